"""What decode costs on an Apple GPU, counted in the emulator; `chips.py` makes lower bounds on time of it.

Each kernel runs at two lengths for one KV head; the difference gives what one more token costs (bytes fetched,
operations, threadgroup traffic).

    python -m tests.msl.cost --shape 64,8,128 --ctx 128k --kv int4
    python -m tests.msl.cost --record results/metal-counts.jsonl     every spec and GQA ratio; goes on where it stopped
"""

from __future__ import annotations

import argparse
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from opentq.attention import backends, dispatch, guard, pages
from opentq.attention.channels import count as count_of_channels
from opentq.caches.single import OpenTQCache
from opentq.kernels.metal import attention as fused_metal
from opentq.kernels.metal import launch as metal
from opentq.kernels.metal import pages as metal_pages
from opentq.records import append, read, record

from .. import oracle
from ..matrix import Shape
from . import launch, native
from .chips import CHIPS

TOKENS = (1024, 2048)
SPECIAL = 4
"""Lane cycles of exp2 and its like: a quarter of the rate."""
REDUCTION = 10
"""Lane operations of a reduction over a simdgroup: five exchanges and five operations."""
MATRIX = 16
"""Multiply-adds of a lane in one 8x8x8 product: up to the M4 it runs on the ordinary lanes."""
PACKED = tuple(1 + metal._CACHE.index(name) for name in metal._PACKED)
"""Buffers of packed keys and values, behind the queries."""
PUBLISHED_MS = 9.9
"""Open-TQ-Metal's int4 attention at 128K on an M1 Max, as its authors published it; they do not say what it spans."""


SPECS = (
    *("f16", "int8", "int4", "int3", "int2", "k8v4", "tq5/tq3:nc"),
    *("tq6", "tq5", "tq4", "tq3", "tq2", "tq1", "tq2.5", "tq3.5", "tq3p/int4", "qjl2/int4", "polar4"),
)
RATIOS = (1, 2, 4, 8, 16)
COLUMNS = 32
"""fp16 columns of a step that is counted: half a block."""


@dataclass(frozen=True)
class Cost:
    """What one more token costs one KV head."""

    name: str
    unique: float
    fetched: float
    operations: float
    issue: float
    memory_instructions: float
    threadgroup_bytes: float

    def megabytes(self, tokens: int, heads: int) -> tuple[float, float]:
        """Unique and fetched megabytes of a call."""
        return self.unique * tokens * heads / 1e6, self.fetched * tokens * heads / 1e6


def difference(name: str, short: launch.Report, long: launch.Report, buffers: tuple[int, ...], tokens: int) -> Cost:
    def per_token(get) -> float:
        return (get(long) - get(short)) / tokens

    def issue(r: launch.Report) -> float:
        collectives = 32 * (REDUCTION * r.reductions + r.shuffles + MATRIX * r.matrix_multiplies)
        return r.arithmetic() + (SPECIAL - 1) * r.ops["special"] + collectives

    def operations(r: launch.Report) -> float:
        return r.arithmetic() + 32 * MATRIX * r.matrix_multiplies

    return Cost(
        name,
        per_token(lambda r: sum(r.unique_bytes[i] for i in buffers)),
        per_token(lambda r: sum(r.fetched_bytes[i] for i in buffers)),
        per_token(operations),
        per_token(issue),
        per_token(lambda r: r.ops["memory"]),
        per_token(lambda r: r.threadgroup_read + r.threadgroup_written),
    )


@contextmanager
def emulated(variant: str):
    """opentq's Metal kernels in the emulator, one threadgroup per KV head."""
    backend = replace(fused_metal.BACKEND, available=lambda: True)
    changes = [
        (metal, "make", launch.metal_kernel),
        (metal, "tuning", lambda: metal.Tuning(variant=variant, simdgroups=4)),
        (metal, "cores", lambda: 1),
        (backends, "active", lambda: backend),
        (guard, "judging", False),  # whose launches are none of a step's
    ]
    saved = [(module, name, getattr(module, name)) for module, name, _ in changes]
    metal.forget()
    try:
        for module, name, value in changes:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in saved:
            setattr(module, name, value)
        metal.forget()


