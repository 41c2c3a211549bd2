"""The judge of kernels at first use: two small cases each, against the portable path. "" or, in words, what is wrong.

The cases are sequences of ragged length, and the model's own shape: heads, head dim, codecs, dtype, window, sinks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import numpy as np

from ..codecs import rotation as rotation_of
from ..contracts.attention import EXACT, AttnArgs, AttnFn, Lengths, PackedKV
from ..contracts.backend import Backend, Pair, StepFn
from ..contracts.codec import Codec
from ..contracts.layout import CANONICAL, FLUSH, Layout
from . import pages, tiled
from .pages import PAGE, Selector, encode, weigh

BOUND = {mx.bfloat16: 1e-2}
"""Relative error to the portable path from which a kernel is wrong, by the query's dtype; `BOUND_HALF` for others."""
BOUND_HALF = 5e-3
PACKED_BOUND = 1.01
"""How much further from the vector than the codec's own bits a back end's may be."""
COUNT = 3
"""Pages of the cases that stand for a choice."""
PREFILL = 24
"""Query tokens of the cases that stand for a prompt; shorter calls are judged as long as they are."""

CASES: tuple[tuple[tuple[Lengths, ...], bool, int], ...] = (
    (((2 * FLUSH, 2, 5), (FLUSH, 0, 3)), False, 9),
    (((2 * FLUSH, 0, 0),), True, 17),
)
"""Lengths; whether with the model's own number of KV heads, or one; fp16 columns besides the call's own."""


def attention(function: AttnFn, args: AttnArgs) -> str:
    length = args.q.shape[2] if args.q.shape[2] <= EXACT else PREFILL
    for lens, own, columns in CASES:
        ours, theirs = _case(args, lens, args.kv_heads if own else 1, columns + length, length)
        out = function(ours)
        if out is None:  # kinds of calls that it serves at other lengths only
            continue
        if why := _differs(out, tiled.attend(theirs), args.q.dtype):
            return why
    return ""


def step(made: Callable[..., StepFn | None], args: AttnArgs, centred: bool) -> str:
    length, (k_codec, v_codec) = args.q.shape[2], (args.k.codec, args.v.codec)
    for lens, own, columns in CASES:
        ours, theirs = _case(args, lens, args.kv_heads if own else 1, columns, length)
        shape = (len(lens), ours.kv_heads, length)
        k, v = (_draw(*shape, side.head_dim, seed=i).astype(args.q.dtype) for i, side in enumerate((args.k, args.v), 1))
        center = _draw(*shape[:2], 1, args.k.head_dim, seed=3).astype(mx.float16) if centred else None
        launch = made(ours, (k, v), center)
        if launch is None:
            continue
        launch(replace(ours, q=-ours.q), (-k, -v), center)  # which the one that is judged may be made after
        done = launch(ours, (k, v), center)
        new = [c.rotate(x.astype(mx.float32)) for c, x in ((k_codec, k), (v_codec, v))]
        new[0] = new[0] if center is None else new[0] - center
        dense = [mx.concatenate([d, n.astype(mx.float16)], axis=2) for d, n in zip((ours.dense_k, ours.dense_v), new)]
        theirs = replace(theirs, q=k_codec.rotate(theirs.q), dense_k=dense[0], dense_v=dense[1])
        for got, expected in zip(done, (v_codec.unrotate(tiled.attend(theirs)), *dense)):
            if why := _differs(got, expected, args.q.dtype):
                return why
    return ""


def _draw(*shape: int, seed: int = 0) -> mx.array:
    """Standard normal numbers, not from MLX's generator, which is the user's."""
    return mx.array(np.random.default_rng(seed).standard_normal(shape, np.float32))


