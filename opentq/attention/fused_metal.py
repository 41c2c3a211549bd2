"""Attention on Apple GPUs, on compressed bytes: decode in two kernels (splits, merge), prefill in one."""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx

from ..codecs import Affine, Raw, Turbo, codebooks
from ..codecs.base import Codec
from ..codecs.packing import words
from ..kernels import metal
from ..kernels.layout import Canonical, Layout
from ..kernels.metal import Side
from .args import AttnArgs, PackedKV

MATRIX_ROWS = 8
"""Query rows per KV head up to which the matrix kernel gives every simdgroup tokens of its own."""
MAX_DIM = 512


def attend(args: AttnArgs) -> mx.array | None:
    """`[B, Hq, L, Dv]` in q's dtype, or None: an explicit mask, a codec or a head dim that the kernels do not know."""
    k, v = side(args.k), side(args.v)
    if args.mask is not None or k is None or v is None or args.q.shape[2] == 0:
        return None
    if args.gqa * args.q.shape[2] <= metal.lane_rows(k, v) and metal.tuning().variant == "lanes":
        return merge(args, *decode_lanes(args, k, v))
    return matrix(args, k, v)


def layouts(k_codec: Codec, v_codec: Codec, dims: tuple[int, int]) -> tuple[Layout, Layout]:
    """The canonical format for keys and values: what the kernels read. Blocks are packed by the pack kernel."""
    return PACKED, PACKED


class _Packed(Canonical):
    """One row per token, written by the pack kernel."""

    def encode(self, codec: Codec, y: mx.array) -> tuple[mx.array, ...]:
        return pack(codec, y) if isinstance(codec, Affine) and y.size else codec.encode(y)


PACKED = _Packed()