def ours(spec: str, gqa: int, dim: int, variant: str) -> Cost:
    """opentq's decode over a cache of `spec`, by counts."""
    shape = Shape(q_heads=gqa, kv_heads=1, key_dim=dim, value_dim=dim)
    found = []
    with emulated(variant):
        for tokens in TOKENS:
            cache = OpenTQCache(spec)
            handles = oracle.fill(cache, *oracle.vectors(shape, tokens + 1), [tokens, 1])
            before = len(launch.launches)
            dispatch.attend(oracle.args_of(handles, oracle.queries(shape, 1, dtype=mx.float16)))
            found.append(next(r for name, r in launch.launches[before:] if name != "opentq_append"))
    return difference(f"opentq {spec}, {variant}", *found, PACKED, TOKENS[1] - TOKENS[0])


def step_kernels(gqa: int, dim: int) -> dict[str, dict[str, float]]:
    """What surrounds attention in a step of one KV head with `COLUMNS` fp16 columns, by kernel: whole launches. The
    merge is of four parts.
    """
    shape, held = Shape(q_heads=gqa, kv_heads=1, key_dim=dim, value_dim=dim), 384 + COLUMNS
    k, v = oracle.vectors(shape, held + 1, dtype=mx.float16)
    with emulated("lanes"):
        metal.tuning = lambda: metal.Tuning(teams=2, simdgroups=4)
        cache = OpenTQCache("int4")
        oracle.fill(cache, k[:, :, :-1], v[:, :, :-1], [held])
        keys, _ = cache.update_and_fetch(k[:, :, -1:], v[:, :, -1:])
        mx.eval(keys.step.attend(oracle.queries(shape, 1, dtype=mx.float16), scale=dim**-0.5))
    found = {name.removeprefix("opentq_"): report for name, report in launch.launches[-3:]}
    assert list(found) == ["append", "decode_lanes", "merge"]
    return {
        name: {
            "unique": sum(report.unique_bytes),
            "fetched": sum(report.fetched_bytes),
            "written": sum(report.written_bytes),
            "operations": report.arithmetic(),
            "threadgroups": report.threadgroups,
        }
        for name, report in found.items()
        if name != "decode_lanes"
    }


def page_kernels(spec: str, gqa: int, dim: int) -> list[Cost]:
    """What one more token costs one KV head where pages are chosen: by sketches, the list, and by keys of `spec`."""
    shape, found = Shape(q_heads=gqa, kv_heads=1, key_dim=dim, value_dim=dim), []
    channels = mx.arange(count_of_channels(dim), dtype=mx.int32).reshape(1, 1, -1)
    with emulated("lanes"):
        for tokens in TOKENS:
            cache = OpenTQCache(spec)
            args = oracle.args_of(
                oracle.fill(cache, *oracle.vectors(shape, tokens + 1), [tokens, 1]),
                oracle.queries(shape, 1, dtype=mx.float16),
            )
            sketches = pages.encode(args.k.decode(0, tokens, mx.float32), channels)
            before = len(launch.launches)
            rows = pages.Selector(sketches, channels, pages.PAGE).queries(args.q, args.scale)
            metal_pages.choose(sketches, rows, (tokens,), 2)
            metal_pages.weigh(args)
            found.append([report for _, report in launch.launches[before:]])
    buffers = {"sketches": (0,), "pick": (0,), "weigh": PACKED[:3]}
    return [difference(n, *pair, b, TOKENS[1] - TOKENS[0]) for (n, b), pair in zip(buffers.items(), zip(*found))]


def mlx_fp16(gqa: int, dim: int) -> Cost:
    """MLX's own two-pass attention over fp16 K/V: the kernel that MLX chooses for this GQA ratio and head dim."""
    variant = gqa == 8 and dim in (64, 128)
    rng = np.random.default_rng(0)
    found = []
    for tokens in TOKENS:
        q, k, v = (
            rng.standard_normal((1, n, t, dim)).astype(np.float16) for n, t in ((gqa, 1), (1, tokens), (1, tokens))
        )
        found.append(native.sdpa_2pass(q, k, v, dim**-0.5, 32, variant)[1])
    name = "MLX fp16 sdpa_vector_2pass" + ("_gqa" if variant else "")
    return difference(name, *found, (1, 2), TOKENS[1] - TOKENS[0])


