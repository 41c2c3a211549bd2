"""Host time of one layer's cache and attention in a decode step, on any machine: what Python and MLX's graph cost.

The graph of a step is built as a model would build it, layer by layer, and never evaluated, so the figure is the time
during which a GPU would wait for the host. Kernels are MLX's own kernel objects, called as they are on the device while
MLX traces, which needs no GPU; what they return is replaced by arrays of the right shapes. An MLX without CUDA can't
make the nodes of that path: there a Metal kernel with the same inputs and outputs stands in for the call.

All arms take turns, step by step, and a ratio is the median of the ratios of neighbours, so that other work on the
machine moves it little. Times are CPU time of this thread.

    python dev/host_time.py                              # prints a table
    python dev/host_time.py --record                     # and appends rows to results/host-time.jsonl
    python dev/host_time.py --profile metal int4 1       # samples one path, spec and batch: where the time goes
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import mlx.core as mx  # noqa: E402
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention  # noqa: E402
from mlx_lm.models.cache import BatchKVCache, KVCache  # noqa: E402

from opentq import records  # noqa: E402
from opentq.attention import backends, guard  # noqa: E402
from opentq.caches.single import OpenTQCache  # noqa: E402
from opentq.hosts import shim  # noqa: E402
from opentq.hosts.mlx_lm.host import HOST  # noqa: E402
from opentq.kernels import repeat  # noqa: E402
from opentq.kernels.cuda import attention as cuda_attention  # noqa: E402
from opentq.kernels.cuda import launch as cuda  # noqa: E402
from opentq.kernels.metal import attention as metal_attention  # noqa: E402
from opentq.kernels.metal import launch as metal  # noqa: E402

RESULTS = ROOT / "results" / "host-time.jsonl"
HEADS, KV_HEADS, DIM, DEPTH = 32, 8, 128, 192
SPECS = ("int4", "tq5/tq3:nc", "tq5/tq3:nc:center:sink=4")
PATHS = {"cuda": cuda_attention.BACKEND, "metal": metal_attention.BACKEND}
BATCHES = (1, 8)


@functools.cache
def tokens(batch: int, heads: int, length: int) -> mx.array:
    return _ready((batch, heads, length, DIM), mx.float16)


@functools.cache
def _ready(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    x = mx.zeros(shape, dtype)
    mx.eval(x)
    return x


def _called(real: Callable[..., Any]) -> Callable[..., list[mx.array]]:
    """A kernel whose node is made and thrown away: what comes back was computed before."""

    def call(**given: Any) -> list[mx.array]:
        real(**given)
        return [_ready(tuple(s), d) for s, d in zip(given["output_shapes"], given["output_dtypes"])]

    call.real = real  # type: ignore[attr-defined]
    return call


def _repeated(kernel: Any, given: dict[str, Any]) -> repeat.Call:
    """The same for calls that are made again."""
    call = REPEATED(kernel.real, given)
    known = [_ready(*x) for x in zip(given["output_shapes"], given["output_dtypes"])]
    return lambda inputs: (call(inputs), known)[1]


REPEATED = repeat.repeated
STAND_INS: dict[tuple[int, int], Callable[..., Any]] = {}


def _cuda_kernel(*, inputs: Any, output_shapes: Any, output_dtypes: Any, grid: Any, threadgroup: Any, **_: Any) -> Any:
    size = len(inputs), len(output_shapes)
    if size not in STAND_INS:
        names = [[f"{side}{i}" for i in range(count)] for side, count in zip("xy", size)]
        make: Any = mx.fast.metal_kernel
        STAND_INS[size] = make(
            name="s", input_names=names[0], output_names=names[1], source="", ensure_row_contiguous=False
        )
    return STAND_INS[size](
        inputs=inputs, output_shapes=output_shapes, output_dtypes=output_dtypes, grid=grid, threadgroup=threadgroup
    )


@contextlib.contextmanager
def stubbed() -> Iterator[Callable[[str], None]]:
    """Both call paths on this machine, without devices, verdicts passed; gives what switches between them."""
    active = [backends.active()]
    make = mx.fast.metal_kernel
    changes: list[tuple[Any, str, Any]] = [
        (cuda, "available", lambda: True),
        (cuda, "multiprocessors", lambda: 132),
        (cuda, "architecture", lambda: "sm_90"),
        (cuda.nvrtc, "cubin", lambda *_: b""),
        (mx.fast, "precompiled_cuda_kernel", _called(_cuda_kernel)),
        (metal, "make", lambda **creation: _called(make(**creation))),
        (repeat, "repeated", _repeated),
        (metal, "cores", lambda: 40),
        (guard, "_passes", lambda *_: True),
        (guard, "trusted", {}),
        (backends, "active", lambda: active[0]),
    ]
    saved = [(module, name, getattr(module, name)) for module, name, _ in changes]
    ready = {name: dataclasses.replace(backend, available=lambda: True) for name, backend in PATHS.items()}
    try:
        for module, name, value in changes:
            setattr(module, name, value)
        cuda.compiled.cache_clear()
        metal.forget()
        yield lambda path: active.__setitem__(0, ready.get(path))
    finally:
        for module, name, value in reversed(saved):
            setattr(module, name, value)
        cuda.compiled.cache_clear()
        metal.forget()


def caches(spec: str, batch: int, layers: int) -> list[Any]:
    """One cache per layer, `DEPTH` tokens in each; `spec` "" is mlx-lm's own."""
    made: list[Any] = []
    prompt = tokens(1, KV_HEADS, DEPTH)
    for _ in range(layers):
        lanes = [KVCache() if not spec else OpenTQCache(spec) for _ in range(batch)]
        for cache in lanes:
            cache.update_and_fetch(prompt, prompt)
        merge = BatchKVCache.merge if not spec else OpenTQCache.merge
        made.append(merge(lanes) if batch > 1 else lanes[0])
    return made


