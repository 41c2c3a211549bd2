"""What opentq takes from inside mlx-vlm, checked against the version that it was written for."""

from __future__ import annotations

import inspect
from importlib.metadata import version
from typing import Any

from mlx_vlm.generate import common
from mlx_vlm.models import base
from mlx_vlm.models import cache as caches

from ..host import HookError

TESTED = "0.7.10"
WANTED = "mlx-vlm>=0.7.10,<0.8"
ATTENTION = ("queries", "keys", "values", "cache", "scale", "mask", "sinks")


def check() -> None:
    """Raise HookError, with both versions, when mlx-vlm is not as this package expects it."""
    function = base.scaled_dot_product_attention
    found = tuple(inspect.signature(function).parameters)
    made = tuple(inspect.signature(caches.make_prompt_cache).parameters)
    lacks = [name for name in ("KVCache", "RotatingKVCache", "ArraysCache", "CacheList") if not hasattr(caches, name)]
    lacks += [name for name in ("_chunked_prefill_enabled",) if not hasattr(common, name)]
    if found == ATTENTION and made == ("model", "max_kv_size") and not lacks:
        return
    what = f"it lacks {', '.join(lacks)}" if lacks else f"its functions take {found} and {made}"
    raise HookError(
        f"mlx-vlm {version('mlx-vlm')} is not supported ({what}); opentq was made for {TESTED}: install '{WANTED}'"
    )


def chunks_allowed(model: Any, inputs: dict[str, Any]) -> bool:
    """Whether a prompt of such processor outputs may be read in chunks: an image may be seen in both directions."""
    return common._chunked_prefill_enabled(model, input_ids=inputs["input_ids"], prefill_kwargs=inputs)
