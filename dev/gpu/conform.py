"""Conformance on the GPU: kernels against fp32 attention over the same decoded values, on fixed and on random cases.

A compiled kernel is a choice of codecs, dims, dtype and row tile; lengths, windows, sinks, batches and the rest are
run-time values. So random cases walk over a list of variants and draw many run-time situations for each. The variants
are dealt out to several processes, because compiling a kernel takes a processor and running it hardly takes a GPU.
"""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import mlx.core as mx

from opentq.attention import reference
from opentq.caches.single import dense, shifted
from opentq.codecs.affine import Affine
from opentq.codecs.polar import Polar
from opentq.codecs.qjl import QJL
from opentq.codecs.turbo import Fractional, Prod, Turbo
from opentq.contracts.attention import AttnArgs, PackedKV
from opentq.contracts.codec import Codec
from opentq.kernels.cuda import attention as fused_cuda
from opentq.kernels.cuda.geometry import Fused
from opentq.kernels.cuda.layout import layout_for
from tests.oracle import _naive

CAPACITY = 1024
"""Tokens in the packed buffers of the cases."""
PROCESSES = 8
TOGETHER = 20
"""Cases evaluated at once."""


@dataclass(frozen=True)
class Variant:
    k: Codec
    v: Codec
    dims: tuple[int, int]
    gqa: int = 4
    kv_heads: int = 2
    batch: int = 1
    dtype: mx.Dtype = mx.float16
    lengths: tuple[int, ...] = (1, 2)

    def __str__(self) -> str:
        return f"{self.k} {self.v} d{self.dims[0]}x{self.dims[1]} gqa{self.gqa} b{self.batch} {self.dtype}"


def variants(quick: bool) -> list[Variant]:
    a, t = Affine, Turbo
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
        Variant(t(4), t(4), (128, 128), gqa=8, lengths=(1, 2, 70)),
        Variant(t(5), t(3), (128, 128), gqa=8, dtype=mx.bfloat16),
        Variant(t(3), t(2), (80, 112), gqa=5, batch=2),
        Variant(a(8), t(4), (64, 64), gqa=4),
        Variant(Fractional(2.5, fit="norm"), Fractional(3.5), (128, 128), gqa=8, lengths=(1, 2, 70)),
        Variant(Prod(3), t(3, fit="norm"), (128, 128), gqa=8, lengths=(1, 3, 90)),
        Variant(QJL(2), a(4), (128, 128), gqa=8, batch=2, dtype=mx.bfloat16),
        Variant(Polar(), Polar(), (128, 128), gqa=8, lengths=(1, 2, 70)),
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
    found += [Variant(t(b), t(6 - b), (96, 96), gqa=3, dtype=(mx.float16, mx.bfloat16)[b % 2]) for b in range(1, 6)]
    found += [Variant(t(4), t(4), (d, d), gqa=4, batch=2, lengths=(1, 9)) for d in (64, 192, 256)]
    found += [
        Variant(Fractional(3.5), Fractional(1.5, fit="norm"), (64, 96), gqa=5, batch=2, dtype=mx.bfloat16),
        Variant(Fractional(1.5), Fractional(2.5), (256, 256), gqa=4),
        Variant(Prod(4), t(4), (256, 256), gqa=4, dtype=mx.bfloat16),
        Variant(Prod(2), t(2, fit="norm"), (80, 80), gqa=6, batch=2, lengths=(1, 20)),
        Variant(QJL(1), a(8), (64, 64), gqa=1),
        Variant(QJL(4), t(3), (128, 128), gqa=16, lengths=(1, 2, 80)),
        Variant(Polar(), a(4), (80, 64), gqa=4, batch=2, dtype=mx.bfloat16),
        Variant(t(4), Polar(), (256, 256), gqa=3),
    ]
    return found


