"""Fixtures that put the emulator where MLX's Metal back end would be, and what every launch is held to."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import pytest

from opentq.attention import backends
from opentq.caches.single import OpenTQCache
from opentq.kernels.metal import attention as fused_metal
from opentq.kernels.metal import launch as metal

from .. import oracle
from ..matrix import Shape
from . import launch, tally

needs_emulator = pytest.mark.skipif(launch.available() is not None, reason=launch.available() or "")

LANES, MATRIX = metal.Tuning(), metal.Tuning(variant="matrix")


@pytest.fixture(autouse=True)
def gpu(monkeypatch, request):
    """Metal kernels run in the emulator, as on a small GPU; afterwards no launch may have left a trace of trouble."""
    monkeypatch.setattr(metal, "make", launch.metal_kernel)
    monkeypatch.setattr(metal, "tuning", lambda: LANES)
    monkeypatch.setattr(metal, "cores", lambda: 2)
    metal_backend = replace(fused_metal.BACKEND, available=lambda: True)
    monkeypatch.setattr(backends, "active", lambda: metal_backend)
    monkeypatch.setenv("OPENTQ_KERNELS", "native")
    metal.forget()
    before = len(launch.launches)
    yield
    metal.forget()
    no_trouble_since(before)
    tally.leave(request.node, before)


def no_trouble_since(before: int) -> None:
    for name, report in launch.launches[before:]:
        if name.startswith("opentq"):
            assert report.allocas == [], f"{name}: an array that did not become registers"
            assert report.threadgroup_memory <= metal.THREADGROUP_BYTES
            assert not any(report.unwritten_bytes), f"{name}: output bytes that nobody wrote"


def step(spec: str, shape: Shape, tokens: int, length: int, dtype: mx.Dtype = mx.float16, **options):
    """The AttnArgs of a step of `length` tokens on a cache that then holds `tokens`."""
    cache = OpenTQCache(spec)
    handles = oracle.fill(cache, *oracle.vectors(shape, tokens), [n for n in (tokens - length, length) if n])
    return oracle.args_of(handles, oracle.queries(shape, length, dtype=dtype), **options)


def reports(kernel: str) -> list[launch.Report]:
    return [report for name, report in launch.launches if name == f"opentq_{kernel}"]
