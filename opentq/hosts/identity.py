"""Which model a loaded model is, told by its numbers: what was measured on one must not be used on another."""

from __future__ import annotations

import hashlib
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from .host import host_of

SAMPLE = 8
"""Numbers of every parameter that are looked at."""


def fingerprint(model: Any) -> str:
    """A hash of the parameters' names, shapes and first numbers; the same in every float type that holds them.

    Quantised weights count as what they stand for: a CPU may have decoded them (`floats.py`). Of a model with encoders
    its language model counts, which may be loaded without them.
    """
    model = host_of(model).decoder(model)
    digest = hashlib.sha256()
    parameters: dict[str, mx.array] = tree_flatten(model.parameters(), destination={})  # type: ignore[assignment]
    shapes = {name: tuple(array.shape) for name, array in parameters.items()}
    for path, module in model.named_modules():
        if "scales" in module and hasattr(module, "bits"):
            name = f"{path}.weight"
            *rows, words = shapes[name]
            shapes[name] = (*rows, words * 32 // module.bits)
            parameters[name] = _first_row(module)
            for key in ("scales", "biases"):
                parameters.pop(f"{path}.{key}", None)
    for name, array in sorted(parameters.items()):
        first = np.array(array.reshape(-1)[:SAMPLE].astype(mx.float32))
        digest.update(f"{name}{shapes[name]}".encode())
        digest.update(first.tobytes())
    return digest.hexdigest()[:16]


def _first_row(module: Any) -> mx.array:
    """The first row of a quantised layer's weights, decoded in float32."""

    def first(name: str) -> Any:
        array = module.get(name)
        return None if array is None else array.reshape(-1, array.shape[-1])[:1]

    scales, biases = first("scales"), first("biases")
    if module.mode == "affine":
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(first("weight"), scales, biases, module.group_size, module.bits, module.mode)