class Data:
    """Random packed buffers of one variant, encoded by the pack kernel."""

    def __init__(self, variant: Variant, seed: int):
        mx.random.seed(seed)
        self.sides, self.layouts = [], []
        for name, codec, dim in (("k", variant.k, variant.dims[0]), ("v", variant.v, variant.dims[1])):
            layout = layout_for(name, codec, dim)
            assert layout is not None
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
    window = rng.choice((0, 0, 0, 1, 40, 333))
    listed = not window and length <= Fused.LENGTH and rng.random() < 0.3
    return AttnArgs(
        q=(normal(variant.batch, q_heads, length, variant.dims[0]) * spread).astype(variant.dtype),
        k=data.sides[0],
        v=data.sides[1],
        dense_k=normal(variant.batch, variant.kv_heads, columns, variant.dims[0]).astype(mx.float16),
        dense_v=normal(variant.batch, variant.kv_heads, columns, variant.dims[1]).astype(mx.float16),
        lens=tuple(lens),
        scale=variant.dims[0] ** -0.5 * rng.choice((0.5, 1.0)),
        causal=length > 1 or rng.random() < 0.5,
        window=window,
        sinks=normal(q_heads) if rng.random() < 0.2 else None,
        softcap=rng.choice((0.0, 0.0, 0.0, 15.0)),
        pages=_lists(lens, variant.kv_heads, rng) if listed else None,
    )


