"""Where the tokens of one sequence are: host integers only, so that no length ever waits for the device.

A sequence is `[sink | packed | tail]`; a sliding window has forgotten its first `base` tokens. `append` decides which
tokens move where, in whole blocks at absolute multiples of 64. The single cache and every sequence of a batch ask the
same function, so a sequence is cut in the same places whoever it travels with.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from ..contracts.layout import FLUSH

SLACK = FLUSH
"""Tokens that a window keeps beyond its size, so that a trim of a few tokens (speculative decoding) stays exact."""

COMPACT = 256
"""Packed tokens out of the window that are worth moving the others for."""


class Limits(NamedTuple):
    """What a cache is asked to keep: fp16 sink tokens, fp16 recent tokens, and a window (0: everything)."""

    sink: int = 0
    recent: int = 0
    window: int = 0


limits = functools.lru_cache(maxsize=64)(Limits)
"""The same object for the same limits: layers share what is asked of it."""


class Move(NamedTuple):
    """What an append does to the tail (new tokens included), oldest first, and to the packed tokens.

    Attributes:
        forget: packed tokens that leave at the front; a multiple of 64, or all.
        to_sink: tail tokens that become sink tokens.
        skip: tail tokens that are already out of the window and are never encoded.
        flush: tail tokens that are packed.
    """

    forget: int
    to_sink: int
    skip: int
    flush: int

    @property
    def nothing(self) -> bool:
        return not (self.forget or self.to_sink or self.skip or self.flush)


class Extent(NamedTuple):
    """Lengths of one sequence's regions."""

    base: int = 0
    sink: int = 0
    packed: int = 0
    tail: int = 0

    @property
    def offset(self) -> int:
        """Tokens seen so far: the position of the next one."""
        return self.base + self.held

    @property
    def held(self) -> int:
        """Tokens that are still there."""
        return self.sink + self.packed + self.tail

    @functools.lru_cache(maxsize=1024)  # noqa: B019  all layers of a step ask for the same, and tuples keep nothing alive
    def append(self, count: int, limits: Limits) -> tuple[Extent, Move]:
        """The lengths after `count` more tokens, and how to get there."""
        tail = self.tail + count
        to_sink = min(limits.sink - self.sink, tail)  # nothing where tokens are packed: sinks are full then
        tail -= to_sink
        packed_end = self.base + self.packed
        end = packed_end + tail
        target = max(packed_end, (end - limits.recent) // FLUSH * FLUSH)
        base = self._new_base(end, target, limits.window)
        start = max(packed_end, base)
        move = Move(min(base - self.base, self.packed), to_sink, start - packed_end, target - start)
        return Extent(base, self.sink + to_sink, target - base, end - target), move

    def _new_base(self, end: int, target: int, window: int) -> int:
        if not window:
            return self.base
        lowest = min(max(0, end - window + 1 - SLACK) // FLUSH * FLUSH, target)
        everything = lowest >= self.base + self.packed
        return lowest if lowest > self.base and (everything or lowest - self.base >= COMPACT) else self.base

    def trim(self, count: int) -> Extent:
        """The lengths after the newest `count` tokens are gone: the tail first, then packed, then sink."""
        from_tail = min(count, self.tail)
        from_packed = min(count - from_tail, self.packed)
        from_sink = 0 if self.base else min(count - from_tail - from_packed, self.sink)
        return self._replace(tail=self.tail - from_tail, packed=self.packed - from_packed, sink=self.sink - from_sink)


_last: tuple[Extent | None, int, Limits | None, Extent | None] = (None, 0, None, None)


def quietly(extent: Extent, count: int, limits: Limits) -> Extent | None:
    """`Extent.append` where no token has to move, else None; all layers of a step ask it of the same objects."""
    global _last
    last = _last
    if last[0] is not extent or last[1] != count or last[2] is not limits:
        grown, move = extent.append(count, limits)
        _last = last = extent, count, limits, None if move.forget or move.skip or move.flush else grown
    return last[3]


class Growth(NamedTuple):
    """What an append does to a batch: the new extents, a move for each, and whether nothing moves at all."""

    extents: tuple[Extent, ...]
    moves: tuple[Move, ...]
    quiet: bool


@functools.lru_cache(maxsize=256)
def grow(extents: tuple[Extent, ...], real: tuple[int, ...], limits: Limits) -> Growth:
    """`Extent.append` for every sequence, `real` tokens each; the layers of a step share the answer."""
    grown = [e.append(n, limits) for e, n in zip(extents, real)]
    moves = tuple(move for _, move in grown)
    return Growth(tuple(extent for extent, _ in grown), moves, all(move.nothing for move in moves))
