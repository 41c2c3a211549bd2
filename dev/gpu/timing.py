"""Times of decode, prefill and packing beside their rivals, in one process.

A figure is the median of several runs; a run is many calls in one `mx.eval`, each fed the output of the call before it,
so that nothing overlaps and launch overhead is amortised as in a model. Calls take their keys and values in turn from
sets that together are several times the L2 cache.
"""

from __future__ import annotations

import functools
import statistics
import time

import mlx.core as mx
from mlx_lm.models.base import quantized_scaled_dot_product_attention

from opentq.attention import fused_cuda
from opentq.attention.args import AttnArgs, PackedKV
from opentq.codecs.affine import Affine
from opentq.kernels import cuda
from opentq.kernels.cuda_layout import MmaLayout

SETS_BYTES = 400 << 20


def torch_or_none():
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def chained(step, first: mx.array, calls: int, runs: int = 7) -> tuple[float, float, float]:
    """(median, least, most) seconds per call of `x = step(x)`."""
    samples = []
    for i in range(runs + 2):
        start = time.perf_counter()
        x = first
        for _ in range(calls):
            x = step(x)
        mx.eval(x)
        mx.synchronize()
        if i >= 2:
            samples.append((time.perf_counter() - start) / calls)
    return statistics.median(samples), min(samples), max(samples)


@functools.cache
def read_bandwidth() -> float:
    """Bytes per second of a read-only pass over 1 GiB (`mx.max`)."""
    x = mx.random.normal((1 << 29,)).astype(mx.float16)
    mx.eval(x)
    samples = []
    for _ in range(9):
        start = time.perf_counter()
        mx.eval([mx.max(x) for _ in range(10)])
        mx.synchronize()
        samples.append((time.perf_counter() - start) / 10)
    return x.nbytes / statistics.median(samples)


class DecodeCase:
    """One shape, its data in several sets, and one step function per engine."""

    def __init__(
        self,
        n: int,
        batch: int = 1,
        kv_heads: int = 8,
        gqa: int = 8,
        dim: int = 128,
        k: Affine | None = None,
        v: Affine | None = None,
        length: int = 1,
    ):
        self.n, self.batch, self.kv_heads, self.gqa, self.dim, self.length = n, batch, kv_heads, gqa, dim, length
        self.k_codec, self.v_codec = k or Affine(4), v or Affine(4)
        self.scale = dim**-0.5
        mx.random.seed(1)
        self.q = mx.random.normal((batch, kv_heads * gqa, length, dim)).astype(mx.float16)
        self.layouts = [MmaLayout(s, c.bits, c.group, dim) for s, c in (("k", self.k_codec), ("v", self.v_codec))]
        values = 2 * batch * kv_heads * n * dim
        self.bytes = values * (self.k_codec.bits_per_value(dim) + self.v_codec.bits_per_value(dim)) / 16
        self.fp16_bytes = 2 * values
        mx.eval(self.q)

    def sets(self, size: float) -> int:
        return max(2, min(8, int(SETS_BYTES / size)))

    def normal(self) -> mx.array:
        return mx.random.normal((self.batch, self.kv_heads, self.n, self.dim), dtype=mx.float16)

    def ours(self, sets: int | None = None):
        data = []
        for _ in range(sets or self.sets(self.bytes)):
            stored = [layout.encode(c, self.normal()) for layout, c in zip(self.layouts, (self.k_codec, self.v_codec))]
            mx.eval(stored)
            data.append(
                [
                    PackedKV(c, layout, s, self.dim)
                    for c, layout, s in zip((self.k_codec, self.v_codec), self.layouts, stored)
                ]
            )
        dense = [mx.random.normal((self.batch, self.kv_heads, self.length, self.dim)).astype(mx.float16) for _ in "kv"]
        mx.eval(dense)
        lens = ((self.n, 0, 0),) * self.batch

        def call(q, pair):
            return fused_cuda.attend(
                AttnArgs(
                    q=q,
                    k=pair[0],
                    v=pair[1],
                    dense_k=dense[0],
                    dense_v=dense[1],
                    lens=lens,
                    scale=self.scale,
                    causal=True,
                )
            )

        return rotate(call, data)

    def fp16_sets(self) -> list[tuple[mx.array, mx.array]]:
        data = [(self.normal(), self.normal()) for _ in range(self.sets(self.fp16_bytes))]
        mx.eval(data)
        return data

    def mlx_sdpa(self):
        return rotate(lambda q, kv: mx.fast.scaled_dot_product_attention(q, *kv, scale=self.scale), self.fp16_sets())

    def quantized_sets(self):
        data = []
        for _ in range(self.sets(self.bytes)):
            data.append([tuple(mx.quantize(self.normal(), group_size=32, bits=4)) for _ in "kv"])
            mx.eval(data[-1])
        return data

    def mlx_lm_quantized(self):
        def call(q, kv):
            return quantized_scaled_dot_product_attention(q, *kv, scale=self.scale, mask=None, group_size=32, bits=4)

        return rotate(call, self.quantized_sets())

    def dequantize_sdpa(self):
        def call(q, kv):
            k, v = (mx.dequantize(*x, group_size=32, bits=4) for x in kv)
            return mx.fast.scaled_dot_product_attention(q, k, v, scale=self.scale)

        return rotate(call, self.quantized_sets())

    def torch_sdpa(self) -> dict[str, float]:
        """Seconds per call of torch's backends; the query heads of a KV head go as rows, which suits them best."""
        torch = torch_or_none()
        if torch is None or self.length > 1:
            return {}
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def normal(rows):
            return torch.randn(self.batch, self.kv_heads, rows, self.dim, device="cuda", dtype=torch.float16)

        data = [(normal(self.n), normal(self.n)) for _ in range(self.sets(self.fp16_bytes))]
        found = {}
        for name, backend in (("torch-cudnn", SDPBackend.CUDNN_ATTENTION), ("torch-flash", SDPBackend.FLASH_ATTENTION)):
            try:
                with sdpa_kernel(backend), torch.no_grad():
                    found[name] = torch_time(torch, data, normal(self.gqa), self.scale)
            except RuntimeError as error:
                print(f"  {name} does not serve this shape: {str(error).splitlines()[0][:100]}")
        del data
        torch.cuda.empty_cache()
        return found


