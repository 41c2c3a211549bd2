"""Attention on Apple GPUs, on compressed bytes: decode in two kernels (splits, merge), prefill in one."""

from __future__ import annotations

import functools

import mlx.core as mx

from ..codecs import Affine, Raw
from ..codecs.base import Codec
from ..kernels import metal
from ..kernels.metal import Side
from .args import AttnArgs, PackedKV

DECODE_ROWS = 16
"""Query tokens up to which a call is decode."""
MAX_DIM = 512


def attend(args: AttnArgs) -> mx.array | None:
    """`[B, Hq, L, Dv]` in q's dtype, or None: an explicit mask, a codec or a head dim that the kernels do not know."""
    k, v = side(args.k), side(args.v)
    if args.mask is not None or k is None or v is None or args.q.shape[2] == 0:
        return None
    if args.q.shape[2] <= DECODE_ROWS:
        return decode(args, k, v)
    return None


def side(kv: PackedKV) -> Side | None:
    """What the kernels need to know of packed keys or values, or None where they do not serve."""
    if kv.layout.name != "canonical" or kv.head_dim % 16 or kv.head_dim > MAX_DIM:
        return None
    return _codec_side(kv.codec, kv.head_dim)


def _codec_side(codec: Codec, dim: int) -> Side | None:
    if isinstance(codec, Affine):
        return Side(codec.bits, min(codec.group, dim), dim)
    if isinstance(codec, Raw):
        return Side(16, dim, dim)
    return None


def decode(args: AttnArgs, k: Side, v: Side, tune: metal.Tuning | None = None) -> mx.array:
    """Decode by the variant of `tune` (default: this device's)."""
    tune = tune or metal.tuning()
    partial, stat = decode_lanes(args, k, v, tune)
    return merge(args, partial, stat)


def decode_lanes(args: AttnArgs, k: Side, v: Side, tune: metal.Tuning) -> tuple[mx.array, mx.array]:
    """Partials `[rows, splits, Dv]` float32 and their (max, sum) `[rows, splits, 2]`, rows = B * Hq * L."""
    batch, q_heads, length, _ = args.q.shape
    heads = batch * args.kv_heads
    tokens = args.max_packed + args.dense_k.shape[2]
    plan = metal.plan_decode(k, v, args.gqa * length, heads, tokens, tune, metal.cores())
    splits = plan.splits * plan.teams
    rows = batch * q_heads * length
    threads = 32 * plan.members * plan.teams
    template = [("KB", k.bits), ("KG", k.group), ("VB", v.bits), ("VG", v.group), ("DK", k.dim), ("DV", v.dim)]
    template += [("R", plan.rows), ("KPL", plan.keys), ("DS", plan.members), ("NT", plan.teams), ("SUB", plan.handover)]
    template += [("WIN", bool(args.window)), ("CAP", bool(args.softcap))]
    partial, stat = metal.kernel("decode_lanes")(
        inputs=[args.q, *cache_inputs(args)],
        template=template,
        grid=(threads, plan.splits, heads * plan.row_tiles),
        threadgroup=(threads, 1, 1),
        output_shapes=[(rows, splits, v.dim), (rows, splits, 2)],
        output_dtypes=[mx.float32, mx.float32],
    )
    return partial, stat


def merge(args: AttnArgs, partial: mx.array, stat: mx.array) -> mx.array:
    """Splits to the output `[B, Hq, L, Dv]`."""
    batch, q_heads, length, _ = args.q.shape
    rows, splits, dim = partial.shape
    capacity = 1 << max(5, (splits - 1).bit_length())
    meta = _ints((splits, length, q_heads))
    (out,) = metal.kernel("merge")(
        inputs=[partial, stat, _sinks(args), meta],
        template=[("T", args.q.dtype), ("DV", dim), ("SPLITS", capacity), ("SINK", args.sinks is not None)],
        grid=(rows * 128, 1, 1),
        threadgroup=(128, 1, 1),
        output_shapes=[(batch, q_heads, length, dim)],
        output_dtypes=[args.q.dtype],
    )
    return out


def cache_inputs(args: AttnArgs) -> list[mx.array]:
    """Packed and dense buffers, lengths and numbers, in the order of `metal._CACHE`."""
    arrays = []
    for kv in (args.k, args.v):
        codes, scales = kv.arrays if len(kv.arrays) == 2 else (kv.arrays[0], kv.arrays[0])
        # A buffer of no rows has no memory; the kernel reads none of it.
        arrays += [codes, scales] if codes.size else [_nothing(codes.dtype), _nothing(mx.float16)]
    capacity = args.k.arrays[0].shape[2]
    meta = (args.q.shape[2], args.gqa, args.kv_heads, args.dense_k.shape[2], capacity, args.window, int(args.causal))
    return [*arrays, args.dense_k, args.dense_v, args.lens_array(), _ints(meta), _floats((args.scale, args.softcap))]


def _sinks(args: AttnArgs) -> mx.array:
    return _nothing(mx.float32) if args.sinks is None else args.sinks.astype(mx.float32)


@functools.lru_cache(maxsize=256)
def _ints(values: tuple[int, ...]) -> mx.array:
    return mx.array(values, dtype=mx.int32)


@functools.lru_cache(maxsize=64)
def _floats(values: tuple[float, ...]) -> mx.array:
    return mx.array(values, dtype=mx.float32)


@functools.cache
def _nothing(dtype: mx.Dtype) -> mx.array:
    return mx.zeros((16,), dtype=dtype)
