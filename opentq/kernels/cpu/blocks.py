"""The blocked storage layout in numpy: its definition in ten lines each way (blocks.h describes it bit by bit).

Slower than the compiled kernels, it reads caches on machines without a compiler and judges the kernels in the tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...codecs import packing

if TYPE_CHECKING:
    from .layout import CpuBlocks

TOKENS = 64


def store_numpy(layout: CpuBlocks, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Canonical arrays -> blocks."""
    batch, heads, tokens, _ = codes.shape
    n, dim, bits = tokens // TOKENS, layout.dim, layout.bits
    values = _unpack(codes.astype("<u4").view(np.uint8), dim, bits).reshape(batch, heads, n, TOKENS, dim)
    fields = np.empty((batch, heads, n, dim // 16, 16, 64), np.uint8)
    tile_axes = values.reshape(batch, heads, n, TOKENS, dim // 16, 16)
    if layout.kind == "k":  # [field: channels/4, tokens/16][lane: token][channel]
        by = tile_axes.reshape(batch, heads, n, 4, 16, dim // 16, 4, 4).transpose(0, 1, 2, 5, 6, 3, 4, 7)
    else:  # [field: token % 16][lane: channel][token / 16]
        by = tile_axes.reshape(batch, heads, n, 4, 16, dim // 16, 16).transpose(0, 1, 2, 5, 4, 6, 3)
    fields[...] = by.reshape(fields.shape)
    tiles = [_merge(_bits(fields, *plane), plane[0]).reshape(*fields.shape[:4], -1) for plane in planes(bits)]
    body = np.concatenate(tiles, axis=-1).reshape(batch, heads, n, layout.code_bytes)
    by_token = scales.reshape(batch, heads, n, TOKENS, layout.params).swapaxes(3, 4)
    params = np.ascontiguousarray(by_token, "<f2").reshape(batch, heads, n, -1).view(np.uint8)
    return np.concatenate([body, params], axis=-1)


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


def _merge(fields: np.ndarray, width: int) -> np.ndarray:
    """`[..., 16, 64]` codes -> `[..., 16 * width / 8, 64]`: field i goes into slot i % per of vector i / per."""
    per = 8 // width
    slots = fields.reshape(*fields.shape[:-2], 16 // per, per, 64)
    shifts = (np.arange(per, dtype=np.uint8) * width)[:, None]
    return np.bitwise_or.reduce(slots << shifts, axis=-2)


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


def _unpack(row: np.ndarray, dim: int, bits: int) -> np.ndarray:
    """One token's canonical bytes `[..., 4 * words]` -> codes `[..., dim]`."""
    if bits in packing.PLANES:
        low, high = packing.PLANES[bits]
        cut = 4 * packing.words(dim, low)
        return _unpack(row[..., :cut], dim, low) | _unpack(row[..., cut:], dim, high) << low
    per = 8 // bits
    fields = (row[..., None] >> (np.arange(per, dtype=np.uint8) * bits)) & ((1 << bits) - 1)
    return fields.reshape(*row.shape[:-1], -1)[..., :dim].astype(np.uint8)


def planes(bits: int) -> tuple[tuple[int, int], ...]:
    """(width, first bit) of the planes in which codes of `bits` bits are stored."""
    low, high = packing.PLANES.get(bits, (bits, 0))
    return ((low, 0), (high, low)) if high else ((low, 0),)
