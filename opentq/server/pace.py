"""How fast prompts may be read beside running answers: a budget of time, measured while it is spent.

Prompts are read in chunks of one size, because what a cache holds depends on the chunks it was read in. The size is
chosen at the start, so that a chunk takes at most twice as long as a decode step. But chunks take longer deep in a
long prompt, and with every model and machine in its own way: so each decode step allows only as much reading as keeps
the mean time between two tokens within `STALL` times what it is when no prompt is being read, and a chunk that takes
longer is followed by steps without one, so that most times are not stretched at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ..contracts.layout import FLUSH
from ..hosts.mlx_lm.public import make_prompt_cache

STALL = 3.0
SHARE = 0.9 * (STALL - 1)
"""Idle decode steps' worth of reading that every decode step allows: a margin is left for what is not measured."""
CHUNKS = (16, 32, 64, 128, 256, 512, 1024, 2048)


def fits_blocks(chunk: int) -> bool:
    """Whether prompts can be read in chunks of so many tokens: what is packed together must not lie across two."""
    return 1 <= chunk <= 1 << 20 and (FLUSH % chunk == 0 or chunk % FLUSH == 0)


class Pace:
    """Seconds as running means: of a decode step (all batches), of an idle one, of a chunk; and what reading owes.

    Attributes:
        debt: seconds of reading that decode steps have not yet allowed.
    """

    def __init__(self) -> None:
        self.step = self.idle = self.chunk = self.debt = 0.0
        self._alone = True  # no chunk was read since the last decode step

    def decoded(self, seconds: float) -> None:
        """Every running answer got a token."""
        self.step = _mean(self.step, seconds)
        if self._alone:
            # A step that the machine held up says little, and would allow a lot of reading.
            self.idle = _mean(self.idle, min(seconds, 2 * self.idle))
        self._alone = True
        self.idle = self.idle or seconds
        self.debt = max(0.0, self.debt - SHARE * self.idle)

    def read(self, seconds: float, running: bool) -> None:
        """A chunk was read, with or without `running` answers that waited for it."""
        self.chunk = _mean(self.chunk, seconds)
        self.owe(seconds, running)

    def owe(self, seconds: float, running: bool) -> None:
        """Something else was done for a prompt, with or without `running` answers that waited for it."""
        self._alone = False
        allowed = SHARE * self.idle
        self.debt += seconds if seconds <= allowed else max(seconds, 2.5 * allowed)  # two more steps at least
        if not running:
            self.debt = 0.0


def _mean(old: float, new: float) -> float:
    return 0.9 * old + 0.1 * new if old else new


def choose_chunk(
    model: Any, limit: int = CHUNKS[-1], slowest: Callable[[float], float] = lambda seconds: seconds
) -> int:
    """The largest chunk that takes at most `STALL - 1` times as long as a decode step, and no less than is packed
    together: smaller ones read much slower, and the debt they leave keeps the mean time between tokens anyway.
    `slowest` makes times those of all processes of the model.
    """

    def seconds(length: int, repeats: int) -> float:
        caches = make_prompt_cache(model)
        x = mx.zeros((1, length), dtype=mx.int32)
        best = float("inf")
        for _ in range(repeats + 1):
            tic = time.perf_counter()
            mx.eval(model(x, cache=caches), [c.state for c in caches])
            best = min(best, time.perf_counter() - tic)
        return slowest(best)

    bound = (STALL - 1) * seconds(1, 5)
    chosen = CHUNKS[0]
    for length in CHUNKS[1:]:
        if length > limit or (length > FLUSH and seconds(length, 2) > bound):
            break
        chosen = length
    return chosen
