"""`opentq doctor --bench`: does every kernel of this machine's back end compile, is it right here, and how fast is it?

The same code runs on every back end. What it finds is a file of records that its owner may send in: most of all from
Macs, of which this project has none. A kernel that does not compile, or is wrong, is a record, too.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

import mlx.core as mx

from .. import records as store
from ..attention import backends, dispatch, reference
from ..caches.single import OpenTQCache
from ..caches.step import Step
from ..contracts.attention import AttnArgs
from ..contracts.codec import Codec, Packed
from ..kernels.metal import launch as metal
from ..spec.kv import KVSpec
from . import kernel, timing

Record = dict[str, Any]
Call = tuple[int, str, int]
Shape = tuple[int, int, int]
Variant = Callable[[], AbstractContextManager[None]]
COMMAND = "opentq doctor --bench"
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
ATOL = 2e-5
FACTS = ("architecture", "device_name", "memory_size", "total_memory", "max_recommended_working_set_size")
"""What is told of the device, and no more: some drivers also give identifiers of the very card."""


@dataclass(frozen=True)
class Plan:
    """What to try: specs, `(query heads, KV heads, head dim)`, query tokens; and what to time.

    Attributes:
        specs: KV specs to judge, each with every shape.
        shapes: shapes to judge.
        calls: (query tokens, dtype, window) with which every spec and shape is judged: decode and prefill.
        options: more of them, for the first two specs and the first shape.
        tokens: tokens in the cache that is judged.
        timed: specs to time, at `shape` and each of `contexts`.
        prompt: query tokens of the timed prefill; 0 skips it.
        windows, warm, window: as `timing.interleave`.
    """

    specs: tuple[str, ...] = (
        *("int8", "int4", "int3", "int2", "k8v4:g64", "f16", "tq4", "tq3", "tq5/tq2", "tq6/tq1"),
        *("tq2.5", "tq3p/int4", "qjl2/int4", "polar4"),
    )
    shapes: tuple[Shape, ...] = ((8, 2, 128), (8, 1, 64), (7, 1, 80), (2, 2, 128), (4, 2, 256))
    calls: tuple[Call, ...] = ((1, "float16", 0), (40, "float16", 0))
    options: tuple[Call, ...] = (
        (3, "float16", 0),
        (1, "float16", 70),
        (40, "float16", 70),
        (1, "bfloat16", 0),
        (40, "bfloat16", 0),
        (1, "float32", 0),
        (40, "float32", 0),
    )
    tokens: int = 333
    timed: tuple[str, ...] = ("f16", "int8", "int4", "int3", "tq4", "tq3")
    shape: Shape = (32, 8, 128)
    contexts: tuple[int, ...] = (4096, 32768)
    prompt: int = 512
    windows: int = timing.WINDOWS
    warm: float = 0.5
    window: float = timing.WINDOW_SECONDS

    def only(self, specs: Sequence[str]) -> Plan:
        """The same with these specs alone, each judged and timed. Raises ValueError for a spec that is none."""
        names = tuple(str(KVSpec.parse(s)) for s in specs)
        return replace(self, specs=names, timed=names)


FULL = Plan()
QUICK = Plan(
    specs=("int4", "int3", "tq4"),
    shapes=((4, 2, 64), (5, 1, 80)),
    tokens=140,
    timed=("int4", "tq4"),
    shape=(4, 2, 64),
    contexts=(512,),
    prompt=64,
    windows=2,
    warm=0.0,
    window=0.0,
)


def examine(plan: Plan) -> Iterator[Record]:
    """All records: one of the device, then conformance, packing, and times. Records that failed have `ok` false."""
    backend = backends.active()
    facts = {k: v for k, v in mx.device_info().items() if k in FACTS}
    kernels = {"backend_kernels": backend.name if backend else "none: portable path", "device_info": facts}
    if metal.architecture():
        kernels["tuning"] = asdict(metal.tuning())
    yield _record("device", **kernels)
    for name, variant in variants():
        for i, spec in enumerate(plan.specs):
            for j, shape in enumerate(plan.shapes):
                for call in plan.calls + (plan.options if i < 2 and j == 0 else ()):
                    yield from _judge(plan.tokens, name, variant, spec, shape, call)
    for spec in plan.specs:
        yield from _pack(plan, spec)
    try:
        for name, variant in variants():
            with variant():
                found = kernel.bench(plan.shape, plan.contexts, plan.timed, (), plan.windows, plan.warm, plan.window)
                yield from (_scrubbed(record) | {"variant": name} for record in found)
        yield from _long_calls(plan)
    except RuntimeError as error:
        yield _record("times", ok=False, failure=str(error)[:4000])


def variants() -> list[tuple[str, Variant]]:
    """The ways to decode here: on Metal both kernels, elsewhere there is one."""
    if not metal.architecture():
        return [("", contextlib.nullcontext)]
    tune = metal.tuning()
    return [(v, functools.partial(metal.trying, replace(tune, variant=v))) for v in metal.CHOICES["variant"]]


def failed(record: Record) -> bool:
    return not record.get("ok", True)


def _record(kind: str, **fields: Any) -> Record:
    return _scrubbed(store.record(kind, **fields))


def _scrubbed(record: Record) -> Record:
    """Without the words of the command line, in which a path may name a person."""
    return record | {"command": COMMAND}


# ---- conformance


def _judge(tokens: int, name: str, variant: Variant, spec: str, shape: Shape, call: Call) -> Iterator[Record]:
    """One call, by every attention function that serves it."""
    heads, kv_heads, dim = shape
    length, dtype, window = call
    mx.random.seed(dim)
    step = _step(spec, kv_heads, dim, tokens, length)
    q = step.k.codec.rotate(mx.random.normal((1, heads, length, dim)).astype(DTYPES[dtype]))
    args = AttnArgs(q, step.k, step.v, step.dense_k, step.dense_v, step.lens, dim**-0.5, True, window)
    case = {"kv": spec, "shape": list(shape), "length": length, "dtype": dtype, "window": window}
    for candidate, function in dispatch.candidates():
        verdict = _verdict(args, candidate, function, variant)
        if verdict is not None:
            yield _record("conformance", served_by=candidate, variant=name, **case, **verdict)


def _step(spec: str, kv_heads: int, dim: int, tokens: int, length: int) -> Step:
    """A cache of `tokens` random tokens, the last `length` of which are new."""
    k, v = (mx.random.normal((1, kv_heads, tokens, dim)).astype(mx.float16) for _ in range(2))
    cache = OpenTQCache(spec)
    cache.update_and_fetch(k[:, :, :-length], v[:, :, :-length])
    step = cache.update_and_fetch(k[:, :, -length:], v[:, :, -length:])[0].step
    mx.eval(cache.state)
    return step


def _verdict(args: AttnArgs, name: str, function: dispatch.AttnFn, variant: Variant) -> Record | None:
    """Errors and seconds of the first call and the second (the first compiles), or None where it does not serve."""
    seconds = []
    try:
        with variant():
            for _ in range(2):
                start = time.perf_counter()
                if (out := function(args)) is None:
                    return None
                mx.eval(out)
                seconds.append(time.perf_counter() - start)
    except RuntimeError as error:  # what MLX raises for a kernel that the device's compiler refuses
        return {"ok": False, "failure": str(error)[:4000]}
    assert out is not None
    judge = reference.attend(args)
    worst, naive = (_largest(x.astype(mx.float32) - judge) for x in (out, _naive(args, name)))
    return {
        "ok": worst <= 2 * naive + ATOL,  # not so for NaN
        "max_error": worst,
        "naive_error": naive,
        "first_seconds": seconds[0],
        "again_seconds": seconds[1],
    }


def _largest(x: mx.array) -> float:
    return mx.abs(x).max().item()  # type: ignore[return-value]


def _naive(args: AttnArgs, name: str) -> mx.array:
    """Plain attention of one sequence, every intermediate in the query's dtype; the CPU's kernels are of fp16 class."""
    dtype = mx.float16 if name == "cpu" and args.q.dtype == mx.float32 else args.q.dtype
    packed, sink, tail = args.lens[0]

    def logical(kv, dense: mx.array) -> mx.array:
        middle = [kv.decode(0, packed, dtype)] if packed else []
        parts = [dense[:, :, :sink], *middle, dense[:, :, tail:]]
        return mx.repeat(mx.concatenate([p.astype(dtype) for p in parts], axis=2), args.gqa, axis=1)

    scores = (args.q.astype(dtype) @ logical(args.k, args.dense_k).swapaxes(-1, -2)) * args.scale
    scores = mx.where(reference.visible(args, 0), scores, mx.finfo(dtype).min)
    return mx.softmax(scores, axis=-1) @ logical(args.v, args.dense_v)


def _pack(plan: Plan, spec: str) -> Iterator[Record]:
    """The pack kernels against their codecs, which differ from them at most in a last place."""
    codecs = KVSpec.parse(spec).codecs()
    for dim in dict.fromkeys(dim for _, _, dim in plan.shapes):
        for codec, layout in zip(codecs, dispatch.layouts(*codecs, (dim, dim))):
            mx.random.seed(dim)
            y = mx.random.normal((1, 2, 128, dim)).astype(mx.float16)
            try:
                got, expected = layout.load(layout.encode(codec, y)), codec.encode(y)
            except RuntimeError as error:
                yield _record("pack", ok=False, codec=str(codec), dim=dim, failure=str(error)[:4000])
                continue
            same = sum((a == b).mean().item() for a, b in zip(got, expected)) / len(got)
            errors = [_distance(codec, packed, y) for packed in (got, expected)]
            ok = errors[0] <= 1.001 * errors[1] + 1e-6
            yield _record("pack", ok=ok, codec=str(codec), dim=dim, identical=same, error=errors[0])


def _distance(codec: Codec, packed: Packed, y: mx.array) -> float:
    y = y.astype(mx.float32)
    return float((mx.linalg.norm(codec.decode(packed, mx.float32, y.shape[-1]) - y) / mx.linalg.norm(y)).item())  # type: ignore[arg-type]


# ---- times of calls that are not one token's


def _long_calls(plan: Plan) -> Iterator[Record]:
    """A prompt chunk over a compressed prefix, and appending (rotating and packing) all of it."""
    heads, kv_heads, dim = plan.shape
    context = plan.contexts[0]
    mx.random.seed(0)
    q = mx.random.normal((1, heads, plan.prompt, dim)).astype(mx.float16)
    k, v = (mx.random.normal((1, kv_heads, context, dim)).astype(mx.float16) for _ in range(2))
    mx.eval(q, k, v)
    for spec in plan.timed:
        step = _step(spec, kv_heads, dim, context, plan.prompt)

        def prefill(step: Step = step) -> None:
            mx.eval(step.attend(q, scale=dim**-0.5, mask="causal"))

        def append(spec: str = spec) -> None:
            cache = OpenTQCache(spec)
            cache.update_and_fetch(k, v)
            mx.eval(cache.state)

        timings = timing.interleave([prefill, append], plan.windows, plan.warm, plan.window)
        for what, tokens, taken in zip(("prefill", "append"), (plan.prompt, context), timings):
            case = {"kv": spec, "shape": list(plan.shape), "context": context, "tokens": tokens}
            yield _record("call", what=what, ms=taken.median * 1e3, ms_sd=taken.sd * 1e3, **case)
