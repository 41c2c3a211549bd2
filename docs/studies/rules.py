"""Rules that choose pages, and a cache that reads what a rule chooses: one forward pass stands for many decode steps.

A query row at position p sees what a decode step there would see: sinks, the pages that its rule chooses among those
that are packed by then, the tail, and itself. Rows don't depend on later ones, so a window of 256 rows in one pass
gives the output of 256 steps. Keys and values stay as the model makes them: what differs is what was not read.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache

from opentq.attention import channels
from opentq.caches.sketches import WARM
from opentq.caches.step import Handle
from opentq.contracts.rotary import Rotary
from opentq.spec.kv import KVSpec

SPEC = KVSpec.parse("f16:sink=4")
"""What is read anyway: 4 sinks and a tail as caches have it by default."""
FLUSH = 64
MEAN_BITS = 8
GAUSS = {2: 0.996, 3: 0.586}
"""Steps of the best uniform quantiser of a normal variable, in standard deviations."""


def packed(tokens: int) -> int:
    """How many of `tokens` tokens a cache has packed."""
    return max(0, (tokens - SPEC.sink - SPEC.recent) // FLUSH * FLUSH)


@dataclass(frozen=True)
class Rule:
    """`prepare`: keys in pages `[B, H, n, page, D]`, float32 -> what is kept of them; `weigh`: scaled queries
    `[B, H, R, D]` and that -> log weights `[B, H, R, n]`."""

    prepare: Callable[[mx.array], Any]
    weigh: Callable[[mx.array, Any], mx.array]


def exact(q: mx.array, k: mx.array, largest: bool = False) -> mx.array:
    scores = q @ k.reshape(*k.shape[:2], -1, k.shape[-1]).swapaxes(-1, -2)
    scores = scores.reshape(*q.shape[:3], k.shape[2], k.shape[3])
    return scores.max(-1) if largest else mx.logsumexp(scores, axis=-1)


ORACLE = Rule(lambda k: k, exact)


def bound(q: mx.array, kept: tuple[mx.array, mx.array]) -> mx.array:
    low, high = kept
    return mx.maximum(q, 0) @ high.swapaxes(-1, -2) + mx.minimum(q, 0) @ low.swapaxes(-1, -2)


QUEST = Rule(lambda k: (k.min(3), k.max(3)), bound)
"""An upper bound of every score of a page, from the minimum and maximum of each channel (arXiv 2406.10774)."""
MEAN = Rule(lambda k: k.mean(3), lambda q, mean: q @ mean.swapaxes(-1, -2))


def coarse(x: mx.array, bits: int) -> mx.array:
    """Numbers of one page and channel (axis 3) in `bits` bits, one scale for them: 4 bits and more to the largest."""
    half = 2 ** (bits - 1)
    step = (
        mx.sqrt(mx.square(x).mean(3, keepdims=True)) * GAUSS[bits]
        if bits in GAUSS
        else mx.abs(x).max(3, keepdims=True) / (half - 0.5)
    ) + 1e-9
    return (mx.clip(mx.floor(x / step), -half, half - 1) + 0.5) * step


def sketch(chosen: mx.array, bits: int = 0, run: int = 0, mean_bits: int = MEAN_BITS, largest: bool = False) -> Rule:
    """Scores from channels `chosen [B, H, C]`, in `bits` bits (0: exact); with `run` from the others by the mean key of
    every so many tokens. A page's weight is the sum of its scores' exponentials, or its `largest` score. With 4 bits,
    runs of a page (64) in 8 bits and the largest score this is how the package names candidates."""

    def prepare(k: mx.array) -> tuple[mx.array, mx.array | None]:
        index = mx.broadcast_to(chosen[:, :, None, None], (*k.shape[:4], chosen.shape[-1]))
        few = mx.take_along_axis(k, index, axis=-1)
        rest = None
        if run:
            length = min(run, k.shape[3])
            known = (mx.arange(k.shape[-1]) == chosen[..., None]).any(axis=2)[:, :, None, None]
            rest = mx.where(known, 0, k.reshape(*k.shape[:3], -1, length, k.shape[-1]).mean(4))
            most = 2 ** (mean_bits - 1) - 1
            unit = mx.abs(rest).max(-1, keepdims=True) / most + 1e-9
            rest = mx.round(rest / unit) * unit
        return coarse(few, bits) if bits else few, rest

    def weigh(q: mx.array, kept: tuple[mx.array, mx.array | None]) -> mx.array:
        few, rest = kept
        own = mx.take_along_axis(q, mx.broadcast_to(chosen[:, :, None], (*q.shape[:3], chosen.shape[-1])), axis=-1)
        if rest is None:
            return exact(own, few, largest)
        batch, heads, pages, runs, dim = rest.shape
        scores = exact(own, few.reshape(batch, heads, pages * runs, -1, few.shape[-1]), largest)
        scores = scores + q @ rest.reshape(batch, heads, -1, dim).swapaxes(-1, -2)
        if largest:
            return scores.reshape(*q.shape[:3], pages, runs).max(-1)
        return mx.logsumexp(scores.reshape(*q.shape[:3], pages, runs), axis=-1)

    return Rule(prepare, weigh)


@dataclass
class Call:
    """A call of attention, page by page.

    Attributes:
        q: scaled queries `[B, H, G * L, D]`, those of one query head together.
        keys: `[B, H, n, page, D]`, behind the sinks.
        whole: `[L]`, how many pages every row can choose among.
    """

    q: mx.array
    keys: mx.array
    whole: mx.array
    rows: int

    def chosen(self, weights: mx.array, count: int, other: mx.array | None = None) -> mx.array:
        """Which pages are read: bool `[B, H, L, n]`, the `count` of most weight by log weights `[B, H, G * L, n]`.

        `other [B, H, G, L]`: log weights of what is read anyway, so that a query head that looks there has less say.
        """
        pages = weights.shape[-1]
        index, whole = mx.arange(pages), self.whole[:, None]
        weights = weights.reshape(*weights.shape[:2], -1, self.rows, pages)
        weights = mx.where(index < whole, weights, -mx.inf)
        every = mx.logsumexp(weights, axis=-1)
        share = mx.exp(weights - (every if other is None else mx.logaddexp(every, other))[..., None]).sum(2)
        share = mx.where(index < whole, mx.where(index == whole - 1, mx.inf, share), -1)  # the newest always
        if pages > count:
            best = mx.argpartition(-share, count - 1, axis=-1)[..., :count]
            taken = mx.put_along_axis(mx.zeros(share.shape, mx.bool_), best, mx.array(True), axis=-1)
        else:
            taken = mx.ones(share.shape, mx.bool_)
        return taken & (index < whole)


class Sparse(KVCache):
    """The model's own cache, of which attention reads some pages.

    Attributes:
        rule: what chooses; None reads everything, as prompts are read.
        page, budget: tokens.
        by_mass: whether a query head has as much say as it looks at packed tokens.
        times: so many times the budget is what the rule chooses, and keys choose among it; 0 where the rule is all.
        watch: told of every call and of its attention `[B, H, G, L, T]`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rule: Rule | None = None
        self.page, self.budget, self.by_mass, self.times = FLUSH, 1024, False, 0
        self.watch: Callable[[Call, mx.array], None] | None = None
        self.seen, self.sums = 0, None
        self._kept: tuple[int, Any] | None = None

    def fork(
        self, rule: Rule | None = None, page: int = FLUSH, budget: int = 1024, by_mass: bool = False, times: int = 0
    ) -> Sparse:
        """A cache that holds the same tokens and goes its own way."""
        other = copy(self)
        other.keys, other.values = self.keys[:], self.values[:]  # arrays of Python's own, which writes replace
        other.rule, other.page, other.budget, other._kept = rule, page, budget, None
        other.by_mass, other.times = by_mass, times
        return other

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Handle, Handle]:
        k, v = super().update_and_fetch(keys, values)
        step = _Step(self, k, v)
        return Handle(step, k.shape, k.dtype), Handle(step, v.shape, v.dtype)  # type: ignore[arg-type]

    def observe(self, q: mx.array, k: mx.array) -> None:
        """Sum up the first queries and keys, as caches do without a recipe: squares, keys, squares of keys."""
        if self.seen >= WARM or q.shape[2] != k.shape[2]:
            return
        square = mx.square(q).reshape(k.shape[0], k.shape[1], -1, *k.shape[2:]).sum(2)
        sums = mx.stack([x.sum(2) for x in (square, k, mx.square(k))], axis=2)
        self.seen, self.sums = k.shape[2], sums

    def own_channels(self, rotary: Rotary, count: int) -> mx.array:
        """The channels that this prompt's first tokens choose, `[B, H, C]`."""
        sums = np.array(self.sums) / self.seen
        energy = channels.energies(sums[:, :, 0], np.maximum(sums[:, :, 2] - sums[:, :, 1] ** 2, 0), rotary)
        dim = sums.shape[-1]
        return mx.array([[channels.choose(e, rotary, dim, count) for e in lane] for lane in energy], dtype=mx.int32)

    def kept(self, keys: mx.array) -> Any:
        """What the rule keeps of the pages, made again when there are more of them."""
        assert self.rule is not None
        if self._kept is None or self._kept[0] != keys.shape[2]:
            self._kept = keys.shape[2], self.rule.prepare(keys)
        return self._kept[1]


