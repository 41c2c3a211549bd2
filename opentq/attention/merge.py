"""Log-sum-exp merge: attention over splits of the key axis, put together exactly (flash-decoding).

The result of a split is `(acc, m, l)`: the maximum score m, `l = sum exp(s - m)` and `acc = sum exp(s - m) v`. Merging
two rescales both to the larger maximum. A split in which a row sees no key has `m = -inf, l = 0, acc = 0`.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx


class Partial(NamedTuple):
    """acc `[..., Dv]`, m `[..., 1]`, l `[..., 1]`, all float32."""

    acc: mx.array
    m: mx.array
    l: mx.array  # noqa: E741  the literature's name

    def finish(self, dtype: mx.Dtype) -> mx.array:
        """The attention output; rows that saw no key at all give zeros."""
        return (self.acc / mx.where(self.l == 0, 1.0, self.l)).astype(dtype)


def softmax_partial(scores: mx.array, values: mx.array) -> Partial:
    """One split: scores `[..., L, S]` float32 (-inf where masked) and values `[..., S, Dv]` float32."""
    m = scores.max(-1, keepdims=True)
    weights = mx.exp(scores - finite(m))
    return Partial(weights @ values, m, weights.sum(-1, keepdims=True))


def merge(a: Partial | None, b: Partial) -> Partial:
    if a is None:
        return b
    m = mx.maximum(a.m, b.m)
    wa, wb = mx.exp(a.m - finite(m)), mx.exp(b.m - finite(m))
    return Partial(a.acc * wa + b.acc * wb, m, a.l * wa + b.l * wb)


def finite(m: mx.array) -> mx.array:
    """-inf as 0, so that `exp(-inf - m)` is 0 and never NaN."""
    return mx.where(m == -mx.inf, 0.0, m)
