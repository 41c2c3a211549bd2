"""`opentq bench kernel`: one layer's attention call of one query token, on this machine, for every KV format and rival.

All arms attend to the same random keys and values. Ours go through `OpenTQCache`, so that what is timed is what serves
a model. Two errors are given, both relative to float64: `error` against attention over the very bytes an arm stores
(its arithmetic), `error_with_codec` against attention over the vectors before they were encoded. Of long contexts only
some KV heads are checked, as each row says. Where a step reads pages, `error` also holds what it did not read, which is
much of random keys. An arm that would take too long is timed once or left out: its row says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ..attention import channels, pages
from ..caches.single import OpenTQCache
from ..errors import UserError
from ..machine import threads
from ..records import record
from ..spec.kv import KVSpec
from . import timing
from .rivals import Entry, find

FILL = 4096
"""Tokens written to a cache at a time."""

CHECKED = 1 << 25
"""Keys are compared with float64 in so many KV heads that this many of their numbers are seen (at least one head)."""

BUDGET = 20.0
"""Seconds that an arm's windows may take at one context."""


@dataclass(frozen=True)
class Problem:
    """One layer: query heads, KV heads, head dim, context; float32 inputs `q [Hq, D]`, `k` and `v` `[Hkv, N, D]`."""

    q_heads: int
    kv_heads: int
    dim: int
    context: int
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray

    @property
    def scale(self) -> float:
        return self.dim**-0.5

    @classmethod
    def random(cls, shape: Sequence[int], context: int, seed: int = 0) -> Problem:
        """Standard normal vectors, rounded to fp16 as a model would hand them over."""
        q_heads, kv_heads, dim = shape
        rng = np.random.default_rng(seed)

        def draw(heads: int, *size: int) -> np.ndarray:
            out = np.empty((heads, *size), np.float32)
            for head in out:  # one at a time: of a million tokens nothing is held twice
                head[...] = rng.standard_normal(size, np.float32).astype(np.float16)
            return out

        k, v = draw(kv_heads, context, dim), draw(kv_heads, context, dim)
        return cls(q_heads, kv_heads, dim, context, draw(q_heads, dim), k, v)


Variant = Callable[[], AbstractContextManager[None]]
"""What surrounds a call, so that one of several kernels serves it."""


class Arm(Protocol):
    """One engine with one KV format on one problem."""

    engine: str
    kv: str
    served_by: str

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that one call reads."""

    @property
    def scratch(self) -> int | None:
        """Bytes one call needs besides, where they can be known."""

    def call(self) -> Any:
        """Attend and wait: an array of Hq * D numbers."""

    def stored(self, heads: int) -> tuple[np.ndarray, np.ndarray]:
        """What the first KV heads store, decoded: float32 `k`, `v` `[heads, N, D]` in the problem's basis."""


class Ours:
    """Our cache and whatever attention dispatch chooses."""

    engine = "opentq"

    def __init__(self, spec: KVSpec, problem: Problem, variant: Variant = contextlib.nullcontext):
        self.kv = str(spec)
        self.problem, self.variant = problem, variant
        if spec.pages:  # random keys: one channel tells as much as another
            some = tuple(range(channels.count(problem.dim)))
            spec = replace(spec, channels=(some,) * problem.kv_heads)
        self.cache = OpenTQCache(spec)
        for start in range(0, problem.context, FILL):
            # The last token enters alone, as in a decode step.
            for a, b in _steps(start, min(start + FILL, problem.context), problem.context):
                # MLX copies all that a view spans, so a slice comes in one piece.
                k, v = (mx.array(x[None, :, a:b].astype(np.float16)) for x in (problem.k, problem.v))
                self.step = self.cache.update_and_fetch(k, v)[0].step
                mx.eval(self.cache.state)
        self.q = mx.array(problem.q[None, :, None]).astype(mx.float16)
        mx.eval(self.q)
        self.scratch = scratch_of(self.call)
        self.served_by = self.cache.stats.served_by

    @property
    def nbytes(self) -> int:
        packed, dense = self.step.lens[0][0], self.step.dense_k.shape[2]
        spec, p = self.cache.spec, self.problem
        per_token = spec.bits_per_value(p.dim) * 2 * p.dim / 8
        choice = 0.0
        if self.cache.stats.read < self.cache.stats.held:
            # All sketches, the keys of candidates, and the tokens of some pages.
            some = pages.CANDIDATES * spec.pages
            choice = packed * pages.bytes_per_token(p.dim) if packed > some else 0.0
            choice += min(packed, some) * self.cache.k_codec.bits_per_value(p.dim) * p.dim / 8
            packed = spec.pages
        return round(p.kv_heads * (packed * per_token + choice + dense * 4 * p.dim))

    def call(self) -> mx.array:
        with self.variant():
            out = self.step.attend(self.q, scale=self.problem.scale)
        mx.eval(out)
        return out

    def stored(self, heads: int) -> tuple[np.ndarray, np.ndarray]:
        packed, sink, tail = self.step.lens[0]
        out = []
        for whole, every in ((self.step.k, self.step.dense_k), (self.step.v, self.step.dense_v)):
            side, dense = replace(whole, arrays=tuple(a[:, :heads] for a in whole.arrays)), every[:, :heads]
            middle = [side.decode(a, b, mx.float32) for a, b in _chunks(packed)]
            ends = [d.astype(mx.float32) for d in (dense[:, :, :sink], dense[:, :, tail:])]
            parts = [p for p in (ends[0], *middle, ends[1]) if p.size]
            out.append(np.concatenate([np.array(side.codec.unrotate(p))[0] for p in parts], axis=1))
        return out[0], out[1]


