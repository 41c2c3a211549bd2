"""Attention by the compiled CPU kernels: decode and prefill straight on stored bytes (attend.cpp).

Serves affine, codebook and polar codecs stored in the CPU's own layouts, with or without outlier channels apart, and
raw fp16, in any pairing of keys and values; any GQA ratio, window, sinks, softcap and ragged lengths. Says "not me" for
masks given as arrays. Inputs are evaluated here, because the kernel reads their memory.

Numerical class: fp16. Queries and probabilities go through the integer products as 15-bit integers (one step per query,
one per group and block of values), everything else is fp32: the error is that of naive attention in fp16, or less.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ...contracts.attention import AttnArgs
from ...contracts.backend import Backend
from ...contracts.check import Check
from ...contracts.codec import Codec, Halves
from ...contracts.layout import CANONICAL, Layout
from ...errors import explained
from .. import extension
from . import blas, pages
from . import library as cpu
from .blocks import TOKENS
from .call import check, prepared, serves
from .layout import layout_for, layout_named
from .outliers import CpuOutliers
from .step import step, strided


def attend(args: AttnArgs) -> mx.array | None:
    """`[B, Hq, L, Dv]` in q's dtype, or None when this call isn't for the CPU kernels."""
    if not serves(args):
        return None
    outlying = args.max_packed > 0 and isinstance(args.v.layout, CpuOutliers)
    # Outliers of values come back apart and still to be rotated, so they may not be rounded yet.
    q, dim = args.q.astype(mx.float32) if outlying else args.q, args.v.head_dim
    call, held = _call(args, q)
    out = np.empty((*q.shape[:3], 2 * dim if outlying else dim), held[0].dtype)
    call.out = out.ctypes.data
    cpu.call("opentq_attend", call)
    result = mx.array(out)
    if outlying:
        return (result[..., :dim] + args.v.codec.rotate(result[..., dim:])).astype(args.q.dtype)
    return result.view(mx.bfloat16) if q.dtype == mx.bfloat16 else result


def weigh(args: AttnArgs) -> mx.array | None:
    """Weights of the blocks of `args.pages`, or of all: see `attention.pages.weigh`."""
    if not serves(args) or args.window or not args.max_packed:
        return None
    call, _held = _call(args, args.q, fresh=True)
    count = args.listed or -(-args.max_packed // TOKENS)
    # Blocks that a shorter sequence does not have are left alone.
    out = np.zeros((args.q.shape[0], args.kv_heads, args.q.shape[2], args.gqa, count), np.float32)
    call.weights, call.page_count = out.ctypes.data, count
    cpu.call("opentq_attend", call)
    return mx.array(out.swapaxes(2, 3).reshape(*out.shape[:2], -1, count))


def select(
    sketches: mx.array, channels: mx.array, args: AttnArgs, plain: mx.array, many: int, count: int
) -> mx.array | None:
    """The whole choice of pages in one call: see `contracts.backend.Backend.select`."""
    by_sketch, (batch, heads, width) = -(-args.max_packed // TOKENS) > many, channels.shape
    if not serves(args) or args.window or not pages.serves(sketches, width + plain.shape[3]):
        return None
    plain = plain.astype(mx.float32)
    call, held = _call(args, args.q, True, [plain, sketches, channels])
    lengths, out = np.array([n for n, _, _ in args.lens], np.int32), np.empty((batch, heads, count), np.int32)
    chosen = cpu.PageCall(packed=lengths.ctypes.data, out=out.ctypes.data, batch=batch, kv_heads=heads, count=count)
    chosen.keys, chosen.many, chosen.threads = ctypes.addressof(call), many, call.threads
    if by_sketch:
        whole = cpu.view(plain).reshape(batch, heads, -1, plain.shape[3]) * np.float32(args.scale)
        few = np.take_along_axis(whole, cpu.view(channels)[:, :, None], axis=-1)
        held += pages.sketched(chosen, sketches, np.concatenate([few, whole], axis=-1), args.max_packed)
    cpu.call("opentq_pages", chosen)
    return mx.array(out)


def _call(
    args: AttnArgs, q: mx.array, fresh: bool = False, others: Sequence[mx.array] = ()
) -> tuple[cpu.Call, list[np.ndarray]]:
    """The kernel's call but for where results go, and what it points to, the queries first.

    `fresh`: the columns of this step's own tokens may still be missing, because none is read. `others` are evaluated in
    the same go.
    """
    packed = args.max_packed > 0
    projected = args.k.codec.project(q) if packed else q
    plain = args.k.codec.unrotate(q) if packed and isinstance(args.k.layout, CpuOutliers) else q
    arrays = [q, projected, plain, args.dense_k, args.dense_v]
    arrays += [a for a in (args.sinks, args.pages, *others) if a is not None]
    try:
        mx.eval(arrays)
    except RuntimeError as error:  # of the model's own arithmetic before this call
        raise explained(error) or error from error
    check(args, q.shape[2] if fresh else 0)
    held = [cpu.rows_view(a) for a in (q, projected, plain, args.dense_k, args.dense_v)]
    same, k, v = args.once(("cpu", packed, args.alike), lambda: _same(args))
    call = cpu.Call.from_buffer_copy(same)
    call.columns, call.dtype, call.threads = args.dense_k.shape[2], cpu.DTYPES[q.dtype], cpu.threads()
    call.q, call.projected, call.plain = (cpu.Queries(*strided(a)) for a in held[:3])
    call.dense_k, call.dense_v = (cpu.Dense(*strided(a)) for a in held[3:])
    held += [*k, *v, np.array(args.lens, np.int32)]
    call.lens = held[-1].ctypes.data
    if args.sinks is not None:
        held.append(np.array(args.sinks.astype(mx.float32)))
        call.sinks = held[-1].ctypes.data
    if args.pages is not None:
        held.append(np.ascontiguousarray(cpu.view(args.pages)))
        call.pages, call.page_count = held[-1].ctypes.data, args.listed
    return call, held


def _same(args: AttnArgs) -> tuple[cpu.Call, list[np.ndarray], list[np.ndarray]]:
    """What is the same in every such call over these packed arrays, and views of them."""
    mx.eval(args.k.arrays, args.v.arrays)
    k, v = ([cpu.rows_view(a) for a in side.arrays] if args.max_packed else [] for side in (args.k, args.v))
    return prepared(args, k, v), k, v


def layouts(k_codec: Codec, v_codec: Codec, dims: tuple[int, int]) -> tuple[Layout, Layout]:
    """The storage layouts these kernels want, canonical where they can't serve."""
    k, v = (_layout(*side) for side in zip("kv", (k_codec, v_codec), dims))
    return (CANONICAL, CANONICAL) if k is None or v is None else (k, v)


def _layout(kind: str, codec: Codec, dim: int) -> Layout | None:
    if codec.format(dim) == Halves():
        return None if dim % 16 else CANONICAL
    return layout_for(kind, codec, dim)


def checks() -> list[Check]:
    """What `opentq doctor` says about the kernels, decode steps and matrix products."""
    status = cpu.status()
    if status.error:
        hint = "install g++ or clang++, or set CXX"
        found = [Check("kernels", "slow", f"portable path only: {status.error}", hint)]
    else:
        about = f"CPU, {status.isa}, {cpu.threads()} threads, by {status.compiler}"
        found = [Check("kernels", "ok", about), Check("decode steps", "ok", "operations of MLX's graph")]
        if why := extension.missing("graph"):
            hint = "install Python's headers"
            found[1] = Check("decode steps", "slow", f"waited for in every layer: {why.splitlines()[0]}", hint)
    product = blas.status()
    slow = product.kind == "reference"
    return [*found, Check("matrix product", "slow" if slow else "ok", f"{product.kind}: {product.detail}")]


BACKEND = Backend(
    "cpu",
    cpu.available,
    attend,
    layouts,
    layout_named,
    step=step,
    choose=pages.choose,
    checks=checks,
    weigh=weigh,
    select=select,
)
