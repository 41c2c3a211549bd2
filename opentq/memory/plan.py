"""The one memory formula: weights + cache + what a prefill needs meanwhile + a reserve.

`price` is what a request of so many tokens holds, for admission; `predict` adds the rest, for planning before anything
is loaded; both read the `LayerPlan`s that the report shows. Growth steps of the buffers are counted, because they are
memory like any other.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..attention import tiled
from ..caches.buffer import STEP_TOKENS
from ..caches.extent import Extent, Limits
from ..hosts.plan import LayerPlan
from .device import GIB, Device
from .skeleton import Skeleton

PREFILL_STEP = 2048
"""Tokens per prefill chunk, mlx-lm's default."""

RESERVE = GIB
"""Bytes for the interpreter, compiled kernels and MLX's buffer cache."""


# ---- what a cache holds


def held(plan: LayerPlan, tokens: int, float_bytes: int = 2, step: int = PREFILL_STEP) -> int:
    """Bytes that one sequence of `tokens` holds in one layer, allocation steps and the fp16 tail included.

    Args:
        plan: the layer, with its shape filled in.
        tokens: prompt and answer together.
        float_bytes: width of what a native cache stores.
        step: prefill chunk.
    """
    if plan.spec is None:
        per_token = plan.kv_heads * (plan.key_dim + plan.value_dim) * float_bytes
        return plan.constant + round(native_rows(plan.bound, tokens, step) * (per_token + plan.beside))
    rows, dense = lengths(Limits(plan.spec.sink, plan.spec.recent, plan.window), tokens, step)
    fp16 = plan.kv_heads * (plan.key_dim + plan.value_dim) * 2
    return round(rows * plan.bytes_per_token()) + round(dense * (fp16 + plan.beside))


def price(plans: Sequence[LayerPlan], tokens: int, float_bytes: int = 2, step: int = PREFILL_STEP) -> int:
    """Bytes that one sequence of `tokens` holds in all layers: the admission price of a request."""
    return sum(n * held(p, tokens, float_bytes, step) for p, n in plans_by_shape(plans).items())


def plans_by_shape(plans: Sequence[LayerPlan]) -> Counter[LayerPlan]:
    """Layers that weigh the same, counted: most models have one or two kinds."""
    return _counted(tuple(plans))


@functools.lru_cache(maxsize=64)
def _counted(plans: tuple[LayerPlan, ...]) -> Counter[LayerPlan]:
    return Counter(replace(p, index=0, part=0) for p in plans)


def payload(plans: Sequence[LayerPlan], tokens: int, float_bytes: int = 2) -> int:
    """Bytes of the tokens themselves, without allocation steps or tails: what tables call KV."""
    total = 0.0
    for p, n in plans_by_shape(plans).items():
        kept = min(tokens, p.bound or p.window or tokens)
        total += n * (p.constant + kept * p.bytes_per_token() * (1 if p.spec else float_bytes / 2))
    return round(total)


@functools.lru_cache(maxsize=4096)
def lengths(limits: Limits, tokens: int, step: int) -> tuple[int, int]:
    """(packed tokens that buffers have room for, fp16 tokens) after `tokens`, prefilled in chunks of `step`."""
    extent, ends = Extent(), []
    for start, stop in itertools.pairwise(_marks(tokens, step)):
        extent, _ = extent.append(stop - start, limits)
        ends.append(extent.packed)
    return capacity(ends), extent.sink + extent.tail


