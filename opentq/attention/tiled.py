"""The portable path: attention over a packed cache in plain MLX operations, on any back end, for any shape and mask.

The key axis is walked in tiles. One tile of keys and values is decoded at a time, scored, folded into a running
log-sum-exp merge and forgotten; query rows are walked in blocks, too. So the scratch (decoded tile + scores) is at
most `SCRATCH` bytes however long the context is. Kernels are faster; nothing is more general.
"""

from __future__ import annotations

import mlx.core as mx

from ..contracts.attention import AttnArgs, lens_array
from .merge import Partial, merge, softmax_partial

SCRATCH = 64 << 20
"""Bytes that one decoded KV tile and its score tile may take together."""

NAME = "tiled"

ROWS = 512
"""Query rows per block."""


def attend(args: AttnArgs) -> mx.array:
    """Serve any `AttnArgs`: `[B, Hq, L, Dv]` in q's dtype."""
    args = args.picked()
    length = args.q.shape[2]
    blocks = [_rows(args, r, min(r + ROWS, length)) for r in range(0, length, ROWS)]
    return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=2)


def tile_tokens(args: AttnArgs, rows: int) -> int:
    """Tokens per tile, a multiple of 64, so that tile and scores stay below `SCRATCH`."""
    batch, q_heads = args.q.shape[:2]
    decoded = batch * args.kv_heads * (args.k.head_dim + args.v.head_dim) * 4
    scores = batch * q_heads * rows * 4 * 2  # scores and their exponentials
    return max(64, SCRATCH // (decoded + scores) // 64 * 64)


def _rows(args: AttnArgs, r0: int, r1: int) -> mx.array:
    """Query rows [r0, r1) over the three regions."""
    batch, q_heads, length, _ = args.q.shape
    rows = r1 - r0
    q = args.q[:, :, r0:r1].astype(mx.float32) * args.scale
    q = q.reshape(batch, args.kv_heads, args.gqa * rows, -1)
    lens = lens_array(args.lens)
    packed, sink, tail_start = (lens[:, i].reshape(-1, 1, 1) for i in range(3))
    columns = args.dense_k.shape[2]
    # Logical position of every query row: [B, rows, 1].
    row_pos = sink + packed - tail_start + columns - length + mx.arange(r0, r1).reshape(1, -1, 1)
    total = sink + packed - tail_start + columns

    acc: Partial | None = None
    step = tile_tokens(args, rows)
    low = _lowest_visible(args, r0) // 64 * 64 if args.window else 0
    for start in range(low, args.max_packed, step):
        stop = min(start + step, args.max_packed)
        index = mx.arange(start, stop).reshape(1, 1, -1)
        k, v = args.k.decode(start, stop, mx.float32), args.v.decode(start, stop, mx.float32)
        acc = merge(acc, _tile(args, q, k, v, sink + index, index < packed, row_pos, total, r0, r1))
        # Tiles must not pile up in one lazy graph: their memory is the point.
        mx.eval(acc)
    # Columns after the last row of this block are in its future.
    end = columns - length + r1 if args.causal else columns
    step = max(64, step)
    for start in range(0, end, step):
        stop = min(start + step, end)
        index = mx.arange(start, stop).reshape(1, 1, -1)
        in_sink = index < sink
        key_pos = mx.where(in_sink, index, sink + packed + index - tail_start)
        k, v = (d[:, :, start:stop].astype(mx.float32) for d in (args.dense_k, args.dense_v))
        tile = _tile(args, q, k, v, key_pos, in_sink | (index >= tail_start), row_pos, total, r0, r1)
        acc = merge(acc, tile)
        if end > step:
            mx.eval(acc)
    assert acc is not None  # the tokens of the call itself are always there
    if args.sinks is not None:
        logits = mx.broadcast_to(args.sinks.astype(mx.float32).reshape(1, q_heads, 1, 1), (batch, q_heads, rows, 1))
        logits = logits.reshape(batch, args.kv_heads, args.gqa * rows, 1)
        acc = merge(acc, Partial(mx.zeros_like(acc.acc), logits, mx.ones_like(logits)))
    return acc.finish(args.q.dtype).reshape(batch, q_heads, rows, -1)


def _tile(args, q, k, v, key_pos, valid, row_pos, total, r0, r1) -> Partial:
    """One tile: keys `[B, Hkv, S, Dk]` at logical positions key_pos `[B, 1, S]`, of which `valid` count."""
    batch, kv_heads, _, _ = q.shape
    scores = (q @ k.swapaxes(-1, -2)).reshape(batch, kv_heads * args.gqa, r1 - r0, -1)
    if args.softcap:
        scores = mx.tanh(scores / args.softcap) * args.softcap
    seen = valid
    if args.causal:
        seen = seen & (key_pos <= row_pos)
    if args.window:
        seen = seen & (key_pos > row_pos - args.window)
    scores = mx.where(seen[:, None], scores, -mx.inf)
    if args.mask is not None:
        mask = _mask_tile(args.mask, key_pos, total, batch, r0, r1)
        scores = mx.where(mask, scores, -mx.inf) if mask.dtype == mx.bool_ else scores + mask.astype(mx.float32)
    return softmax_partial(scores.reshape(batch, kv_heads, args.gqa * (r1 - r0), -1), v)


def _mask_tile(mask: mx.array, key_pos: mx.array, total: mx.array, batch: int, r0: int, r1: int) -> mx.array:
    """The columns of an array mask that belong to one tile: `[B or 1, H or 1, rows, S]`."""
    while mask.ndim < 4:
        mask = mask[None]
    if mask.shape[2] != 1:
        mask = mask[:, :, r0:r1]
    if mask.shape[3] == 1:
        return mask
    # Masks are aligned to the last key, so that a mask wider than the cache (left padding) still fits.
    column = mx.clip(key_pos + (mask.shape[3] - total), 0, mask.shape[3] - 1)
    shape = (batch, mask.shape[1], mask.shape[2], column.shape[-1])
    mask = mx.broadcast_to(mask, (batch, *mask.shape[1:]))
    return mx.take_along_axis(mask, mx.broadcast_to(column[:, None], shape), axis=3)


def _lowest_visible(args: AttnArgs, r0: int) -> int:
    """The lowest packed token that any query row from r0 on can see through the window."""
    ahead = args.q.shape[2] - r0
    lows = []
    for packed, _sink, tail_start in args.lens:
        tail = args.dense_k.shape[2] - tail_start
        lows.append(packed + tail - ahead - args.window + 1)
    return max(0, min(lows))
