"""One generation of an mlx-vlm model with its measurements: a prompt and images in, text out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx_vlm
from mlx_vlm.prompt_utils import apply_chat_template
from PIL import Image

from ...errors import UserError
from .. import hooks
from ..generation import Meter, Request, Result
from .load import sees
from .private import caches as vlm_caches


def prompt_of(model: Any, processor: Any, text: str, images: int, system: str | None = None) -> str:
    """The text with the places of its images, through the chat template. Raises UserError for a model without eyes."""
    if images and not sees(model):
        raise UserError(f"{model.config.model_type} takes text only: leave --image out")
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    return str(apply_chat_template(processor, model.config, messages, num_images=images))


def run(
    model: Any,
    processor: Any,
    prompt: str,
    images: list[Image.Image],
    request: Request,
    on_text: Callable[[str], None] | None = None,
) -> Result:
    """Generate; of `request`, what is about the prompt's tokens and drafts is not read."""
    caches = vlm_caches.make_prompt_cache(hooks.host_of(model).decoder(model))
    options: dict[str, Any] = {"temperature": request.temp, "min_p": request.min_p, "top_k": request.top_k}
    options |= {"top_p": request.top_p or 1.0, "prefill_step_size": request.prefill_step_size, "image": images or None}
    prompt_tokens = 0
    meter = Meter(request.seed, on_text)
    for response in mlx_vlm.stream_generate(
        model, processor, prompt, max_tokens=request.max_tokens, prompt_cache=caches, **options
    ):
        # The last response repeats the last token with the reason to stop.
        new = response.generation_tokens > len(meter.tokens)
        meter.take(response.text, response.token if new else None, response.finish_reason)
        prompt_tokens = response.prompt_tokens or prompt_tokens
    return meter.result(model, caches, prompt_tokens)
