"""The judge: plain fp32 attention over the decoded cache. Slow, obvious, and used only to check the others."""

from __future__ import annotations

import mlx.core as mx

from ..contracts.attention import AttnArgs
from ..contracts.layout import FLUSH


def attend(args: AttnArgs) -> mx.array:
    """fp32 softmax attention for one `AttnArgs`, sequence by sequence: `[B, Hq, L, Dv]` float32."""
    return mx.concatenate([_one(args, b) for b in range(args.q.shape[0])])


def visible(args: AttnArgs, b: int) -> mx.array:
    """bool `[L, S]`: which keys, in logical order, each query row of sequence b sees."""
    packed, sink, tail_start = args.lens[b]
    tail = args.dense_k.shape[2] - tail_start
    keys = mx.arange(sink + packed + tail)[None]
    rows = mx.arange(args.q.shape[2])[:, None] + keys.size - args.q.shape[2]
    seen = mx.ones((args.q.shape[2], keys.size), dtype=mx.bool_)
    if args.causal:
        seen = seen & (keys <= rows)
    if args.window:
        seen = seen & (keys > rows - args.window)
    return seen


def read(args: AttnArgs, b: int) -> mx.array:
    """bool `[Hkv, S]`: which keys of sequence b, in logical order, are in pages that are read."""
    packed, sink, tail_start = args.lens[b]
    held = sink + packed + args.dense_k.shape[2] - tail_start
    if args.pages is None:
        return mx.ones((args.kv_heads, held), dtype=mx.bool_)
    page = (mx.arange(held) - sink) // FLUSH
    listed = args.pages[b, :, : -(-packed // FLUSH)]
    is_packed = (mx.arange(held) >= sink) & (mx.arange(held) < sink + packed)
    return (listed[:, :, None] == page).any(1) | ~is_packed


def _one(args: AttnArgs, b: int) -> mx.array:
    packed, sink, tail_start = args.lens[b]

    def logical(kv, dense):  # [1, Hkv, S, D] float32, in logical order
        middle = kv.decode(0, packed, mx.float32)[b : b + 1] if packed else dense[b : b + 1, :, :0]
        parts = [dense[b : b + 1, :, :sink], middle, dense[b : b + 1, :, tail_start:]]
        return mx.concatenate([p.astype(mx.float32) for p in parts], axis=2)

    k = mx.repeat(logical(args.k, args.dense_k), args.gqa, axis=1)
    v = mx.repeat(logical(args.v, args.dense_v), args.gqa, axis=1)
    scores = (args.q[b : b + 1].astype(mx.float32) @ k.swapaxes(-1, -2)) * args.scale
    if args.softcap:
        scores = mx.tanh(scores / args.softcap) * args.softcap
    in_pages = mx.repeat(read(args, b), args.gqa, axis=0)[None, :, None]
    scores = mx.where(visible(args, b) & in_pages, scores, -mx.inf)
    if args.mask is not None:
        mask = args.mask[b : b + 1] if args.mask.ndim == 4 and args.mask.shape[0] > 1 else args.mask
        scores = mx.where(mask, scores, -mx.inf) if mask.dtype == mx.bool_ else scores + mask.astype(mx.float32)
    top = scores.max(-1, keepdims=True)
    if args.sinks is not None:
        extra = args.sinks.astype(mx.float32).reshape(1, -1, 1, 1)
        top = mx.maximum(top, extra)
    top = mx.where(top == -mx.inf, 0.0, top)
    weights = mx.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    if args.sinks is not None:
        total = total + mx.exp(extra - top)
    return (weights @ v) / mx.where(total == 0, 1.0, total)
