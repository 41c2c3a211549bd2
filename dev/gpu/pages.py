"""The choice of pages on the GPU: lists are judged by the softmax mass that they hold beside the best that exist."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from opentq.attention import pages
from opentq.kernels.cuda import pages as kernels

CASES = [
    # packed tokens of two sequences, channels, dim, KV heads, query heads each, pages to choose
    ((1300, 700), 6, 64, 3, 8, 4),
    ((2050, 2050), 16, 40, 3, 3, 9),
    ((2560, 100), 4, 128, 8, 8, 1),
    ((131072, 65000), 4, 128, 8, 8, 64),
    ((131072, 131072), 6, 64, 3, 3, 16),
]
TIES = 1e-4
"""Of the mass: pages whose weights are this near may stand for each other."""


def run(log) -> None:
    """One row: cases, how many failed, and the most mass that a list missed of the best one's."""
    rng, failed, worst = np.random.default_rng(0), 0, 0.0
    for case in CASES:
        packed, channels, dim, heads, rows, count = case
        keys = mx.array(rng.standard_normal((2, heads, -(-max(packed) // 64) * 64, dim), dtype=np.float32))
        chosen = mx.broadcast_to(mx.arange(1, channels + 1, dtype=mx.int32), (2, heads, channels))
        selector = pages.Selector(pages.encode(keys, chosen), chosen, 64 * count, sums=True)
        queries = selector.queries(mx.array(rng.standard_normal((2, heads * rows, 1, dim), dtype=np.float32)), 1.0)
        mine, best = kernels.choose(selector.sketches, queries, packed, count), selector.choose(queries, packed, count)
        weights = selector.weights(queries, max(packed) // 64)
        for b, tokens in enumerate(packed):
            there, whole = -(-tokens // 64), tokens // 64
            mass = np.array(mx.softmax(weights[b, :, :, :whole], axis=-1).sum(1))
            for h in range(heads):
                got, wanted = (np.array(x[b, h])[: min(count, there)].tolist() for x in (mine, best))
                held, most = (sum(mass[h, p] for p in picked if p < whole) for picked in (got, wanted))
                short = 1 - held / most if most else 0.0
                sound = got == sorted(set(got)) and got[-1] == there - 1
                failed += int(not sound or short > TIES)
                worst = max(worst, float(short))
    log.test("pages of most weight", not failed, f"{failed} lists hold less than the best, by up to {worst:.1e}")
    log.row("pages", cases=len(CASES), failed=failed, worst_share_missed=worst)
