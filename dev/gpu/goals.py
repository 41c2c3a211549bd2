"""Figures against the goals of the project: one line each, from the rows of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

Row = dict
FP16 = ("mlx_sdpa", "torch-cudnn", "torch-flash", "flashinfer-fa2", "flashinfer-xqa", "flash-attn-3")
FP8 = ("flashinfer-fa2-fp8", "flashinfer-xqa-fp8", "flash-attn-3-fp8")
"""Engines whose keys and values have 16 and 8 bits; of each kind the fastest of a shape is the rival."""


def bits(engine: str) -> int | None:
    """Of a rival's keys and values."""
    return 16 if engine in FP16 else 8 if engine in FP8 else None


def fastest(times: dict[str, float], engines: tuple[str, ...]) -> tuple[float, str] | None:
    """The least of `times` by engine, and its name; None where none of `engines` was measured."""
    return min(((t, name) for name, t in times.items() if name in engines), default=None)


class Figures:
    """Decode times of one run in microseconds, by shape, harness and engine."""

    def __init__(self, rows: list[Row]):
        self.rows = rows
        self.times: dict[tuple, float] = {}
        for r in self.of("decode"):
            self.times[key(r), r["harness"], r["engine"]] = r["us"]
        self.read = self.of("read bandwidth")[-1]["gb_per_s"] * 1e9

    def of(self, what: str) -> list[Row]:
        return [r for r in self.rows if r["what"] == what]

    def us(self, harness: str = "graph", engine: str = "ours", **changed) -> float:
        return self.times[key(BASE | changed), harness, engine]

    def share(self, **changed) -> float:
        (size,) = {r["bytes"] for r in self.of("decode") if r["engine"] == "ours" and key(r) == key(BASE | changed)}
        return size / self.us(**changed) * 1e6 / self.read

    def bytes(self, **changed) -> float:
        return next(r["bytes"] for r in self.of("decode") if r["engine"] == "ours" and key(r) == key(BASE | changed))

    def best(self, engines: tuple[str, ...] = FP16, **changed) -> tuple[float, str] | None:
        """The fastest of `engines` in either harness, and its name."""
        return fastest({n: t for (of, _, n), t in self.times.items() if of == key(BASE | changed)}, engines)

    def best_fp16(self, **changed) -> tuple[float, str]:
        found = self.best(**changed)
        assert found, "MLX's own attention is timed at every shape"
        return found


BASE = {
    "n": 131072,
    "batch": 1,
    "q_heads": 64,
    "kv_heads": 8,
    "dim": 128,
    "length": 1,
    "k": "int4:g32",
    "v": "int4:g32",
}


def key(row: Row) -> tuple:
    return tuple(row[k] for k in BASE)


OTHERS = (
    *(("tq2.5", "tq2.5"), ("tq3.5", "tq3.5"), ("tq3p:gauss", "tq3")),
    *(("qjl2:orth", "int4:g32"), ("polar4", "polar4")),
)

Goal = tuple[str, str, str, bool]
"""What, the figure, the goal, reached."""


def at_least(what: str, value: float, goal: float, show: Callable[[float], str]) -> Goal:
    return what, show(value), f">= {show(goal)}", value >= goal


def at_most(what: str, value: float, goal: float, show: Callable[[float], str]) -> Goal:
    return what, show(value), f"<= {show(goal)}", value <= goal


def times(x: float) -> str:
    return f"{x:.2f}x"


def percent(x: float) -> str:
    return f"{x:.0%}"


