"""Choosing pages: by sketches in two launches of pages.cu, or by the keys of some of them.

Keys of candidates are laid out in fp16 as for a prompt's chunk, a bounded number of heads at a time, meet the queries
in one matrix product, and are dropped.
"""

from __future__ import annotations

import functools

import mlx.core as mx

from ...contracts.attention import AttnArgs
from ...contracts.ints import int_array
from ..sketches import shape_of
from . import launch as cuda
from .launch import BLOCK, KernelSource
from .layout import MmaLayout

THREADS = 512
MAX_CHANNELS, MAX_DIM = 32, 512
"""Channels of two tokens, and of the mean, that a lane keeps in registers."""

AT_ONCE = 64 << 20
"""Bytes of keys in fp16 that exist at one time."""

CHOOSING = 2 << 30
"""Bytes that a layer reads while pages are chosen: of 512K tokens that took 1.15 ms, and reading all .39 (H200)."""

LOG2_OF_E = 1.4426950408889634


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
    channels, dim = shape_of(sketches.shape[3], width)
    if not cuda.available() or channels > MAX_CHANNELS or dim > MAX_DIM or dim % 2:
        return None
    pages, both = max(packed) // BLOCK, batch * heads
    kernel = cuda.compiled(weigh_source(channels, dim))
    (weights,) = kernel(
        [sketches, rows],
        [((both, length, pages), mx.float32)],
        (pages, sketches.shape[2], length),
        (-(-pages // 4), both, 1),
    )
    return _pick(weights, packed, heads, count)


def _pick(weights: mx.array, packed: tuple[int, ...], heads: int, count: int) -> mx.array:
    """int32 `[B, Hkv, count]` from weights in log2, float32 `[B * Hkv, rows, pages]`."""
    both, length, pages = weights.shape
    outputs = [((both, pages), mx.float32), ((both // heads, heads, count), mx.int32)]
    pick = cuda.compiled(pick_source(THREADS))
    return pick([weights, int_array(packed)], outputs, (pages, length, heads, count), (both, 1, 1))[1]


def top(weights: mx.array, packed: tuple[int, ...], count: int) -> mx.array | None:
    """`attention.pages.top` in one launch: weights float32 `[B, Hkv, rows, pages]` -> int32 `[B, Hkv, count]`."""
    if not cuda.available():
        return None
    batch, heads, length, pages = weights.shape
    return _pick((weights * LOG2_OF_E).reshape(batch * heads, length, pages), packed, heads, count)


def weigh(args: AttnArgs) -> mx.array | None:
    """`attention.pages.weigh` of keys in `MmaLayout`, but sketches; scores are fp16, as in plain attention."""
    layout = args.k.layout
    if not cuda.available() or not isinstance(layout, MmaLayout) or layout.sketched or not args.max_packed:
        return None
    keys = args.k if args.pages is None else args.k.pick(args.pages)
    lens = [packed for packed, _, _ in args.picked_lens]
    pages, heads, dim = -(-max(lens) // BLOCK), args.kv_heads, args.k.head_dim
    rows = (args.q.astype(mx.float32) * args.scale).astype(mx.float16).reshape(len(lens), heads, -1, dim)
    step = max(1, AT_ONCE // (2 * max(lens) * dim))
    done = []
    for b, packed in enumerate(lens):
        for first in range(0, heads, step):
            some = range(first, min(first + step, heads))
            done.append(_weights(args, keys.arrays[0], rows[b : b + 1, first : some.stop], b, some, packed, pages))
    every = done[0] if len(done) == 1 else mx.concatenate(done, axis=1)
    return every.reshape(len(lens), heads, -1, pages)


def _weights(
    args: AttnArgs, records: mx.array, rows: mx.array, b: int, heads: range, packed: int, pages: int
) -> mx.array:
    """Of some KV heads of one sequence: float32 `[1, heads, R, pages]`."""
    if not packed:
        return mx.full((*rows.shape[:3], pages), -mx.inf)
    assert isinstance(args.k.layout, MmaLayout)
    none = mx.zeros((1, args.kv_heads, 1, 1), mx.float16)  # the one dense column lies between sinks and tail
    (keys,) = cuda.unpack([(args.k.layout, records, none)], (packed, 0, 1), b, heads, mx.float16)
    scores = rows @ keys.swapaxes(-1, -2)
    if args.softcap:
        scores = mx.tanh(scores / args.softcap) * args.softcap
    scores = mx.pad(scores, [(0, 0)] * 3 + [(0, pages * BLOCK - packed)], constant_values=-mx.inf)
    return mx.logsumexp(scores.astype(mx.float32).reshape(*rows.shape[:3], pages, BLOCK), axis=-1)
