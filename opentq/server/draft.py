"""Drafts by a second model: a small one that has the same vocabulary writes the next few tokens, and one step of the
large one settles them (speculative decoding: Leviathan et al. 2023, arXiv 2211.17192; here a guess is right when it is
the very token that a step of its own would have chosen, so text and draws stay those of plain steps).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import mlx.core as mx

from ..hosts.mlx_lm.public import make_prompt_cache

CHUNK = 512
"""Tokens that it reads at most for one guess: behind a long prompt it catches up in steps, and nobody waits long."""


class Draft:
    """A draft model with the caches of one sequence, which go on from whatever the last one has in common with it."""

    def __init__(self, model: Any, count: int, context: int):
        """`count` tokens are guessed at once, within `context`, for which `model` was made."""
        self.model = model
        self.count = count
        self.context = context
        self.forget()

    def forget(self) -> None:
        """Start anew: nothing was read."""
        self._caches: list[Any] = make_prompt_cache(self.model)
        self._held: list[int] = []  # the tokens in the caches
        self._of: Sequence[int] = ()  # the sequence that they were read for, ...
        self._same = 0  # ... and how many of its tokens they are known to begin with

    def guess(self, tokens: list[int], newest: int, most: int) -> list[int]:
        """Up to `most` tokens that may follow `tokens` and the `newest`; none while it has not read as far as that."""
        count = min(self.count, most, self.context - len(tokens) - 1)
        if count < 1:
            return []
        self._agree(tokens)
        todo = [*tokens[self._same :], newest]
        if len(todo) > CHUNK:
            self._read(todo[:CHUNK])
            self._same += CHUNK
            return []
        logits = self._read(todo)
        guesses = [mx.argmax(logits[:, -1], axis=-1)]
        while len(guesses) < count:
            guesses.append(mx.argmax(self.model(guesses[-1][None], cache=self._caches)[:, -1], axis=-1))
        self._same = len(tokens)
        found: list[int] = mx.concatenate(guesses).tolist()  # type: ignore[assignment]
        self._held += found[:-1]
        return found

    def _agree(self, tokens: list[int]) -> None:
        """Take out of the caches what is not the beginning of `tokens`."""
        if tokens is not self._of:
            self._of, self._same = tokens, 0
        pairs = zip(self._held[self._same :], tokens[self._same :])
        self._same += sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        for cache in self._caches:
            cache.trim(len(self._held) - self._same)
        del self._held[self._same :]

    def _read(self, tokens: list[int]) -> mx.array:
        logits = self.model(mx.array([tokens]), cache=self._caches)
        mx.async_eval(logits, [c.state for c in self._caches])
        self._held += tokens
        return logits
