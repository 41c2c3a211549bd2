"""Which model a loaded model is, told by its numbers: what was measured on one must not be used on another."""

from __future__ import annotations

import hashlib
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

SAMPLE = 8
"""Numbers of every parameter that are looked at."""


def fingerprint(model: Any) -> str:
    """A hash of the parameters' names, shapes and first numbers; the same in every float type that holds them."""
    digest = hashlib.sha256()
    parameters: dict[str, mx.array] = tree_flatten(model.parameters(), destination={})  # type: ignore[assignment]
    for name, array in sorted(parameters.items()):
        first = np.array(array.reshape(-1)[:SAMPLE].astype(mx.float32))
        digest.update(f"{name}{tuple(array.shape)}".encode())
        digest.update(first.tobytes())
    return digest.hexdigest()[:16]
