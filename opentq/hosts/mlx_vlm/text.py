"""A model of mlx-vlm behind mlx-lm's interface: what the commands and the server run.

It is called as mlx-lm calls its models and gives logits, so everything that is built on mlx-lm's generators works with
it. With `vision` it takes prompts with images, too (`vision.py`); without, its encoders are let go.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from .host import decoder

if TYPE_CHECKING:
    from .vision import Vision


class TextModel(nn.Module):
    """`model`'s language model: tokens `[B, L]` and caches to logits `[B, L, V]`."""

    vision: Vision | None = None

    def __init__(self, model: Any, config: Any):
        super().__init__()
        self.model = model
        self.model_type = getattr(self.language_model, "model_type", config.model_type)
        self.config = config
        self.args = getattr(config, "text_config", None) or config

    @property
    def language_model(self) -> Any:
        return decoder(self.model)

    def __call__(
        self, inputs: mx.array, cache: list[Any] | None = None, shifts: Sequence[int] = (), **options: Any
    ) -> mx.array:
        """`shifts`: what images before these tokens took from every sequence's positions (`ImagePrompt.shift`)."""
        language = self.language_model
        if hasattr(language, "get_rope_index"):
            # The model remembers the positions of the last conversation; those of text follow from the cache.
            language._position_ids = language._rope_deltas = None
            options["position_ids"] = _positions(inputs, cache, shifts)
        out = language(inputs, cache=cache, **options)
        return getattr(out, "logits", out)

    @property
    def layers(self) -> list[Any]:
        return self.language_model.layers

    def make_cache(self) -> list[Any]:
        """Fresh caches: compressed where `compress` said so."""
        from .private import caches

        return caches.make_prompt_cache(self.language_model)


class Shifted:
    """A model for the text after a prompt's images, for generators that know of none.

    `shown` is what a model with cross attention takes with the first tokens; later ones take only the images of it.
    """

    def __init__(self, model: TextModel, shift: int, shown: dict[str, Any]):
        self._model, self._shift, self._shown = model, shift, shown

    def __call__(self, inputs: mx.array, cache: list[Any] | None = None, **options: Any) -> mx.array:
        options |= self._shown
        self._shown = {k: v for k, v in self._shown.items() if k == "cross_attention_states"}
        return self._model(inputs, cache, (self._shift,), **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def load(path: str, tokenizer_config: dict[str, Any] | None = None, images: bool = False) -> tuple[Any, Any]:
    """`(model, tokenizer)` of a folder or repository, as `mlx_lm.load` returns them; with `images` the model has
    `vision`, where it takes them. Raises ModelError.
    """
    from mlx_lm.utils import load_tokenizer

    from ..mlx_lm.load import model_folder
    from .load import load as load_whole
    from .load import sees

    model, processor = load_whole(path)
    eos = getattr(model.config, "eos_token_id", None)
    tokenizer = load_tokenizer(Path(model_folder(path)), tokenizer_config, eos_token_ids=eos)
    if not tokenizer.has_chat_template and (template := getattr(processor, "chat_template", None)):
        extra = {**(tokenizer_config or {}), "chat_template": template}
        tokenizer = load_tokenizer(Path(model_folder(path)), extra, eos_token_ids=eos)
    if not (images and sees(model)):
        return TextModel(decoder(model), model.config), tokenizer
    from .vision import Vision

    text = TextModel(model, model.config)
    text.vision = Vision(model, processor)
    return text, tokenizer


def _positions(inputs: mx.array, cache: list[Any] | None, shifts: Sequence[int]) -> mx.array:
    """Time, height and width of text are the same: int32 `[3, B, L]`."""
    batch, length = inputs.shape
    offset = next((c.offset for c in cache or [] if getattr(c, "offset", None) is not None), 0)
    start = mx.maximum(offset, 0).reshape(-1, 1) if isinstance(offset, mx.array) else mx.array([[offset]])
    if any(shifts):
        start = start + mx.array(list(shifts))[:, None]
    return mx.broadcast_to((start + mx.arange(length))[None], (3, batch, length)).astype(mx.int32)
