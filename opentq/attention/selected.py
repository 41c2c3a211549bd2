"""Attention over chosen tokens of a packed cache: models that choose tokens themselves (DSA, QSA) name their positions.

Only the chosen rows are gathered, packed as they are, and decoded: the scratch is K decoded tokens however long the
context is. Plain MLX operations, on any back end.
"""

from __future__ import annotations

import mlx.core as mx

from ..contracts.attention import AttnArgs, PackedKV, lens_array


def attend(args: AttnArgs, positions: mx.array) -> mx.array:
    """Attention of one query per sequence, `q [B, Hq, 1, Dk]`, to some of its tokens: `[B, Hq, 1, Dv]` in q's dtype.

    Args:
        args: the call, of a cache that stores one row per token; its `mask` is not read, because `positions` says
            what is seen.
        positions: int32 `[B, K]`, logical positions in each sequence; negative ones are no tokens.
    """
    assert args.k.layout.block == args.v.layout.block == 1, "single tokens can't be gathered from blocks"
    batch, heads, _, _ = args.q.shape
    lens = lens_array(args.lens)
    packed, sink, tail = (lens[:, i : i + 1] for i in range(3))
    in_packed = (positions >= sink) & (positions < sink + packed)
    row = mx.clip(positions - sink, 0, mx.maximum(packed - 1, 0))
    column = mx.where(positions < sink, positions, tail + positions - sink - packed)
    column = mx.clip(column, 0, args.dense_k.shape[2] - 1)
    keys, values = (
        _rows(side, dense, row, column, in_packed) for side, dense in ((args.k, args.dense_k), (args.v, args.dense_v))
    )
    q = args.q.astype(mx.float32).reshape(batch, args.kv_heads, args.gqa, -1) * args.scale
    scores = mx.where((positions >= 0)[:, None, None], q @ keys.swapaxes(-1, -2), -mx.inf)
    if args.sinks is None:
        weights = mx.softmax(scores, axis=-1)
    else:
        sinks = mx.broadcast_to(
            args.sinks.astype(mx.float32).reshape(1, args.kv_heads, args.gqa, 1), (*scores.shape[:3], 1)
        )
        weights = mx.softmax(mx.concatenate([scores, sinks], axis=-1), axis=-1)[..., :-1]
    return (weights @ values).reshape(batch, heads, 1, -1).astype(args.q.dtype)


def _rows(side: PackedKV, dense: mx.array, row: mx.array, column: mx.array, in_packed: mx.array) -> mx.array:
    """Decoded float32 `[B, H, K, D]`: packed rows where `in_packed`, else fp16 columns."""
    heads = dense.shape[1]
    out = mx.take_along_axis(dense, _index(column, heads, dense.ndim), axis=2).astype(mx.float32)
    if not side.arrays:
        return out
    stored = tuple(mx.take_along_axis(a, _index(row, a.shape[1], a.ndim), axis=2) for a in side.arrays)
    packed = side.layout.load(stored)
    decoded = side.codec.decode(packed, mx.float32, side.head_dim)
    return mx.where(in_packed[:, None, :, None], decoded, out)


def _index(rows: mx.array, heads: int, ndim: int) -> mx.array:
    """`[B, K]` as an index along axis 2 of an array `[B, heads, rows, ...]`."""
    batch, count = rows.shape
    return mx.broadcast_to(rows.reshape(batch, 1, count, *[1] * (ndim - 3)), (batch, heads, count, *[1] * (ndim - 3)))