def _lists(lens: list[tuple[int, int, int]], heads: int, rng: random.Random) -> mx.array:
    """A list of pages of every KV head, as `AttnArgs` describes it."""
    count = rng.randint(1, 6)

    def one(pages: int) -> list[int]:
        if pages <= count:
            return [*range(pages), *[0] * (count - pages)]
        return [*sorted(rng.sample(range(pages - 1), count - 1)), pages - 1]

    return mx.array([[one(-(-packed // 64)) for _ in range(heads)] for packed, _, _ in lens], dtype=mx.int32)


def margin(args: AttnArgs, out: mx.array, atol: float = 2e-5) -> tuple[mx.array, mx.array]:
    """(worst error, what the rule allows), scalars: twice the error of naive attention in the same dtype."""
    args = args.picked()
    ref = reference.attend(args)
    naive = mx.abs(_naive(args).astype(mx.float32) - ref).max()
    worst = mx.abs(out.astype(mx.float32) - ref).max()
    return mx.where(mx.isfinite(out).all(), worst, float("nan")), 2 * naive + atol


STEP = "a step of "


def step_margin(args: AttnArgs) -> tuple[mx.array, mx.array] | None:
    """The same rule for a whole step in one launch, and columns as caches make them; None where it takes several."""
    length = args.q.shape[2]
    old = [mx.contiguous(x[:, :, : x.shape[2] - length]) for x in (args.dense_k, args.dense_v)]
    fresh = tuple(mx.random.normal((*x.shape[:2], length, x.shape[3])).astype(args.q.dtype) for x in old)
    center = mx.random.normal((*old[0].shape[:2], 1, old[0].shape[3])).astype(mx.float16) if args.window == 40 else None
    call = replace(args, dense_k=old[0], dense_v=old[1])
    launch = fused_cuda.step(call, fresh, center)
    if launch is None:
        return None
    done = launch(call, fresh, center)
    codecs = args.k.codec, args.v.codec
    wanted = [shifted(dense(codecs[0], fresh[0]), center), dense(codecs[1], fresh[1])]
    wanted = [mx.concatenate(pair, axis=2) for pair in zip(old, wanted)]
    off = [mx.abs(mine.astype(mx.float32) - theirs.astype(mx.float32)).max() for mine, theirs in zip(done[1:], wanted)]
    query = codecs[0].rotate(args.q.astype(mx.float32))
    exact = replace(args, q=query, dense_k=done[1], dense_v=done[2]).picked()
    ref = reference.attend(exact)
    naive = _naive(replace(exact, q=query.astype(args.q.dtype)))
    ref, naive = codecs[1].unrotate(ref), codecs[1].unrotate(naive.astype(mx.float32)).astype(args.q.dtype)
    worst, naive = (mx.abs(x.astype(mx.float32) - ref).max() for x in (done[0], naive))
    good = mx.isfinite(done[0]).all() & (mx.maximum(*off) < 2e-2)
    return mx.where(good, worst, float("nan")), 2 * naive + 2e-5


def results(variant: Variant, index: int, cases: int) -> Iterator[tuple[float, float, str]]:
    """(worst error, allowed error, the call in words) of `cases` random calls of one variant."""
    rng, data = random.Random(20 + index), Data(variant, index)
    for layout, codec, y, stored in data.layouts:
        same = mx.array_equal(layout.store(codec.encode(y))[0], stored[0]).item()
        yield 0.0 if same else float("nan"), 1.0, f"pack {layout.name} bit for bit"
    for start in range(0, cases, TOGETHER):
        calls = [situation(variant, data, rng) for _ in range(min(TOGETHER, cases - start))]
        found = []
        for args in calls:
            out = fused_cuda.attend(args)
            if out is None:
                raise RuntimeError(f"not served: {args.describe()}")
            found.append((*margin(args, out), args.describe()))
            step = step_margin(args)
            if step is not None:
                found.append((*step, STEP + args.describe()))
        mx.eval([pair[:2] for pair in found])
        for worst, allowed, what in found:
            yield worst.item(), allowed.item(), what


def work(part: int, parts: int, cases: int, quick: bool) -> None:
    """One process: every `parts`-th variant; prints a JSON line for each."""
    todo = variants(quick)
    for index in range(part, len(todo), parts):
        variant, started = todo[index], time.perf_counter()
        found = list(results(variant, index, cases))
        shares = [worst / allowed for worst, allowed, _ in found]
        failed = [f"error {w:.2e} above {a:.2e}: {what}" for w, a, what in found if not w <= a]
        steps = sum(what.startswith(STEP) for _, _, what in found)
        steps_failed = sum(STEP in line for line in failed)
        row = {"variant": str(variant), "dtype": str(variant.dtype).removeprefix("mlx.core."), "cases": cases}
        row |= {"failed": len(failed) - steps_failed, "steps": steps, "steps_failed": steps_failed}
        row |= {"worst_share_of_allowed": round(max(shares), 2), "checks": len(found)}
        row |= {"seconds": round(time.perf_counter() - started, 1), "failures": failed[:3]}
        print(json.dumps(row), flush=True)


def start(command: list[str], cases: int, quick: bool) -> list[subprocess.Popen]:
    """The processes, running."""
    share = -(-cases // len(variants(quick)))
    return [
        subprocess.Popen(
            [*command, "--driver", f"conform {i} {PROCESSES} {share} {int(quick)}"], stdout=subprocess.PIPE, text=True
        )
        for i in range(PROCESSES)
    ]


def collect(log, jobs: list[subprocess.Popen]) -> None:
    """What the processes found, as tests and rows."""
    top, done, kernels = 0.0, 0, 0
    for job in jobs:
        output = job.communicate()[0]
        log.test("conformance process", job.returncode == 0, f"exit status {job.returncode}")
        for line in output.splitlines():
            if not line.startswith("{"):
                continue
            row = json.loads(line)
            failures, checks = row.pop("failures"), row.pop("checks")
            failed = row["failed"] + row["steps_failed"]
            log.passed += checks - failed
            log.failed += failed
            log.row("conformance", **row)
            share, seconds = row["worst_share_of_allowed"], row["seconds"]
            said = f"{row['cases']} cases, {failed} failed, worst {share:.2f} of what is allowed, {seconds:.0f} s"
            print(f"  {row['variant']}: {said}", *failures, sep="\n    ", flush=True)
            top, done, kernels = max(top, row["worst_share_of_allowed"]), done + row["cases"], kernels + 1
    print(f"{done} random cases over {kernels} variants, worst at {top:.2f} of the allowed error", flush=True)
