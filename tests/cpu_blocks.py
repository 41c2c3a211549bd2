"""The blocked storage layout of the CPU in numpy, the way in: its definition in ten lines, which judges the kernels."""

from __future__ import annotations

import numpy as np

from opentq.codecs import packing
from opentq.kernels.cpu.blocks import TOKENS, _bits, planes
from opentq.kernels.cpu.layout import CpuBlocks


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


def _merge(fields: np.ndarray, width: int) -> np.ndarray:
    """`[..., 16, 64]` codes -> `[..., 16 * width / 8, 64]`: field i goes into slot i % per of vector i / per."""
    per = 8 // width
    slots = fields.reshape(*fields.shape[:-2], 16 // per, per, 64)
    shifts = (np.arange(per, dtype=np.uint8) * width)[:, None]
    return np.bitwise_or.reduce(slots << shifts, axis=-2)


def _unpack(row: np.ndarray, dim: int, bits: int) -> np.ndarray:
    """One token's canonical bytes `[..., 4 * words]` -> codes `[..., dim]`."""
    if bits in packing.PLANES:
        low, high = packing.PLANES[bits]
        cut = 4 * packing.words(dim, low)
        return _unpack(row[..., :cut], dim, low) | _unpack(row[..., cut:], dim, high) << low
    per = 8 // bits
    fields = (row[..., None] >> (np.arange(per, dtype=np.uint8) * bits)) & ((1 << bits) - 1)
    return fields.reshape(*row.shape[:-1], -1)[..., :dim].astype(np.uint8)
