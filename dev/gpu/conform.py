"""Conformance on the GPU: kernels against fp32 attention over the same decoded values, on fixed and on random cases.

A compiled kernel is a choice of widths, groups, dims, dtype and row tile; lengths, windows, sinks, batches and the rest
are run-time values. So random cases walk over a list of variants and draw many run-time situations for each.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import mlx.core as mx

from opentq.attention import fused_cuda, reference
from opentq.attention.args import AttnArgs, PackedKV
from opentq.codecs.affine import Affine
from opentq.kernels.cuda_layout import MmaLayout
from tests.oracle import _naive

CAPACITY = 1024
"""Tokens in the packed buffers of the cases."""


@dataclass(frozen=True)
class Variant:
    k: Affine
    v: Affine
    dims: tuple[int, int]
    gqa: int = 4
    kv_heads: int = 2
    batch: int = 1
    dtype: mx.Dtype = mx.float16
    lengths: tuple[int, ...] = (1, 2)

    def __str__(self) -> str:
        return f"{self.k} {self.v} d{self.dims[0]}x{self.dims[1]} gqa{self.gqa} b{self.batch} {self.dtype}"


def variants(quick: bool) -> list[Variant]:
    a = Affine
    found = [
        Variant(a(4), a(4), (128, 128), gqa=8),
        Variant(a(4), a(4), (128, 128), gqa=8, batch=3, lengths=(1,)),
        Variant(a(4), a(4), (128, 128), gqa=4, lengths=(3, 4)),
        Variant(a(4), a(4), (128, 128), gqa=16, lengths=(2, 5, 40)),
        Variant(a(4), a(4), (128, 128), gqa=8, dtype=mx.bfloat16),
        Variant(a(8), a(4), (128, 128), gqa=1),
        Variant(a(3), a(2), (80, 80), gqa=6),
        Variant(a(4), a(4), (128, 128), gqa=2),
        Variant(a(2, 64), a(3, 32), (192, 128), gqa=5, batch=2),
        Variant(a(8, 64), a(8, 64), (256, 256), gqa=4, dtype=mx.bfloat16),
        Variant(a(4), a(4), (512, 512), gqa=8),
        Variant(a(4), a(4), (64, 64), gqa=4, lengths=(1, 64, 200)),
    ]
    if quick:
        return found
    for bits in (2, 3, 4, 8):
        for dim, group in ((64, 64), (96, 32), (112, 128), (128, 128)):
            found.append(Variant(a(bits, group), a({2: 4, 3: 8, 4: 3, 8: 2}[bits], group), (dim, dim)))
    for dim in (80, 192, 256, 512):
        found.append(Variant(a(3, 64), a(8, 32), (dim, dim), gqa=3, dtype=mx.bfloat16))
    for gqa in (1, 7, 32, 64):
        found.append(Variant(a(4, 64), a(4, 64), (64, 64), gqa=gqa, kv_heads=1, lengths=(1, 5, 16)))
    found.append(Variant(a(4), a(4), (256, 256), gqa=2, lengths=(1, 7, 90)))
    return found


class Data:
    """Random packed buffers of one variant, encoded by the pack kernel."""

    def __init__(self, variant: Variant, seed: int):
        mx.random.seed(seed)
        self.sides, self.layouts = [], []
        for name, codec, dim in (("k", variant.k, variant.dims[0]), ("v", variant.v, variant.dims[1])):
            layout = MmaLayout(name, codec.bits, codec.group, dim)
            y = mx.random.normal((variant.batch, variant.kv_heads, CAPACITY, dim)) + 0.3
            y = (y * mx.exp(mx.random.normal((1, 1, 1, dim)) * 0.5)).astype(mx.float16)
            stored = layout.encode(codec, y)
            self.layouts.append((layout, codec, y, stored))
            self.sides.append(PackedKV(codec, layout, stored, dim))


def situation(variant: Variant, data: Data, rng: random.Random) -> AttnArgs:
    """One call: random lengths, window, sinks, softcap, dense columns."""
    length = rng.choice(variant.lengths)
    sink = rng.choice((0, 0, 4, 17))
    tail = rng.choice((0, 1, 15, 16, 63, 100)) + length
    gaps = [rng.choice((0, 0, 3, 20)) if variant.batch > 1 else 0 for _ in range(variant.batch)]
    columns = sink + max(gaps) + tail
    lens = []
    for b in range(variant.batch):
        packed = rng.choice((0, 1, 31, 32, 33, 64, rng.randint(0, CAPACITY), rng.randint(0, CAPACITY), CAPACITY))
        lens.append((packed, sink, sink + gaps[b]))

    def normal(*shape):
        return mx.random.normal(shape)

    q_heads = variant.kv_heads * variant.gqa
    spread = rng.choice((0.3, 1.0, 4.0))
    return AttnArgs(
        q=(normal(variant.batch, q_heads, length, variant.dims[0]) * spread).astype(variant.dtype),
        k=data.sides[0],
        v=data.sides[1],
        dense_k=normal(variant.batch, variant.kv_heads, columns, variant.dims[0]).astype(mx.float16),
        dense_v=normal(variant.batch, variant.kv_heads, columns, variant.dims[1]).astype(mx.float16),
        lens=tuple(lens),
        scale=variant.dims[0] ** -0.5 * rng.choice((0.5, 1.0)),
        causal=length > 1 or rng.random() < 0.5,
        window=rng.choice((0, 0, 0, 1, 40, 333)),
        sinks=normal(q_heads) if rng.random() < 0.2 else None,
        softcap=rng.choice((0.0, 0.0, 0.0, 15.0)),
    )


def margin(args: AttnArgs, out: mx.array, atol: float = 2e-5) -> tuple[float, float]:
    """(worst error, what the rule allows): twice the error of naive attention in the same dtype."""
    ref = reference.attend(args)
    naive = mx.abs(_naive(args).astype(mx.float32) - ref).max()
    worst = mx.abs(out.astype(mx.float32) - ref).max()
    finite = mx.isfinite(out).all()
    mx.eval(naive, worst, finite)
    return (worst.item() if finite.item() else float("nan")), 2 * naive.item() + atol


def run(log, cases: int, quick: bool) -> None:
    rng = random.Random(20)
    todo = variants(quick)
    share = -(-cases // len(todo))
    top, done = 0.0, 0
    for index, variant in enumerate(todo):
        data = Data(variant, index)
        for layout, codec, y, stored in data.layouts:
            same = mx.array_equal(layout.store(codec.encode(y))[0], stored[0]).item()
            log.test(f"pack {layout.name} is bit for bit the codec's", same)
        peak, failed, started = 0.0, log.failed, time.perf_counter()
        for _ in range(share):
            args = situation(variant, data, rng)
            out = fused_cuda.attend(args)
            if out is None:
                log.test(f"attend {variant}", False, "not served")
                continue
            worst, allowed = margin(args, out)
            peak = max(peak, worst / allowed)
            log.test(f"attend {variant}", worst <= allowed, f"error {worst:.2e} above {allowed:.2e}: {args.describe()}")
            done += 1
        top = max(top, peak)
        seconds = time.perf_counter() - started
        log.row(
            "conformance",
            variant=str(variant),
            dtype=str(variant.dtype).removeprefix("mlx.core."),
            cases=share,
            failed=log.failed - failed,
            worst_share_of_allowed=round(peak, 2),
            seconds=round(seconds, 1),
        )
        print(f"  {variant}: {share} cases, worst {peak:.2f} of what is allowed, {seconds:.0f} s", flush=True)
    print(f"{done} random cases over {len(todo)} kernels, worst at {top:.2f} of the allowed error")
