"""Where tokens are: the lengths of a sequence's regions, beside lists of the tokens themselves."""

from __future__ import annotations

import random

import pytest

from opentq.caches.extent import COMPACT, SLACK, Extent, Limits, grow
from opentq.contracts.layout import FLUSH

COUNTS = (1, 1, 2, 7, 63, 64, 65, 150, 500)


class Lists:
    """The tokens 0, 1, 2... of a sequence in the regions where they are."""

    def __init__(self):
        self.sink, self.packed, self.tail, self.gone = [], [], [], []

    @property
    def seen(self) -> int:
        return len(self.sink + self.packed + self.tail + self.gone)

    def append(self, count: int, move) -> None:
        self.tail += range(self.seen, self.seen + count)
        for name, to, number in (("packed", "gone", move.forget), ("tail", "sink", move.to_sink),
                                 ("tail", "gone", move.skip), ("tail", "packed", move.flush)):  # fmt: skip
            of = getattr(self, name)
            assert 0 <= number <= len(of), f"{move} of {name}"
            getattr(self, to).extend(of[:number])
            setattr(self, name, of[number:])

    def trim(self, count: int) -> None:
        for name in ("tail", "packed", "sink"):
            held = getattr(self, name)
            setattr(self, name, held[: max(len(held) - count, 0)])
            count = max(count - len(held), 0)

    @property
    def extent(self) -> Extent:
        return Extent(len(self.gone), len(self.sink), len(self.packed), len(self.tail))


@pytest.mark.parametrize("recent", [0, 1, 70])
@pytest.mark.parametrize("sink", [0, 1, 64, 70])
def test_tokens_are_where_the_lengths_say(sink, recent):
    """First tokens are sinks, the newest are in the tail, whole blocks between them are packed, and a trim takes
    exactly the newest."""
    limits, rng = Limits(sink, recent), random.Random(sink + recent)
    for _ in range(20):
        extent, lists = Extent(), Lists()
        for _ in range(20):
            if rng.random() < 0.7:
                count, packed = rng.choice(COUNTS), extent.packed
                extent, move = extent.append(count, limits)
                lists.append(count, move)
                assert move.nothing == (move == (0, 0, 0, 0))
                assert extent.packed == max(packed, (lists.seen - extent.sink - recent) // FLUSH * FLUSH, 0)
            else:
                count = rng.choice((*COUNTS, 10_000))
                extent = extent.trim(count)
                lists.trim(count)
            assert lists.sink + lists.packed + lists.tail == list(range(lists.seen)), "a token is lost or misplaced"
            assert extent == lists.extent and extent.sink == min(sink, lists.seen)
            assert extent.offset == extent.held == lists.seen


@pytest.mark.parametrize("recent", [0, 70])
@pytest.mark.parametrize("sink", [0, 5])
@pytest.mark.parametrize("window", [1, 64, 65, 100, 1000])
def test_a_window_forgets_what_nobody_sees_and_holds_little_more(window, sink, recent):
    limits, rng = Limits(sink, recent, window), random.Random(window)
    for _ in range(6):
        extent, lists = Extent(), Lists()
        while lists.seen < 2000:
            count, before = rng.choice(COUNTS), extent
            extent, move = extent.append(count, limits)
            lists.append(count, move)
            last = lists.seen
            assert extent == lists.extent and extent.offset == last and extent.base % FLUSH == 0
            assert sorted(lists.gone + lists.sink + lists.packed + lists.tail) == list(range(last))
            assert lists.sink == list(range(min(sink, last))) and lists.packed + lists.tail == list(
                range(extent.base + extent.sink, last)
            )
            # What the next token sees, and what it would see after a trim of SLACK tokens, is held.
            assert extent.base + extent.sink <= max(last - window + 1 - SLACK, sink)
            assert extent.held - extent.sink <= window + SLACK + COMPACT + FLUSH + recent
            assert not move.forget or move.forget == before.packed or move.forget >= COMPACT, "a copy for a few tokens"
            assert not move.skip or move.forget == before.packed
            assert extent.trim(10_000) == (extent.base, extent.sink if extent.base else 0, 0, 0)


def test_lanes_of_a_batch_grow_as_they_would_alone():
    limits = Limits(4, 10)
    alone = [Extent(), Extent(0, 4, 64, 15), Extent(0, 4, 0, 63)]
    extents, moves, quiet = grow(tuple(alone), (3, 1, 11), limits)
    assert list(zip(extents, moves)) == [e.append(n, limits) for e, n in zip(alone, (3, 1, 11))] and not quiet
    assert grow((Extent(0, 4, 64, 15),), (1,), limits).quiet and not grow((Extent(0, 4, 0, 63),), (11,), limits).quiet
