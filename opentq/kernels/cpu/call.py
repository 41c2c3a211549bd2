"""A call of the attention kernel, and what has to hold before one is made."""

from __future__ import annotations

import ctypes

import mlx.core as mx
import numpy as np

from ...contracts.attention import AttnArgs, PackedKV
from ...contracts.codec import Codebook, Codebooks, Halves, WithOutliers
from . import library as cpu
from .blocks import TOKENS
from .layout import CpuBlocks, CpuLayout, CpuRuns, Place
from .outliers import CpuOutliers
from .polar import CpuPolar


def _readable(side: PackedKV) -> bool:
    return isinstance(side.layout, CpuLayout) or (side.head_dim % 16 == 0 and side.format == Halves())


def serves(args: AttnArgs) -> bool:
    return (
        _readable(args.k)
        and _readable(args.v)
        and args.mask is None
        and args.q.dtype in cpu.DTYPES
        and args.dense_k.dtype == args.dense_v.dtype == mx.float16
        and cpu.available()
    )


def check(args: AttnArgs, fresh: int = 0) -> None:
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


def prepared(args: AttnArgs, k: list[np.ndarray], v: list[np.ndarray]) -> cpu.Call:
    """A call over the packed arrays that `k` and `v` show, without queries, columns, lengths and output."""
    call = cpu.Call(batch=args.q.shape[0], kv_heads=args.kv_heads, gqa=args.gqa, length=args.q.shape[2])
    call.causal, call.dim_k, call.dim_v = args.causal, args.k.head_dim, args.v.head_dim
    call.k, call.v = _packed(args.k, k), _packed(args.v, v)
    call.k_outliers, call.v_outliers = _outliers(args.k, k), _outliers(args.v, v)
    call.scale, call.softcap, call.window = args.scale, args.softcap, args.window
    return call
