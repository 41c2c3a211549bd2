"""`opentq bench model`: prompt and generation speed at depth, in llama-bench's words (`pp512 @ d8192`, `tg128`).

For each depth every KV format gets caches filled to that depth, and the formats take turns, repetition by repetition.
mlx-lm's own cache (`native`) is the yardstick. Caches are filled by a real prefill, or with random vectors that are
written through the caches themselves, which is the same memory and the same speed; each row says which.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..caches.composite import members
from ..errors import UserError
from ..evaluate.forward import prefill
from ..hosts import hooks
from ..hosts.mlx_lm.public import make_prompt_cache
from ..memory.device import GIB
from ..records import record
from ..spec.text import Spec, name
from . import timing
from .build import Built
from .limit import limited

FILL = 2048
FILLS = ("prefill", "random")
YARDSTICK = name(None)


class OverLimit(Exception):
    """An arm needs more memory than `--memory-limit`."""


class ModelArm:
    """One KV format at one depth: its caches, and what was measured on them."""

    def __init__(self, built: Built, spec: Spec | None, step: int, limit: int, parallel: int = 1):
        self.built, self.kv, self.step, self.limit, self.parallel = built, name(spec), step, limit, parallel
        self.caches = make_caches(built.model, spec)
        self.depth = 0
        self.peak = 0
        self.note = ""

    @property
    def nbytes(self) -> int:
        return sum(c.nbytes for c in self.caches if not c.empty())

    def fill(self, depth: int, how: str) -> None:
        """Bring the caches to `depth` tokens."""
        if how == "prefill" or depth < 2:
            self._read(self.caches, self._tokens(depth))
        else:
            # One real token first: it makes every cache and its recurrent state the right shape.
            self._read(self.caches, self._tokens(1))
            fill_random(self.caches, depth - 1, self._check)
        if self.parallel > 1:
            self.caches = [c.merge([c] * self.parallel) for c in self.caches]
            mx.eval([c.state for c in self.caches])
        self.depth = depth

    def _read(self, caches: list[Any], tokens: mx.array) -> None:
        def after(_: int) -> None:
            self._check()
            mx.clear_cache()

        prefill(self.built.model, tokens, caches, self.step, after)

    def prompt(self, count: int, others: int) -> float:
        """Seconds to process `count` more tokens, the output layer for the last one included."""
        return self._timed(lambda caches: self._prompt(caches, count), others)

    def generate(self, count: int, others: int) -> float:
        """Seconds to generate `count` tokens, as `mlx_lm.generate` does, or `count` for each parallel sequence."""
        generate = self._generate if self.parallel == 1 else self._generate_batch
        return self._timed(lambda caches: generate(caches, count), others)

    def _timed(self, work: Callable[[list[Any]], None], others: int) -> float:
        """Run on the caches and put them back as they were; `others` are the bytes of other arms' caches.

        Batches are not put back: every repetition is a few tokens deeper.
        """
        trims = self.parallel > 1 or all(c.is_trimmable() for c in self.caches)
        caches = self.caches if trims else copy.deepcopy(self.caches)
        before = [c.offset for c in caches] if trims and self.parallel == 1 else []
        mx.eval([c.state for c in caches])
        mx.clear_cache()
        mx.reset_peak_memory()
        start = time.perf_counter()
        work(caches)
        seconds = time.perf_counter() - start
        self.peak = max(self.peak, mx.get_peak_memory() - others - (0 if trims else self.nbytes))
        for cache, offset in zip(caches, before):
            cache.trim(cache.offset - offset)
        self._check(others)
        return seconds

    def _prompt(self, caches: list[Any], count: int) -> None:
        tokens = self._tokens(count)
        if count > 1:
            prefill(self.built.model, tokens[:, :-1], caches, self.step, lambda _: mx.clear_cache())
        mx.eval(self.built.model(tokens[:, -1:], cache=caches))

    def _generate(self, caches: list[Any], count: int) -> None:
        from ..hosts.mlx_lm.public import generate_step

        for _ in generate_step(self._tokens(1)[0], self.built.model, max_tokens=count, prompt_cache=caches):
            pass

    def _generate_batch(self, caches: list[Any], count: int) -> None:
        token = mx.broadcast_to(self._tokens(1), (self.parallel, 1))
        for _ in range(count):
            token = mx.argmax(self.built.model(token, cache=caches)[:, -1:], axis=-1)
            mx.async_eval(token)
        mx.eval(token)

    def _tokens(self, count: int) -> mx.array:
        """The same synthetic tokens for every arm: `[1, count]`."""
        return (mx.arange(count) * 7919 % self.built.vocabulary)[None]

    def _check(self, others: int = 0) -> None:
        used = mx.get_active_memory() - others
        if self.limit and max(used, self.peak) > self.limit:
            raise OverLimit(f"needs {max(used, self.peak) / GIB:.1f} GiB, the limit is {self.limit / GIB:.1f}")


def make_caches(model: Any, spec: Spec | None) -> list[Any]:
    """Fresh caches of one format: ours for a spec, mlx-lm's own without one."""
    return make_prompt_cache(model) if spec is None else hooks.make_caches(hooks.prepare(model, spec))


