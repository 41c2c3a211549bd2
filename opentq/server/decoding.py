"""The running answers of one batch: mlx-lm's batch, where a token costs only what its own request asked for.

mlx-lm normalises the logits of every step and runs every sequence's logits processors apart. Here log probabilities are
computed when somebody samples or wants to see them, and the logit biases of all sequences are one addition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..caches.batch import BatchOpenTQCache
from ..contracts.layout import FLUSH
from ..dialogue.sampling import Processor, Sampler
from ..hosts.mlx_lm.private import GenerationBatch, StopSequences, greedy_sampler


@dataclass(frozen=True, eq=False)
class RowSampling:
    """How the tokens of one sequence are chosen.

    Attributes:
        sampler: from log probabilities `[1, V]` to a token `[1]`; None is greedy.
        bias: (token, what is added to its logit).
        logprobs: whether log probabilities are reported.
        shift: how far the sequence's positions are from its places in the cache, for its prompt's images.
    """

    sampler: Sampler | None = None
    bias: tuple[tuple[int, float], ...] = ()
    logprobs: bool = False
    shift: int = 0

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
        share: Callable[[mx.array], mx.array] = lambda tokens: tokens,
    ):
        """A sequence whose `caches` (of a batch) hold all of its prompt `tokens` but the last.

        `share` makes chosen tokens `[B]` those of all processes that run the model.
        """
        self.share = share
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
        logits = self._logits(inputs[:, None])[:, -1, :]
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

    def _logits(self, inputs: mx.array) -> mx.array:
        shifts = [sampling.shift for sampling in self.samplers]
        return self.model(inputs, cache=self.prompt_cache, **({"shifts": shifts} if any(shifts) else {}))

    # ---- several tokens a step, for one sequence

    def room(self) -> int:
        """Tokens that one step may guess, at most; 0 where tokens can't be taken back, or are not a matter of logits.

        A step never packs tokens that it might have to take back: a cache is the same as after single steps.
        """
        if len(self.uids) != 1 or self.logits_processors[0] or self.samplers[0].logprobs:
            return 0
        if not all(cache.is_trimmable() and not hasattr(cache, "caches") for cache in self.prompt_cache):
            return 0
        left = self.max_tokens[0] - self._num_tokens[0] - 1
        for cache in self.prompt_cache:
            if isinstance(cache, BatchOpenTQCache):
                left = min(left, FLUSH - 1 - (cache.extents[0].offset - cache.limits.recent) % FLUSH)
        return max(left - 1, 0)

    @property
    def newest(self) -> int:
        """The token that was chosen last and that no step has returned yet."""
        return int(self._next_tokens.item())

    def verify(self, guesses: list[int]) -> tuple[list[Any], int]:
        """One step over the newest token and guesses at those after it; returns what `next` returns, for each token
        that it decides, and how many guesses were right.

        Every position's token is chosen as a step of its own would: the most likely one, or a draw with the key of
        that step. A guess is right when it is that token, so greedy text is plain text and draws are plain draws.
        """
        (sampling,), last = self.samplers, self.newest
        logits = self._logits(mx.array([[last, *guesses]]))[0]
        if (bias := self._bias(logits[:1])) is not None:
            logits = logits + bias
        chosen, keys = self._choose_each(logits)
        right = next((i for i, guess in enumerate(guesses) if chosen[i] != guess), len(guesses))
        if sampling.sampler:
            sampling.sampler.key = keys[right]
        if wrong := len(guesses) - right:
            for cache in self.prompt_cache:
                cache.trim(wrong)
        self._next_tokens, self._next_logprobs = mx.array([chosen[right]]), [None]
        responses = []
        for token in [last, *guesses[:right]]:
            responses.append(self._response(token))
            if responses[-1].finish_reason:
                self.filter([])
                break
        return responses, right

    def _choose_each(self, logits: mx.array) -> tuple[list[int], list[mx.array]]:
        """The token of every row `[T, V]`, and the random key after each."""
        sampler = self.samplers[0].sampler
        if sampler is None:
            return mx.argmax(logits, axis=-1).tolist(), []  # type: ignore[return-value]
        logprobs, tokens, keys = logits - mx.logsumexp(logits, axis=-1, keepdims=True), [], []
        for i in range(logits.shape[0]):
            tokens.append(sampler(logprobs[i : i + 1]))
            keys.append(sampler.key)
        return mx.concatenate(tokens).tolist(), keys  # type: ignore[return-value]

    def _response(self, token: int) -> Any:
        """What `next` says of one token."""
        self._num_tokens[0] += 1
        self.tokens[0].append(token)
        reason = "length" if self._num_tokens[0] >= self.max_tokens[0] else None
        reason = "stop" if self._matchers[0].advance(token) else reason
        return self.Response(self.uids[0], token, None, reason, None, None)

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
            return self.share(tokens), [None] * len(self.samplers)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        if any(sampling.sampler for sampling in self.samplers):
            chosen = [
                sampling.sampler(logprobs[i : i + 1]) if sampling.sampler else tokens[i : i + 1]
                for i, sampling in enumerate(self.samplers)
            ]
            tokens = mx.concatenate(chosen)
        return self.share(tokens), [
            row if sampling.logprobs else None for row, sampling in zip(logprobs, self.samplers)
        ]