def ours(spec: KVSpec, name: str = "", variant: Variant = contextlib.nullcontext) -> Entry:
    """Our cache with the kernels that serve inside `variant()`, which is called `name`."""
    return Entry("opentq", str(spec), lambda problem, threads: Ours(spec, problem, variant), name)


def _steps(start: int, stop: int, context: int) -> list[tuple[int, int]]:
    return [(start, stop)] if stop < context or stop - start < 2 else [(start, stop - 1), (stop - 1, stop)]


def _chunks(tokens: int) -> Iterator[tuple[int, int]]:
    for start in range(0, tokens, FILL):
        yield start, min(start + FILL, tokens)


def scratch_of(call: Callable[[], Any]) -> int:
    """MLX memory that a call needs beyond what is there before it."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    call()
    return mx.get_peak_memory() - before


def bench(
    shape: Sequence[int],
    contexts: Sequence[int],
    specs: Sequence[KVSpec],
    against: Sequence[str] = (),
    windows: timing.Windows = timing.WINDOWS,
    seed: int = 0,
    budget: float = BUDGET,
) -> Iterator[dict[str, Any]]:
    """Records for every context and arm. Raises UserError for a bad shape or a rival that is not installed."""
    entries = [ours(spec) for spec in specs]
    check_shape(shape)
    for name in against:
        entries += find(name)(shape[2])
    return measure(shape, contexts, entries, windows, seed, budget)


def check_shape(shape: Sequence[int]) -> None:
    """Raises UserError for what is not query heads, KV heads and head dim."""
    if len(shape) != 3 or min(shape) < 1 or shape[0] % shape[1]:
        raise UserError(
            f"--shape {','.join(map(str, shape))}: give query heads, KV heads and head dim such as 64,8,128; "
            "query heads must be a multiple of KV heads"
        )


def measure(
    shape: Sequence[int],
    contexts: Sequence[int],
    entries: Sequence[Entry],
    windows: timing.Windows = timing.WINDOWS,
    seed: int = 0,
    budget: float = BUDGET,
) -> Iterator[dict[str, Any]]:
    """Records for every context and entry, whose arms take turns at each context."""
    seconds_per_token: dict[Entry, float] = {}
    for context in contexts:
        problem = Problem.random(shape, context, seed)
        heads = max(1, min(problem.kv_heads, CHECKED // (context * problem.dim)))
        k, v = problem.k[:heads], problem.v[:heads]
        q = problem.q[: heads * problem.q_heads // problem.kv_heads]
        exact = attend_float64(q, k, v, problem.scale)
        arms: list[Arm | None] = []
        firsts, notes = [], []
        for entry in entries:
            expected = seconds_per_token.get(entry, 0.0) * context
            note = f"left out: a call would take about {expected:.0f} s" if expected > budget else ""
            arm = None if note else entry.make(problem, threads())
            first = expected if arm is None else timing.seconds(arm.call)
            if arm is not None and first * (windows.number + 1) > budget:  # slow, or cold, or disturbed?
                first = min(first, timing.undisturbed(lambda arm=arm: timing.seconds(arm.call))[0])  # type: ignore[misc]
            seconds_per_token[entry] = first / context
            if arm is not None and first * (windows.number + 1) > budget:
                note = f"timed once: {windows.number} windows would take {first * windows.number:.0f} s"
            arms.append(arm)
            firsts.append(first)
            notes.append(note)
        many = [i for i, note in enumerate(notes) if not note]
        timings = dict(zip(many, timing.interleave([arms[i].call for i in many], windows)))  # type: ignore[union-attr]
        for i, (entry, arm) in enumerate(zip(entries, arms)):
            fields = {"shape": list(shape), "context": context, "engine": entry.engine, "kv": entry.kv}
            fields |= {"variant": entry.variant} if entry.variant else {}
            if arm is None:
                yield record("kernel", **fields, **dict.fromkeys(FIGURES), served_by="", note=notes[i])
                continue
            taken = timings.get(i, timing.Timing((firsts[i],)))
            out = np.asarray(arm.call(), np.float64).reshape(problem.q_heads, problem.dim)[: len(q)]
            rate = arm.nbytes / taken.median
            figures = (
                *(taken.median * 1e3, taken.sd * 1e3, [t * 1e3 for t in taken.windows], round(taken.stolen, 3)),
                *(arm.nbytes, rate / 1e9, rate / timing.read_bandwidth(), timing.read_bandwidth()),
                *(relative(out, attend_float64(q, *arm.stored(heads), problem.scale)), relative(out, exact), heads),
                arm.scratch,
            )
            fields |= dict(zip(FIGURES, figures, strict=True))
            yield record("kernel", **fields, served_by=arm.served_by, note=notes[i])


FIGURES = (
    *("ms", "ms_sd", "windows_ms", "stolen"),
    *("bytes", "gb_per_s", "bandwidth_share", "read_bandwidth"),
    *("error", "error_with_codec", "checked_heads"),
    "scratch_bytes",
)
"""What a row measures; all None in the row of an arm that was left out."""


def attend_float64(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    """float64 attention of `q [Hq, D]` over `k`, `v` `[Hkv, N, D]`: `[Hq, D]`, one KV head at a time."""
    group = q.shape[0] // k.shape[0]
    out = []
    for head in range(k.shape[0]):
        rows = q[head * group : (head + 1) * group].astype(np.float64)
        scores = rows @ k[head].astype(np.float64).T * scale
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out.append(weights @ v[head].astype(np.float64) / weights.sum(-1, keepdims=True))
    return np.concatenate(out)


def relative(out: np.ndarray, exact: np.ndarray) -> float:
    """Frobenius norm of the error over that of the exact result."""
    return float(np.linalg.norm(out - exact) / np.linalg.norm(exact))
