"""A packed buffer: storage rows of keys or values that grow in steps and are written in place.

Growth copies one layer's packed rows once per step; the step is a thirty-second of the length, so a token is copied
about thirty times on its way to any length and at most 3 % of the buffer is slack.
"""

from __future__ import annotations

import mlx.core as mx

STEP_TOKENS = 256


class Buffer:
    """Storage arrays `[B, H, rows, ...]` with room to grow; `block` tokens per row."""

    def __init__(self, block: int, arrays: tuple[mx.array, ...] = ()):
        self.block = block
        self.arrays = arrays

    @property
    def rows(self) -> int:
        """Allocated rows."""
        return self.arrays[0].shape[2] if self.arrays else 0

    def write(self, row: int, new: tuple[mx.array, ...]) -> None:
        """Put `new` (n rows) at `row`, growing as needed. Rows above `row` are forgotten."""
        end = row + new[0].shape[2]
        if not self.arrays:
            self.arrays = tuple(mx.zeros((*a.shape[:2], 0, *a.shape[3:]), a.dtype) for a in new)
        if end > self.rows:
            self._grow(row, end)
        # With the old array's only reference gone, slice_update works in place.
        self.arrays = tuple(_assign(a, n, row) for a, n in zip(self.arrays, new))

    def truncated(self, rows: int) -> tuple[mx.array, ...]:
        """The first `rows` rows (views)."""
        return tuple(a[:, :, :rows] for a in self.arrays)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays)

    def _grow(self, keep: int, needed: int) -> None:
        step = max(STEP_TOKENS // self.block, needed // 32)
        capacity = -(-needed // step) * step
        grown = []
        for a in self.arrays:
            room = mx.zeros((*a.shape[:2], capacity - keep, *a.shape[3:]), a.dtype)
            grown.append(mx.concatenate([a[:, :, :keep], room], axis=2) if keep else room)
        self.arrays = tuple(grown)


def _assign(array: mx.array, new: mx.array, row: int) -> mx.array:
    array[:, :, row : row + new.shape[2]] = new
    return array


def own(x: mx.array) -> mx.array:
    """A copy with memory of its own: a slice would keep its whole parent alive."""
    return mx.concatenate([x, x[:, :, :0]], axis=2) if x.shape[2] else mx.zeros(x.shape, x.dtype)
