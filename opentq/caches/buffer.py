"""A packed buffer: storage rows of keys or values that grow in steps and are written in place.

Growth copies one layer's packed rows once per step; the step is a thirty-second of the length, so a token is copied
about thirty times on its way to any length and at most 3 % of the buffer is slack.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ..codecs import Codec, Packed
from ..contracts.layout import Layout

STEP_TOKENS = 256

EVERY = slice(None)
"""All sequences of a batch."""


class Buffer:
    """Storage arrays `[B, H, rows, ...]` with room to grow; `block` tokens per row."""

    def __init__(self, block: int, arrays: tuple[mx.array, ...] = ()):
        self.block = block
        self.arrays = arrays

    @property
    def rows(self) -> int:
        """Allocated rows."""
        return self.arrays[0].shape[2] if self.arrays else 0

    def rows_of(self, tokens: int) -> int:
        """Rows that `tokens` tokens take."""
        return -(-tokens // self.block)

    def write(self, row: int, new: tuple[mx.array, ...], sequences: slice = EVERY, count: int = 0) -> None:
        """Put `new` (n rows) at `row` of some sequences, growing as needed. With all, rows above are forgotten."""
        end = row + new[0].shape[2]
        if not self.arrays:
            self.arrays = tuple(mx.zeros((count or a.shape[0], a.shape[1], 0, *a.shape[3:]), a.dtype) for a in new)
        if end > self.rows:
            self._grow(row if sequences == EVERY else self.rows, end)
        # With the old array's only reference gone, slice_update works in place.
        self.arrays = tuple(_assign(a, n, row, sequences) for a, n in zip(self.arrays, new))

    def append(self, codec: Codec, layout: Layout, tokens: int, y: mx.array, sequences: slice = EVERY, count: int = 0):
        """Encode rotated vectors `y [sequences, H, T, D]` and write them after the `tokens` that are there."""
        row, inside = divmod(tokens, self.block)
        if not inside:
            self.write(row, layout.encode(codec, y), sequences, count)
            return
        # A trim left a block half full: it is packed anew, and the bits of the tokens that it has are put back.
        new = layout.encode(codec, mx.concatenate([mx.zeros((*y.shape[:2], inside, y.shape[3]), y.dtype), y], axis=2))
        old = tuple(a[sequences, :, row : row + 1] for a in self.arrays)
        first = tuple(spliced(*of) for of in zip(old, new, bits_of(layout, inside, old)))
        self.write(row, new, sequences)
        self.write(row, first, sequences)

    def forget(self, front: int, tokens: int, sequences: slice = EVERY) -> None:
        """Drop the first `front` of `tokens` tokens; both whole rows.

        Whoever holds the arrays keeps all tokens: writing to an array changes it for all its holders.
        """
        first, last = front // self.block, self.rows_of(tokens)
        self.arrays = tuple(map(mx.array, self.arrays))
        if last > first:
            kept = tuple(own(a[sequences, :, first:last]) for a in self.arrays)
            self.arrays = tuple(_assign(a, k, 0, sequences) for a, k in zip(self.arrays, kept))

    def canonical(self, layout: Layout, tokens: int, sequences: slice = EVERY) -> Packed:
        """The first `tokens` tokens in the canonical format."""
        rows = self.rows_of(tokens)
        arrays = layout.load(tuple(a[sequences, :, :rows] for a in self.arrays)) if rows else ()
        return tuple(a[:, :, :tokens] for a in arrays)

    def truncated(self, rows: int) -> tuple[mx.array, ...]:
        """The first `rows` rows (views)."""
        return tuple(a[:, :, :rows] for a in self.arrays)

    def capacity(self, rows: int) -> int:
        """Rows to allocate for `rows` rows."""
        steps = max(1, rows * self.block // (32 * STEP_TOKENS))
        step = steps * STEP_TOKENS // self.block
        return -(-rows // step) * step

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays)

    def _grow(self, keep: int, needed: int) -> None:
        grown = []
        for a in self.arrays:
            room = mx.zeros((*a.shape[:2], self.capacity(needed), *a.shape[3:]), a.dtype)
            grown.append(_assign(room, a[:, :, :keep], 0) if keep else room)
        self.arrays = tuple(grown)


Bits = tuple[mx.array, mx.array]
"""Of a storage row some bits and all others, unsigned integers `[1, 1, 1, ..]` as wide as what is stored."""
UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}


def spliced(old: mx.array, new: mx.array, bits: Bits) -> mx.array:
    """The first row of `new [B, H, n, ..]` with the first of `bits` from the row `old`."""
    x, y = (a[:, :, :1].view(bits[0].dtype) for a in (old, new))
    return ((x & bits[0]) | (y & bits[1])).view(old.dtype)


PROBES = 64
_bits: dict[tuple[Layout, int], tuple[Bits, ...]] = {}


def bits_of(layout: Layout, inside: int, stored: tuple[mx.array, ...]) -> tuple[Bits, ...]:
    """Of rows like `stored`, the bits of the first `inside` tokens.

    A layout moves bits, and may spell codes in another way, but each bit belongs to one token: those that change with
    these tokens, whatever the others are. A bit that changes every other time is missed by all probes once in 2^64.
    """
    if (layout, inside) not in _bits:
        rng = np.random.default_rng(0)
        pairs = []
        for a in layout.load(tuple(a[:1, :1, :1] for a in stored)):
            size = (PROBES, 1, a.shape[2], a.shape[3] * a.dtype.size)
            x, y = (mx.array(rng.integers(0, 256, size, np.uint8)).view(a.dtype) for _ in range(2))
            pairs.append((x, mx.concatenate([y[:, :, :inside], x[:, :, inside:]], axis=2)))
        one, other = (layout.store(side) for side in zip(*pairs))
        made = []
        for x, y in zip(one, other):
            kind = UNSIGNED[x.dtype.size]
            changed = np.bitwise_or.reduce(np.array(x.view(kind) ^ y.view(kind)), axis=0, keepdims=True)
            made.append((mx.array(changed), mx.array(~changed)))
        _bits[layout, inside] = tuple(made)
    return _bits[layout, inside]


def joined(parts: Sequence[tuple[int, tuple[mx.array, ...]]], rows: int) -> tuple[mx.array, ...]:
    """Sequences of several caches in one set of arrays with `rows` rows: no more memory than the result takes.

    Args:
        parts: (number of sequences, arrays `[sequences, H, some rows <= rows, ...]` or () where there is nothing yet).
    """
    like = next((arrays for _, arrays in parts if arrays), ())
    total = sum(count for count, _ in parts)
    out = [mx.zeros((total, a.shape[1], rows, *a.shape[3:]), a.dtype) for a in like]
    start = 0
    for count, arrays in parts:
        for i, a in enumerate(arrays):
            if a.shape[2]:
                out[i] = _assign(out[i], a, 0, slice(start, start + count))
        start += count
    return tuple(out)


def _assign(array: mx.array, new: mx.array, row: int, sequences: slice = EVERY) -> mx.array:
    array[sequences, :, row : row + new.shape[2]] = new
    return array


def own(x: mx.array) -> mx.array:
    """A copy with memory of its own: a slice would keep its whole parent alive."""
    return mx.concatenate([x, x[:, :, :0]], axis=2) if x.shape[2] else mx.zeros(x.shape, x.dtype)