def step(layers: list[Any], batch: int, own: bool) -> float:
    """One step through all layers: microseconds per layer."""
    q, kv, outs = tokens(batch, HEADS, 1), tokens(batch, KV_HEADS, 1), []
    start = time.thread_time()
    mask = create_attention_mask(q[:, 0], layers[0])
    for cache in layers:
        keys, values = cache.update_and_fetch(kv, kv)
        outs.append(scaled_dot_product_attention(q, keys, values, cache=cache, scale=DIM**-0.5, mask=mask))
    taken = (time.thread_time() - start) / len(layers) * 1e6
    if own:
        mx.eval([c.state for c in layers])  # or the graph of all steps would be kept
    return taken


def packed(layers: list[Any]) -> int:
    """Packed tokens of a layer's sequences."""
    cache = layers[0]
    return sum(cache._packed(1)) if isinstance(cache, OpenTQCache) else 0


def traced(work: Callable[[], None]) -> None:
    """Run `work` while MLX traces, when kernels without a device are made."""
    with tempfile.TemporaryDirectory() as folder:
        mx.export_function(str(Path(folder) / "nothing.mlxfn"), lambda x: (work(), x + 1)[1], mx.zeros((1,)))


def measure(batch: int, layers: int, steps: int, paths: dict[str, Any] = PATHS) -> list[dict[str, Any]]:
    """Every arm, taking turns: microseconds per layer and step, and the ratio to mlx-lm's own cache."""
    shim.install(HOST)
    arms = [("", ""), *((path, spec) for path in paths for spec in SPECS)]
    taken: dict[tuple[str, str], list[float]] = {arm: [] for arm in arms}
    packing: dict[tuple[str, str], list[float]] = {arm: [] for arm in arms}  # steps that fill a block

    def work() -> None:
        with stubbed() as switch:
            # One layer first, to the end: it makes the arrays that kernels are said to return.
            for size, kept in ((1, False), (layers, True)):
                made = {}
                for path, spec in arms:
                    switch(path)
                    made[path, spec] = caches(spec, batch, size)
                for _ in range(steps):
                    for arm in arms:
                        switch(arm[0])
                        for counted in (False, kept):  # the first one's code the last arm has pushed out of caches
                            before = packed(made[arm])
                            us = step(made[arm], batch, not arm[1])
                            packing[arm] += [us] * (kept and packed(made[arm]) > before)
                            taken[arm] += [us] * counted

    traced(work)
    own = taken["", ""]
    return [
        {
            "arm": spec or "mlx-lm",
            "path": path,
            "batch": batch,
            "us": round(statistics.median(times), 2),
            "ratio": round(statistics.median(t / o for t, o in zip(times, own)), 3),
            "packing_us": round(statistics.median(packing[path, spec]), 2) if packing[path, spec] else None,
        }
        for (path, spec), times in taken.items()
    ]


def profile(path: str, spec: str, batch: int, steps: int = 600, layers: int = 32) -> str:
    """Samples of a path, one every few milliseconds of CPU time: a table of functions by their own share."""
    shim.install(HOST)
    own, whole = Counter[str](), [0]

    def sample(_: int, frame: Any) -> None:
        code = frame.f_code
        file = code.co_filename.rpartition("site-packages/")[2].removeprefix(f"{ROOT}/")
        whole[0] += 1
        own[f"| `{file}` | `{code.co_name}`"] += 1

    def work() -> None:
        with stubbed() as switch:
            switch(path)
            made = caches(spec, batch, layers)
            before = signal.signal(signal.SIGPROF, sample)
            signal.setitimer(signal.ITIMER_PROF, 1e-3, 1e-3)
            for _ in range(steps):
                step(made, batch, not spec)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)

    traced(work)
    rows = [f"{where} | {n / whole[0]:.1%} |" for where, n in own.most_common(16)]
    return "\n".join(["| file | function | share |", "| --- | --- | ---: |", *rows])


def table(rows: list[dict[str, Any]]) -> str:
    head = ["cache", "path", "batch", "us per layer and step", "of mlx-lm's", "us where a block is packed"]
    lines = [f"| {' | '.join(head)} |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    for r in rows:
        packing = f"{r['packing_us']:.0f}" if r["packing_us"] else ""
        lines.append(f"| {r['arm']} | {r['path']} | {r['batch']} | {r['us']:.1f} | {r['ratio']:.2f} | {packing} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="append the rows to results/host-time.jsonl")
    parser.add_argument("--profile", metavar=("PATH", "SPEC", "BATCH"), nargs=3, help='path "" is mlx-lm\'s own cache')
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=64, help="steps of every arm, each behind an uncounted one")
    args = parser.parse_args()
    if args.profile:
        path, spec, batch = args.profile
        print(profile(path, spec, int(batch)))
        return
    rows = [row for batch in BATCHES for row in measure(batch, args.layers, args.steps)]
    print(table(rows))
    if args.record:
        records.append(RESULTS, [records.record("host-time", layers=args.layers, depth=DEPTH, **r) for r in rows])


if __name__ == "__main__":
    main()
