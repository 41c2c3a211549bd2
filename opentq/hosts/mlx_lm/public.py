"""The documented names of mlx-lm that the rooms above use, imported when first asked for.

Only `hosts` imports mlx-lm (an import contract holds it), so this is the whole of what the project needs of it, beside
`private.py`. Laziness matters: `mlx_lm.generate` imports transformers, which takes two seconds.
"""

from __future__ import annotations

import importlib
from typing import Any

_CACHE = ("ArraysCache", "CacheList", "ChunkedKVCache", "KVCache", "QuantizedKVCache", "RotatingKVCache")
_HOME = {
    **dict.fromkeys((*_CACHE, "make_prompt_cache", "can_trim_prompt_cache", "trim_prompt_cache"), "models.cache"),
    **dict.fromkeys(("generate_step", "speculative_generate_step", "stream_generate"), "generate"),
    **dict.fromkeys(("make_logits_processors", "make_sampler"), "sample_utils"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"mlx_lm.{_HOME[name]}"), name)
