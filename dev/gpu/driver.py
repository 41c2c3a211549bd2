"""Small runs for tools that watch a process: every kernel once for the sanitizers, one long decode for the profiler."""

from __future__ import annotations

import random

import mlx.core as mx

from opentq.attention import fused_cuda

from . import conform


def run(what: str) -> None:
    if what == "profile":
        from . import timing

        case = timing.DecodeCase(n=131072)
        step = case.ours(1)
        for _ in range(3):
            mx.eval(step(case.q))
        return
    rng = random.Random(5)
    for variant in conform.variants(quick=True)[:4]:
        data = conform.Data(variant, 1)
        for _ in range(3):
            mx.eval(fused_cuda.attend(conform.situation(variant, data, rng)))
    variant = conform.variants(quick=True)[-1]
    args = conform.situation(variant, conform.Data(variant, 2), rng)
    mx.eval(fused_cuda.prefill(args))
