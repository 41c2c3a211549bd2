"""One generation with its measurements: tokens in, text out, and what it cost in time and bytes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm import stream_generate
from mlx_lm.models.cache import ArraysCache, RotatingKVCache
from mlx_lm.sample_utils import make_sampler

from ...errors import UserError
from .. import hooks
from .load import cache_bytes, fp16_bytes, make_cache


@dataclass
class Request:
    """What to generate: `tokens` is the encoded prompt, after the `cached` tokens that `caches` hold already."""

    tokens: list[int]
    max_tokens: int = 256
    temp: float = 0.0
    top_p: float = 0.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    prefill_step_size: int = 2048
    max_context: int | None = None
    draft: Any = None
    num_draft_tokens: int = 3
    caches: list[Any] | None = None
    cached: int = 0


@dataclass
class Result:
    """What came out. Times in seconds, memory in bytes; `kv_fp16_bytes` is 2 bytes per value for the same tokens."""

    text: str
    tokens: list[int]
    prompt_tokens: int
    prompt_seconds: float
    generation_seconds: float
    finish_reason: str
    context: int
    kv_spec: str
    kv_bytes: int
    kv_fp16_bytes: int
    peak_bytes: int
    pages: tuple[int, int] = (0, 0)  # packed tokens that decode steps read, of those there were

    @property
    def prompt_tps(self) -> float:
        return self.prompt_tokens / max(self.prompt_seconds, 1e-9)

    @property
    def generation_tps(self) -> float:
        # The first token belongs to the prompt's time.
        return max(len(self.tokens) - 1, 0) / max(self.generation_seconds, 1e-9)

    @property
    def ratio(self) -> float:
        """How many times smaller than fp16 the cache is (0 when nothing is compressed)."""
        return self.kv_fp16_bytes / self.kv_bytes if self.kv_fp16_bytes and self.kv_bytes else 0.0

    def summary(self) -> str:
        kv = f"KV {human_bytes(self.kv_bytes)} ({self.kv_spec}" + (f", {self.ratio:.2f}x)" if self.ratio else ")")
        return (
            f"{len(self.tokens)} tokens · {self.generation_tps:.1f} tok/s · prompt {self.prompt_tokens} tokens, "
            f"{self.prompt_tps:.0f} tok/s · ctx {self.context} · {kv} · peak {human_bytes(self.peak_bytes)}"
            f"{self._pages()}"
        )

    def _pages(self) -> str:
        """What a step read of a cache that is read in pages; "" otherwise."""
        read, held = self.pages
        return f" · read {read:,} of {held:,} packed tokens a step" if held else ""

    def as_dict(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "generation_tokens": len(self.tokens),
            "prompt_tps": round(self.prompt_tps, 2),
            "generation_tps": round(self.generation_tps, 2),
            "context": self.context,
            "kv_spec": self.kv_spec,
            "kv_bytes": self.kv_bytes,
            "kv_fp16_bytes": self.kv_fp16_bytes,
            "kv_ratio": round(self.ratio, 3),
            "peak_bytes": self.peak_bytes,
            "pages": list(self.pages),
        }


def encode_prompt(tokenizer: Any, text: str, system: str | None = None, raw: bool = False) -> list[int]:
    """Token ids of a user message through the chat template, or of the bare text where it is `raw`.

    Raises UserError for an empty prompt, and for a model without a template that is asked for one.
    """
    if not raw and not getattr(tokenizer, "has_chat_template", True):
        raise UserError("this model has no chat template; add --ignore-chat-template to let it continue the bare text")
    if not raw:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": text})
        tokens = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    else:
        tokens = list(tokenizer.encode(text))
    if not tokens:
        raise UserError("the prompt is empty: it has no tokens")
    return tokens


def run(model: Any, tokenizer: Any, request: Request, on_text: Callable[[str], None] | None = None) -> Result:
    """Generate. Raises UserError when prompt and answer would pass `max_context`."""
    check_context(request)
    if request.seed is not None:
        mx.random.seed(request.seed)
    caches = request.caches if request.caches is not None else make_cache(model)
    options: dict[str, Any] = {"prefill_step_size": request.prefill_step_size}
    if request.draft is not None:
        options |= {"draft_model": request.draft, "num_draft_tokens": request.num_draft_tokens}
        options["prompt_cache"] = caches + make_cache(request.draft)
    else:
        options |= {"prompt_cache": caches, "prompt_progress_callback": progress()}
    sampler = make_sampler(request.temp, request.top_p, request.min_p, top_k=request.top_k)
    mx.reset_peak_memory()
    text, reason = "", "length"
    tokens: list[int] = []
    start = first = time.perf_counter()
    for response in stream_generate(
        model, tokenizer, request.tokens, max_tokens=request.max_tokens, sampler=sampler, **options
    ):
        if not tokens and response.finish_reason is None:
            first = time.perf_counter()
        if response.finish_reason != "stop":
            tokens.append(response.token)
        text += response.text
        if on_text and response.text:
            on_text(response.text)
        reason = response.finish_reason or reason
    end = time.perf_counter()
    context = max((c.size() for c in caches), default=0)
    record = hooks.installed(model)
    return Result(
        text=text,
        tokens=tokens,
        prompt_tokens=len(request.tokens),
        prompt_seconds=(first if first > start else end) - start,
        generation_seconds=end - first,
        finish_reason=reason,
        context=context,
        kv_spec=str(record.spec) if record else "mlx-lm",
        kv_bytes=cache_bytes(caches),
        kv_fp16_bytes=fp16_bytes(model, context),
        peak_bytes=mx.get_peak_memory(),
        pages=pages_read(record),
    )


def pages_read(record: hooks.Installation | None) -> tuple[int, int]:
    """(packed tokens read, packed tokens held) per layer and step, over the layers that read in pages."""
    stats = [s for s in record.stats.values() if s.steps] if record else []
    steps = max(sum(s.steps for s in stats), 1)
    return sum(s.read for s in stats) // steps, sum(s.held for s in stats) // steps


def check_context(request: Request) -> None:
    """Raise UserError when prompt + answer don't fit in `max_context`."""
    prompt = request.cached + len(request.tokens)
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


def human_bytes(count: float) -> str:
    """Bytes in decimal units, as disks and mlx-lm count them."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
