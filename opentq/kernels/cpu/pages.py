"""Choosing pages by the compiled CPU kernel (pages.cpp)."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from . import library as cpu

MAX_CHANNELS, MAX_DIM = 64, 1024


def shape_of(row: int, width: int) -> tuple[int, int]:
    """(C, D) of sketches with rows of `C * 34 + D + 2` bytes for queries of `C + D` numbers."""
    channels = (row - width - 2) // 33
    return channels, width - channels


def choose(sketches: mx.array, rows: mx.array, packed: tuple[int, ...], count: int) -> mx.array | None:
    """The `count` pages of most weight, int32 `[B, Hkv, count]`: see `attention.pages.Selector.choose`.

    Args:
        sketches: uint8 `[B, Hkv, pages, C * 34 + D + 2]`.
        rows: scaled queries, float32 `[B, Hkv, R, C + D]`.
        packed: packed tokens of every sequence.
    """
    batch, heads, length, width = rows.shape
    channels, dim = shape_of(sketches.shape[3], width)
    if channels > MAX_CHANNELS or dim > MAX_DIM or not cpu.available():
        return None
    if max(packed) // 64 > sketches.shape[2]:
        raise ValueError(f"{max(packed)} packed tokens, and sketches of {sketches.shape[2]} pages")
    mx.eval(sketches, rows)
    held, queries = cpu.rows_view(sketches), np.ascontiguousarray(cpu.view(rows))
    lengths, out = np.array(packed, np.int32), np.empty((batch, heads, count), np.int32)
    where = held.ctypes.data, *held.strides[:3]
    call = cpu.PageCall(
        *where,
        queries.ctypes.data,
        lengths.ctypes.data,
        out.ctypes.data,
        batch,
        heads,
        length,
        channels,
        dim,
        count,
        cpu.threads(),
    )
    cpu.call("opentq_pages", call)
    return mx.array(out)
