"""`opentq doctor --bench`: does every kernel of this machine's back end compile, is it right here, and how fast is it?

The same code runs on every back end. What it finds is a file of records that its owner may send in: most of all from
Macs, of which this project has none. A kernel that does not compile, or is wrong, is a record, too.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import records as store
from ..attention import backends, channels, dispatch, judge, reference
from ..caches.single import OpenTQCache
from ..contracts.attention import AttnArgs, AttnFn
from ..contracts.backend import Backend
from ..contracts.codec import Codec, Packed
from ..kernels.metal import launch as metal
from ..spec.kv import KVSpec
from . import device_times, kernel, timing
from .facts import facts

Record = dict[str, Any]
Case = tuple[int, str, int]
Shape = tuple[int, int, int]
COMMAND = "opentq doctor --bench"
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
ATOL = 2e-5


@dataclass(frozen=True)
class Examination:
    """What to try: specs, `(query heads, KV heads, head dim)`, query tokens; and what to time.

    Attributes:
        specs: KV specs to judge, each with every shape.
        shapes: shapes to judge.
        calls: (query tokens, dtype, window) with which every spec and shape is judged: decode and prefill.
        options: more of them, for the first two specs and the first shape.
        tokens: tokens in the cache that is judged.
        timed: specs to time, at `shape` and each of `contexts` that fits this machine.
        deep: contexts at whose end a chunk of `prompt` tokens is timed.
        prompt: tokens of that chunk.
        windows: how long each is timed.
    """

    specs: tuple[str, ...] = (
        *("int8", "int4", "int3", "int2", "k8v4:g64", "f16", "tq5/tq3:nc", "tq4", "tq3", "tq5/tq2"),
        *("tq6/tq1", "tq2.5", "tq3p/int4", "qjl2/int4", "polar4"),
    )
    shapes: tuple[Shape, ...] = ((8, 2, 128), (8, 1, 64), (7, 1, 80), (2, 2, 128), (4, 2, 256))
    calls: tuple[Case, ...] = ((1, "float16", 0), (40, "float16", 0))
    options: tuple[Case, ...] = (
        (3, "float16", 0),
        (1, "float16", 70),
        (40, "float16", 70),
        (1, "bfloat16", 0),
        (40, "bfloat16", 0),
        (1, "float32", 0),
        (40, "float32", 0),
    )
    tokens: int = 620  # Metal shares them out over threadgroups; with those of `QUICK` it does not
    timed: tuple[str, ...] = ("f16", "int8", "k8v4", "int4", "tq4", "tq5/tq3:nc")
    shape: Shape = (32, 8, 128)
    contexts: tuple[int, ...] = (1024, 4096, 16384, 32768, 65536, 131072, 262144)
    deep: tuple[int, ...] = (4096, 32768)
    prompt: int = 512
    windows: timing.Windows = timing.WINDOWS

    def only(self, specs: Sequence[str]) -> Examination:
        """The same with these specs alone, each judged and timed. Raises ValueError for a spec that is none."""
        names = tuple(str(KVSpec.parse(s)) for s in specs)
        return replace(self, specs=names, timed=names)


FULL = Examination(windows=timing.Windows(warm=0.5))
QUICK = Examination(
    specs=("int4", "int3", "tq4"),
    shapes=((4, 2, 64), (5, 1, 80)),
    tokens=140,
    timed=("int4", "tq4"),
    shape=(4, 2, 64),
    contexts=(512,),
    deep=(512,),
    prompt=64,
    windows=timing.Windows(2, 0.0, 0.0),
)


def examine(plan: Examination) -> Iterator[Record]:
    """All records: one of the device, then conformance, packing, pages, and times. Records that failed have `ok` false.

    Only what was right is timed.
    """
    backend = backends.active()
    told = facts() | {"backend_kernels": backend.name if backend else "none: portable path"}
    if metal.architecture():
        told["tuning"] = asdict(metal.tuning())
    bandwidths = {"read_bandwidth": timing.read_bandwidth(), "copy_bandwidth": device_times.copy_bandwidth()}
    yield _record("device", **told, **bandwidths)
    wrong = set()
    for name, variant in variants():
        for i, spec in enumerate(plan.specs):
            for j, shape in enumerate(plan.shapes):
                for call in plan.calls + (plan.options if i < 2 and j == 0 else ()):
                    for found in _judge(plan.tokens, name, variant, spec, shape, call):
                        if failed(found):
                            wrong.add((spec, name))
                        yield found
    for spec in plan.specs:
        yield from _pack(plan, spec)
    yield from _pages(plan)
    arms = [(spec, name, variant) for name, variant in variants() for spec in plan.timed if (spec, name) not in wrong]
    right = [spec for spec in plan.timed if not any(s == spec for s, _ in wrong)]
    ours = [kernel.ours(KVSpec.parse(spec), name, variant) for spec, name, variant in arms]
    try:
        for found in device_times.decode(plan.shape, plan.contexts, ours, plan.windows):
            yield _scrubbed(found)
        for found in device_times.prefill(plan.shape, plan.deep, right, plan.prompt, plan.windows):
            yield _scrubbed(found)
    except RuntimeError as error:
        yield _record("times", ok=False, failure=str(error)[:4000])


def variants() -> list[tuple[str, kernel.Variant]]:
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
    """Without the words of the command line and without the user's folder, in which a path may name a person."""
    told = {"command": COMMAND}
    if "failure" in record:
        told["failure"] = record["failure"].replace(str(Path.home()), "~")
    return record | told


