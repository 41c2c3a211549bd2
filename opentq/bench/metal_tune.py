"""`opentq bench kernel --tune`: which Metal decode variant is fastest on this GPU, and with which numbers.

One number is varied at a time, from what is in use now, for each variant; candidates take turns, so that a GPU that
slows down slows all of them. What counts is the geometric mean over the problems, each relative to what was in use. The
winner goes into `metal.tuning_file()`, from where the kernels take it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from ..errors import UserError
from ..kernels.metal import launch as metal
from ..kernels.metal.launch import Tuning
from ..spec.kv import KVSpec
from . import kernel, timing

SHAPES = ((32, 8, 128), (64, 8, 128))
CONTEXTS = (4096, 32768)
SPEC = "int4"
MATTERS = {"lanes": ("teams", "keys", "handover", "simdgroups"), "matrix": ("simdgroups",)}
"""What each variant depends on, in the order in which it is tried."""

Decode = Callable[[], Any]
Timer = Callable[[Sequence[Decode]], Sequence[float]]
"""Seconds of each call."""


@dataclass(frozen=True)
class Candidate:
    """One candidate: seconds per problem, and their geometric mean relative to the tuning in use before."""

    tuning: Tuning
    seconds: tuple[float, ...]
    relative: float


def search(problems: Sequence[Decode], timer: Timer, start: Tuning) -> list[Candidate]:
    """Every candidate that was measured, the best first. `problems` decode by `metal.tuning()`."""

    def measure(candidates: Sequence[Tuning]) -> list[Candidate]:
        times = timer([_under(t, call) for t in (start, *candidates) for call in problems])
        rows = [tuple(times[i : i + len(problems)]) for i in range(0, len(times), len(problems))]
        return [Candidate(t, row, _mean_ratio(row, rows[0])) for t, row in zip((start, *candidates), rows)]

    found: list[Candidate] = []
    for variant, fields in MATTERS.items():
        best = replace(start, variant=variant)
        for field in fields:
            rows = measure([replace(best, **{field: value}) for value in metal.CHOICES[field]])
            found += rows
            best = min((r for r in rows if r.tuning.variant == variant), key=lambda r: r.relative).tuning
    return sorted({r.tuning: r for r in reversed(found)}.values(), key=lambda r: r.relative)


def _under(tune: Tuning, call: Decode) -> Decode:
    def measured() -> Any:
        with metal.trying(tune):
            return call()

    return measured


def _mean_ratio(times: Sequence[float], base: Sequence[float]) -> float:
    return math.exp(sum(math.log(a / b) for a, b in zip(times, base)) / len(base))


def tune(windows: timing.Windows) -> Iterator[str]:
    """Measure, write the winner down and say so, line by line. Raises UserError without a Metal GPU."""
    if not metal.architecture():
        raise UserError(
            f"--tune measures the Metal kernels, and MLX has no Metal here: its device is {mx.default_device()}"
        )
    names = [f"{q}/{h} heads, D {d}, {n}" for q, h, d in SHAPES for n in CONTEXTS]
    problems = [kernel.Ours(KVSpec.parse(SPEC), kernel.Problem.random(s, n)).call for s in SHAPES for n in CONTEXTS]
    start = metal.tuning()
    rows = search(problems, lambda calls: [t.median for t in timing.interleave(calls, windows)], start)
    yield f"{metal.architecture()}, {SPEC}; milliseconds for {'; '.join(names)}; relative to what was in use"
    yield from (line(row) + ("   in use" if row.tuning == start else "") for row in rows)
    yield f"the first is now used on this GPU: {metal.keep(rows[0].tuning)}"


def line(row: Candidate) -> str:
    t = row.tuning
    what = f"{t.variant:6} teams {t.teams} keys {t.keys} handover {t.handover:2} simdgroups {t.simdgroups:2}"
    return f"{what}  " + " ".join(f"{s * 1e3:8.3f}" for s in row.seconds) + f"  {row.relative:6.3f}"