def _case(
    args: AttnArgs, lens: tuple[Lengths, ...], kv_heads: int, columns: int, length: int
) -> tuple[AttnArgs, AttnArgs]:
    """Random vectors in the place of `args`' own: as the kernel reads them, and for the portable path in fp32."""
    batch, heads = len(lens), kv_heads * args.gqa
    q = _draw(batch, heads, length, args.q.shape[3]).astype(args.q.dtype)
    tokens = max(packed for packed, _, _ in lens)
    sides, plain, dense = [], [], []
    for seed, kv in enumerate((args.k, args.v), 4):
        canonical = kv.codec.encode(_draw(batch, kv_heads, tokens, kv.head_dim, seed=seed).astype(mx.float16))
        sides.append(PackedKV(kv.codec, kv.layout, kv.layout.store(canonical), kv.head_dim))
        plain.append(PackedKV(kv.codec, CANONICAL, canonical, kv.head_dim))
        dense.append(_draw(batch, kv_heads, columns, kv.head_dim, seed=seed + 2).astype(mx.float16))
    newest = [[[packed // FLUSH - 1]] * kv_heads for packed, _, _ in lens]
    case = replace(
        args,
        q=q,
        k=sides[0],
        v=sides[1],
        dense_k=dense[0],
        dense_v=dense[1],
        lens=lens,
        window=min(args.window, FLUSH + 7),
        sinks=None if args.sinks is None else _draw(heads, seed=8).astype(args.sinks.dtype),
        pages=None if args.pages is None else mx.array(newest, mx.int32),
    )
    return case, replace(case, q=q.astype(mx.float32), k=plain[0], v=plain[1]).picked()


def packing(layout: Layout, codec: Codec, dim: int) -> str:
    y = _draw(1, 2, 2 * FLUSH, dim).astype(mx.float16)
    packed, expected = layout.load(layout.encode(codec, y)), codec.encode(y)
    mine, theirs = (_relative(codec.decode(p, mx.float32, dim), y) for p in (packed, expected))
    if not mine <= PACKED_BOUND * theirs + 1e-6:
        return f"is {mine:.1e} from the vector, the codec {theirs:.1e}"
    return ""


def extend(backend: Backend, codecs: Pair, dims: tuple[int, int], dtype: mx.Dtype) -> str:
    dense = _draw(1, 2, 5, dims[0]).astype(mx.float16), _draw(1, 2, 5, dims[1], seed=1).astype(mx.float16)
    fresh = _draw(1, 2, 3, dims[0], seed=2).astype(dtype), _draw(1, 2, 3, dims[1], seed=3).astype(dtype)
    got = backend.extend(codecs, dense, fresh)
    for codec, old, new, out in zip(codecs, dense, fresh, got or dense):
        plain = mx.concatenate([old, codec.rotate(new.astype(mx.float32)).astype(mx.float16)], axis=2)
        if why := _differs(out, plain, dtype):
            return why
    return ""


def rotation(backend: Backend, dim: int, dtype: mx.Dtype) -> str:
    x = _draw(3, 7, dim).astype(dtype)
    y = backend.rotate(x)
    return "does not serve" if y is None else _differs(y, rotation_of.plain(x), dtype)


def choice(backend: Backend, channels: int, heads: int, length: int, dim: int) -> str:
    """The share of the softmax that a back end's choice of pages has, in place of the pages: the last ones may tie."""
    for packed, kv_heads in (((5 * PAGE, 3 * PAGE + 5), 1), ((7 * PAGE,), heads)):
        batch, whole = len(packed), max(packed) // PAGE
        index = mx.broadcast_to(mx.arange(0, 2 * channels, 2, dtype=mx.int32) % dim, (batch, kv_heads, channels))
        keys, q = _draw(batch, kv_heads, whole * PAGE, dim), _draw(batch, kv_heads * length, 1, dim, seed=1)
        case = Selector(encode(keys, index), index, COUNT * PAGE, backend.sums)
        rows = case.queries(q, 4 * dim**-0.5)  # scores that differ from page to page
        found = backend.choose(case.sketches, rows, packed, COUNT)
        if found is None:
            continue
        if why := _misses(found, case.choose(rows, packed, COUNT), case.weights(rows, whole), packed):
            return why
    return ""


def _misses(found: mx.array, best: mx.array, weights: mx.array, packed: tuple[int, ...]) -> str:
    """Why a list of pages is no such list, or holds less of the softmax of `weights` than the portable path's."""
    whole = weights.shape[-1]
    newest = mx.array([-(-n // PAGE) - 1 for n in packed]).reshape(-1, 1, 1)
    kept = mx.arange(whole) < mx.array([n // PAGE for n in packed]).reshape(-1, 1, 1)
    share = mx.softmax(mx.where(kept[:, :, None], weights, -mx.inf), axis=-1).sum(2)
    mine, theirs = (
        float(mx.take_along_axis(share, mx.clip(chosen, 0, whole - 1), axis=-1).sum()) for chosen in (found, best)
    )
    listed = (found[..., 1:] > found[..., :-1]).all() & (found >= 0).all() & (found <= newest).all()
    if bool(listed & (found == newest).any(-1).all()) and mine >= (1 - BOUND_HALF) * theirs:
        return ""
    return f"reads {mine / theirs:.1%} of the softmax that the portable path reads"


def top(backend: Backend, heads: int, rows: int) -> str:
    for packed in ((5 * PAGE, 3 * PAGE + 5), (7 * PAGE,)):
        weights = 4 * _draw(len(packed), heads, rows, -(-max(packed) // PAGE))
        found = backend.top(weights, packed, COUNT)
        if found is not None and (why := _misses(found, pages.top(weights, packed, COUNT), weights, packed)):
            return why
    return ""


def weights(backend: Backend, args: AttnArgs) -> str:
    """A page that a sequence does not have counts for nothing."""
    for lens, own, columns in CASES:
        ours, theirs = _case(args, lens, args.kv_heads if own else 1, columns + args.q.shape[2], args.q.shape[2])
        found, expected = backend.weigh(ours), weigh(theirs)
        if found is None:
            continue
        there = expected > -mx.inf
        if why := _differs(mx.where(there, found, 0), mx.where(there, expected, 0), mx.float32):
            return why
    return ""


def selection(backend: Backend, args: AttnArgs, channels: int) -> str:
    """Both choices in one call: sketches name some of the pages, and keys choose among these."""
    dim, many = args.k.head_dim, COUNT + 2
    for packed, kv_heads in (((7 * PAGE, 3 * PAGE + 5), 1), ((7 * PAGE,), args.kv_heads)):
        lens: tuple[Lengths, ...] = tuple((n, 0, 0) for n in packed)
        ours, theirs = _case(replace(args, scale=4 * dim**-0.5), lens, kv_heads, args.q.shape[2], args.q.shape[2])
        plain, index = ours.q, mx.arange(0, 2 * channels, 2, dtype=mx.int32) % dim
        ours, theirs = (replace(a, q=a.k.codec.rotate(a.q)) for a in (ours, theirs))
        index = mx.broadcast_to(index, (len(packed), kv_heads, channels))
        keys = theirs.k.codec.unrotate(theirs.k.decode(0, 7 * PAGE, mx.float32))
        case = Selector(encode(keys, index), index, COUNT * PAGE, backend.sums)
        found = backend.select(case.sketches, index, ours, plain, many, COUNT)
        if found is None:
            continue
        best = pages.select(case, theirs, plain, many, COUNT)
        if why := _misses(found, best, weigh(theirs), packed):
            return why
    return ""


def _differs(out: mx.array, expected: mx.array, dtype: mx.Dtype) -> str:
    error = _relative(out, expected)
    good = error <= BOUND.get(dtype, BOUND_HALF)  # not so for NaN
    return "" if good else f"differs from the portable path by {error:.1e}"


def _relative(out: mx.array, expected: mx.array) -> float:
    a, b = out.astype(mx.float32), expected.astype(mx.float32)
    if a.shape != b.shape:
        return float("inf")
    return (mx.linalg.norm(a - b) / mx.linalg.norm(b)).item()  # type: ignore[return-value]
