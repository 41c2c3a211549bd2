"""Prompts with images: what a model's processor and towers make of them, read chunk by chunk into any caches.

`Vision.prompt` turns text and images into tokens, in any thread. `ImagePrompt.read` gives a chunk of them to the model,
in the thread that runs it. After the last image a prompt is text again, and only its positions may be shifted; but
models with cross attention (mllama) show the images to every token.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_vlm.prompt_utils import MODEL_CONFIG, get_message_json
from mlx_vlm.utils import prepare_inputs, should_add_special_tokens
from PIL import Image

from ...errors import UserError, first_line
from .host import decoder
from .images import BYTES
from .private import chunks_allowed
from .text import Shifted, TextModel

WHOLE = 8192
"""Most tokens that are read at once, for the models whose images see each other in both directions."""

CROSS = ("cross_attention_states", "cross_attention_mask", "full_text_row_masked_out_mask")
"""What models with cross attention take with the tokens of a prompt; with those of an answer, the first of it."""

BROKEN = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, AssertionError, OSError)
"""What processors and towers raise for images that they can't take."""


class VisionError(UserError):
    """These images can't be read by this model; the message says why."""


@dataclass(eq=False)
class ImagePrompt:
    """A prompt with images.

    Attributes:
        tokens: ids of the whole prompt, an image's places among them.
        end: tokens up to the last place of an image; what follows is text. All of them, with cross attention.
        marks: (place, digest) of the images: from that place on, what the caches hold depends on the image, too.
        inputs: what the processor made: `input_ids [1, L]`, pixels, and what else the model takes.
        shift: how far positions are from places after the images, for models with positions of several axes (M-RoPE);
            known after `examine`.
        whole: whether all up to `end` must be read at once; known after `examine`.
    """

    tokens: list[int]
    end: int
    marks: tuple[tuple[int, bytes], ...]
    inputs: dict[str, Any] = field(repr=False)
    shift: int = 0
    whole: bool = False
    _examined: bool = False
    _embedded: dict[str, Any] | None = field(default=None, repr=False)
    _shown: dict[str, Any] = field(default_factory=dict, repr=False)  # what cross attention takes with the last token

    @property
    def nbytes(self) -> int:
        """Bytes that it holds until it is read."""
        return sum(v.nbytes for v in self.inputs.values() if isinstance(v, mx.array))

    def examine(self, model: Any, alone: bool = False) -> None:
        """Find `shift`, `whole` and, with cross attention, `end`.

        Raises VisionError for a prompt that would be read at once and is too long, and for cross attention unless the
        answer is written `alone`, not in a batch.
        """
        if self._examined:
            return
        inputs, language = self.inputs, decoder(model)
        if _crosses(language):
            if not alone:
                raise VisionError(
                    "this model shows its images to every token (cross attention), which a batch of answers can't do: "
                    "use opentq generate --image or opentq chat"
                )
            self.end = len(self.tokens)
        self.whole = not chunks_allowed(model, inputs)
        if hasattr(language, "get_rope_index"):
            known = {**inputs, "attention_mask": inputs.get("attention_mask")}
            takes = inspect.signature(language.get_rope_index).parameters
            try:
                positions, _ = language.get_rope_index(**{k: v for k, v in known.items() if k in takes})
                inputs["position_ids"] = positions
                self.shift = int(positions.max().item()) + 1 - len(self.tokens)
            except (ValueError, TypeError):
                self.whole = True  # only the towers know the positions
        if self.whole and self.end > WHOLE:
            raise VisionError(
                f"this model reads all up to the last image at once, which can be {WHOLE} tokens, not {self.end}"
            )
        self._examined = True

    def begin(self, model: TextModel, caches: list[Any], step: int = 2048) -> tuple[Any, int]:
        """Read all up to the last image into empty `caches`.

        Returns what stands for the model for the text that follows, and how many tokens the caches hold. Raises
        VisionError.
        """
        self.examine(model.model, alone=True)
        end, at = min(self.end, len(self.tokens) - 1), 0
        while at < end:
            stop = end if self.whole else min(at + step, end)
            self.read(model.model, caches, at, stop)
            mx.eval([c.state for c in caches])
            at = stop
        return self.speaker(model), at

    def speaker(self, model: TextModel) -> TextModel | Shifted:
        """What stands for the model for the text that follows; what is not needed any more is let go."""
        if _crosses(decoder(model.model)) and not self._shown:  # all of it was read in an earlier turn
            self._embed(model.model)
        shown = self._shown
        self.release()
        return Shifted(model, self.shift, shown) if self.shift or shown else model

    def read(self, model: Any, caches: Sequence[Any], start: int, stop: int) -> Any:
        """Give the tokens from `start` to `stop` to the model; `start` is before `end`. Returns logits `[1, L, V]`.

        Raises VisionError.
        """
        if self._embedded is None:
            self._embedded = self._embed(model)
        language, rest = decoder(model), dict(self._embedded)
        ids, embeddings = rest.pop("input_ids"), rest.pop("inputs_embeds")
        if (positions := rest.pop("position_ids", None)) is not None:
            rest["position_ids"] = positions[..., start:stop]
        _forget(language)
        out = language(
            inputs=ids[:, start:stop],
            inputs_embeds=embeddings[:, start:stop],
            cache=caches,
            n_to_process=stop - start,
            **rest,
        )
        return getattr(out, "logits", out)

    def release(self) -> None:
        """Let go what is not needed any more once all is read."""
        self.inputs, self._embedded, self._shown = {}, None, {}

    def _embed(self, model: Any) -> dict[str, Any]:
        """What the language model takes: `inputs_embeds [1, L, E]`, `input_ids`, and what the model adds to them."""
        given = dict(self.inputs)
        ids, pixels, mask = (given.pop(name, None) for name in ("input_ids", "pixel_values", "attention_mask"))
        positions = given.pop("position_ids", None)
        language = decoder(model)
        _forget(language)
        try:
            features = model.get_input_embeddings(ids, pixels, mask=mask, **given)
            found = {k: v for k, v in features.to_dict().items() if v is not None}
            mx.eval(*[v for v in found.values() if isinstance(v, mx.array)])
        except BROKEN as error:
            raise VisionError(f"the model can't read these images: {first_line(error)}") from error
        if found["inputs_embeds"].shape[1] != len(self.tokens):
            raise VisionError(
                "this model puts more tokens in an image's place than its processor says: only mlx_vlm.generate, after "
                "opentq.compress(model), can show it one"
            )
        if _crosses(language):
            self._shown = {name: found[name] for name in CROSS if name in found}
        if hasattr(language, "get_rope_index"):
            if positions is None:  # they were not known without the towers
                positions = found.get("position_ids", language._position_ids)
                self.shift = int(positions.max().item()) + 1 - len(self.tokens)
            found.pop("rope_deltas", None)
            found["position_ids"] = positions
        return {**given, **found, "input_ids": ids}


