"""`opentq bench long`: the context doubles until memory, time or the model's limit ends it, for three kinds of cache.

Each row is a fresh prompt of that length: a text with a needle half way down where the model has a tokenizer, else
synthetic tokens. Prefill and decode are timed, the peak is taken, and the needle's answer is read. An arm that can't go
on says why in its row, and the others go on without it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..evaluate import corpus
from ..evaluate.contenders import Contender, enter
from ..evaluate.forward import prefill
from ..memory.device import GIB
from ..records import record
from .build import Built
from .limit import limited

DECODE = 32
"""Tokens generated per row, at least: enough to answer and to time."""


@dataclass(frozen=True)
class Bounds:
    """When an arm ends: bytes (0: none), seconds per row, and tokens that the model was made for (0: unknown)."""

    memory: int = 0
    seconds: float = 600.0
    tokens: int = 0


class Stopped(Exception):
    """An arm can't go on; the message says why."""


def bench(
    built: Built, arms: Sequence[str], start: int, stop: int, limits: Bounds, step: int = 2048, depth: float = 0.5
) -> Iterator[dict[str, Any]]:
    """One record per context and arm, shortest context first.

    Args:
        arms: names as `opentq eval` knows them: `native`, `mlx4` (mlx-lm --kv-bits 4), any KV spec.
        start, stop: first and last context; it doubles in between.
        depth: where the needle is, 0 to 1.
    """
    contenders = [enter(name, built.model) for name in arms]
    running = {c.name: 0.0 for c in contenders}  # seconds of the last row
    context = start
    with limited(limits.memory):
        while context <= stop and running:
            if limits.tokens and context > limits.tokens:
                for name in running:
                    yield _row(built, name, context, note=f"the model was made for {limits.tokens:,} tokens")
                return
            for contender in contenders:
                if contender.name not in running:
                    continue
                expected = 2 * running[contender.name]
                try:
                    if expected > limits.seconds:
                        raise Stopped(f"would take more than {expected:.0f} s, the limit is {limits.seconds:.0f} s")
                    began = time.perf_counter()
                    yield _row(
                        built, contender.name, context, **_measure(built, contender, context, limits, step, depth)
                    )
                    running[contender.name] = time.perf_counter() - began
                except Stopped as reason:
                    del running[contender.name]
                    mx.clear_cache()
                    yield _row(built, contender.name, context, note=str(reason))
            context *= 2


def _measure(
    built: Built, contender: Contender, context: int, limits: Bounds, step: int, depth: float
) -> dict[str, Any]:
    tokens, answer = _prompt(built, context, depth)
    caches = contender.caches()
    mx.clear_cache()
    mx.reset_peak_memory()
    began = time.perf_counter()

    def after(_: int) -> None:
        _check(began, limits)
        mx.clear_cache()

    try:
        prefill(built.model, mx.array([tokens[:-1]]), caches, step, after)
        filled = time.perf_counter()
        said = _generate(built, caches, tokens[-1])
        ended = time.perf_counter()
    except (RuntimeError, MemoryError) as error:
        if "alloc" not in str(error).lower() and not isinstance(error, MemoryError):
            raise
        raise Stopped(f"out of memory: {str(error).splitlines()[0]}") from error
    _check(began, limits)
    return {
        "prefill_per_s": (len(tokens) - 1) / (filled - began),
        "decode_per_s": len(said) / (ended - filled),
        "kv_bytes": sum(c.nbytes for c in caches),
        "peak_bytes": mx.get_peak_memory(),
        "needle": None if answer is None else answer in built.tokenizer.decode(said),
    }


def _check(began: float, limits: Bounds) -> None:
    peak = mx.get_peak_memory()
    if limits.memory and peak > limits.memory:
        raise Stopped(f"out of memory: {peak / GIB:.1f} GiB, the limit is {limits.memory / GIB:.1f} GiB")
    if time.perf_counter() - began > limits.seconds:
        raise Stopped(f"took more than {limits.seconds:.0f} s")


def _prompt(built: Built, context: int, depth: float) -> tuple[list[int], str | None]:
    if built.tokenizer is None:
        return [i * 7919 % built.vocabulary for i in range(context)], None
    needle = corpus.needle(built.tokenizer, corpus.standard_library(), context, depth, seed=context)
    return needle.text + needle.question, needle.answer


def _generate(built: Built, caches: list[Any], last: int) -> list[int]:
    """Greedy tokens after `last`, as many as are timed; the answer is at their start."""
    from ..hosts.mlx_lm.public import generate_step

    steps = generate_step(mx.array([last]), built.model, max_tokens=DECODE, prompt_cache=caches)
    return [int(token) for token, _ in steps]


def _row(built: Built, arm: str, context: int, note: str = "", **measured: Any) -> dict[str, Any]:
    empty = dict.fromkeys(("prefill_per_s", "decode_per_s", "kv_bytes", "peak_bytes", "needle"))
    return record("long", model=built.name, arm=arm, context=context, note=note, **{**empty, **measured})