def fill_random(caches: list[Any], count: int, check: Callable[[], None]) -> None:
    """Write `count` random tokens to every cache that grows; keys get outlier channels and offsets, like real ones."""
    pool: dict[tuple, tuple[mx.array, mx.array]] = {}
    for cache in (part for c in caches for part in members(c)):
        shape = _shape(cache)
        if shape is None:
            continue  # recurrent state: its size does not depend on the depth
        heads, key_dim, value_dim, dtype = shape
        if shape not in pool:
            channels = mx.exp(0.5 * mx.random.normal((heads, 1, key_dim)))
            channels = mx.where(mx.arange(key_dim) % 32 == 5, 8 * channels, channels)
            keys = (mx.random.normal((1, heads, FILL, key_dim)) + 0.3) * channels
            values = mx.random.normal((1, heads, FILL, value_dim))
            pool[shape] = keys.astype(dtype), values.astype(dtype)
            mx.eval(pool[shape])
        keys, values = pool[shape]
        for start in range(0, count, FILL):
            n = min(FILL, count - start)
            cache.update_and_fetch(keys[:, :, :n], values[:, :, :n])
            mx.eval(cache.state)
        check()


def _shape(cache: Any) -> tuple[int, int, int, mx.Dtype] | None:
    """(KV heads, key dim, value dim, dtype) of a cache that has seen a token; None for recurrent state."""
    if hasattr(cache, "dims"):
        return cache.dense_k.shape[1], *cache.dims, mx.float16
    keys, values = getattr(cache, "keys", None), getattr(cache, "values", None)
    if not isinstance(keys, mx.array) or not isinstance(values, mx.array):
        return None
    return keys.shape[1], keys.shape[3], values.shape[3], keys.dtype


def bench(
    built: Built,
    specs: Sequence[Spec | None],
    depths: Sequence[int] = (0,),
    prompts: Sequence[int] = (512,),
    generates: Sequence[int] = (128,),
    repetitions: int = 5,
    fill: str = "prefill",
    step: int = 2048,
    limit: int = 0,
    parallel: int = 1,
    rival: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """One record per test, depth and KV format; `parallel` sequences of the same depth are generated as one batch.

    `rival` is a GGUF file that llama.cpp runs in turn with ours.
    """
    if fill not in FILLS:
        raise UserError(f"--fill {fill!r} is not known: use {' or '.join(FILLS)}")
    tests = [("pp", n) for n in prompts if parallel == 1] + [("tg", n) for n in generates]
    side = f"x{parallel}" if parallel > 1 else ""
    with limited(limit):
        for depth in depths:
            arms: list[Any] = [ModelArm(built, spec, step, limit, parallel) for spec in specs]
            if rival:
                from .rivals import llama_cpp_model

                arms += llama_cpp_model.arms(rival, depth + max([*prompts, *generates]) + 8)
            for arm in arms:
                _try(arm, arm.fill, depth, fill)
            for kind, count in tests:
                samples: dict[str, list[float]] = {arm.kv: [] for arm in arms}
                for turn in range(repetitions + 1):  # the first one warms up
                    for arm in arms if turn % 2 else reversed(arms):
                        if arm.note:
                            continue
                        others = sum(a.nbytes for a in arms if a is not arm)
                        work = arm.prompt if kind == "pp" else arm.generate
                        tries = timing.TRIES if parallel == 1 else 1  # a batch would grow with every try
                        seconds, _ = timing.undisturbed(lambda: _try(arm, work, count, others), tries)  # noqa: B023
                        if turn and not arm.note:
                            samples[arm.kv].append(parallel * count / seconds)
                base = samples.get(YARDSTICK) or []
                for arm in arms:
                    yield _record(
                        built, arm, f"{kind}{count}{side}", depth, fill if depth else "", samples[arm.kv], base
                    )


def _try(arm: ModelArm, work: Callable[..., Any], *args: Any) -> float:
    """Run; when memory is over the limit, the arm is out, its caches are dropped, and its rows say why."""
    if arm.note:
        return 0.0
    try:
        return work(*args)
    except OverLimit as error:
        arm.note = str(error)
        arm.caches = []
        mx.clear_cache()
        return 0.0


def _record(
    built: Built, arm: Any, test: str, depth: int, fill: str, samples: list[float], base: list[float]
) -> dict[str, Any]:
    taken = timing.Timing(tuple(samples)) if samples else None
    served = {c.stats.served_by for c in getattr(arm, "caches", []) if hasattr(c, "stats")}
    return record(
        "model",
        model=built.name,
        weight_bytes=getattr(arm, "weight_bytes", built.weight_bytes),
        kv=arm.kv,
        test=test,
        depth=depth,
        fill=fill,
        tokens_per_s=taken.mean if taken else None,
        tokens_per_s_sd=taken.sd if taken else None,
        samples=samples,
        peak_bytes=arm.peak or None if taken else None,
        kv_bytes=arm.nbytes if taken else None,
        vs_native=taken.mean / timing.Timing(tuple(base)).mean if taken and base else None,
        served_by=", ".join(sorted(served - {""})) or getattr(arm, "served_by", "mlx-lm"),
        note=arm.note,
    )
