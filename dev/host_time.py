"""Host time of one layer's cache and attention in a decode step, on any machine: what Python and MLX's graph cost.

The graph of a step is built as a model would build it, layer by layer, and never evaluated: device calls are replaced
by arrays of the right shapes. So the figure is the time during which a GPU would wait for the host.

    python dev/host_time.py                  # prints a table
    python dev/host_time.py --record         # and appends rows to results/host-time.jsonl
    python dev/host_time.py --profile int4   # where the time goes, by function
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import pstats
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import mlx.core as mx  # noqa: E402
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention  # noqa: E402
from mlx_lm.models.cache import BatchKVCache, KVCache  # noqa: E402

from opentq import records  # noqa: E402
from opentq.attention import backends  # noqa: E402
from opentq.caches.single import OpenTQCache  # noqa: E402
from opentq.hosts import shim  # noqa: E402
from opentq.hosts.mlx_lm.host import HOST  # noqa: E402
from opentq.kernels.cuda import attention as cuda_attention  # noqa: E402
from opentq.kernels.cuda import launch as cuda  # noqa: E402
from opentq.kernels.metal import attention as metal_attention  # noqa: E402
from opentq.kernels.metal import launch as metal  # noqa: E402

RESULTS = ROOT / "results" / "host-time.jsonl"
LAYERS, HEADS, KV_HEADS, DIM, DEPTH, STEPS = 32, 32, 8, 128, 512, 130
SPECS = ("int4", "tq5/tq3:nc", "tq5/tq3:nc:center:sink=4")


def tokens(batch: int, heads: int, length: int) -> mx.array:
    x = mx.zeros((batch, heads, length, DIM), mx.float16)
    mx.eval(x)
    return x


class _Stub:
    """A kernel that does nothing: outputs of the shapes asked for, made before."""

    made: dict[tuple, mx.array] = {}  # noqa: RUF012

    def outputs(self, shapes: Any, dtypes: Any) -> list[mx.array]:
        return [self._array(tuple(shape), dtype) for shape, dtype in zip(shapes, dtypes)]

    def _array(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        if (shape, dtype) not in self.made:
            self.made[shape, dtype] = mx.zeros(shape, dtype)
            mx.eval(self.made[shape, dtype])
        return self.made[shape, dtype]


@contextlib.contextmanager
def stubbed(dialect: str) -> Iterator[None]:
    """`dialect`'s call path on this machine: everything but the device call itself."""
    stub = _Stub()
    saved: list[tuple[Any, str, Any]] = []

    def put(module: Any, name: str, value: Any) -> None:
        saved.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    if dialect == "cuda":
        put(cuda, "available", lambda: True)
        put(cuda, "multiprocessors", lambda: 132)
        put(cuda, "architecture", lambda: "sm_90")
        put(cuda.nvrtc, "cubin", lambda *_: b"")
        put(mx.fast, "precompiled_cuda_kernel", lambda **k: stub.outputs(k["output_shapes"], k["output_dtypes"]))
        cuda.compiled.cache_clear()
        backend = cuda_attention.BACKEND
    else:
        put(metal, "make", lambda **_: lambda **k: stub.outputs(k["output_shapes"], k["output_dtypes"]))
        put(metal, "cores", lambda: 40)
        metal.kernel.cache_clear()
        backend = metal_attention.BACKEND
    put(backends, "active", lambda: backend)
    backends.backend(dialect)
    try:
        yield
    finally:
        for module, name, value in reversed(saved):
            setattr(module, name, value)
        cuda.compiled.cache_clear()
        metal.kernel.cache_clear()


def caches(spec: str, batch: int) -> list[Any]:
    """One cache per layer, `DEPTH` tokens in each; `spec` "" is mlx-lm's own."""
    made: list[Any] = []
    prompt = tokens(1, KV_HEADS, DEPTH)
    for _ in range(LAYERS):
        lanes = [KVCache() if not spec else OpenTQCache(spec) for _ in range(batch)]
        for cache in lanes:
            cache.update_and_fetch(prompt, prompt)
        merge = BatchKVCache.merge if not spec else OpenTQCache.merge
        made.append(merge(lanes) if batch > 1 else lanes[0])
    return made


def measure(spec: str, batch: int, steps: int = STEPS) -> float:
    """Median microseconds per layer and step."""
    layers = caches(spec, batch)
    q, kv = tokens(batch, HEADS, 1), tokens(batch, KV_HEADS, 1)
    taken = []
    for _ in range(steps):
        outs = []
        start = time.thread_time()
        mask = create_attention_mask(q[:, 0], layers[0])
        for cache in layers:
            keys, values = cache.update_and_fetch(kv, kv)
            outs.append(scaled_dot_product_attention(q, keys, values, cache=cache, scale=DIM**-0.5, mask=mask))
        taken.append((time.thread_time() - start) / len(layers))
        if not spec:
            mx.eval([c.state for c in layers])  # or the graph of all steps would be kept
    return statistics.median(taken) * 1e6


def table(steps: int = STEPS) -> list[dict[str, Any]]:
    """Every arm, and its ratio to mlx-lm's own cache in the same batch."""
    shim.install(HOST)
    rows = []
    for batch in (1, 8):
        own = measure("", batch, steps)
        rows.append({"arm": "mlx-lm", "path": "", "batch": batch, "us": round(own, 2), "ratio": 1.0})
        for dialect in ("cuda", "metal"):
            with stubbed(dialect):
                for spec in SPECS:
                    us = measure(spec, batch, steps)
                    row = {
                        "arm": spec,
                        "path": dialect,
                        "batch": batch,
                        "us": round(us, 2),
                        "ratio": round(us / own, 3),
                    }
                    rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="append the rows to results/host-time.jsonl")
    parser.add_argument("--profile", metavar="SPEC", help="profile one spec and print its functions")
    parser.add_argument("--path", default="cuda", choices=["cuda", "metal"], help="call path, with --profile")
    parser.add_argument("--batch", type=int, default=1, help="sequences, with --profile")
    args = parser.parse_args()
    if args.profile:
        shim.install(HOST)
        with stubbed(args.path), cProfile.Profile() as profile:
            measure(args.profile, args.batch, 60)
        pstats.Stats(profile).sort_stats("tottime").print_stats(28)
        return
    rows = table()
    print(f"{'cache':<28}{'path':<8}{'batch':>6}{'us per layer':>14}{'ratio':>8}")
    for row in rows:
        print(f"{row['arm']:<28}{row['path']:<8}{row['batch']:>6}{row['us']:>14.1f}{row['ratio']:>8.2f}")
    if args.record:
        records.append(RESULTS, [records.record("host-time", layers=LAYERS, depth=DEPTH, **row) for row in rows])


if __name__ == "__main__":
    main()
