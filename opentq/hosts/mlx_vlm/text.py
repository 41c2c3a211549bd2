"""A vision-language model that only mlx-vlm knows, as a text model: what the commands and the server run.

It is called as mlx-lm calls its models and gives logits, so everything that is built on mlx-lm's generators works with
it. Its encoders stay in memory and are not used; images go through `generate.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .host import decoder


class TextModel(nn.Module):
    """The language model of `model` behind mlx-lm's interface: tokens `[B, L]` and caches to logits `[B, L, V]`."""

    def __init__(self, model: Any):
        super().__init__()
        self.language_model = decoder(model)
        self.model_type = self.language_model.model_type
        self.config = model.config

    def __call__(self, inputs: mx.array, cache: list[Any] | None = None, **options: Any) -> mx.array:
        language = self.language_model
        if hasattr(language, "get_rope_index"):
            # The model remembers the positions of the last conversation; those of text follow from the cache.
            language._position_ids = language._rope_deltas = None
            options["position_ids"] = _positions(inputs, cache)
        out = language(inputs, cache=cache, **options)
        return getattr(out, "logits", out)

    @property
    def layers(self) -> list[Any]:
        return self.language_model.layers

    def make_cache(self) -> list[Any]:
        """Fresh caches: compressed where `compress` said so."""
        from .private import caches

        return caches.make_prompt_cache(self.language_model)


def load(path: str, tokenizer_config: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """`(model, tokenizer)` of a folder or repository, as `mlx_lm.load` returns them. Raises ModelError."""
    from mlx_lm.utils import load_tokenizer

    from ..mlx_lm.load import model_folder
    from .load import load as load_whole

    model, _ = load_whole(path)
    eos = getattr(model.config, "eos_token_id", None)
    return TextModel(model), load_tokenizer(Path(model_folder(path)), tokenizer_config, eos_token_ids=eos)


def _positions(inputs: mx.array, cache: list[Any] | None) -> mx.array:
    """Time, height and width of text are the same: int32 `[3, B, L]`."""
    batch, length = inputs.shape
    offset = next((c.offset for c in cache or [] if getattr(c, "offset", None) is not None), 0)
    start = mx.maximum(offset, 0).reshape(-1, 1) if isinstance(offset, mx.array) else mx.array([[offset]])
    return mx.broadcast_to((start + mx.arange(length))[None], (3, batch, length)).astype(mx.int32)