def torch_time(torch, data, q, scale: float, calls: int = 20) -> float:
    """Seconds per chained call, from a captured graph."""

    def run():
        x = q
        for i in range(calls):
            x = torch.nn.functional.scaled_dot_product_attention(x, *data[i % len(data)], scale=scale)
        return x

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    samples = []
    for i in range(9):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        if i >= 2:
            samples.append(start.elapsed_time(stop) / 1e3 / calls)
    return statistics.median(samples)


def rotate(call, data):
    turn = iter(range(1 << 30))
    return lambda x: call(x, data[next(turn) % len(data)])


def decode_row(log, case: DecodeCase, engines: tuple[str, ...]) -> dict[str, float]:
    """Time `engines` on one shape; prints and records them."""
    shape = {
        "n": case.n,
        "batch": case.batch,
        "q_heads": case.gqa * case.kv_heads,
        "kv_heads": case.kv_heads,
        "dim": case.dim,
        "length": case.length,
        "k": str(case.k_codec),
        "v": str(case.v_codec),
    }
    times: dict[str, float] = {}
    for engine in engines:
        if engine == "torch":
            for name, seconds in case.torch_sdpa().items():
                times[name] = seconds
                log.row("decode", engine=name, us=round(seconds * 1e6, 2), bytes=case.fp16_bytes, **shape)
            continue
        step = getattr(case, engine)()
        slow = engine in ("mlx_lm_quantized", "dequantize_sdpa")
        seconds, least, most = chained(step, case.q, 10 if slow or case.bytes > 1 << 30 else 40, 5 if slow else 7)
        size = case.fp16_bytes if engine == "mlx_sdpa" else case.bytes
        times[engine] = seconds
        log.row(
            "decode",
            engine=engine,
            us=round(seconds * 1e6, 2),
            us_least=round(least * 1e6, 2),
            us_most=round(most * 1e6, 2),
            bytes=int(size),
            gb_per_s=round(size / seconds / 1e9, 1),
            share_of_read=round(size / seconds / read_bandwidth(), 3),
            **shape,
        )
        del step
        mx.clear_cache()
    share = case.bytes / times["ours"] / read_bandwidth()
    fp16 = min((t for e, t in times.items() if e == "mlx_sdpa" or e.startswith("torch")), default=None)
    heads = f"{case.gqa * case.kv_heads}/{case.kv_heads}"
    line = f"  n {case.n:>6} b{case.batch:<2} {heads:>6} D{case.dim:<3} L{case.length:<2} "
    line += f"{case.k_codec} {case.v_codec}: " + ", ".join(f"{e} {t * 1e6:.1f}" for e, t in times.items())
    line += f" us | {share:.0%} of read" + (f", {fp16 / times['ours']:.2f}x best fp16" if fp16 else "")
    print(line, flush=True)
    return times


