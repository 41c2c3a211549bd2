"""The running answers of one batch: mlx-lm's batch, where a token costs only what its own request asked for.

mlx-lm normalises the logits of every step and runs every sequence's logits processors apart. Here log probabilities are
computed when somebody samples or wants to see them, and the logit biases of all sequences are one addition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..dialogue.sampling import Processor, Sampler
from ..hosts.mlx_lm.private import GenerationBatch, StopSequences, greedy_sampler


@dataclass(frozen=True, eq=False)
class RowSampling:
    """How the tokens of one sequence are chosen.

    Attributes:
        sampler: from log probabilities `[1, V]` to a token `[1]`; None is greedy.
        bias: (token, what is added to its logit).
        logprobs: whether log probabilities are reported.
    """

    sampler: Sampler | None = None
    bias: tuple[tuple[int, float], ...] = ()
    logprobs: bool = False

    @property
    def normalised(self) -> bool:
        return self.sampler is not None or self.logprobs


class Decoding(GenerationBatch):
    """A batch of one, to be joined by others with `extend`. `next` gives every sequence a token."""

    _next_tokens: Any
    _next_logprobs: Any

    samplers: Any  # a RowSampling for each sequence: mlx-lm keeps this list in step with them
    logits_processors: Any

    def __init__(
        self,
        model: Any,
        uid: int,
        tokens: list[int],
        caches: list[Any],
        sampling: RowSampling,
        processors: list[Processor],
        stops: StopSequences,
        max_tokens: int,
    ):
        """A sequence whose `caches` (of a batch) hold all of its prompt `tokens` but the last."""
        self._biased: tuple[list[int], mx.array | None] = ([], None)
        seen = tokens[:-1] if processors else []
        last = mx.array(tokens[-1:])
        samplings: list[Any] = [sampling]
        super().__init__(
            model, [uid], last, caches, [seen], samplings, greedy_sampler, [processors], [stops], [max_tokens]
        )

    def extract_cache(self, idx: int) -> list[Any]:
        """Finished caches are not copied out: prefixes were remembered when the prompt was read."""
        return []

    def _step(self) -> tuple[list[int], list[Any]]:
        """Start computing the next tokens, and return the last ones with their log probabilities, where asked for."""
        inputs, current = self._next_tokens, self._next_logprobs
        logits = self.model(inputs[:, None], cache=self.prompt_cache)[:, -1, :]
        bias = self._bias(logits)
        logits = logits if bias is None else logits + bias
        contexts: list[mx.array] = []
        if any(self.logits_processors):
            logits = self._process(logits, inputs, contexts)
        self._next_tokens, self._next_logprobs = self._choose(logits)
        mx.async_eval(self._next_tokens, [x for x in self._next_logprobs if x is not None], contexts)
        mx.eval(inputs, [x for x in current if x is not None])
        tokens: Any = inputs.tolist()
        for seen, token in zip(self.tokens, tokens):
            seen.append(token)
        return tokens, current

    def _bias(self, logits: mx.array) -> mx.array | None:
        """What is added to `logits [B, V]`; made anew when sequences came or went."""
        if self._biased[0] != self.uids:
            table = None
            if any(sampling.bias for sampling in self.samplers):
                rows = np.zeros(logits.shape, np.float32)
                for row, sampling in zip(rows, self.samplers):
                    for token, value in sampling.bias:
                        row[token] += value
                table = mx.array(rows).astype(logits.dtype)
            self._biased = (list(self.uids), table)
        return self._biased[1]

    def _process(self, logits: mx.array, inputs: mx.array, contexts: list[mx.array]) -> mx.array:
        rows = []
        for i, processors in enumerate(self.logits_processors):
            row = logits[i : i + 1]
            if processors:
                contexts.append(self._token_context[i].update_and_fetch(inputs[i : i + 1]))
                for processor in processors:
                    row = processor(contexts[-1], row)
            rows.append(row)
        return mx.concatenate(rows)

    def _choose(self, logits: mx.array) -> tuple[mx.array, list[mx.array | None]]:
        """The next token of every row, and its log probabilities where they are used. Greedy rows share an argmax."""
        tokens = mx.argmax(logits, axis=-1)
        if not any(sampling.normalised for sampling in self.samplers):
            return tokens, [None] * len(self.samplers)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        if any(sampling.sampler for sampling in self.samplers):
            chosen = [
                sampling.sampler(logprobs[i : i + 1]) if sampling.sampler else tokens[i : i + 1]
                for i, sampling in enumerate(self.samplers)
            ]
            tokens = mx.concatenate(chosen)
        return tokens, [row if sampling.logprobs else None for row, sampling in zip(logprobs, self.samplers)]
