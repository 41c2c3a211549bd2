"""What the tests compare with: random caches, the same-dtype naive attention, and the rule that judges fast paths."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np

from opentq.attention import dispatch, reference
from opentq.caches.single import OpenTQCache
from opentq.codecs import Codec
from opentq.contracts.attention import AttnArgs
from opentq.contracts.layout import CANONICAL
from opentq.kernels.cpu import attention as cpu
from opentq.kernels.cuda import layout as cuda_layout
from opentq.kernels.metal import attention as metal

from .matrix import Shape


def vectors(shape: Shape, tokens: int, seed: int = 0, dtype: mx.Dtype = mx.float32) -> tuple[mx.array, mx.array]:
    """Keys and values `[B, H, T, D]` with some outlier channels, as real keys have."""
    out = []
    for dim in (shape.key_dim, shape.value_dim):
        # Tokens outermost: a longer call with the same seed begins with the same tokens.
        rng = np.random.default_rng([seed, len(out)])
        x = rng.standard_normal((tokens, shape.batch, shape.kv_heads, dim), dtype=np.float32).transpose(1, 2, 0, 3)
        x[..., 3] *= 6
        x[..., 5] += 2
        out.append(mx.array(x).astype(dtype))
    return out[0], out[1]


def queries(shape: Shape, length: int, seed: int = 1, dtype: mx.Dtype = mx.float32) -> mx.array:
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((shape.batch, shape.q_heads, length, shape.key_dim), dtype=np.float32)
    return mx.array(q).astype(dtype)


def fill(cache: OpenTQCache, k: mx.array, v: mx.array, chunks: list[int]):
    """Append k, v in pieces of the given sizes (the last size repeats); returns the last handles."""
    done, sizes, handles = 0, iter(chunks), None
    size = 1
    while done < k.shape[2]:
        size = next(sizes, size)
        stop = min(done + size, k.shape[2])
        handles = cache.update_and_fetch(k[:, :, done:stop], v[:, :, done:stop])
        done = stop
    return handles


def args_of(handles, q: mx.array, **options) -> AttnArgs:
    """The AttnArgs that a step makes for query q (rotated there, as the cache does)."""
    step = handles[0].step
    return AttnArgs(
        q=step.k.codec.rotate(q),
        k=step.k,
        v=step.v,
        dense_k=step.dense_k,
        dense_v=step.dense_v,
        lens=step.lens,
        scale=options.pop("scale", q.shape[-1] ** -0.5),
        **options,
    )


def judge(
    args: AttnArgs, out: mx.array | None = None, atol: float = 2e-5, dtype: mx.Dtype | None = None, model: bool = False
) -> None:
    """Hold the dispatched output to the rule: error to fp32 at most twice that of naive attention in the same dtype.

    Args:
        dtype: the numerical class where it is not q's: the CPU kernels are fp16-class for float32 queries, too.
        model: whether `out` is what the model gets, not in the values' own basis any more.
    """
    if out is None:
        out, _ = dispatch.attend(args)
    assert out.dtype == args.q.dtype
    ref = reference.attend(args)
    naive = _naive(args if dtype is None else replace(args, q=args.q.astype(dtype)))
    if model:
        ref, naive = args.v.codec.unrotate(ref), args.v.codec.unrotate(naive)
    worst = mx.abs(out.astype(mx.float32) - ref).max().item()
    allowed = 2 * mx.abs(naive.astype(mx.float32) - ref).max().item() + atol
    assert mx.isfinite(out).all().item(), "output has NaN or infinity"
    assert worst <= allowed, f"error {worst:.2e} above {allowed:.2e}: {args.describe()}"


def _naive(args: AttnArgs) -> mx.array:
    """Plain attention with every intermediate in q's dtype, over the same decoded values.

    Products are added up in float32 and then rounded, as GPUs do it; a CPU is slow at any other dtype's.
    """
    dtype = args.q.dtype
    outs = []

    def rounded(x: mx.array) -> mx.array:
        return x.astype(dtype).astype(mx.float32)

    for b in range(args.q.shape[0]):
        packed, sink, tail_start = args.lens[b]

        def logical(kv, dense, b=b, packed=packed, sink=sink, tail_start=tail_start):
            middle = kv.decode(0, packed, dtype)[b : b + 1] if packed else dense[b : b + 1, :, :0]
            parts = [dense[b : b + 1, :, :sink], middle, dense[b : b + 1, :, tail_start:]]
            return mx.repeat(mx.concatenate([rounded(p) for p in parts], axis=2), args.gqa, axis=1)

        keys, values = logical(args.k, args.dense_k), logical(args.v, args.dense_v)
        scores = rounded(rounded(rounded(args.q[b : b + 1]) @ keys.swapaxes(-1, -2)) * args.scale)
        if args.softcap:
            scores = rounded(mx.tanh(scores / args.softcap) * args.softcap)
        seen = reference.visible(args, b)
        if args.mask is not None and args.mask.dtype == mx.bool_:
            seen = seen & args.mask
        elif args.mask is not None:
            scores = rounded(scores + args.mask)
        scores = mx.where(seen, scores, mx.finfo(dtype).min)
        if args.sinks is not None:
            extra = mx.broadcast_to(rounded(args.sinks).reshape(1, -1, 1, 1), (*scores.shape[:3], 1))
            scores = mx.concatenate([scores, extra], axis=-1)
        weights = rounded(mx.softmax(scores, axis=-1))
        outs.append((weights[..., : values.shape[2]] @ values).astype(dtype))
    return mx.concatenate(outs)


def kernels_serve(backend: str, codecs: tuple[Codec, Codec], dims: tuple[int, int]) -> bool:
    """Whether a back end's kernels serve keys and values of these codecs and dims; the same on every machine."""
    k, v = codecs
    if backend == "cuda":
        return CANONICAL not in cuda_layout.layouts(k, v, dims)
    side = cpu._layout if backend == "cpu" else lambda _, codec, dim: metal.codec_side(codec, dim)
    return None not in (side("k", k, dims[0]), side("v", v, dims[1]))


def same_state(a: OpenTQCache, b: OpenTQCache) -> bool:
    """Whether two caches hold the same tokens, bit for bit, in the same places."""
    if (a.n_packed, a.extent.sink, a.offset) != (b.n_packed, b.extent.sink, b.offset):
        return False
    pairs = [(a.dense_k, b.dense_k), (a.dense_v, b.dense_v)]
    for mine, theirs in zip(a.canonical(), b.canonical()):
        pairs += list(zip(mine, theirs))
    return all(mx.array_equal(x, y).item() for x, y in pairs)


def held_arrays(value, seen=None) -> dict[int, mx.array]:
    """Every mx.array reachable from an object."""
    seen = {} if seen is None else seen
    if isinstance(value, mx.array):
        seen[id(value)] = value
    elif isinstance(value, (list, tuple)):
        for item in value:
            held_arrays(item, seen)
    elif hasattr(value, "__dict__"):
        for item in vars(value).values():
            held_arrays(item, seen)
    return seen
