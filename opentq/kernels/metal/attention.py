"""Attention on Apple GPUs, on compressed bytes: decode in two kernels (splits, merge), prefill in one."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import mlx.core as mx

from ...codecs import codebooks
from ...codecs.packing import words
from ...codecs.polar import LEVELS
from ...codecs.rounding import lengths
from ...contracts.attention import AttnArgs, PackedKV
from ...contracts.backend import Backend, Finding, Pair
from ...contracts.codec import Angles, Book, Codebooks, Codec, Halves, Integers
from ...contracts.layout import Canonical, Layout
from . import launch as metal
from .launch import Format, Side

MATRIX_ROWS = 8
"""Query rows per KV head up to which the matrix kernel gives every simdgroup tokens of its own."""
MAX_DIM = 512


def attend(args: AttnArgs) -> mx.array | None:
    """`[B, Hq, L, Dv]` in q's dtype, or None: an explicit mask, a codec or a head dim that the kernels do not know."""
    k, v = side(args.k), side(args.v)
    if args.mask is not None or args.pages is not None or k is None or v is None or v.sketch or args.q.shape[2] == 0:
        return None
    if in_lanes(args, k, v):
        return merge(args, *decode_lanes(args, k, v))
    return matrix(args, k, v)


def in_lanes(args: AttnArgs, k: Side, v: Side) -> bool:
    """Whether the lane kernel decodes this call; else the matrix kernel does."""
    return args.gqa * args.q.shape[2] <= metal.lane_rows(k, v) and metal.tuning().variant == "lanes"


def extend(codecs: Pair, dense: Pair, fresh: Pair) -> Pair | None:
    """fp16 columns `[B, H, Td + L, D]`: new keys and values, rotated, behind the old ones, in one launch; or None."""
    if not appends(codecs, (dense[0].shape[3], dense[1].shape[3])):
        return None
    _, k, v = append(_nothing(mx.float16, dense[0].shape[3]), codecs, dense, fresh, None)
    return k, v


def step(args: AttnArgs, fresh: Pair, center: mx.array | None) -> tuple[mx.array, mx.array, mx.array] | None:
    """A decode step (`contracts.backend.Backend.step`): one launch appends and rotates, two attend and rotate back."""
    k, v, codecs = side(args.k), side(args.v), (args.k.codec, args.v.codec)
    if k is None or v is None or v.sketch or args.mask is not None or args.pages is not None:
        return None
    if not appends(codecs, (k.dim, v.dim)):
        return None
    q, dense_k, dense_v = append(args.q, codecs, (args.dense_k, args.dense_v), fresh, center)
    whole = replace(args, q=q, dense_k=dense_k, dense_v=dense_v)
    if in_lanes(whole, k, v):
        return merge(whole, *decode_lanes(whole, k, v), args.v.codec.basis == "hadamard"), dense_k, dense_v
    return args.v.codec.unrotate(matrix(whole, k, v)), dense_k, dense_v


@functools.lru_cache(maxsize=64)
def appends(codecs: Pair, dims: tuple[int, int]) -> bool:
    """Whether the append kernel knows the bases of keys and values."""
    for codec, dim in zip(codecs, dims):
        if dim % 32 or dim > MAX_DIM or codec.basis not in ("none", "hadamard"):
            return False
        if codec.basis == "hadamard" and dim & (dim - 1):
            return False
    return True