def count(path: Path, seconds: float) -> None:
    """Append a row for every spec, GQA ratio and variant that `path` lacks, and for MLX's own kernel; D 128."""
    rows = read([path]) if path.exists() else []
    done = {(r["kv"], r["gqa"], r["variant"]) for r in rows if r["kind"] == "metal-count"}
    for gqa in set(RATIOS) - {r["gqa"] for r in rows if r["kind"] == "metal-step"}:
        for kernel, counts in step_kernels(gqa, 128).items():
            append(path, [record("metal-step", kernel=kernel, gqa=gqa, dim=128, columns=COLUMNS, per_launch=counts)])
    for gqa in set(RATIOS) - {r["gqa"] for r in rows if r["kind"] == "metal-pages"}:
        for cost in page_kernels("int4", gqa, 128):
            append(path, [record("metal-pages", kv="int4", gqa=gqa, dim=128, kernel=cost.name, per_token=_row(cost))])
    wanted = [("mlx f16", gqa, "") for gqa in RATIOS]
    wanted += [(spec, gqa, variant) for gqa in RATIOS for spec in SPECS for variant in metal.CHOICES["variant"]]
    start = time.monotonic()
    for spec, gqa, variant in wanted:
        if (spec, gqa, variant) in done:
            continue
        if time.monotonic() - start > seconds:
            print("not all: call it again")
            return
        cost = ours(spec, gqa, 128, variant) if variant else mlx_fp16(gqa, 128)
        append(path, [record("metal-count", kv=spec, gqa=gqa, dim=128, variant=variant, per_token=_row(cost))])


def _row(cost: Cost) -> dict[str, float]:
    return {k: v for k, v in asdict(cost).items() if k != "name"}


def table(costs: list[Cost], tokens: int, heads: int, dim: int) -> str:
    head = f"{'':34}{'unique MB':>11}{'fetched MB':>12}{'ops/elt':>9}{'mem/elt':>9}{'tg B/elt':>10}"
    lines = [head + "".join(f"{chip.name + ' ms':>20}" for chip in CHIPS)]
    for cost in costs:
        unique, fetched = cost.megabytes(tokens, heads)
        line = f"{cost.name:34}{unique:11.1f}{fetched:12.1f}{cost.operations / dim:9.1f}"
        line += f"{cost.memory_instructions / dim:9.2f}{cost.threadgroup_bytes / dim:10.1f}"
        for chip in CHIPS:
            memory, lanes = chip.bounds(asdict(cost), tokens, heads)
            line += f"{max(memory, lanes):9.2f} ({memory:.2f}|{lanes:.2f})"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.msl.cost", description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", default="64,8,128", help="query heads, KV heads, head dim")
    parser.add_argument("--ctx", default="128k", help="tokens, e.g. 32k")
    parser.add_argument("--kv", default="int4", help="spec of the cache")
    parser.add_argument("--record", type=Path, help="append the counts of every spec and GQA ratio to this file")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="with --record: stop after so long")
    options = parser.parse_args()
    q_heads, kv_heads, dim = (int(x) for x in options.shape.split(","))
    tokens = int(options.ctx.lower().rstrip("k")) * (1024 if options.ctx.lower().endswith("k") else 1)
    gqa = q_heads // kv_heads
    reason = launch.available()
    if reason:
        raise SystemExit(reason)
    if options.record:
        count(options.record, options.seconds)
        return
    costs = [mlx_fp16(gqa, dim), *(ours(options.kv, gqa, dim, v) for v in ("lanes", "matrix"))]
    what = f"{q_heads} query heads, {kv_heads} KV heads, D {dim}, {tokens} tokens"
    print(f"MODEL, not a measurement: one decode step of one layer, {what}.")
    print("Counts are from the emulator. Times are lower bounds, the larger of (memory | lanes), from nominal numbers.")
    print("Per KV element (one K and one V value): operations, memory instructions, threadgroup bytes.\n")
    print(table(costs, tokens, kv_heads, dim))
    print(f"\nOpen-TQ-Metal int4, published by its authors for 128K on an M1 Max: {PUBLISHED_MS} ms")


if __name__ == "__main__":
    main()
