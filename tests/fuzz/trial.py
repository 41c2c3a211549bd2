"""One seed: draw its case, live it, and where that fails make it small and say how to see it again."""

from __future__ import annotations

import functools
import traceback
from collections import Counter

from opentq.attention import backends, guard
from opentq.spec.kv import KVSpec

from ..oracle import kernels_serve
from .case import Case, draw
from .life import Life
from .shrink import shrink

served: Counter[str] = Counter()
"""Attention calls that were judged, by who served them."""


def run(seed: int, mode: str) -> str | None:
    """None where all went well under `mode` ("", "native" or "tiled"), else what went wrong and the smallest case."""
    backend = backends.active() if mode == "native" else None
    if mode == "native" and backend is None:
        return "no fused kernels on this machine: no C++ compiler, no GPU"
    serves = None if backend is None else functools.partial(_serves, backend.name)
    return examine(draw(seed, serves), mode)


def _serves(backend: str, spec: KVSpec, dims: tuple[int, int]) -> bool:
    return kernels_serve(backend, spec.codecs(), dims)


def examine(case: Case, mode: str, small: bool = False) -> str | None:
    """The same of a case; a `small` one is left as it is."""
    guard.judging = False  # here the reference judges every call
    fault = _live(case, mode)
    if fault is None:
        return None
    kind = _kind(fault)
    least = case if small else shrink(case, lambda other: _kind(_live(other, mode)) == kind)
    fault = _live(least, mode) or fault
    where = "".join(traceback.format_tb(fault.__traceback__)[-3:])
    return f"{kind[0]}: {fault}\n{where}{least.text()}"


def _live(case: Case, mode: str) -> BaseException | None:
    life = None
    try:
        life = Life(case, mode)
        life.run()
    except Exception as fault:  # noqa: BLE001  whatever goes wrong is what is looked for
        return fault
    finally:
        served.update(life.served if life else {})
    return None


def _kind(fault: BaseException | None) -> tuple[str, ...]:
    """What makes two faults the same: the error and the function that raised it."""
    if fault is None:
        return ("",)
    return type(fault).__name__, traceback.extract_tb(fault.__traceback__)[-1].name
