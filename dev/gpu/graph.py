"""The decode kernel without a framework: launched on torch tensors and replayed from a CUDA graph, as torch's own are.

MLX spends about as long on asking for a short call as the GPU on doing it. Times from graphs show the kernel; times
through MLX (`timing.py`) show what a model gets.
"""

from __future__ import annotations

import ctypes
import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from opentq.contracts.codec import Codec
from opentq.kernels.cuda import launch as cuda
from opentq.kernels.cuda import nvrtc
from opentq.kernels.cuda.geometry import Geometry
from opentq.kernels.cuda.layout import layout_for

TORCH = {"f16": "float16", "bf16": "bfloat16"}
CALLS = 20  # in one graph
COLUMNS = 64  # dense ones
COLD_BYTES = 400 << 20  # sets of keys and values together: several times the L2 cache


@dataclass(frozen=True)
class Shape:
    """One decode call: `length` query tokens of `gqa * kv_heads` heads over `n` packed tokens."""

    n: int
    k: Codec
    v: Codec
    batch: int = 1
    kv_heads: int = 8
    gqa: int = 8
    dim: int = 128
    length: int = 1

    @property
    def bytes(self) -> float:
        """Packed keys and values."""
        bits = self.k.bits_per_value(self.dim) + self.v.bits_per_value(self.dim)
        return self.batch * self.kv_heads * self.n * self.dim * bits / 8

    @property
    def fp16_bytes(self) -> float:
        return 4 * self.batch * self.kv_heads * self.n * self.dim

    def sets(self, size: float) -> int:
        """How many copies of data of `size` bytes a benchmark should take in turn."""
        return max(2, min(8, int(COLD_BYTES / size)))

    def row(self) -> dict:
        """As it goes into records."""
        heads = {"q_heads": self.gqa * self.kv_heads, "kv_heads": self.kv_heads}
        return {"n": self.n, "batch": self.batch, **heads, "dim": self.dim, "length": self.length} | {
            "k": str(self.k),
            "v": str(self.v),
        }

    def geometry(self) -> Geometry:
        layouts = layout_for("k", self.k, self.dim), layout_for("v", self.v, self.dim)
        assert layouts[0] and layouts[1]
        return Geometry.choose(*layouts, "opentq::f16", self.gqa * self.length)

    @property
    def scalars(self) -> cuda.Scalars:
        """Of a launch over `COLUMNS` dense columns."""
        blocks, heads, causal = self.n // 64, self.gqa * self.kv_heads, int(self.length > 1)
        first = (blocks, blocks, COLUMNS, heads, self.kv_heads, self.length, 0, causal)  # no window,
        return (*first, self.n, 0, 0, self.dim**-0.5, 0.0, 0, 0)  # sinks, softcap, center or list

    def splits(self, geometry: Geometry) -> int:
        tiles = self.batch * self.kv_heads * -(-self.gqa * self.length // geometry.row_tile)
        return geometry.splits(tiles, -(-self.n // 32), 4, cuda.multiprocessors())


@functools.cache
def _function(source: cuda.KernelSource) -> ctypes.c_void_p:
    library, module, function = _driver(), ctypes.c_void_p(), ctypes.c_void_p()
    code = nvrtc.cubin(source.name, source.translation_unit(), cuda.architecture())
    _check(library.cuModuleLoadData(ctypes.byref(module), code))
    _check(library.cuModuleGetFunction(ctypes.byref(function), module, source.name.encode()))
    _check(library.cuFuncSetAttribute(function, 8, source.shared))  # dynamic shared memory
    return function


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"the CUDA driver answered error {status}")


def launch(
    torch, source: cuda.KernelSource, tensors: list, scalars: cuda.Scalars, blocks: tuple[int, int, int]
) -> None:
    """One launch on torch's current stream."""
    held = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
    types = {"float": ctypes.c_float, "int": ctypes.c_int}
    held += [types[ctype](s) for s, (_, ctype) in zip(scalars, source.scalars, strict=True)]
    table = (ctypes.c_void_p * len(held))(*(ctypes.addressof(h) for h in held))
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    function = _function(source)
    _check(_driver().cuLaunchKernel(function, *blocks, source.threads, 1, 1, source.shared, stream, table, None))


def graph_seconds(torch, calls: list[Callable[[], object]], inner: int = CALLS, runs: int = 5) -> float:
    """Seconds per call: `inner` calls, taken in turn, captured once and replayed; median of `runs`."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(inner):
            calls[i % len(calls)]()
    samples = []
    for i in range(runs + 1):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        if i:
            samples.append(start.elapsed_time(stop) / 1e3 / inner)
    return statistics.median(samples)


READ = """
extern "C" __global__ __launch_bounds__(512, 2) void read_sum(const int4* x, int* out, long long n) {
  const long long step = (long long)gridDim.x * blockDim.x;
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  int sum = 0;
  for (; i + 7 * step < n; i += 8 * step) {
    int4 v[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) v[k] = __ldcs(x + i + k * step);
#pragma unroll
    for (int k = 0; k < 8; ++k) sum += v[k].x + v[k].y + v[k].z + v[k].w;
  }
  if (sum == 12345) *out = sum;
}
"""
READ_BYTES = 4 << 30


@functools.cache
def read_bandwidth(torch) -> float:
    """Bytes per second of a pass over 4 GiB that only reads: whole words, 128 bytes a thread in flight, an int32 sum.

    Reductions of floats are no measure: torch's and MLX's `max` read a quarter slower than the memory does.
    """
    x = torch.randint(-(2**31), 2**31 - 1, (READ_BYTES // 4,), dtype=torch.int32, device="cuda")
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check(_driver().cuModuleLoadData(ctypes.byref(module), nvrtc.cubin("read_sum", READ, cuda.architecture())))
    _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, b"read_sum"))
    held = [ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()), ctypes.c_longlong(READ_BYTES // 16)]
    table = (ctypes.c_void_p * 3)(*(ctypes.addressof(h) for h in held))

    def call() -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        _check(_driver().cuLaunchKernel(function, 2 * cuda.multiprocessors(), 1, 1, 512, 1, 1, 0, stream, table, None))

    return READ_BYTES / graph_seconds(torch, [call], 4)


def kernel_seconds(torch, shape: Shape, geometry: Geometry | None = None, splits: int | None = None) -> float:
    """Seconds per launch over random records and `COLUMNS` dense columns."""
    geometry = geometry or shape.geometry()
    splits = splits or shape.splits(geometry)
    source, rows = geometry.source(), shape.gqa * shape.length
    blocks = geometry.grid(shape.batch, shape.kv_heads, rows, splits)
    sets = []
    for _ in range(shape.sets(shape.bytes)):
        sides = [random_records(torch, shape, layout) for layout in (geometry.k, geometry.v)]
        sets.append(sides)
    heads = shape.gqa * shape.kv_heads
    q = torch.randn(shape.batch, heads, shape.length, geometry.k.query, device="cuda").half()
    dense = [torch.randn(shape.batch, shape.kv_heads, COLUMNS, shape.dim, device="cuda").half() for _ in "kv"]
    lens = torch.zeros(1, dtype=torch.int32, device="cuda")
    sinks = torch.full((1,), float("nan"), device="cuda")
    tickets = torch.zeros(65536, dtype=torch.int32, device="cuda")
    out = torch.empty(shape.batch, heads, shape.length, shape.dim, device="cuda").half()
    scratch = torch.empty(blocks[1] * blocks[2], splits, geometry.row_tile, shape.dim + 2, device="cuda")
    scalars = shape.scalars

    def call(pair):
        launch(torch, source, [q, *pair, *dense, lens, sinks, tickets, out, scratch], scalars, blocks)

    return graph_seconds(torch, [functools.partial(call, pair) for pair in sets])


def random_records(torch, shape: Shape, layout):
    """Records `[B, H, T/64, words]` with random codes and finite scales and zeros."""
    count, words, numbers = shape.batch * shape.kv_heads * shape.n // 32, layout.record_words, 16 * layout.groups
    x = torch.randint(-(2**31), 2**31 - 1, (count, words), dtype=torch.int32, device="cuda")
    values = torch.rand(count, 2 * numbers * layout.numbers, device="cuda").mul_(0.1).half()
    values[:, 2 * numbers :] -= 0.7
    x[:, words - numbers * layout.numbers :] = values.view(torch.int32)
    return x.view(shape.batch, shape.kv_heads, shape.n // 64, -1)


def sdpa_seconds(torch, shape: Shape) -> dict[str, float]:
    """torch's fp16 attention, each back end that serves the shape.

    The query heads of a KV head go as rows of one head, which suits these kernels best.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def normal(rows):
        return torch.randn(shape.batch, shape.kv_heads, rows, shape.dim, device="cuda", dtype=torch.float16)

    data = [(normal(shape.n), normal(shape.n)) for _ in range(shape.sets(shape.fp16_bytes))]
    q = normal(shape.gqa * shape.length)
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, q, scale=shape.dim**-0.5)
    found = {}
    for name, backend in (("torch-cudnn", SDPBackend.CUDNN_ATTENTION), ("torch-flash", SDPBackend.FLASH_ATTENTION)):
        try:
            with sdpa_kernel(backend), torch.no_grad():
                found[name] = graph_seconds(torch, [functools.partial(attend, *kv) for kv in data])
        except RuntimeError as error:
            print(f"  {name} does not serve {shape.row()}: {str(error).splitlines()[0][:100]}")
    return found