def goals(rows: list[Row]) -> Iterator[Goal]:
    f = Figures(rows)
    yield at_least("decode int4 128K, of read bandwidth", f.share(), 0.85, percent)
    fp16, name = f.best_fp16()
    yield at_least(f"  against the best fp16 ({name})", fp16 / f.us(), 2.8, times)
    if fp8 := f.best(FP8):
        yield at_least(f"  against the best fp8 ({fp8[1]})", fp8[0] / f.us(), 1.0, times)
    for rival, goal in (("mlx_lm_quantized", 15.0), ("dequantize_sdpa", 12.0)):
        if (key(BASE), "mlx", rival) in f.times:
            yield at_least(f"  against {rival}", f.us("mlx", rival) / f.us(), goal, times)
            yield at_least("    both through MLX", f.us("mlx", rival) / f.us("mlx"), goal, times)
    for n in (1024, 2048, 4096, 8192, 16384):
        fp16, name = f.best_fp16(n=n)
        yield at_least(f"decode {n // 1024}K against the best fp16 ({name})", fp16 / f.us(n=n), 1.0, times)
        mine, theirs = f.us("mlx", n=n), f.us("mlx", "mlx_sdpa", n=n)
        yield at_least("  through MLX, against its SDPA", theirs / mine, 1.0, times)
    shapes = {f"GQA {g}": {"q_heads": 8 * g} for g in (1, 4, 16)} | {f"D {d}": {"dim": d} for d in (64, 256)}
    shapes |= {f"batch {b} at {n // 1024}K": {"batch": b, "n": n} for b in (8, 32) for n in (8192, 32768)}
    for what, changed in shapes.items():
        fp16, name = f.best_fp16(**changed)
        figure = f"decode {what}: {fp16 / f.us(**changed):.2f}x {name}, of read bandwidth"
        yield at_least(figure, f.share(**changed), 0.6 if f.bytes(**changed) > 1e8 else 0.0, percent)
    for batch, dim in ((1, 128), (1, 64), (8, 128), (8, 64)):
        for k, v in (("int4:g32", "int4:g32"), ("tq5:nc", "tq3:nc")):
            what = f"decode {k} {v}, D {dim}, batch {batch}, 128K, of read bandwidth"
            yield at_least(what, f.share(k=k, v=v, batch=batch, dim=dim), 0.85, percent)
    pairs = (("int8:g32", "int8:g32"), ("int8:g32", "int4:g32"), ("int2:g32", "int2:g32"))
    for k, v in (*pairs, ("tq4", "tq4"), ("tq3", "tq3"), ("tq5:nc", "tq3:nc"), ("tq2", "tq2"), *OTHERS):
        ratio = f.us(k=k, v=v) / f.us() / (f.bytes(k=k, v=v) / f.bytes())
        yield at_most(f"decode {k} {v}: time per byte, of int4's", ratio, 1.15, times)
    prefill = {(r["n"], r["engine"]): r for r in f.of("prefill")}
    for n in (8192, 32768, 131072):
        mine, theirs = prefill[n, "ours"], prefill[n, "mlx_sdpa"]
        yield at_least(f"prefill 2,048 rows after {n // 1024}K, speed of fp16", theirs["us"] / mine["us"], 0.95, times)
        sizes = [r["kv_bytes"] + r["scratch_bytes"] for r in (mine, theirs)]
        yield at_most("  K/V and scratch, of fp16's", sizes[0] / sizes[1], 1.0, times)
    for r in f.of("error"):
        yield at_most(f"relative error {r['k']} at 128K, of fp16 SDPA's", r["ours"] / r["fp16_sdpa"], 2.0, times)
    worst = max(r["worst_share_of_allowed"] for r in f.of("conformance")) if f.of("conformance") else None
    if worst is not None:
        yield at_most("decode error, of twice naive fp16's", worst, 1.0, times)


def table(rows: list[Row]) -> str:
    lines = list(goals(rows))
    reached = sum(ok for *_, ok in lines)
    width = max(len(what) for what, *_ in lines)
    body = [f"{what:<{width}}  {value:>7}  {goal:>9}  {'yes' if ok else 'NO'}" for what, value, goal, ok in lines]
    return (
        "\n".join([f"{'figure':<{width}}  {'value':>7}  {'goal':>9}  reached", *body])
        + f"\n{reached} of {len(lines)} goals reached"
    )
