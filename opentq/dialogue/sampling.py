"""How tokens are chosen: samplers with a random state of their own, and penalties over the answer alone.

mlx-lm's samplers draw from one global random state, so an answer would depend on who else is being served. Here every
request has its own key: the same seed gives the same answer, alone or in a batch.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from functools import partial

import mlx.core as mx

from ..hosts.mlx_lm.private import apply_top_p, greedy_sampler
from ..hosts.mlx_lm.public import make_logits_processors
from .request import Draw, SamplingParams

Sampler = Callable[[mx.array], mx.array]
Processor = Callable[[mx.array, mx.array], mx.array]


def make_sampler(how: Draw) -> Sampler:
    """A function from log probabilities `[1, V]` to a token `[1]`; greedy ones are one shared object, so they batch."""
    if how.greedy:
        return greedy_sampler
    return KeyedSampler(how)


class KeyedSampler:
    """Samples with a key that it splits at every step. top_p, min_p and top_k apply in mlx-lm's order."""

    def __init__(self, how: Draw):
        self.how = how
        self.key = mx.random.key(secrets.randbits(63) if how.seed is None else how.seed)

    def __call__(self, logprobs: mx.array) -> mx.array:
        how = self.how
        logprobs = logprobs.astype(mx.float32)
        if how.top_p < 1:
            logprobs = apply_top_p(logprobs, max(how.top_p, 1e-30))  # 0 in float32 would leave no token at all
        if how.min_p > 0:
            floor = mx.max(logprobs, axis=-1, keepdims=True) + math.log(how.min_p)
            logprobs = mx.where(logprobs < floor, -mx.inf, logprobs)
        if 0 < how.top_k < logprobs.shape[-1]:
            least = mx.sort(logprobs, axis=-1)[..., -how.top_k : -how.top_k + 1 or None]
            logprobs = mx.where(logprobs < least, -mx.inf, logprobs)
        self.key, now = mx.random.split(self.key)
        # Beside the best: a low temperature must not turn all of them into -inf.
        logprobs = logprobs - mx.max(logprobs, axis=-1, keepdims=True)
        return mx.random.categorical(logprobs / how.temperature, key=now)


def make_processors(how: SamplingParams, prompt_tokens: int) -> list[Processor]:
    """Processors of `(tokens so far, logits [1, V])`. Presence and frequency look at the answer, as OpenAI's do;
    repetition looks at prompt and answer, as Hugging Face's does."""
    whole = 2**30
    answer = make_logits_processors(
        presence_penalty=how.presence_penalty,
        presence_context_size=whole,
        frequency_penalty=how.frequency_penalty,
        frequency_context_size=whole,
    )
    everything = make_logits_processors(
        repetition_penalty=None if how.repetition_penalty == 1 else how.repetition_penalty,
        repetition_context_size=how.repetition_context or whole,
    )
    return [*everything, *(partial(_on_answer, p, prompt_tokens) for p in answer)]


def _on_answer(processor: Processor, prompt_tokens: int, tokens: mx.array, logits: mx.array) -> mx.array:
    return processor(tokens[prompt_tokens:], logits)
