"""opentq: long-context language models in the memory you have.

The KV cache is compressed once, and attention is computed directly on the compressed bytes, inside mlx-lm::

    import opentq
    model, tokenizer = opentq.load("mlx-community/Llama-3.2-3B-Instruct-4bit", kv="int4")
    print(opentq.generate(model, tokenizer, prompt="Hello"))   # mlx_lm.generate works the same

Names are imported on first use, so that `import opentq` costs nothing. Import it before mlx: on Linux CPUs it then
gives MLX a fast float32 matrix product (`kernels/cpu/blas.py`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .kernels.cpu import blas

blas.before_mlx()

__version__ = "0.1.0"

_HOME = {
    "KVSpec": "spec",
    "compress": "hosts.hooks",
    "uninstall": "hosts.hooks",
    "generate": "hosts.mlx_lm.load",
    "load": "hosts.mlx_lm.load",
    "make_cache": "hosts.mlx_lm.load",
    "report": "hosts.report",
}

__all__ = ["KVSpec", "__version__", "compress", "generate", "load", "make_cache", "report", "uninstall"]

if TYPE_CHECKING:
    from .hosts.hooks import compress, uninstall
    from .hosts.mlx_lm.load import generate, load, make_cache
    from .hosts.report import report
    from .spec.kv import KVSpec


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module 'opentq' has no attribute {name!r}")