class _Step:
    """Stands in for a step of a compressed cache."""

    def __init__(self, cache: Sparse, k: mx.array, v: mx.array):
        self.cache, self.k, self.v = cache, k, v

    def attend(self, q: mx.array, *, scale: float, mask: Any = None, sinks: mx.array | None = None) -> mx.array:
        cache, k, v = self.cache, self.k, self.v
        (batch, heads, held, dim), rows = k.shape, q.shape[2]
        cache.observe(q, k)
        first = held - rows
        limits = [packed(first + i) // cache.page for i in range(rows)]
        if not max(limits) or (cache.rule is None and cache.watch is None):
            return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)
        pages = max(limits)
        keys = k[:, :, SPEC.sink : SPEC.sink + pages * cache.page].astype(mx.float32)
        keys = keys.reshape(batch, heads, pages, cache.page, dim)
        call = Call(q.astype(mx.float32).reshape(batch, heads, -1, dim) * scale, keys, mx.array(limits), rows)
        at, row = mx.arange(held), mx.arange(rows)[:, None]
        tail = SPEC.sink + call.whole[:, None] * cache.page
        always = (at < SPEC.sink) | ((at >= tail) & (at <= first + row))
        if cache.watch is not None:
            seen = mx.where(at <= first + row, 0.0, -mx.inf)
            scores = (call.q @ k.swapaxes(-1, -2).astype(mx.float32)).reshape(batch, heads, -1, rows, held)
            cache.watch(call, mx.softmax(scores + seen, axis=-1))
        if cache.rule is None:
            return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)
        other = None
        if cache.by_mass:
            scores = (call.q @ k.swapaxes(-1, -2).astype(mx.float32)).reshape(batch, heads, -1, rows, held)
            other = mx.logsumexp(mx.where(always, scores, -mx.inf), axis=-1)
        weights, count = cache.rule.weigh(call.q, cache.kept(keys)), cache.budget // cache.page
        if cache.times:
            some = mx.tile(call.chosen(weights, cache.times * count, other), (1, 1, q.shape[1] // heads, 1))
            weights = mx.where(some, exact(call.q, keys), -mx.inf)
        taken = call.chosen(weights, count, other)
        listed = mx.repeat(taken, cache.page, axis=-1)
        end = SPEC.sink + pages * cache.page
        listed = mx.pad(listed, [(0, 0)] * 3 + [(SPEC.sink, held - end)])
        read = mx.repeat(listed | always, q.shape[1] // heads, axis=1)
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=read, sinks=sinks)