# ---- conformance


def _judge(tokens: int, name: str, variant: kernel.Variant, spec: str, shape: Shape, call: Case) -> Iterator[Record]:
    """One call, by every attention function that serves it."""
    length, dtype, window = call
    mx.random.seed(shape[2])
    args = attention(tokens, spec, shape, call)
    case = {"kv": spec, "shape": list(shape), "length": length, "dtype": dtype, "window": window}
    for candidate, function in dispatch.candidates():
        verdict = _verdict(args, candidate, function, variant)
        if verdict is not None:
            yield _record("conformance", served_by=candidate, variant=name, **case, **verdict)


def attention(tokens: int, spec: str, shape: Shape, call: Case) -> AttnArgs:
    """A call over `tokens` random tokens, the last of which are new."""
    heads, kv_heads, dim = shape
    length, dtype, window = call
    k, v = (mx.random.normal((1, kv_heads, tokens, dim)).astype(mx.float16) for _ in range(2))
    cache = OpenTQCache(spec)
    cache.update_and_fetch(k[:, :, :-length], v[:, :, :-length])
    step = cache.update_and_fetch(k[:, :, -length:], v[:, :, -length:])[0].step
    mx.eval(cache.state)
    q = step.k.codec.rotate(mx.random.normal((1, heads, length, dim)).astype(DTYPES[dtype]))
    return AttnArgs(q, step.k, step.v, step.dense_k, step.dense_v, step.lens, dim**-0.5, True, window)


def _verdict(args: AttnArgs, name: str, function: AttnFn, variant: kernel.Variant) -> Record | None:
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


def _pack(plan: Examination, spec: str) -> Iterator[Record]:
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


def _pages(plan: Examination) -> Iterator[Record]:
    """The kernels that choose pages for a decode step, by sketches and by the packed keys of every spec."""
    backend = dispatch.serving()
    if backend is None:
        return
    for heads, kv_heads, dim in plan.shapes:
        number, rows = channels.count(dim), heads // kv_heads
        choice = functools.partial(judge.choice, channels=number, heads=kv_heads, length=rows, dim=dim)
        yield from _chosen(backend, "choose", choice, {"dim": dim})
        yield from _chosen(backend, "top", functools.partial(judge.top, heads=kv_heads, rows=rows), {"dim": dim})
        for spec in plan.specs:
            args = attention(plan.tokens, spec, (heads, kv_heads, dim), (1, "float16", 0))
            yield from _chosen(backend, "weigh", functools.partial(judge.weights, args=args), {"dim": dim, "kv": spec})


def _chosen(backend: Backend, name: str, verdict: Callable[[Backend], str], case: Record) -> Iterator[Record]:
    """What the judge says of a back end's function, if it serves."""
    served = False

    def watched(*args: Any) -> Any:
        nonlocal served
        out = getattr(backend, name)(*args)
        served = served or out is not None
        return out

    changed: dict[str, Any] = {name: watched}
    try:
        why = verdict(replace(backend, **changed))
    except RuntimeError as error:
        why = str(error)[:4000]
    if served or why:
        yield _record("pages", ok=not why, by=name, **case, **({"failure": why} if why else {}))
