"""mlx-lm's attention over its quantised cache (`--kv-bits`), called with its own function on its own format."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from . import Entry

if TYPE_CHECKING:
    from ..kernel import Problem

GROUP = 64
"""mlx-lm's default `--kv-group-size`."""


def entries(dim: int) -> list[Entry]:
    """8 and 4 bits, on as many threads as MLX likes."""
    return [Entry("mlx-lm", f"kv-bits {bits}", partial(Quantized, bits)) for bits in (8, 4)]


class Quantized:
    engine = "mlx-lm"
    served_by = "quantized_scaled_dot_product_attention"

    def __init__(self, bits: int, problem: Problem, threads: int):
        from ..kernel import scratch_of

        self.kv, self.bits, self.scale = f"kv-bits {bits}", bits, problem.scale
        # The CPU's quantised products are for float32 models; on a GPU the model is in half precision.
        dtype = mx.float32 if mx.default_device() == mx.Device(mx.cpu) else mx.float16
        self.q = mx.array(problem.q[None, :, None]).astype(dtype)
        self.k, self.v = (
            mx.quantize(mx.array(x[None]).astype(dtype), group_size=GROUP, bits=bits) for x in (problem.k, problem.v)
        )
        mx.eval(self.q, self.k, self.v)
        self.scratch = scratch_of(self.call)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (*self.k, *self.v))

    def call(self) -> mx.array:
        from ...hosts.mlx_lm.private import quantized_scaled_dot_product_attention

        queries = mx.array(self.q)  # the function scales them in place
        out = quantized_scaled_dot_product_attention(
            queries, self.k, self.v, scale=self.scale, mask=None, group_size=GROUP, bits=self.bits
        )
        mx.eval(out)
        return out

    def stored(self, heads: int) -> tuple[np.ndarray, np.ndarray]:
        def decoded(side: tuple[mx.array, ...]) -> np.ndarray:
            codes, scales, biases = (a[0, :heads] for a in side)
            return np.array(mx.dequantize(codes, scales, biases, GROUP, self.bits).astype(mx.float32))

        return decoded(self.k), decoded(self.v)
