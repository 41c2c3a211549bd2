"""MLX's own fused attention over fp16 and float32 keys and values: what an uncompressed mlx-lm cache uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

if TYPE_CHECKING:
    from ..kernel import Problem


def require() -> None:
    """MLX is always there."""


def arms(problem: Problem, threads: int) -> list[MLX]:
    """fp16 and float32."""
    return [MLX(problem, mx.float16, "f16"), MLX(problem, mx.float32, "f32")]


class MLX:
    engine = "mlx"
    served_by = "mx.fast.scaled_dot_product_attention"

    def __init__(self, problem: Problem, dtype: mx.Dtype, kv: str):
        from ..kernel import _scratch

        self.kv, self.scale = kv, problem.scale
        self.q = mx.array(problem.q[None, :, None]).astype(dtype)
        self.k, self.v = (mx.array(x[None]).astype(dtype) for x in (problem.k, problem.v))
        mx.eval(self.q, self.k, self.v)
        self.scratch = _scratch(self.call)

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def call(self) -> mx.array:
        out = mx.fast.scaled_dot_product_attention(self.q, self.k, self.v, scale=self.scale)
        mx.eval(out)
        return out

    def stored(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array(self.k[0].astype(mx.float32)), np.array(self.v[0].astype(mx.float32))
