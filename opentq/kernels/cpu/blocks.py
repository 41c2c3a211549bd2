"""The blocked storage layout (blocks.h describes it bit by bit) read by numpy, slower than the compiled kernels.

So caches are read on machines without a compiler. The way to write it is in the tests, and judges both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...codecs import packing

if TYPE_CHECKING:
    from .layout import CpuBlocks

TOKENS = 64


def load_numpy(layout: CpuBlocks, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blocks -> canonical arrays."""
    batch, heads, n, _ = blocks.shape
    dim, bits = layout.dim, layout.bits
    tiles = blocks[..., : layout.code_bytes].reshape(batch, heads, n, dim // 16, 128 * bits)
    fields = np.zeros((*tiles.shape[:4], 16, 64), np.uint8)
    for width, first in planes(bits):
        fields |= _split(tiles[..., 128 * first : 128 * (first + width)], width) << first
    if layout.kind == "k":
        by = fields.reshape(batch, heads, n, dim // 16, 4, 4, 16, 4).transpose(0, 1, 2, 5, 6, 3, 4, 7)
    else:
        by = fields.reshape(batch, heads, n, dim // 16, 16, 16, 4).transpose(0, 1, 2, 6, 4, 3, 5)
    values = by.reshape(batch, heads, n * TOKENS, dim)
    rows = []
    for width, first in planes(bits):
        plane = np.pad(_bits(values, width, first), [(0, 0)] * 3 + [(0, -dim % (32 // width))])
        rows.append(_merge_row(plane, width).view("<u4"))
    params = np.ascontiguousarray(blocks[..., layout.code_bytes :]).view("<f2")
    by_token = params.reshape(batch, heads, n, layout.params, TOKENS).swapaxes(3, 4)
    return np.concatenate(rows, axis=-1), by_token.reshape(batch, heads, n * TOKENS, layout.params)


def _bits(values: np.ndarray, width: int, first: int) -> np.ndarray:
    return values >> first & ((1 << width) - 1)


def _split(tile: np.ndarray, width: int) -> np.ndarray:
    """The inverse of `_merge`, from `[..., bytes]` to `[..., 16, 64]`."""
    per = 8 // width
    vectors = tile.reshape(*tile.shape[:-1], 16 // per, 1, 64)
    shifts = (np.arange(per, dtype=np.uint8) * width)[:, None]
    return ((vectors >> shifts) & ((1 << width) - 1)).reshape(*tile.shape[:-1], 16, 64)


def _merge_row(values: np.ndarray, width: int) -> np.ndarray:
    """Little-endian fields along the last axis -> bytes."""
    per = 8 // width
    slots = values.reshape(*values.shape[:-1], -1, per)
    return np.bitwise_or.reduce(slots << (np.arange(per, dtype=np.uint8) * width), axis=-1)


def planes(bits: int) -> tuple[tuple[int, int], ...]:
    """(width, first bit) of the planes in which codes of `bits` bits are stored."""
    low, high = packing.PLANES.get(bits, (bits, 0))
    return ((low, 0), (high, low)) if high else ((low, 0),)
