"""`opentq generate --image`."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError

if TYPE_CHECKING:
    from ..dialogue.pictures import Picture
    from ..hosts.mlx_vlm.vision import ImagePrompt

Images = Annotated[
    list[Path] | None, typer.Option("--image", help="An image that the prompt is about; may be repeated.")
]


def read(files: Sequence[Path]) -> list[Picture]:
    """Images that can be decoded, before a model is loaded. Raises UserError."""
    from ..hosts.mlx_lm.load import ranks
    from ..hosts.mlx_vlm.load import EXTRA

    if importlib.util.find_spec("mlx_vlm") is None:
        raise UserError(f"images need mlx-vlm: {EXTRA}")
    if ranks() > 1:
        raise UserError("images can't be used on several machines")
    from ..dialogue.pictures import Picture
    from ..hosts.mlx_vlm import images

    return [Picture(images.read(file), repr(str(file))) for file in files]


def prompt(model: Any, tokenizer: Any, text: str, system: str | None, images: Sequence[Picture]) -> ImagePrompt:
    """The prompt of a text about images. Raises UserError."""
    from ..dialogue.errors import ApiError
    from ..dialogue.pictures import content
    from ..dialogue.prompt import Prompter
    from ..dialogue.request import GenerationRequest

    messages = [{"role": "system", "content": system}] if system else []
    ask = GenerationRequest(messages=(*messages, {"role": "user", "content": content([*images, text])}))
    try:
        made = Prompter(tokenizer, 1 << 31, vision=getattr(model, "vision", None)).encode(ask).images
    except ApiError as error:
        raise UserError(error.message) from error
    assert made is not None
    return made
