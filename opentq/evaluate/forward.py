"""Running a model over given tokens with given caches: prefill, teacher-forced steps, greedy continuation.

Within one forward step the step's own tokens are seen in fp16 and only older ones compressed; so a whole text in one
step would test nothing. Text before a measurement is fed in prefill steps as generation would, and what is measured is
fed in small steps, so that almost every key and value seen is a compressed one (all but the step itself and the fp16
tail of the cache).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

Tick = Callable[[int], None]
"""Told how many tokens (times sequences) have been worked off."""


def nothing(_: int) -> None:
    """A `Tick` that does nothing."""


def prefill(model: Any, tokens: mx.array, caches: list[Any], step: int = 512, tick: Tick = nothing) -> None:
    """Feed `[B, L]` tokens in steps; no logits are computed."""
    for start in range(0, tokens.shape[1], step):
        part = tokens[:, start : start + step]
        model(part, cache=caches)
        mx.eval([c.state for c in caches])
        tick(part.size)


def forced(
    model: Any, tokens: mx.array, caches: list[Any], step: int = 16, tick: Tick = nothing
) -> Iterator[tuple[int, mx.array]]:
    """Feed `[B, L]` tokens in small steps; yields (start, logits `[B, step, V]`) of each."""
    for start in range(0, tokens.shape[1], step):
        part = tokens[:, start : start + step]
        logits = model(part, cache=caches)
        mx.eval(logits, [c.state for c in caches])
        tick(part.size)
        yield start, logits


def greedy(
    model: Any, tokens: mx.array, caches: list[Any], count: int, stop: set[int], tick: Tick = nothing
) -> list[list[int]]:
    """Up to `count` greedy tokens after `[B, L]` tokens, one list per sequence, each ending before a stop token."""
    rows: list[list[int]] = [[] for _ in range(tokens.shape[0])]
    done = [False] * len(rows)
    for _ in range(count):
        logits = model(tokens, cache=caches)
        best = mx.argmax(logits[:, -1], axis=-1)
        mx.eval(best, [c.state for c in caches])
        picked: list[int] = best.tolist()  # type: ignore[assignment]
        for row, token in enumerate(picked):
            done[row] = done[row] or token in stop
            if not done[row]:
                rows[row].append(token)
        tick(len(rows))
        if all(done):
            break
        tokens = best[:, None]
    return rows
