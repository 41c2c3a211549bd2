"""One generation with its measurements, whichever host runs it: what was asked, what came out, what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..caches.composite import members
from ..caches.single import OpenTQCache
from ..spec.recipe import BAR
from . import hooks

if TYPE_CHECKING:
    from .mlx_vlm.vision import ImagePrompt


@dataclass
class Request:
    """What to generate: `tokens` is the encoded prompt, after the `cached` tokens that `caches` hold already; `images`
    is the same prompt, where it has any.
    """

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
    images: ImagePrompt | None = None


@dataclass
class Result:
    """What came out. Times in seconds, memory in bytes; `kv_fp16_bytes` is as of `fp16_bytes`."""

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
        layers = self.kv_spec.split(BAR)
        spec = self.kv_spec if len(layers) == 1 else f"a recipe of {len(layers)} layers"
        kv = f"KV {human_bytes(self.kv_bytes)} ({spec}" + (f", {self.ratio:.2f}x)" if self.ratio else ")")
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


class Meter:
    """Takes in a host's responses one by one, from its making on, and says in the end what they cost."""

    def __init__(self, seed: int | None, on_text: Callable[[str], None] | None = None):
        if seed is not None:
            mx.random.seed(seed)
        mx.reset_peak_memory()
        self.on_text = on_text
        self.text, self.tokens, self.reason = "", list[int](), "length"
        self.start = time.perf_counter()
        self.first: float | None = None

    def take(self, text: str, token: int | None, reason: str | None) -> None:
        """More text, and the token that it came with, or None where a response brings none of its own."""
        if token is not None:
            self.first = self.first or time.perf_counter()
            self.tokens.append(token)
        self.text += text
        if self.on_text and text:
            self.on_text(text)
        self.reason = reason or self.reason

    def result(self, model: Any, caches: Sequence[Any], prompt_tokens: int) -> Result:
        """The generation is over."""
        end = time.perf_counter()
        first = self.first or end
        context = max((c.size() for c in caches), default=0)
        record = hooks.installed(model)
        return Result(
            text=self.text,
            tokens=self.tokens,
            prompt_tokens=prompt_tokens,
            prompt_seconds=first - self.start,
            generation_seconds=end - first,
            finish_reason=self.reason,
            context=context,
            kv_spec=str(record.spec) if record else hooks.host_of(model).name,
            kv_bytes=cache_bytes(caches),
            kv_fp16_bytes=fp16_bytes(model, context, caches),
            peak_bytes=mx.get_peak_memory(),
            pages=pages_read(record),
        )


def cache_bytes(caches: Sequence[Any]) -> int:
    """Bytes that a generation's caches hold now."""
    return sum(c.nbytes for c in caches if not c.empty())


def fp16_bytes(model: Any, tokens: int, caches: Sequence[Any] = ()) -> int:
    """Bytes that the same tokens would take in fp16 (2 a value) where layers are compressed; windows hold no more.
    Caches that are the model's own count as they are. 0 where nothing is compressed.
    """
    record = hooks.installed(model)
    plans = [p for p in record.plans if p.compressed] if record else []
    dense = sum(
        min(tokens, p.window or tokens) * (p.kv_heads * (p.key_dim + p.value_dim) * 2 + p.beside) for p in plans
    )
    own = [c for cache in caches for c in members(cache) if not isinstance(c, OpenTQCache)]
    return int(dense) + cache_bytes(own) if dense else 0


def pages_read(record: hooks.Installation | None) -> tuple[int, int]:
    """(packed tokens read, packed tokens held) per layer and step, over the layers that read in pages."""
    stats = [s for s in record.stats.values() if s.steps] if record else []
    steps = max(sum(s.steps for s in stats), 1)
    return sum(s.read for s in stats) // steps, sum(s.held for s in stats) // steps


def human_bytes(count: float) -> str:
    """Bytes in decimal units, as disks and mlx-lm count them."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
