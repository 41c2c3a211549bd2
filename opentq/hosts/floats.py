"""What weights are computed in: on a CPU, float32 products are the fast ones, by a factor of tens.

MLX multiplies quantised weights on a CPU slowly and on one thread; float32 ones go through the BLAS
(`kernels/cpu/blas.py`). So there quantised layers are decoded once, where that leaves memory for what else a model
needs; larger models stay quantised.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from .. import machine

SHARE = 0.5
"""Share of the machine's memory that float32 weights may take."""


def to_float32(model: Any) -> None:
    """On a CPU: weights in float32, and quantised ones decoded where they fit. Elsewhere nothing."""
    if mx.default_device() != mx.Device(mx.cpu):
        return
    model.set_dtype(mx.float32)  # before decoding: products of fp16 scales are not rounded to fp16
    if decodes(_float32_bytes(model), machine.ram()):
        from mlx_lm.utils import dequantize_model  # brings transformers, which planning does without

        # Layer by layer, so that the old weights go as the new ones come.
        for part in [*getattr(model, "layers", []), model]:
            dequantize_model(part)
            mx.eval(part.parameters())
    mx.eval(model.parameters())


def decodes(float32_bytes: float, memory: int) -> bool:
    """Whether a CPU with so much memory decodes weights that take so many bytes in float32."""
    return float32_bytes <= SHARE * memory


def _float32_bytes(model: Any) -> int:
    """Bytes of all parameters in float32, quantised ones decoded."""
    arrays: dict[str, mx.array] = tree_flatten(model.parameters(), destination={})  # type: ignore[assignment]
    total = sum(p.size for p in arrays.values())
    for _, module in model.named_modules():
        if "scales" in module and hasattr(module, "bits"):
            total += module.weight.size * 32 // module.bits - module.weight.size - module.scales.size
            total -= module.biases.size if module.get("biases") is not None else 0
    return 4 * total
