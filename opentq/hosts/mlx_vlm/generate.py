"""One generation of an mlx-vlm model with its measurements: a prompt and images in, text out."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx_vlm
from mlx_vlm.prompt_utils import apply_chat_template
from PIL import Image

from ...errors import UserError
from .. import hooks
from ..mlx_lm.generate import Request, Result
from ..mlx_lm.load import cache_bytes, fp16_bytes
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
    decoder = hooks.host_of(model).decoder(model)
    caches = vlm_caches.make_prompt_cache(decoder)
    if request.seed is not None:
        mx.random.seed(request.seed)
    options: dict[str, Any] = {"temperature": request.temp, "min_p": request.min_p, "top_k": request.top_k}
    options |= {"top_p": request.top_p or 1.0, "prefill_step_size": request.prefill_step_size}
    mx.reset_peak_memory()
    text, reason, prompt_tokens = "", "length", 0
    tokens: list[int] = []
    options["image"] = images or None
    start = first = time.perf_counter()
    for response in mlx_vlm.stream_generate(
        model, processor, prompt, max_tokens=request.max_tokens, prompt_cache=caches, **options
    ):
        if not tokens:
            first = time.perf_counter()
        # The last response repeats the last token with the reason to stop.
        if response.token is not None and response.generation_tokens > len(tokens):
            tokens.append(response.token)
        text += response.text
        prompt_tokens = response.prompt_tokens or prompt_tokens
        if on_text and response.text:
            on_text(response.text)
        reason = response.finish_reason or reason
    end = time.perf_counter()
    context = max((c.size() for c in caches), default=0)
    record = hooks.installed(model)
    return Result(
        text=text,
        tokens=tokens,
        prompt_tokens=prompt_tokens,
        prompt_seconds=first - start,
        generation_seconds=end - first,
        finish_reason=reason,
        context=context,
        kv_spec=str(record.spec) if record else "mlx-vlm",
        kv_bytes=cache_bytes(caches),
        kv_fp16_bytes=fp16_bytes(model, context),
        peak_bytes=mx.get_peak_memory(),
    )
