"""The times of `opentq doctor --bench`: decode at growing contexts, prompt chunks at depth, and appending.

Ours, MLX's attention over fp16 and mlx-lm's quantised attention take turns, so that a machine that slows down slows
all of them. Contexts grow until the vectors of one layer, in all forms that are compared, would take a quarter of the
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from .. import machine
from ..caches.single import OpenTQCache
from ..caches.step import Step
from ..memory import device
from ..records import Record, record
from . import kernel, timing
from .rivals import Entry, find

RIVALS = ("mlx", "mlx-lm")
Shape = tuple[int, int, int]


def that_fit(contexts: Sequence[int], shape: Shape) -> list[int]:
    """The contexts whose vectors fit a quarter of this machine: float32 twice, fp16 and packed."""
    _, kv_heads, dim = shape
    return [n for n in contexts if n * kv_heads * dim * 2 * 16 <= device.here().usable / 4]


def decode(
    shape: Shape, contexts: Sequence[int], entries: Sequence[Entry], windows: timing.Windows
) -> Iterator[Record]:
    """One query token: `kernel` records of `entries` and of both rivals."""
    rivals = [entry for name in RIVALS for entry in find(name)(shape[2])]
    if machine.device()[0] == "mac":  # nobody decodes in float32 there, and it takes the memory of two contexts
        rivals = [entry for entry in rivals if entry.kv != "f32"]
    return kernel.measure(shape, that_fit(contexts, shape), [*entries, *rivals], windows)


def prefill(
    shape: Shape, contexts: Sequence[int], specs: Sequence[str], prompt: int, windows: timing.Windows
) -> Iterator[Record]:
    """A chunk of `prompt` tokens at the end of each context, ours and MLX's fp16; and appending all of a context."""
    heads, kv_heads, dim = shape
    dtype = mx.float32 if machine.device()[0] == "cpu" else mx.float16
    for context in that_fit(contexts, shape):
        if context <= prompt:
            continue
        mx.random.seed(0)
        q = mx.random.normal((1, heads, prompt, dim)).astype(dtype)
        k, v = (mx.random.normal((1, kv_heads, context, dim)).astype(dtype) for _ in range(2))
        mx.eval(q, k, v)
        names, calls = ["mlx fp16" if dtype == mx.float16 else "mlx float32"], [_mlx(q, k, v)]
        for spec in specs:
            names.append(spec)
            calls.append(_ours(_filled(spec, k, v, prompt), q))
        for name, taken in zip(names, timing.interleave(calls, windows)):
            yield _call("prefill", name, shape, context, prompt, taken)
    for name, taken in zip(specs, timing.interleave([_append(spec, k, v) for spec in specs], windows)):
        yield _call("append", name, shape, context, context, taken)


def _filled(spec: str, k: mx.array, v: mx.array, prompt: int) -> Step:
    """The step of the last `prompt` tokens on a cache of all."""
    cache = OpenTQCache(spec)
    cache.update_and_fetch(k[:, :, :-prompt], v[:, :, :-prompt])
    step = cache.update_and_fetch(k[:, :, -prompt:], v[:, :, -prompt:])[0].step
    mx.eval(cache.state)
    return step


def _ours(step: Step, q: mx.array) -> Callable[[], Any]:
    return lambda: mx.eval(step.attend(q, scale=q.shape[-1] ** -0.5, mask="causal"))


def _mlx(q: mx.array, k: mx.array, v: mx.array) -> Callable[[], Any]:
    attention = mx.fast.scaled_dot_product_attention
    return lambda: mx.eval(attention(q, k, v, scale=q.shape[-1] ** -0.5, mask="causal"))


def _append(spec: str, k: mx.array, v: mx.array) -> Callable[[], Any]:
    def call() -> None:
        cache = OpenTQCache(spec)
        cache.update_and_fetch(k, v)
        mx.eval(cache.state)

    return call


def _call(what: str, kv: str, shape: Shape, context: int, tokens: int, taken: timing.Timing) -> Record:
    case = {"kv": kv, "shape": list(shape), "context": context, "tokens": tokens}
    return record("call", what=what, ms=taken.median * 1e3, ms_sd=taken.sd * 1e3, **case)


def copy_bandwidth(mebibytes: int = 256, rounds: int = 5) -> float:
    """Bytes per second that the device moves, read and written counted, when it writes one array from another."""
    x = mx.ones((mebibytes << 18,), mx.float32)
    mx.eval(x, x + 1)
    best = min(timing.seconds(lambda: mx.eval([x + i for i in range(1, 5)])) / 4 for _ in range(rounds))
    return 2 * x.nbytes / best
