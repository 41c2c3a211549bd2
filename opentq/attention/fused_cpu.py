"""Attention by the compiled CPU kernels: decode and prefill straight on stored bytes (kernels/attend.cpp).

Serves affine and codebook codecs stored in the CPU's blocked layout, and raw fp16, in any pairing of keys and values;
any GQA ratio, window, sinks, softcap and ragged lengths. Says "not me" for masks given as arrays. Inputs are evaluated
here, because the kernel reads their memory.

Numerical class: fp16. Queries and probabilities go through the integer products as 15-bit integers (one step per query,
one per group and block of values), everything else is fp32: the error is that of naive attention in fp16, or less.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..codecs.base import Codec
from ..codecs.raw import Raw
from ..kernels import build, cpu
from ..kernels.cpu_layout import TOKENS, CpuBlocks
from ..kernels.layout import CANONICAL, Layout
from .args import AttnArgs, PackedKV


def attend(args: AttnArgs) -> mx.array | None:
    """`[B, Hq, L, Dv]` in q's dtype, or None when this call isn't for the CPU kernels."""
    if not _serves(args):
        return None
    arrays = [args.q, args.dense_k, args.dense_v, *args.k.arrays, *args.v.arrays]
    if args.sinks is not None:
        arrays.append(args.sinks)
    mx.eval(arrays)
    batch, heads, length, _ = args.q.shape
    _check(args)
    q, dense_k, dense_v = (cpu.rows_view(a) for a in (args.q, args.dense_k, args.dense_v))
    lens = np.array(args.lens, np.int32)
    sinks = None if args.sinks is None else np.array(args.sinks.astype(mx.float32))
    out = np.empty((batch, heads, length, args.v.head_dim), q.dtype)
    packed = args.max_packed > 0
    keep = [cpu.rows_view(side.arrays[0]) if packed else None for side in (args.k, args.v)]
    call = cpu.Call(
        batch,
        args.kv_heads,
        args.gqa,
        length,
        args.dense_k.shape[2],
        q.ctypes.data,
        *(s // q.itemsize for s in q.strides[:3]),
        cpu.DTYPES[args.q.dtype],
        args.causal,
        _packed(args.k, keep[0]),
        _packed(args.v, keep[1]),
        _dense(dense_k),
        _dense(dense_v),
        lens.ctypes.data,
        None if sinks is None else sinks.ctypes.data,
        out.ctypes.data,
        args.scale,
        args.softcap,
        args.window,
        cpu.threads(),
    )
    cpu.call("opentq_attend", call)
    result = mx.array(out)
    return result.view(mx.bfloat16) if args.q.dtype == mx.bfloat16 else result


def layouts(k_codec: Codec, v_codec: Codec, dims: tuple[int, int]) -> tuple[Layout, Layout]:
    """The storage layouts these kernels want, canonical where they can't serve."""
    k, v = (_layout(*side) for side in zip("kv", (k_codec, v_codec), dims))
    if k is None or v is None or build.active_dialect() != "cpu" or not cpu.available():
        return CANONICAL, CANONICAL
    return k, v


def _layout(kind: str, codec: Codec, dim: int) -> Layout | None:
    if isinstance(codec, Raw):
        return None if dim % 16 else CANONICAL
    return CpuBlocks.of(kind, codec, dim)


def _readable(side: PackedKV) -> bool:
    return isinstance(side.layout, CpuBlocks) or (isinstance(side.codec, Raw) and side.head_dim % 16 == 0)


def _serves(args: AttnArgs) -> bool:
    return (
        _readable(args.k)
        and _readable(args.v)
        and args.mask is None
        and args.q.dtype in cpu.DTYPES
        and args.dense_k.dtype == args.dense_v.dtype == mx.float16
        and cpu.available()
    )


def _check(args: AttnArgs) -> None:
    """Lengths that don't fit the buffers would read memory that isn't ours."""
    columns, length = args.dense_k.shape[2], args.q.shape[2]
    for packed, sink, tail in args.lens:
        if not 0 <= sink <= tail <= columns - length or packed < 0:
            raise ValueError(f"lengths {(packed, sink, tail)} don't fit {columns} dense columns and {length} queries")
        for side in (args.k, args.v):
            rows = side.arrays[0].shape[2] if side.arrays else 0
            if packed > rows * side.layout.block:
                raise ValueError(f"{packed} packed tokens don't fit {rows} blocks of {side.layout.block}")


def _packed(side: PackedKV, view: np.ndarray | None) -> cpu.Packed:
    batch, head, row = (0, 0, 0) if view is None else view.strides[:3]
    data = None if view is None else view.ctypes.data
    if isinstance(side.layout, CpuBlocks):
        return side.layout.view((data, batch, head, row))
    return cpu.Packed(data, batch, head, TOKENS * row, 16, side.head_dim, side.head_dim, cpu.RAW)


def _dense(view: np.ndarray) -> cpu.Dense:
    return cpu.Dense(view.ctypes.data, *(s // view.itemsize for s in view.strides[:3]))
