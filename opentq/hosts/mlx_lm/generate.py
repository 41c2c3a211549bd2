"""One generation of an mlx-lm model: tokens in, text out (`hosts/generation.py` says what it cost)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from mlx_lm import stream_generate
from mlx_lm.models.cache import ArraysCache, RotatingKVCache
from mlx_lm.sample_utils import make_sampler

from ...errors import UserError
from ..generation import Meter, Request, Result
from .load import make_cache
from .tokens import Encoder, TooLong


def encode_prompt(tokenizer: Any, text: str, system: str | None = None, raw: bool = False, limit: int = 0) -> list[int]:
    """Token ids of a user message through the chat template, or of the bare text where it is `raw`.

    Raises UserError for an empty prompt, for a model without a template that is asked for one, for a system message
    without one, and for a prompt of more than `limit` tokens (0: any number), which is not tokenized whole for that.
    """
    if raw and system:
        raise UserError("--system-prompt goes through the chat template, which --ignore-chat-template leaves out")
    if not raw and not getattr(tokenizer, "has_chat_template", True):
        raise UserError("this model has no chat template; add --ignore-chat-template to let it continue the bare text")
    encoder = Encoder(tokenizer)
    try:
        encoder.bound(len(text), limit or None)
        if not raw:
            messages = [{"role": "system", "content": system}] if system else []
            messages.append({"role": "user", "content": text})
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        tokens = encoder.encode(text, limit or None, special=raw)
    except TooLong as error:
        raise _too_long(str(error), limit) from error
    if not tokens:
        raise UserError("the prompt is empty: it has no tokens")
    if limit and len(tokens) > limit:
        raise _too_long(f"{len(tokens):,} tokens", limit)
    return tokens


def _too_long(has: str, limit: int) -> UserError:
    return UserError(
        f"the prompt has {has}, and the context is {limit:,} tokens: shorten it, or insist with --max-context (beyond "
        "what it was made for, a model answers badly)"
    )


def run(model: Any, tokenizer: Any, request: Request, on_text: Callable[[str], None] | None = None) -> Result:
    """Generate. Raises UserError when prompt and answer would pass `max_context`."""
    check_context(request)
    caches = request.caches if request.caches is not None else make_cache(model)
    options: dict[str, Any] = {"prefill_step_size": request.prefill_step_size}
    if request.draft is not None:
        options |= {"draft_model": request.draft, "num_draft_tokens": request.num_draft_tokens}
        options["prompt_cache"] = caches + make_cache(request.draft)
    else:
        options |= {"prompt_cache": caches, "prompt_progress_callback": progress()}
    sampler = make_sampler(request.temp, request.top_p, request.min_p, top_k=request.top_k)
    meter = Meter(request.seed, on_text)
    speaker, read = model, 0
    if request.images:
        speaker, read = request.images.begin(model, caches, request.prefill_step_size)
    for response in stream_generate(
        speaker, tokenizer, request.tokens[read:], max_tokens=request.max_tokens, sampler=sampler, **options
    ):
        reason = response.finish_reason
        meter.take(response.text, None if reason == "stop" else response.token, reason)
    return meter.result(model, caches, len(request.tokens))


def check_context(request: Request, made_for: int = 0) -> None:
    """Raise UserError when prompt + answer don't fit in `max_context`.

    Without that, the answer is made shorter where the model was not made for so many tokens.
    """
    prompt = request.cached + len(request.tokens)
    if request.max_context is None and made_for:
        if prompt >= made_for:
            raise _too_long(f"{prompt:,} tokens", made_for)
        request.max_tokens = min(request.max_tokens, made_for - prompt)
    if request.max_context is not None and prompt + request.max_tokens > request.max_context:
        raise UserError(
            f"the prompt has {prompt} tokens and --max-tokens is {request.max_tokens}: together more than "
            f"--max-context {request.max_context}; shorten the prompt or raise the limit"
        )


def check_draft(model: Any, tokenizer: Any, draft: Any, own: Any) -> None:
    """Raise UserError for a draft model (with its `own` tokenizer) whose proposals `model` can't take."""
    if own.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            "the draft model's vocabulary is not the model's: its tokens would mean something else; use a draft model "
            "of the same family, or leave --draft-model out"
        )
    check_trims(model, draft)


def check_trims(*models: Any) -> None:
    """Raise UserError for models whose caches can't take proposals back: speculation would go wrong silently."""
    for model in models:
        bound = next((c for c in make_cache(model) if isinstance(c, (RotatingKVCache, ArraysCache))), None)
        if bound is not None:
            raise UserError(
                f"speculative decoding needs caches that can be trimmed, and {type(model).__module__} has a "
                f"{type(bound).__name__}; use it without --draft-model"
            )


def progress() -> Callable[[int, int], None] | None:
    """A prefill progress line on a terminal; None (quiet) in a pipe."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        end = "\r\033[K" if done >= total else ""
        print(f"\rprefill {done}/{total} tokens {end}", end="", file=sys.stderr, flush=True)

    return show