def append(
    q: mx.array, codecs: Pair, dense: Pair, fresh: Pair, center: mx.array | None
) -> tuple[mx.array, mx.array, mx.array]:
    """`q [..., Dk]` rotated, and the fp16 columns with `fresh` behind them, `center` taken off new keys."""
    (batch, heads, columns, k_dim), v_dim, length = dense[0].shape, dense[1].shape[3], fresh[0].shape[2]
    old = [mx.contiguous(d) if columns else _nothing(mx.float16) for d in dense]
    rows, queries = batch * heads, q.size // k_dim
    tasks = 2 * rows * (columns + length) + queries
    centers = _nothing(mx.float16) if center is None else mx.contiguous(center)
    template = [("DK", k_dim), ("DV", v_dim), *((n, c.basis == "hadamard") for n, c in zip(("RK", "RV"), codecs))]
    shapes = [(batch, heads, columns + length, dim) for dim in (k_dim, v_dim)]
    rotated, k, v = metal.kernel("append")(
        inputs=[
            *(mx.contiguous(x) for x in (q, *fresh)),
            *old,
            centers,
            _ints((length, columns, rows, queries)),
            _floats((k_dim**-0.5, v_dim**-0.5)),
        ],
        template=[("T", q.dtype), *template, ("CENTER", center is not None)],
        grid=(-(-tasks // 4) * 128, 1, 1),
        threadgroup=(128, 1, 1),
        output_shapes=[q.shape, *shapes],
        output_dtypes=[q.dtype, mx.float16, mx.float16],
    )
    return rotated, k, v


def layouts(k_codec: Codec, v_codec: Codec, dims: tuple[int, int]) -> tuple[Layout, Layout]:
    """The canonical format for keys and values: what the kernels read. Blocks are packed by the pack kernel."""
    return PACKED, PACKED


class _Packed(Canonical):
    """One row per token, written by a pack kernel where there is one."""

    def encode(self, codec: Codec, y: mx.array) -> tuple[mx.array, ...]:
        form = codec.format(y.shape[-1]) if y.size else None
        if isinstance(form, Integers):
            return pack(form, y)
        return pack_book(form, y) if isinstance(form, Codebooks) and form.fit else codec.encode(y)


PACKED = _Packed()


def pack(form: Integers, y: mx.array) -> tuple[mx.array, mx.array]:
    """Rotated vectors `[B, H, T, D]` -> packed arrays of this format, in one kernel."""
    *lead, dim = y.shape
    tokens, group = y.size // dim, min(form.group, dim)
    codes, scales = metal.kernel("pack")(
        inputs=[mx.contiguous(y), _ints((tokens,))],
        template=[("FORMAT", int(Format.integers(form.bits))), ("GROUP", group), ("D", dim)],
        grid=(-(-tokens // 4) * 128, 1, 1),
        threadgroup=(128, 1, 1),
        output_shapes=[(*lead, words(dim, form.bits)), (*lead, 2 * -(-dim // group))],
        output_dtypes=[mx.uint32, mx.float16],
    )
    return codes, scales


def pack_book(form: Codebooks, y: mx.array) -> tuple[mx.array, ...]:
    """Rotated vectors `[B, H, T, D]` -> packed arrays of this format, in one kernel behind the lengths."""
    *lead, dim = y.shape
    books = form.books
    y, bits = mx.contiguous(y), [book.bits for book in books]
    tokens, sizes = y.size // dim, [words(books[0].dim, b) for b in bits]
    codes, scales = metal.kernel("pack_book")(
        inputs=[y, lengths(y, len(books)), *_cuts(books), _ints((tokens,))],
        template=[
            ("FORMAT", int(Format.book(bits[0]))),
            ("FORMAT2", int(Format.book(bits[1]) if bits[1:] else Format.NONE)),
            ("N", books[0].dim),
            ("NORM", form.fit == "norm"),
        ],
        grid=(-(-tokens // 4) * 128, 1, 1),
        threadgroup=(128, 1, 1),
        output_shapes=[(*lead, sum(sizes)), (*lead, len(books))],
        output_dtypes=[mx.uint32, mx.float16],
    )
    return (*mx.split(codes, sizes[:1], axis=-1), scales) if bits[1:] else (codes, scales)


@functools.lru_cache(maxsize=64)
def _cuts(books: tuple[Book, ...]) -> tuple[mx.array, mx.array]:
    """Of each book 63 boundaries, ascending, and its step, float32 `[64]`; and its entries, float32 `[64]`."""
    cuts: list[float] = []
    entries: list[float] = []
    for book in books:
        boundaries = codebooks.boundaries(book.values)
        cuts += (*boundaries, *[0.0] * (63 - len(boundaries)), book.step)
        entries += (*map(float, book.entries), *[0.0] * (64 - len(book.entries)))
    return mx.array(cuts, dtype=mx.float32), mx.array(entries, dtype=mx.float32)


def side(kv: PackedKV) -> Side | None:
    """What the kernels need to know of packed keys or values, or None where they do not serve."""
    if kv.layout.name != "canonical" or kv.head_dim % 16 or kv.head_dim > MAX_DIM:
        return None
    return codec_side(kv.codec, kv.head_dim)


@functools.lru_cache(maxsize=256)
def codec_side(codec: Codec, dim: int) -> Side | None:
    """The `Side` of keys or values of `dim` channels, or None."""
    form = codec.format(dim)
    if isinstance(form, Integers):
        return Side(Format.integers(form.bits), min(form.group, dim), dim)
    if isinstance(form, Halves):
        return Side(Format.HALF, dim, dim)
    if isinstance(form, Angles):
        return Side(Format.POLAR, dim, dim)
    if isinstance(form, Codebooks):
        formats, run = [Format.book(book.bits) for book in form.books], form.books[0].dim
        packed, sketch = run * len(form.books), sum(book.dim for book in form.books if book.sketch)
        if packed <= MAX_DIM and dim + sketch <= metal.MAX_QUERY:
            return Side(formats[0], run, dim, formats[1] if formats[1:] else Format.NONE, sketch, packed)
    return None


def queries(args: AttnArgs, k: Side) -> mx.array:
    """What the kernels read: the queries, and behind each its sketch, where packed keys are the codes of one."""
    if not k.sketch:
        return mx.contiguous(args.q)
    return mx.concatenate([args.q, args.projected[..., -k.sketch :]], axis=-1)


def decode_lanes(args: AttnArgs, k: Side, v: Side) -> tuple[mx.array, mx.array]:
    """Partials `[rows, splits, Dv]` float32 and their (max, sum) `[rows, splits, 2]`, rows = B * Hq * L."""
    batch, q_heads, length, _ = args.q.shape
    heads = batch * args.kv_heads
    plan = metal.plan_decode(k, v, args.gqa * length, heads, _tokens(args), metal.tuning(), metal.cores())
    splits, rows = plan.splits * plan.teams, batch * q_heads * length
    threads = 32 * plan.members * plan.teams
    template = [("R", plan.rows), ("KPL", plan.keys), ("DS", plan.members), ("NT", plan.teams), ("SUB", plan.handover)]
    partial, stat = metal.kernel("decode_lanes")(
        inputs=[queries(args, k), *_cache_inputs(args)],
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
        inputs=[queries(args, k), *_cache_inputs(args), _sinks(args)],
        template=[*_template(args, k, v), *template, ("SINK", args.sinks is not None)],
        grid=(threads, plan.splits, heads * plan.row_tiles),
        threadgroup=(threads, 1, 1),
        output_shapes=[(batch * q_heads * length, splits, v.dim), (batch * q_heads * length, splits, 2)],
        output_dtypes=[args.q.dtype if final else mx.float32, mx.float32],
    )
    return out.reshape(batch, q_heads, length, v.dim) if final else merge(args, out, stat)


def merge(args: AttnArgs, partial: mx.array, stat: mx.array, rotate: bool = False) -> mx.array:
    """Splits to the output `[B, Hq, L, Dv]`; `rotate`: out of a Hadamard basis."""
    batch, q_heads, length, _ = args.q.shape
    rows, splits, dim = partial.shape
    capacity = 1 << max(5, (splits - 1).bit_length())
    meta = _ints((splits, length, q_heads))
    (out,) = metal.kernel("merge")(
        inputs=[partial, stat, _sinks(args), meta],
        template=[
            ("T", args.q.dtype),
            ("DV", dim),
            ("SPLITS", capacity),
            ("SINK", args.sinks is not None),
            ("ROT", rotate),
        ],
        grid=(rows * 128, 1, 1),
        threadgroup=(128, 1, 1),
        output_shapes=[(batch, q_heads, length, dim)],
        output_dtypes=[args.q.dtype],
    )
    return out


def _tokens(args: AttnArgs) -> int:
    return args.max_packed + args.dense_k.shape[2]


def _template(args: AttnArgs, k: Side, v: Side) -> list[tuple[str, int | bool]]:
    sides = [("KF", int(k.format)), ("KG", k.group), ("VF", int(v.format)), ("VG", v.group)]
    sides += [("KF2", int(k.second)), ("VF2", int(v.second)), ("DK", k.dim), ("DV", v.dim)]
    sides += [("KE", k.width), ("QE", k.query)]
    return [*sides, ("WIN", bool(args.window)), ("CAP", bool(args.softcap))]


def _cache_inputs(args: AttnArgs) -> list[mx.array]:
    """Packed and dense buffers, lengths and numbers, in the order of `metal._CACHE`."""
    arrays: list[mx.array] = []
    for kv in (args.k, args.v):
        if kv.arrays and kv.arrays[0].size:
            more = kv.arrays[1] if len(kv.arrays) == 3 else _nothing(mx.uint32)
            arrays += [kv.arrays[0], more, kv.arrays[-1]]  # of the raw codec, which has no scales, the values twice
        else:  # a buffer of no rows has no memory, and the kernel reads none of it
            arrays += [_nothing(mx.uint32), _nothing(mx.uint32), _nothing(mx.float16)]
    capacity = args.k.arrays[0].shape[2] if args.k.arrays else 0
    meta = (args.q.shape[2], args.gqa, args.kv_heads, args.dense_k.shape[2], capacity, args.window, int(args.causal))
    dense = [mx.contiguous(args.dense_k), mx.contiguous(args.dense_v)]  # as they are, unless a caller sliced them
    books = _books(args.k.codec, args.k.head_dim, args.v.codec, args.v.head_dim)
    return [*arrays, *dense, args.lens_array(), _ints(meta), _floats((args.scale, args.softcap)), books]


@functools.lru_cache(maxsize=64)
def _books(k_codec: Codec, k_dim: int, v_codec: Codec, v_dim: int) -> mx.array:
    """Two books of keys and two of values, float32 `[128]`: what 32 lanes hold of each, zeros where there is none."""
    entries: list[float] = []
    for form in (k_codec.format(k_dim), v_codec.format(v_dim)):
        tables: tuple[tuple[float, ...], ...] = ()
        if isinstance(form, Angles):
            tables = _circles()
        elif isinstance(form, Codebooks):  # of 64 entries the upper half
            tables = tuple(book.values[-metal.LANES :] for book in form.books)
        for table in (*tables, (0.0,), (0.0,))[:2]:
            entries += (table * metal.LANES)[: metal.LANES]
    return mx.array(entries, dtype=mx.float32)


@functools.cache
def _circles() -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The polar codec's angles: cosines and sines of level 1; cosines of levels 4 times 3, then of level 2."""
    angles = [codebooks.angle(bits, level) for level, bits in enumerate(LEVELS, 1)]
    one, two, three, four = [[math.cos(a) for a in level] for level in angles]
    return (*one, *map(math.sin, angles[0])), (*(a * b for a in four for b in three), *two)


def _sinks(args: AttnArgs) -> mx.array:
    return _nothing(mx.float32) if args.sinks is None else args.sinks.astype(mx.float32)


@functools.lru_cache(maxsize=256)
def _ints(values: tuple[int, ...]) -> mx.array:
    return mx.array(values, dtype=mx.int32)


@functools.lru_cache(maxsize=64)
def _floats(values: tuple[float, ...]) -> mx.array:
    return mx.array(values, dtype=mx.float32)


@functools.cache
def _nothing(dtype: mx.Dtype, size: int = 16) -> mx.array:
    return mx.zeros((size,), dtype=dtype)


def findings() -> list[Finding]:
    """What `opentq doctor` says about the kernels."""
    return [Finding("kernels", "ok", "Metal, compiled on first use")]


BACKEND = Backend("metal", mx.metal.is_available, attend, layouts, extend=extend, step=step, findings=findings)