def pack(codec: Affine, y: mx.array) -> tuple[mx.array, mx.array]:
    """Rotated vectors `[B, H, T, D]` -> `codec.encode(y)`, in one kernel."""
    *lead, dim = y.shape
    codec.check(dim)
    tokens = y.size // dim
    codes, scales = metal.kernel("pack")(
        inputs=[mx.contiguous(y), _ints((tokens,))],
        template=[("BITS", codec.bits), ("GROUP", min(codec.group, dim)), ("D", dim)],
        grid=(-(-tokens // 4) * 128, 1, 1),
        threadgroup=(128, 1, 1),
        output_shapes=[(*lead, words(dim, codec.bits)), (*lead, 2 * codec.groups(dim))],
        output_dtypes=[mx.uint32, mx.float16],
    )
    return codes, scales


def side(kv: PackedKV) -> Side | None:
    """What the kernels need to know of packed keys or values, or None where they do not serve."""
    if kv.layout.name != "canonical" or kv.head_dim % 16 or kv.head_dim > MAX_DIM:
        return None
    return _codec_side(kv.codec, kv.head_dim)


def _codec_side(codec: Codec, dim: int) -> Side | None:
    if isinstance(codec, Affine):
        return Side(codec.bits, min(codec.group, dim), dim)
    if isinstance(codec, Turbo):
        return Side(metal.BOOK + codec.bits, dim, dim)
    if isinstance(codec, Raw):
        return Side(16, dim, dim)
    return None


def decode_lanes(args: AttnArgs, k: Side, v: Side) -> tuple[mx.array, mx.array]:
    """Partials `[rows, splits, Dv]` float32 and their (max, sum) `[rows, splits, 2]`, rows = B * Hq * L."""
    batch, q_heads, length, _ = args.q.shape
    heads = batch * args.kv_heads
    plan = metal.plan_decode(k, v, args.gqa * length, heads, _tokens(args), metal.tuning(), metal.cores())
    splits, rows = plan.splits * plan.teams, batch * q_heads * length
    threads = 32 * plan.members * plan.teams
    template = [("R", plan.rows), ("KPL", plan.keys), ("DS", plan.members), ("NT", plan.teams), ("SUB", plan.handover)]
    partial, stat = metal.kernel("decode_lanes")(
        inputs=[mx.contiguous(args.q), *_cache_inputs(args)],
        template=[*_template(args, k, v), *template],
        grid=(threads, plan.splits, heads),
        threadgroup=(threads, 1, 1),
        output_shapes=[(rows, splits, v.dim), (rows, splits, 2)],
        output_dtypes=[mx.float32, mx.float32],
    )
    return partial, stat


def matrix(args: AttnArgs, k: Side, v: Side) -> mx.array:
    """Prefill, and decode where `Tuning.variant` is "matrix" or the rows are many: `[B, Hq, L, Dv]`."""
    batch, q_heads, length, _ = args.q.shape
    heads, rows = batch * args.kv_heads, args.gqa * length
    own, wide = rows <= MATRIX_ROWS, args.q.dtype == mx.float32
    plan = metal.plan_matrix(k, v, rows, heads, _tokens(args), own, wide, metal.tuning(), metal.cores())
    splits = plan.splits * (plan.simdgroups if own else 1)
    final = splits == 1
    threads = 32 * plan.simdgroups
    template: list[tuple[str, Any]] = [
        ("TT", mx.float32 if wide else mx.float16),
        ("OT", args.q.dtype if final else mx.float32),
    ]
    template += [("TK", plan.tile), ("NSG", plan.simdgroups), ("OWN", own), ("FINAL", final)]
    out, stat = metal.kernel("matrix")(
        inputs=[mx.contiguous(args.q), *_cache_inputs(args), _sinks(args)],
        template=[*_template(args, k, v), *template, ("SINK", args.sinks is not None)],
        grid=(threads, plan.splits, heads * plan.row_tiles),
        threadgroup=(threads, 1, 1),
        output_shapes=[(batch * q_heads * length, splits, v.dim), (batch * q_heads * length, splits, 2)],
        output_dtypes=[args.q.dtype if final else mx.float32, mx.float32],
    )
    return out.reshape(batch, q_heads, length, v.dim) if final else merge(args, out, stat)


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


def _tokens(args: AttnArgs) -> int:
    return args.max_packed + args.dense_k.shape[2]


def _template(args: AttnArgs, k: Side, v: Side) -> list[tuple[str, int | bool]]:
    sides = [("KB", k.bits), ("KG", k.group), ("VB", v.bits), ("VG", v.group), ("DK", k.dim), ("DV", v.dim)]
    return [*sides, ("WIN", bool(args.window)), ("CAP", bool(args.softcap))]


def _cache_inputs(args: AttnArgs) -> list[mx.array]:
    """Packed and dense buffers, lengths and numbers, in the order of `metal._CACHE`."""
    arrays: list[mx.array] = []
    for kv in (args.k, args.v):
        if kv.arrays and kv.arrays[0].size:
            arrays += [kv.arrays[0], kv.arrays[-1]]  # of the raw codec, which has no scales, the values twice
        else:  # a buffer of no rows has no memory, and the kernel reads none of it
            arrays += [_nothing(mx.uint32), _nothing(mx.float16)]
    capacity = args.k.arrays[0].shape[2] if args.k.arrays else 0
    meta = (args.q.shape[2], args.gqa, args.kv_heads, args.dense_k.shape[2], capacity, args.window, int(args.causal))
    dense = [mx.contiguous(args.dense_k), mx.contiguous(args.dense_v)]  # as they are, unless a caller sliced them
    books = _books(_bits(args.k), args.k.head_dim, _bits(args.v), args.v.head_dim)
    return [*arrays, *dense, args.lens_array(), _ints(meta), _floats((args.scale, args.softcap)), books]


def _bits(kv: PackedKV) -> int:
    """Bits of a codebook codec, else 0."""
    return kv.codec.bits if isinstance(kv.codec, Turbo) else 0


@functools.lru_cache(maxsize=64)
def _books(k_bits: int, k_dim: int, v_bits: int, v_dim: int) -> mx.array:
    """Codebooks of keys and of values, float32 `[64]`: what each of 32 lanes holds, zeros where there is no book."""
    entries: list[float] = []
    for bits, dim in ((k_bits, k_dim), (v_bits, v_dim)):
        book = codebooks.sphere(bits, dim)[-metal.BOOK :] if bits else (0.0,)  # of 64 entries the upper half
        entries += book * (metal.BOOK // len(book))
    return mx.array(entries, dtype=mx.float32)


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