def run(log, quick: bool) -> None:
    log.row("read bandwidth", gb_per_s=round(read_bandwidth() / 1e9, 1))
    print(f"  read {read_bandwidth() / 1e9:.0f} GB/s", flush=True)
    fp16 = ("ours", "mlx_sdpa", "torch")
    for n in (131072, 65536, 32768, 16384, 8192, 4096, 2048, 1024):
        decode_row(log, DecodeCase(n), fp16)
    for gqa in (1, 4, 16):
        decode_row(log, DecodeCase(131072, gqa=gqa), fp16)
    for dim in (64, 256):
        decode_row(log, DecodeCase(131072, dim=dim), fp16)
    for batch in (8, 32):
        for n in (8192, 32768):
            decode_row(log, DecodeCase(n, batch=batch), fp16)
    for k, v in ((8, 8), (8, 4), (3, 3), (2, 2)):
        decode_row(log, DecodeCase(131072, k=Affine(k), v=Affine(v)), ("ours",))
    decode_row(log, DecodeCase(131072, k=Affine(4, 64), v=Affine(4, 64)), ("ours",))
    for length in (4, 16):
        decode_row(log, DecodeCase(32768, length=length), ("ours", "mlx_sdpa"))
    for n in (8192, 32768, 131072):
        prefill_row(log, n)
    pack_row(log, 2048)
    # Last, because MLX compiles kernels of its own for these two, which has taken more than a minute.
    for n in (131072, 16384):
        decode_row(log, DecodeCase(n), ("ours", "mlx_sdpa", "dequantize_sdpa", "mlx_lm_quantized"))


def prefill_row(log, n: int, rows: int = 2048) -> None:
    """A chunk of `rows` tokens after n packed ones, beside fp16 attention over all of them; time and peak memory."""
    case = DecodeCase(n, length=rows)
    step = case.ours(1)
    result = {}
    for name in ("ours", "mlx_sdpa"):
        if name == "mlx_sdpa":
            k, v = (mx.random.normal((1, 8, n + rows, 128), dtype=mx.float16) for _ in "kv")
            mx.eval(k, v)

            def step(q, k=k, v=v):
                return mx.fast.scaled_dot_product_attention(q, k, v, scale=case.scale, mask="causal")

        held = mx.get_active_memory()
        mx.reset_peak_memory()
        seconds, least, most = chained(step, case.q, 2, 5)
        extra = mx.get_peak_memory() - held
        kv_bytes = int(case.bytes if name == "ours" else 4 * 8 * (n + rows) * 128)
        result[name] = (seconds, kv_bytes + extra)
        log.row(
            "prefill",
            engine=name,
            n=n,
            rows=rows,
            us=round(seconds * 1e6, 1),
            us_least=round(least * 1e6, 1),
            us_most=round(most * 1e6, 1),
            kv_bytes=kv_bytes,
            scratch_bytes=int(extra),
            q_heads=64,
            kv_heads=8,
            dim=128,
        )
        del step
        mx.clear_cache()
    ours, theirs = result["ours"], result["mlx_sdpa"]
    print(
        f"  prefill {rows} rows after {n}: ours {ours[0] * 1e3:.2f} ms, fp16 {theirs[0] * 1e3:.2f} ms, "
        f"{theirs[0] / ours[0]:.2f}x its speed; K/V + scratch {ours[1] / 1e6:.0f} against {theirs[1] / 1e6:.0f} MB",
        flush=True,
    )


def pack_row(log, tokens: int) -> None:
    """Encoding `tokens` tokens of 8 heads: our kernel, and the codec in MLX operations."""
    layout, codec = MmaLayout("k", 4, 32, 128), Affine(4)
    y = mx.random.normal((1, 8, tokens, 128)).astype(mx.float16)
    mx.eval(y)
    times = {}
    for name, call in (("kernel", lambda: cuda.pack(layout, y)), ("codec", lambda: codec.encode(y)[0])):
        mx.eval([call() for _ in range(3)])
        samples = []
        for _ in range(7):
            start = time.perf_counter()
            mx.eval([call() for _ in range(20)])
            mx.synchronize()
            samples.append((time.perf_counter() - start) / 20)
        times[name] = statistics.median(samples)
        log.row("pack", engine=name, tokens=tokens, us=round(times[name] * 1e6, 2), heads=8, dim=128, k=str(codec))
    print(
        f"  pack {tokens} tokens x 8 heads: kernel {times['kernel'] * 1e6:.1f} us, codec {times['codec'] * 1e6:.1f} us",
        flush=True,
    )
