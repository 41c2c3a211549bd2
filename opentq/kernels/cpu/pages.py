"""Choosing pages by the compiled CPU kernel (pages.cpp)."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..sketches import shape_of
from . import library as cpu

MAX_CHANNELS, MAX_DIM = 64, 1024


def choose(sketches: mx.array, rows: mx.array, packed: tuple[int, ...], count: int) -> mx.array | None:
    """The `count` pages of most weight, int32 `[B, Hkv, count]`: see `attention.pages.Selector.choose`.

    Args:
        sketches: uint8 `[B, Hkv, pages, C * 34 + D + 2]`.
        rows: scaled queries, float32 `[B, Hkv, R, C + D]`.
        packed: packed tokens of every sequence.
    """
    if not serves(sketches, rows.shape[3]):
        return None
    mx.eval(sketches, rows)
    batch, heads = rows.shape[:2]
    out, lengths = np.empty((batch, heads, count), np.int32), np.array(packed, np.int32)
    call = cpu.PageCall(packed=lengths.ctypes.data, out=out.ctypes.data, batch=batch, kv_heads=heads, count=count)
    call.threads = cpu.threads()
    _held = sketched(call, sketches, np.ascontiguousarray(cpu.view(rows)), max(packed))
    cpu.call("opentq_pages", call)
    return mx.array(out)


def serves(sketches: mx.array, width: int) -> bool:
    """Whether the kernel reads these for queries of `C + D` numbers."""
    channels, dim = shape_of(sketches.shape[3], width)
    return channels <= MAX_CHANNELS and dim <= MAX_DIM and cpu.available()


def sketched(call: cpu.PageCall, sketches: mx.array, rows: np.ndarray, packed: int) -> list[np.ndarray]:
    """Let a call choose by sketches, evaluated, of at least `packed` tokens; what it then points to."""
    if packed // 64 > sketches.shape[2]:
        raise ValueError(f"{packed} packed tokens, and sketches of {sketches.shape[2]} pages")
    held = cpu.rows_view(sketches)
    call.sketches, call.batch_stride, call.head_stride, call.page_stride = held.ctypes.data, *held.strides[:3]
    call.queries, call.rows = rows.ctypes.data, rows.shape[2]
    call.channels, call.dim = shape_of(sketches.shape[3], rows.shape[3])
    return [held, rows]
