"""Attention by the compiled CPU kernels: decode and prefill straight on stored bytes (attend.cpp).

Serves affine, codebook and polar codecs stored in the CPU's own layouts, with or without outlier channels apart, and
raw fp16, in any pairing of keys and values; any GQA ratio, window, sinks, softcap and ragged lengths. Says "not me" for
masks given as arrays. Inputs are evaluated here, because the kernel reads their memory.

Numerical class: fp16. Queries and probabilities go through the integer products as 15-bit integers (one step per query,
one per group and block of values), everything else is fp32: the error is that of naive attention in fp16, or less.
"""

from __future__ import annotations

import ctypes
from typing import Any

import mlx.core as mx
import numpy as np

from ...contracts.attention import AttnArgs, PackedKV
from ...contracts.backend import Backend, Pair
from ...contracts.check import Check
from ...contracts.codec import Codebook, Codebooks, Codec, Halves, WithOutliers
from ...contracts.layout import CANONICAL, Layout
from ...errors import explained
from . import blas
from . import library as cpu
from .blocks import TOKENS
from .layout import CpuBlocks, CpuLayout, CpuRuns, Place, layout_for, layout_named
from .outliers import CpuOutliers
from .pages import choose
from .polar import CpuPolar
from .step import Launch, library, strided, turned


def attend(args: AttnArgs) -> mx.array | None:
    """`[B, Hq, L, Dv]` in q's dtype, or None when this call isn't for the CPU kernels."""
    if not _serves(args):
        return None
    packed = args.max_packed > 0
    k_outlying, v_outlying = (packed and isinstance(side.layout, CpuOutliers) for side in (args.k, args.v))
    # Outliers of values come back apart and still to be rotated, so they may not be rounded yet.
    q = args.q.astype(mx.float32) if v_outlying else args.q
    projected = args.k.codec.project(q) if packed else q
    plain = args.k.codec.unrotate(q) if k_outlying else q
    arrays = [q, projected, plain, args.dense_k, args.dense_v, *args.k.arrays, *args.v.arrays]
    arrays += [a for a in (args.sinks, args.pages) if a is not None]
    try:
        mx.eval(arrays)
    except RuntimeError as error:  # of the model's own arithmetic before this call
        raise explained(error) or error from error
    _check(args)
    batch, heads, length, _ = q.shape
    queries = [cpu.rows_view(a) for a in (q, projected, plain)]
    dense_k, dense_v = cpu.rows_view(args.dense_k), cpu.rows_view(args.dense_v)
    lens = np.array(args.lens, np.int32)
    sinks = None if args.sinks is None else np.array(args.sinks.astype(mx.float32))
    pages = None if args.pages is None else np.ascontiguousarray(cpu.view(args.pages))
    dim = args.v.head_dim
    out = np.empty((batch, heads, length, 2 * dim if v_outlying else dim), queries[0].dtype)
    k, v = ([cpu.rows_view(a) for a in side.arrays] if packed else [] for side in (args.k, args.v))
    call = _prepared(args, k, v)
    call.columns = args.dense_k.shape[2]
    call.q, call.projected, call.plain = (cpu.Queries(*strided(a)) for a in queries)
    call.dtype = cpu.DTYPES[q.dtype]
    call.dense_k, call.dense_v = cpu.Dense(*strided(dense_k)), cpu.Dense(*strided(dense_v))
    call.lens, call.sinks = lens.ctypes.data, None if sinks is None else sinks.ctypes.data
    call.out, call.threads = out.ctypes.data, cpu.threads()
    if pages is not None:
        call.pages, call.page_count = pages.ctypes.data, pages.shape[2]
    cpu.call("opentq_attend", call)
    result = mx.array(out)
    if v_outlying:
        return (result[..., :dim] + args.v.codec.rotate(result[..., dim:])).astype(args.q.dtype)
    return result.view(mx.bfloat16) if q.dtype == mx.bfloat16 else result


def _prepared(args: AttnArgs, k: list[np.ndarray], v: list[np.ndarray]) -> cpu.Call:
    """A call over the packed arrays that `k` and `v` show, without queries, columns, lengths and output."""
    call = cpu.Call(batch=args.q.shape[0], kv_heads=args.kv_heads, gqa=args.gqa, length=args.q.shape[2])
    call.causal, call.dim_k, call.dim_v = args.causal, args.k.head_dim, args.v.head_dim
    call.k, call.v = _packed(args.k, k), _packed(args.v, v)
    call.k_outliers, call.v_outliers = _outliers(args.k, k), _outliers(args.v, v)
    call.scale, call.softcap, call.window = args.scale, args.softcap, args.window
    return call


def step(args: AttnArgs, fresh: Pair, center: mx.array | None) -> tuple[mx.array, mx.array, mx.array] | None:
    """A decode step (`contracts.backend.Backend.step`) of float32, or None: outliers, sketches, other rotations."""
    q, memo = args.q, args.k.memo
    key = "step", q.shape, q.dtype, args.window, args.causal, args.scale, args.softcap, args.max_packed > 0
    launch: Launch | None = memo.get(key, _UNKNOWN)
    fresh_kinds = q.dtype == fresh[0].dtype == fresh[1].dtype == mx.float32
    if args.mask is not None or args.pages is not None or not fresh_kinds:
        return None
    try:
        mx.eval(q, *fresh, args.dense_k, args.dense_v, *args.k.arrays, *args.v.arrays)
    except RuntimeError as error:  # of the model's own arithmetic before this call
        raise explained(error) or error from error
    if launch is _UNKNOWN or (launch is not None and launch.values is not args.v):
        launch = memo[key] = _launch(args)
    if launch is None:
        return None
    _check(args, fresh[0].shape[2])
    return launch(args, fresh, center)


