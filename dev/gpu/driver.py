"""Small runs for tools that watch a process: every kernel once for the sanitizers, one long decode for the profiler."""

from __future__ import annotations

import random

import mlx.core as mx

from opentq.codecs.affine import Affine
from opentq.codecs.qjl import QJL
from opentq.codecs.turbo import Prod
from opentq.kernels.cuda import attention as fused_cuda

from . import conform


def run(what: str) -> None:
    """`profile`, `decode`, `prefill` (without the matrix products that sketches need), `small` (both, and those), or
    `conform PART PARTS CASES QUICK`, `rival NUMBER`, or `exhaust`.
    """
    if what.startswith("rival"):
        from . import rivals

        rivals.probe(int(what.split()[1]))
        return
    if what == "exhaust":
        from . import exhaust

        exhaust.run()
        return
    if what.startswith("conform"):
        part, parts, cases, quick = map(int, what.split()[1:])
        conform.work(part, parts, cases, bool(quick))
        return
    if what == "profile":
        from . import graph, timing

        shape = graph.Shape(131072, Affine(4), Affine(4))
        step = timing.ours(shape)
        for _ in range(3):
            mx.eval(step(timing.queries(shape)))
        return
    rng = random.Random(5)
    todo = conform.variants(quick=True)
    for variant in [] if what == "prefill" else [*todo[:3], *(v for v in todo if not isinstance(v.k, Affine))]:
        print("pack", variant, flush=True)
        data = conform.Data(variant, 1)
        mx.eval([side.arrays for side in data.sides])
        print("decode", variant, flush=True)
        for _ in range(2):
            mx.eval(fused_cuda.decode(conform.situation(variant, data, rng)))
    for variant in [] if what == "decode" else [v for v in todo if max(v.lengths) > 64]:
        if what == "prefill" and isinstance(variant.k, (Prod, QJL)):
            continue
        print("prefill", variant, flush=True)
        mx.eval(fused_cuda.prefill(conform.situation(variant, conform.Data(variant, 2), rng)))