def capacity(ends: Iterable[int]) -> int:
    """Tokens that a packed buffer has room for after it was filled to each of `ends` in turn (`caches/buffer.py`)."""
    rows = 0
    for end in ends:
        if end > rows:
            step = STEP_TOKENS * max(1, end // (32 * STEP_TOKENS))
            rows = -(-end // step) * step
    return rows


@functools.lru_cache(maxsize=4096)
def native_rows(bound: int, tokens: int, step: int) -> int:
    """Token rows that mlx-lm's own cache has allocated after a prompt of `tokens`, prefilled in chunks of `step`."""
    if bound:
        return min(tokens - 1 + STEP_TOKENS, bound)
    rows = 0
    for start, stop in itertools.pairwise(_marks(tokens, step)):
        if stop > rows:
            # It drops the unused rows of the old allocation before it adds new ones.
            rows = min(rows, start) - (-(stop - start) // STEP_TOKENS) * STEP_TOKENS
    return rows


def _marks(tokens: int, step: int) -> list[int]:
    """Lengths between which a prompt is written; mlx-lm leaves its last token to the first decode step."""
    return sorted({*range(0, tokens, step), tokens - 1, tokens})


# ---- what a prefill needs meanwhile


def transient(
    skeleton: Skeleton, plans: Sequence[LayerPlan], tokens: int, device: Device, step: int, portable: bool = True
) -> int:
    """Bytes that the last prefill chunk needs besides weights and caches, at its worst moment.

    `portable` says that the tiled attention serves packed layers, not a kernel that keeps its tiles in registers.
    """
    chunk = min(step, tokens)
    hidden, inner, heads = skeleton.widths
    activations = chunk * (4 * hidden + 3 * inner) * device.float_bytes
    layers = set(plans_by_shape(plans))
    # Where attention sinks are not fused they join the scores as one more column: two copies.
    copies = 3 if skeleton.has_sinks else 1
    attention = max((_attention(p, heads, copies, chunk, tokens, device, portable) for p in layers), default=0)
    # A buffer that grows is there twice for a moment: keys first, then values.
    growing = max((held(p, tokens, device.float_bytes, step) // 2 for p in layers if not p.constant), default=0)
    windows = sum(n * _window_overhang(p, tokens, chunk, device) for p, n in plans_by_shape(plans).items())
    return activations + attention + growing + windows


def _attention(
    plan: LayerPlan, heads: int, copies: int, chunk: int, tokens: int, device: Device, portable: bool
) -> int:
    """Scratch of one attention call: bounded over packed tokens; the score matrix where MLX's own is not fused."""
    if plan.compressed:
        if not portable:
            return 0
        rows = min(chunk, tiled.ROWS)
        decoded, scores = plan.kv_heads * (plan.key_dim + plan.value_dim) * 4, heads * rows * 4
        tile = min(tokens, tiled.SCRATCH // (decoded + 2 * scores))
        return tile * (decoded + scores + heads * rows)  # scores, decoded tile, and the mask of what is seen
    if plan.constant:
        # Without a kernel, MLX's recurrences keep the state of every step of the chunk.
        return chunk * plan.constant if device.kind == "cpu" else 0
    if not plan.kv_heads or (device.kind != "cpu" and plan.key_dim <= 128):
        return 0
    seen = min(tokens, plan.bound + chunk) if plan.bound else tokens
    return copies * heads * chunk * seen * device.float_bytes


def _window_overhang(plan: LayerPlan, tokens: int, chunk: int, device: Device) -> int:
    """A sliding-window cache holds a whole chunk beyond its window during prefill."""
    if not plan.bound:
        return 0
    rows = min(tokens, plan.bound + chunk - 1) - native_rows(plan.bound, tokens, chunk)
    return max(0, rows) * plan.kv_heads * (plan.key_dim + plan.value_dim) * device.float_bytes


# ---- the whole


@dataclass(frozen=True)
class Estimate:
    """Bytes for one context; `kv` is the tokens themselves, `slack` growth steps and the fp16 tail."""

    tokens: int
    weights: int
    kv: int
    slack: int
    prefill: int
    reserve: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.slack + self.prefill + self.reserve

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.total}


def predict(
    skeleton: Skeleton,
    plans: Sequence[LayerPlan],
    tokens: int,
    weights: int,
    device: Device,
    step: int = PREFILL_STEP,
    reserve: int = RESERVE,
    portable: bool = True,
) -> Estimate:
    """The memory of `tokens` of context with the caches that `plans` describe (`Skeleton.plans`)."""
    kv = payload(plans, tokens, device.float_bytes)
    slack = price(plans, tokens, device.float_bytes, step) - kv
    prefill = transient(skeleton, plans, tokens, device, step, portable)
    return Estimate(tokens, weights, kv, slack, prefill, reserve)


def largest_context(
    skeleton: Skeleton, plans: Sequence[LayerPlan], weights: int, device: Device, limit: int, step: int = PREFILL_STEP
) -> int:
    """The longest context, a multiple of 1024 tokens, whose total stays within `limit` bytes; 0 when none does.

    Models whose caches are all bounded stop at 64 M tokens.
    """

    def fits(blocks: int) -> bool:
        return predict(skeleton, plans, blocks * 1024, weights, device, step).total <= limit

    low, high = 0, 1
    while high <= 1 << 16 and fits(high):
        low, high = high, high * 2
    while low + 1 < high and high <= 1 << 16:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * 1024
