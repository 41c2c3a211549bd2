"""Times of decode, prefill and packing beside their rivals, in one process.

Two harnesses. "graph" replays the kernel alone from a CUDA graph (`graph.py`), beside torch's. "mlx" is what a model
gets: the median of several runs, a run being many calls in one evaluation, each fed the output of the call before it,
while Python builds the next run, as generation does: the slower of GPU and host. In both, calls take their keys and
values in turn from sets that together are several times the L2 cache.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence

import mlx.core as mx
from mlx_lm.models.base import quantized_scaled_dot_product_attention

from opentq.codecs.affine import Affine
from opentq.codecs.polar import Polar
from opentq.codecs.qjl import QJL
from opentq.codecs.turbo import Fractional, Prod, Turbo
from opentq.contracts.attention import AttnArgs, PackedKV
from opentq.contracts.codec import Codec, packable
from opentq.kernels.cuda import attention as fused_cuda
from opentq.kernels.cuda import launch as cuda
from opentq.kernels.cuda import nvrtc
from opentq.kernels.cuda.layout import layout_for

from . import goals, graph, rivals
from .graph import Shape

Step = Callable[[mx.array], mx.array]


def chained(step: Step, first: mx.array, calls: int, runs: int = 9) -> float:
    """Median seconds per call of `x = step(x)`, `calls` of them per evaluation, the next ones built meanwhile."""
    samples, x, pending = [], first, first
    last = time.perf_counter()
    for _ in range(runs + 3):
        for _ in range(calls):
            x = step(x)
        mx.async_eval(x)
        mx.eval(pending)
        now = time.perf_counter()
        samples.append((now - last) / calls)
        last, pending = now, x
    mx.eval(x)
    return statistics.median(samples[3:])


def repeated(call: Callable[[], mx.array], calls: int = 10, runs: int = 7) -> float:
    """Median seconds per call of independent calls."""
    mx.eval([call() for _ in range(3)])
    samples = []
    for _ in range(runs):
        start = time.perf_counter()
        mx.eval([call() for _ in range(calls)])
        mx.synchronize()
        samples.append((time.perf_counter() - start) / calls)
    return statistics.median(samples)


def queries(shape: Shape) -> mx.array:
    q = mx.random.normal((shape.batch, shape.kv_heads * shape.gqa, shape.length, shape.dim)).astype(mx.float16)
    mx.eval(q)
    return q


def normal(shape: Shape) -> mx.array:
    return mx.random.normal((shape.batch, shape.kv_heads, shape.n, shape.dim), dtype=mx.float16)


def rotate(call: Callable[[mx.array, tuple], mx.array], data: Sequence) -> Step:
    turn = iter(range(1 << 30))
    return lambda x: call(x, data[next(turn) % len(data)])


# ---- engines: a shape -> what one step does


def packed_sets(shape: Shape, sets: int = 0) -> list[list[PackedKV]]:
    data = []
    for _ in range(sets or shape.sets(shape.bytes)):
        pair = []
        for side, codec in (("k", shape.k), ("v", shape.v)):
            layout = layout_for(side, codec, shape.dim)
            assert layout is not None
            pair.append(PackedKV(codec, layout, layout.encode(codec, normal(shape)), shape.dim))
            mx.eval(pair[-1].arrays)
        data.append(pair)
    return data


def ours(shape: Shape, data: list[list[PackedKV]] | None = None, dense: list[mx.array] | None = None) -> Step:
    data = data or packed_sets(shape)
    dense = dense or newest(shape)
    lens = ((shape.n, 0, 0),) * shape.batch
    scale = shape.dim**-0.5

    def call(q, pair):
        out = fused_cuda.attend(AttnArgs(q, *pair, *dense, lens, scale=scale, causal=True))
        assert out is not None
        return out

    return rotate(call, data)


def newest(shape: Shape) -> list[mx.array]:
    """Keys and values of the query tokens themselves, fp16."""
    dense = [mx.random.normal((shape.batch, shape.kv_heads, shape.length, shape.dim)).astype(mx.float16) for _ in "kv"]
    mx.eval(dense)
    return dense


def mlx_sdpa(shape: Shape, mask: str | None = None) -> Step:
    data = [(normal(shape), normal(shape)) for _ in range(shape.sets(shape.fp16_bytes))]
    mx.eval(data)
    attend = functools.partial(mx.fast.scaled_dot_product_attention, scale=shape.dim**-0.5, mask=mask)
    return rotate(lambda q, kv: attend(q, *kv), data)


def quantized_sets(shape: Shape) -> list:
    data = []
    for _ in range(shape.sets(shape.bytes)):
        data.append([tuple(mx.quantize(normal(shape), group_size=32, bits=4)) for _ in "kv"])
        mx.eval(data[-1])
    return data


def mlx_lm_quantized(shape: Shape) -> Step:
    attend = functools.partial(quantized_scaled_dot_product_attention, scale=shape.dim**-0.5, mask=None)
    return rotate(lambda q, kv: attend(q, *kv, group_size=32, bits=4), quantized_sets(shape))


def dequantize_sdpa(shape: Shape) -> Step:
    def call(q, kv):
        k, v = (mx.dequantize(*x, group_size=32, bits=4) for x in kv)
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=shape.dim**-0.5)

    return rotate(call, quantized_sets(shape))


# ---- rows


def decode_row(log, torch, ways: list[rivals.Way], shape: Shape, compared: bool = True) -> None:
    """Time one shape on every engine; records and prints."""
    times = {("graph", "ours"): graph.kernel_seconds(torch, shape)}
    chosen: dict[str, rivals.Way] = {}
    if compared:
        times |= {("graph", name): t for name, t in graph.sdpa_seconds(torch, shape).items()}
        for name, (seconds, chosen[name]) in rivals.fastest(torch, ways, shape).items():
            times["graph", name] = seconds
    torch.cuda.empty_cache()
    q = queries(shape)
    for engine in (ours, mlx_sdpa) if compared else (ours,):
        times["mlx", engine.__name__] = chained(engine(shape), q, 30)
        mx.clear_cache()
    read = graph.read_bandwidth(torch)
    for (harness, name), seconds in times.items():
        bits = goals.bits(name)
        size = shape.fp16_bytes * bits / 16 if bits else shape.bytes
        rate = size / seconds
        row = {"engine": name, "harness": harness, "us": round(seconds * 1e6, 2), "bytes": int(size)}
        row |= {"setting": chosen[name].setting, "library": chosen[name].version()} if name in chosen else {}
        log.row("decode", **row, gb_per_s=round(rate / 1e9, 1), share_of_read=round(rate / read, 3), **shape.row())
    said = ", ".join(f"{name} {1e6 * t:.1f} ({harness})" for (harness, name), t in times.items())
    what = f"n {shape.n:>6} b{shape.batch:<2} gqa {shape.gqa:<2} D{shape.dim:<3} L{shape.length:<2}"
    print(f"  {what} {shape.k} {shape.v}: {said} us", flush=True)


def read_row(log, torch) -> None:
    read = graph.read_bandwidth(torch) / 1e9
    log.row("read bandwidth", gb_per_s=round(read, 1), by="int32 sum over 4 GiB")
    print(f"  read {read:.0f} GB/s", flush=True)


def run_decode(log, torch, ways: list[rivals.Way]) -> None:
    """Decode alone, beside every rival: the shapes that readers look for first."""
    read_row(log, torch)
    for dim, contexts in ((128, (1024, 8192, 32768, 131072)), (64, (131072,))):
        for n in contexts:
            for batch in (1, 8):
                decode_row(log, torch, ways, Shape(n, INT4, INT4, batch=batch, dim=dim))


INT4 = Affine(4)
RECOMMENDED = (Turbo(5, fit="norm"), Turbo(3, fit="norm"))
OTHERS = [
    (Fractional(2.5), Fractional(2.5)),
    (Fractional(3.5), Fractional(3.5)),
    (Prod(3), Turbo(3)),
    (QJL(2), INT4),
    (Polar(), Polar()),
]
"""Codes of two runs, sketches and angles."""


def run(log, torch, quick: bool, ways: list[rivals.Way]) -> None:
    read_row(log, torch)
    row = functools.partial(decode_row, log, torch, ways)
    for n in (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072):
        row(Shape(n, INT4, INT4))
    for codecs in ((Affine(8), Affine(8)), (Affine(8), INT4), (Affine(2), Affine(2)), (Affine(4, 64), Affine(4, 64))):
        row(Shape(131072, *codecs), compared=False)
    for codecs in ((Turbo(4), Turbo(4)), (Turbo(3), Turbo(3)), RECOMMENDED, (Turbo(2), Turbo(2))):
        row(Shape(131072, *codecs), compared=False)
    for batch, dim in ((1, 64), (8, 64), (8, 128)):
        for codecs in ((INT4, INT4), RECOMMENDED):
            if (batch, dim, codecs) != (1, 64, (INT4, INT4)):
                row(Shape(131072, *codecs, batch=batch, dim=dim), compared=False)
    for n in (32768, 131072):
        for codecs in OTHERS:
            row(Shape(n, *codecs), compared=False)
    for gqa in (1, 4, 16):
        row(Shape(131072, INT4, INT4, gqa=gqa))
    for dim in (64, 256):
        row(Shape(131072, INT4, INT4, dim=dim))
    for batch in (8, 32):
        for n in (8192, 32768):
            row(Shape(n, INT4, INT4, batch=batch))
    if not quick:
        for length in (4, 16):
            row(Shape(32768, INT4, INT4, length=length), compared=False)
    for n in (8192, 32768, 131072):
        prefill_row(log, Shape(n, INT4, INT4, length=2048))
    for codecs in ((INT4, INT4), (Turbo(4), Turbo(4)), *OTHERS):
        error_row(log, Shape(131072, *codecs))
    pack_row(log, 2048)
    weights_row(log)
    compile_rows(log)


def run_slow_rivals(log) -> None:
    """Apart and last: MLX compiles kernels of its own for these two, which has taken more than a minute."""
    shape = Shape(131072, INT4, INT4)
    for engine in (dequantize_sdpa, mlx_lm_quantized):
        seconds = chained(engine(shape), queries(shape), 4, 4)
        log.row(
            "decode",
            engine=engine.__name__,
            harness="mlx",
            us=round(seconds * 1e6, 2),
            bytes=int(shape.bytes),
            **shape.row(),
        )
        print(f"  n {shape.n}: {engine.__name__} {seconds * 1e6:.1f} us", flush=True)
        mx.clear_cache()


def prefill_row(log, shape: Shape) -> None:
    """A chunk of tokens after n packed ones, beside fp16 attention over all of them; time and peak memory.

    Times are taken in turn, because a card that multiplies for long slows down.
    """
    whole = Shape(shape.n + shape.length, INT4, INT4, length=shape.length)
    q, steps, sizes, samples = queries(shape), {}, {}, {"ours": [], "mlx_sdpa": []}
    for name in samples:
        mx.synchronize()
        mx.clear_cache()
        before = mx.get_active_memory()
        steps[name] = step = ours(shape, packed_sets(shape, sets=1)) if name == "ours" else one_set_sdpa(whole)
        held = mx.get_active_memory() - before
        mx.eval(step(q))
        mx.synchronize()
        mx.reset_peak_memory()
        mx.eval(step(q))
        sizes[name] = held, mx.get_peak_memory() - before - held
    for _ in range(4):
        for name, step in steps.items():
            samples[name].append(chained(step, q, 3, 3))
    times = {name: statistics.median(found) for name, found in samples.items()}
    for name, (held, scratch) in sizes.items():
        row = {"engine": name, "us": round(times[name] * 1e6, 1), "kv_bytes": int(held), "scratch_bytes": int(scratch)}
        log.row("prefill", **row, **shape.row())
    mine, theirs = times["ours"], times["mlx_sdpa"]
    print(f"  prefill {shape.length} rows after {shape.n}: ours {mine * 1e3:.2f} ms, fp16 {theirs * 1e3:.2f} ms, "
          f"{theirs / mine:.2f}x its speed; K/V + scratch {sum(sizes['ours']) / 1e6:.0f} against "
          f"{sum(sizes['mlx_sdpa']) / 1e6:.0f} MB", flush=True)  # fmt: skip


def error_row(log, shape: Shape) -> None:
    """Errors of our decode and of fp16 SDPA over the decoded values, both against fp32, with spread-out scores."""
    q, data, dense = queries(shape), packed_sets(shape, sets=1), newest(shape)
    k, v = (
        mx.concatenate([kv.decode(0, shape.n, mx.float32), new.astype(mx.float32)], axis=2)
        for kv, new in zip(data[0], dense)
    )
    scale = shape.dim**-0.5
    scores = (4 * q.astype(mx.float32)).reshape(shape.kv_heads, shape.gqa, shape.dim) @ k[0].swapaxes(-1, -2) * scale
    exact = (mx.softmax(scores, axis=-1) @ v[0]).reshape(q.shape)
    mine = ours(shape, data, dense)(4 * q)
    theirs = mx.fast.scaled_dot_product_attention(4 * q, k.astype(mx.float16), v.astype(mx.float16), scale=scale)
    errors = [mx.linalg.norm(x.astype(mx.float32) - exact) / mx.linalg.norm(exact) for x in (mine, theirs)]
    mx.eval(errors)
    row = {"ours": errors[0].item(), "fp16_sdpa": errors[1].item()}
    log.row("error", **row, **shape.row())
    log.test(f"error of {shape.k} at {shape.n} tokens", row["ours"] <= 2 * row["fp16_sdpa"], str(row))
    print(
        f"  relative error, {shape.k} at {shape.n}: ours {row['ours']:.1e}, fp16 SDPA {row['fp16_sdpa']:.1e}",
        flush=True,
    )
    del k, v, scores
    mx.clear_cache()


def one_set_sdpa(shape: Shape) -> Step:
    k, v = normal(shape), normal(shape)
    mx.eval(k, v)
    return lambda q: mx.fast.scaled_dot_product_attention(q, k, v, scale=shape.dim**-0.5, mask="causal")


def pack_row(log, tokens: int) -> None:
    """Encoding `tokens` tokens of 8 heads: our kernel, and the codecs in MLX operations."""
    y = mx.random.normal((1, 8, tokens, 128)).astype(mx.float16)
    mx.eval(y)
    codecs: list[Codec] = [INT4, Turbo(4), Turbo(4, fit="norm"), Fractional(2.5), Prod(3), QJL(2), Polar()]
    for codec in codecs:
        form = codec.format(128)
        layout = layout_for("k", codec, 128)
        assert layout is not None
        ways = {"codec": functools.partial(lambda c, f: f.store(c.encode(y))[0], codec, layout)}
        if packable(form):
            ways["kernel"] = functools.partial(cuda.pack, layout, form, y)
        for name, way in ways.items():
            seconds = repeated(way)
            log.row("pack", engine=name, tokens=tokens, us=round(seconds * 1e6, 2), heads=8, dim=128, k=str(codec))
            print(f"  pack {tokens} tokens x 8 heads, {codec} by {name}: {seconds * 1e6:.1f} us", flush=True)


def weights_row(log) -> None:
    """What bounds the rest of a decode step: one 4-bit matrix of Llama-3.1-70B times one vector."""
    x = mx.random.normal((1, 8192)).astype(mx.float16)
    weights = [mx.quantize(mx.random.normal((28672, 8192)).astype(mx.float16), group_size=64, bits=4) for _ in range(4)]
    mx.eval(x, weights)
    turn = iter(range(1 << 30))
    seconds = repeated(lambda: mx.quantized_matmul(x, *weights[next(turn) % 4], group_size=64, bits=4), 40)
    rate = sum(w.nbytes for w in weights[0]) / seconds
    log.row("weights", us=round(seconds * 1e6, 1), gb_per_s=round(rate / 1e9, 1), rows=1, shape=[28672, 8192], bits=4)
    print(f"  28672 x 8192 4-bit matrix times a vector: {seconds * 1e6:.0f} us, {rate / 1e9:.0f} GB/s", flush=True)


def compile_rows(log) -> None:
    """NVRTC's time per decode kernel, which the cache on disk leaves to the first process."""
    for dim, codec in ((128, INT4), (128, Turbo(4)), (256, INT4)):
        source = Shape(1024, codec, codec, dim=dim).geometry().source()
        start = time.perf_counter()
        code = nvrtc.compile_source(source.name, source.translation_unit(), cuda.architecture())
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        nvrtc.cubin(source.name, source.translation_unit(), cuda.architecture())
        kept = time.perf_counter() - start
        log.row("compile", kernel=source.name, seconds=round(seconds, 2), from_cache=round(kept, 4), bytes=len(code))
        print(f"  compile {source.name}: {seconds:.1f} s, from the cache {1e3 * kept:.1f} ms", flush=True)
