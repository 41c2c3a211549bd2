"""The sketches of one layer's packed keys, over time: an index that is made of the packed bytes and follows them.

A page is sketched when it is whole, from the very keys that attention will read, so sketches depend on packed bytes and
chosen channels only: what is trimmed, merged, taken apart, saved or loaded keeps them exactly. The channels come from a
calibrated recipe, or from the prompt: the first queries and keys are summed up until there are `WARM` of them, then the
channels are chosen once and kept with the sequence. Until then everything is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..attention import channels, pages
from ..attention.pages import PAGE, Selector
from ..contracts.attention import PackedKV
from ..contracts.rotary import Rotary
from .buffer import EVERY, Buffer, joined

WARM = 512
"""Tokens whose queries and keys choose the channels of a sequence without a recipe."""

CATCH_UP = 16
"""Pages decoded at a time."""


class Sketches:
    """Sketches of B sequences, each with channels of its own.

    Args:
        budget: packed tokens that a step reads.
        rotary: how keys are turned.
        given: channels per KV head from a recipe, or None.
        count: sequences.
    """

    def __init__(
        self, budget: int, rotary: Rotary, given: tuple[tuple[int, ...], ...] | None = None, count: int = 1
    ) -> None:
        self.budget, self.rotary, self.given = budget, rotary, given
        self.buffer = Buffer(PAGE)
        self.sketched = [0] * count  # pages
        self.ready = [given is not None] * count
        self.seen = [0] * count  # tokens in `sums`
        self.channels: mx.array | None = None  # int32 [B, H, C]
        self.sums: mx.array | None = None  # float32 [B, H, 3, D]: squares of queries, keys, squares of keys
        self._keys: mx.array | None = None

    # ---- choosing channels

    def meet(self, keys: mx.array, real: Sequence[int]) -> None:
        """Keys `[B, H, L, D]` of a step, of which `real` count; its queries follow in `observe`."""
        batch, heads, _, dim = keys.shape
        if self.channels is None:
            start = self.given or (tuple(range(channels.count(dim))),) * heads
            self.channels = mx.broadcast_to(mx.array(start, dtype=mx.int32)[None], (batch, heads, len(start[0])))
        for sequence in range(batch):
            if not self.ready[sequence] and self.seen[sequence] >= WARM:
                self._choose(sequence, dim)
        if not all(self.ready):
            self._keys, self._real = keys, list(real)

    def observe(self, q: mx.array) -> None:
        """The queries `[B, Hq, L, D]` that go with the keys last met."""
        keys, self._keys = self._keys, None
        if keys is None:
            return
        batch, heads, length, dim = keys.shape
        counted = (mx.arange(length)[None] < mx.array(self._real)[:, None]).astype(mx.float32)
        k = keys.astype(mx.float32)
        square = mx.square(q.astype(mx.float32)).reshape(batch, heads, -1, length, dim).sum(2)
        sums = mx.stack([(x * counted[:, None, :, None]).sum(2) for x in (square, k, mx.square(k))], axis=2)
        self.sums = sums if self.sums is None else self.sums + sums
        self.seen = [n + r for n, r in zip(self.seen, self._real)]
        mx.async_eval(self.sums)  # a graph over the whole prompt would keep all its queries

    def _choose(self, sequence: int, dim: int) -> None:
        """Choose the channels of a sequence from what was seen of it."""
        assert self.sums is not None and self.channels is not None
        q_square, k_sum, k_square = np.array(self.sums[sequence]).swapaxes(0, 1) / self.seen[sequence]
        energy = channels.energies(q_square, np.maximum(k_square - k_sum**2, 0), self.rotary)
        count = self.channels.shape[2]
        chosen = mx.array([channels.choose(e, self.rotary, dim, count) for e in energy], dtype=mx.int32)
        every = [self.channels[i] for i in range(len(self.ready))]
        every[sequence] = chosen
        self.channels = mx.stack(every)
        self.ready[sequence] = True

    # ---- following the packed keys

    def follow(self, keys: PackedKV, packed: Sequence[int]) -> None:
        """Sketch the whole pages that have none yet; `packed` tokens are held of each sequence."""
        todo = [(done, n // PAGE) if ok else (0, 0) for ok, done, n in zip(self.ready, self.sketched, packed)]
        together = all(t == todo[0] for t in todo)
        for sequence in [EVERY] if together else [slice(b, b + 1) for b in range(len(todo))]:
            done, whole = todo[sequence.start or 0]
            if done == whole:
                continue
            made = []
            for first in range(done, whole, CATCH_UP):
                made.append(self._make(keys, sequence, first, min(first + CATCH_UP, whole)))
                if whole - done > CATCH_UP:
                    mx.eval(made[-1])  # decoded keys must not pile up
            self.buffer.write(done, (mx.concatenate(made, axis=2),), sequence, len(todo))
        self.sketched = [max(done, whole) for done, (_, whole) in zip(self.sketched, todo)]

    def _make(self, keys: PackedKV, sequence: slice, first: int, last: int) -> mx.array:
        assert self.channels is not None
        part = PackedKV(keys.codec, keys.layout, tuple(a[sequence] for a in keys.arrays), keys.head_dim)
        x = keys.codec.unrotate(part.decode(first * PAGE, last * PAGE, mx.float32))
        return pages.encode(x, self.channels[sequence])

    def trim(self, packed: Sequence[int]) -> None:
        """Packed tokens are down to these."""
        self.sketched = [min(done, n // PAGE) for done, n in zip(self.sketched, packed)]
        self._keys = None

    def selector(self, packed: Sequence[int]) -> Selector | None:
        """What chooses pages in this step; None while everything is read."""
        if max(packed, default=0) <= pages.WHOLE * self.budget or not all(self.ready) or self.channels is None:
            return None
        return Selector(self.buffer.arrays[0], self.channels, self.budget)

    # ---- sequences come and go

    @classmethod
    def join(cls, parts: Sequence[Sketches]) -> Sketches:
        """The sequences of several caches side by side."""
        first, given = parts[0], next((p.given for p in parts if p.given is not None), None)
        out = cls(first.budget, first.rotary, given, 0)
        for name in ("sketched", "ready", "seen"):
            setattr(out, name, [x for p in parts for x in getattr(p, name)])
        like = next((p for p in parts if p.channels is not None), None)
        if like is None or like.channels is None:
            return out
        counts = [len(p.ready) for p in parts]
        empty = mx.zeros_like(like.channels[:1]) if given is None else mx.array(given, dtype=mx.int32)[None]
        out.channels = _side_by_side([p.channels for p in parts], counts, empty)
        sums = next((p.sums for p in parts if p.sums is not None), None)
        out.sums = None if sums is None else _side_by_side([p.sums for p in parts], counts, mx.zeros_like(sums[:1]))
        rows = out.buffer.capacity(max(out.sketched, default=0)) if any(out.sketched) else 0
        held = [(n, p.buffer.truncated(max(p.sketched, default=0))) for n, p in zip(counts, parts)]
        out.buffer.arrays = joined(held, rows) if rows else ()
        return out

    def pick(self, sequences: Sequence[int]) -> Sketches:
        """Some of the sequences, in the given order."""
        out = Sketches(self.budget, self.rotary, self.given, 0)
        for name in ("sketched", "ready", "seen"):
            setattr(out, name, [getattr(self, name)[i] for i in sequences])
        index = mx.array(list(sequences), dtype=mx.int32)
        out.channels, out.sums = (None if a is None else mx.take(a, index, axis=0) for a in (self.channels, self.sums))
        used = max(out.sketched, default=0)
        if used:
            out.buffer.arrays = tuple(mx.take(a[:, :, :used], index, axis=0) for a in self.buffer.arrays)
        return out

    # ---- bytes and states

    @property
    def arrays(self) -> list[mx.array]:
        """Everything that is held."""
        return [a for a in (*self.buffer.arrays, self.channels, self.sums) if a is not None]

    @property
    def state(self) -> list[Any]:
        """Arrays and numbers to save: sketches in use, channels, sums, and what `__init__` and the sequences need."""
        used = max(self.sketched, default=0)
        held = self.buffer.arrays[0][:, :, :used] if used else None
        sequences = [[n, int(ok), seen] for n, ok, seen in zip(self.sketched, self.ready, self.seen)]
        return [self.budget, self.rotary.dims, int(self.rotary.traditional), held, self.channels, self.sums, sequences]

    @classmethod
    def from_state(cls, state: Sequence[Any], given: tuple[tuple[int, ...], ...] | None = None) -> Sketches:
        budget, dims, traditional, held, chosen, sums, sequences = state
        out = cls(budget, Rotary(dims, bool(traditional)), given, 0)
        out.channels, out.sums = chosen, sums
        for n, ok, seen in sequences:
            out.sketched.append(n)
            out.ready.append(bool(ok))
            out.seen.append(seen)
        if held is not None:
            out.buffer.write(0, (held,))
        return out


def _side_by_side(arrays: Sequence[mx.array | None], counts: Sequence[int], empty: mx.array) -> mx.array:
    """Arrays of several caches behind each other, `empty [1, ...]` for every sequence of those that have none."""
    return mx.concatenate([mx.repeat(empty, n, axis=0) if a is None else a for n, a in zip(counts, arrays)])
