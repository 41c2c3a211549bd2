"""Choosing pages by two launches of pages.cu."""

from __future__ import annotations

import functools

import mlx.core as mx

from ...contracts.ints import int_array
from . import launch as cuda
from .launch import KernelSource

THREADS = 512
MAX_CHANNELS, MAX_DIM = 32, 512
"""Channels of two tokens, and of the mean, that a lane keeps in registers."""


@functools.cache
def weigh_source(channels: int, dim: int) -> KernelSource:
    """Weights of pages; four pages per block."""
    return KernelSource(
        name=f"opentq_weigh_pages_{channels}_{dim}",
        file="pages.cu",
        inputs=(("sketches", "unsigned char"), ("queries", "float")),
        outputs=(("weights", "float"),),
        scalars=(("pages", "int"), ("held", "int"), ("rows", "int")),
        body=f"  opentq::weigh_pages<{channels}, {dim}>(sketches, queries, weights, pages, held, rows);",
        threads=128,
        shared=0,
    )


@functools.cache
def pick_source(threads: int = THREADS) -> KernelSource:
    """The list of every KV head; one block each."""
    return KernelSource(
        name=f"opentq_pick_pages_{threads}",
        file="pages.cu",
        inputs=(("weights", "float"), ("packed", "int")),
        outputs=(("shares", "float"), ("list", "int")),
        scalars=(("pages", "int"), ("rows", "int"), ("kv_heads", "int"), ("count", "int")),
        body=f"  opentq::pick_pages<{threads}>(weights, packed, shares, list, pages, rows, kv_heads, count);",
        threads=threads,
        shared=threads // 32 * 4,
    )


def choose(sketches: mx.array, rows: mx.array, packed: tuple[int, ...], count: int) -> mx.array | None:
    """The `count` pages of most weight, int32 `[B, Hkv, count]`: see `attention.pages.Selector.choose`.

    Args:
        sketches: uint8 `[B, Hkv, pages, C * 34 + D + 2]`.
        rows: scaled queries, float32 `[B, Hkv, R, C + D]`.
        packed: packed tokens of every sequence.
    """
    batch, heads, length, width = rows.shape
    channels = (sketches.shape[3] - width - 2) // 33
    dim = width - channels
    if not cuda.available() or channels > MAX_CHANNELS or dim > MAX_DIM or dim % 2:
        return None
    pages, both = max(packed) // 64, batch * heads
    weigh, pick = cuda.compiled(weigh_source(channels, dim)), cuda.compiled(pick_source())
    shape = (both, length, pages)
    (weights,) = weigh(
        [sketches, rows], [(shape, mx.float32)], (pages, sketches.shape[2], length), (-(-pages // 4), both, 1)
    )
    outputs = [((both, pages), mx.float32), ((batch, heads, count), mx.int32)]
    return pick([weights, int_array(packed)], outputs, (pages, length, heads, count), (both, 1, 1))[1]