_UNKNOWN: Any = object()


def _launch(args: AttnArgs) -> Launch | None:
    sides = args.k, args.v
    turns = tuple(turned(side.codec, side.head_dim) for side in sides)
    plain = type(args.k.codec).project is Codec.project and not any(isinstance(s.layout, CpuOutliers) for s in sides)
    if None in turns or not plain or not _serves(args) or library() is None or args.q.shape[2] == 0:
        return None
    k, v = ([cpu.rows_view(a) for a in side.arrays] if args.max_packed else [] for side in sides)
    call = _prepared(args, k, v)
    call.dtype = cpu.DTYPES[mx.float32]
    return Launch(args, call, (k, v), (bool(turns[0]), bool(turns[1])))


def layouts(k_codec: Codec, v_codec: Codec, dims: tuple[int, int]) -> tuple[Layout, Layout]:
    """The storage layouts these kernels want, canonical where they can't serve."""
    k, v = (_layout(*side) for side in zip("kv", (k_codec, v_codec), dims))
    return (CANONICAL, CANONICAL) if k is None or v is None else (k, v)


def _layout(kind: str, codec: Codec, dim: int) -> Layout | None:
    if codec.format(dim) == Halves():
        return None if dim % 16 else CANONICAL
    return layout_for(kind, codec, dim)


def _readable(side: PackedKV) -> bool:
    return isinstance(side.layout, CpuLayout) or (side.head_dim % 16 == 0 and side.format == Halves())


def _serves(args: AttnArgs) -> bool:
    return (
        _readable(args.k)
        and _readable(args.v)
        and args.mask is None
        and args.q.dtype in cpu.DTYPES
        and args.dense_k.dtype == args.dense_v.dtype == mx.float16
        and cpu.available()
    )


def _check(args: AttnArgs, fresh: int = 0) -> None:
    """Lengths that don't fit the buffers would read memory that isn't ours. `fresh` columns are still to come."""
    columns, length = args.dense_k.shape[2] + fresh, args.q.shape[2]
    for packed, sink, tail in args.lens:
        if not 0 <= sink <= tail <= columns - length or packed < 0:
            raise ValueError(f"lengths {(packed, sink, tail)} don't fit {columns} dense columns and {length} queries")
        for side in (args.k, args.v):
            rows = min((a.shape[2] for a in side.arrays), default=0)
            if packed > rows * side.layout.block:
                raise ValueError(f"{packed} packed tokens don't fit {rows} blocks of {side.layout.block}")
    if args.pages is not None:
        if args.window or args.pages.dtype != mx.int32 or args.pages.shape[:2] != (args.q.shape[0], args.kv_heads):
            raise ValueError(f"a list of pages {args.pages.shape} doesn't fit this call: {args.describe()}")
        listed = cpu.view(args.pages)
        if listed.size and not 0 <= listed.min() <= listed.max() < -(-args.max_packed // TOKENS):
            raise ValueError(f"a list of pages names one that is not among {args.max_packed} packed tokens")


def _outliers(side: PackedKV, views: list[np.ndarray]) -> cpu.Outliers:
    return side.layout.view(*views[-2:]) if views and isinstance(side.layout, CpuOutliers) else cpu.Outliers()


def _packed(side: PackedKV, views: list[np.ndarray]) -> ctypes.Array[cpu.Packed]:
    """One or two runs as the kernel reads them; without views no tokens, of whatever form."""
    runs = (cpu.Packed * 2)()
    layout, form = side.layout, side.format
    if isinstance(layout, CpuOutliers):
        layout, views = layout.inner, views[:-2]
    where: list[Place] = [(v.ctypes.data, v.strides[0], v.strides[1], v.strides[2]) for v in views]
    if where and isinstance(layout, CpuPolar):
        runs[0] = layout.view(where[0])
    elif where and isinstance(layout, CpuBlocks | CpuRuns):
        form = form.inner if isinstance(form, WithOutliers) else form
        books: tuple[Codebook | None, ...] = form.books if isinstance(form, Codebooks) else (None,)
        for i, (run, book) in enumerate(zip(layout.runs, books)):
            runs[i] = run.view(where[i], book)
    else:
        data, batch, head, row = where[0] if where else (None, 0, 0, 0)
        runs[0] = cpu.Packed(data, batch, head, TOKENS * row, 16, side.head_dim, side.head_dim, cpu.RAW)
    return runs


def checks() -> list[Check]:
    """What `opentq doctor` says about the kernels and about matrix products."""
    status = cpu.status()
    if status.error:
        found = Check("kernels", "slow", f"portable path only: {status.error}", "install g++ or clang++, or set CXX")
    else:
        found = Check("kernels", "ok", f"CPU, {status.isa}, {cpu.threads()} threads, by {status.compiler}")
    product = blas.status()
    slow = product.kind == "reference"
    return [found, Check("matrix product", "slow" if slow else "ok", f"{product.kind}: {product.detail}")]


BACKEND = Backend("cpu", cpu.available, attend, layouts, layout_named, step=step, choose=choose, checks=checks)