class Vision:
    """A model's eyes: its processor, and the words that its template has for images."""

    largest = BYTES
    """Bytes of the largest image file."""

    def __init__(self, model: Any, processor: Any):
        self.model = model
        self.processor = processor

    def message(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message whose content has images, as the model's template takes it."""
        kind, parts = self.model.config.model_type.lower(), message["content"]
        count = sum(p["type"] == "image" for p in parts)
        plain = [{"type": "image"} if p["type"] == "image" else p for p in parts]
        if kind not in MODEL_CONFIG:
            return message | {"content": plain}
        try:
            made = get_message_json(kind, plain, message["role"], num_images=count)
        except ValueError as error:
            raise VisionError(first_line(error)) from error
        return message | made if isinstance(made, dict) else message | {"content": made}

    def prompt(self, text: str, images: list[Image.Image], digests: list[bytes]) -> ImagePrompt:
        """The prompt of a rendered `text` with the places of `images`, whose contents `digests` stand for.

        Raises VisionError.
        """
        config = self.model.config
        try:
            inputs = prepare_inputs(
                self.processor,
                images=images,
                prompts=text,
                image_token_index=getattr(config, "image_token_index", None),
                add_special_tokens=should_add_special_tokens(config.model_type, self.processor),
            )
            mx.eval(*[v for v in inputs.values() if isinstance(v, mx.array)])
        except BROKEN as error:
            raise VisionError(f"the model's processor refuses these images: {first_line(error)}") from error
        inputs = {k: v for k, v in inputs.items() if v is not None}
        ids = np.array(inputs["input_ids"])
        if ids.ndim != 2 or ids.shape[0] != 1:
            raise VisionError("the model's processor makes no single prompt of these images")
        end, marks = places(ids[0], self._image_token(ids[0]), digests)
        return ImagePrompt(np.maximum(ids[0], 0).tolist(), end, marks, inputs)

    def _image_token(self, ids: np.ndarray) -> int | None:
        config = self.model.config
        names = ("image_token_id", "image_token_index")
        return next((t for name in names if (t := getattr(config, name, None)) is not None and t in ids), None)


def places(ids: np.ndarray, token: int | None, digests: list[bytes]) -> tuple[int, tuple[tuple[int, bytes], ...]]:
    """`end` and `marks` of an ImagePrompt: where each image's run of `token` begins.

    Where runs and images can't be told to be the same, the first place stands for all images; where no place is known,
    the whole prompt does. So what is remembered may be too little, and is never another image's.
    """
    if token is None:
        return len(ids), ((0, b"".join(digests)),)
    where = np.flatnonzero(ids == token)
    starts = [int(i) for i in where if i == 0 or ids[i - 1] != token]
    end = int(where[-1]) + 1
    if len(starts) == len(digests):
        return end, tuple(zip(starts, digests))
    return end, ((starts[0], b"".join(digests)),)


def _crosses(language: Any) -> bool:
    """Whether every token attends to the images by cross attention."""
    return CROSS[0] in inspect.signature(type(language).__call__).parameters


def _forget(language: Any) -> None:
    """The model remembers the positions of the last prompt: here they are always given."""
    if hasattr(language, "get_rope_index"):
        language._position_ids = language._rope_deltas = None
