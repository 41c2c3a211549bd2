"""MLX's own fused attention over fp16 and float32 keys and values: what an uncompressed mlx-lm cache uses."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from . import Entry

if TYPE_CHECKING:
    from ..kernel import Problem


DTYPES = {"f16": mx.float16, "f32": mx.float32}


def entries(dim: int) -> list[Entry]:
    """fp16 and float32, on as many threads as MLX likes."""
    return [Entry("mlx", kv, partial(MLX, kv)) for kv in DTYPES]


class MLX:
    engine = "mlx"
    served_by = "mx.fast.scaled_dot_product_attention"

    def __init__(self, kv: str, problem: Problem, threads: int):
        from ..kernel import scratch_of

        self.kv, self.scale, dtype = kv, problem.scale, DTYPES[kv]
        self.q = mx.array(problem.q[None, :, None]).astype(dtype)
        self.k, self.v = (mx.array(x[None]).astype(dtype) for x in (problem.k, problem.v))
        mx.eval(self.q, self.k, self.v)
        self.scratch = scratch_of(self.call)

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def call(self) -> mx.array:
        out = mx.fast.scaled_dot_product_attention(self.q, self.k, self.v, scale=self.scale)
        mx.eval(out)
        return out

    def stored(self, heads: int) -> tuple[np.ndarray, np.ndarray]:
        k, v = (x[0, :heads].astype(mx.float32) for x in (self.k, self.v))
        return np.array(k), np.array(v)
