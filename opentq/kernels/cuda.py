"""CUDA kernels: their sources, their launch geometry, and the `mx.fast.cuda_kernel` objects built from them.

A kernel is a `.cu` file of templates plus one line that instantiates it. `KernelSource` holds both and can spell itself
in three ways: for MLX, which compiles it with NVRTC on first use; as a translation unit for nvcc, which checks it on
machines without a GPU; and as one for the warp emulator of the tests. Everything about a launch that is arithmetic (row
tiles, warps, ring stages, shared memory, splits) is in `Geometry`, so that it can be tested anywhere.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from .cuda_layout import BLOCK, RECORD, MmaLayout

HERE = Path(__file__).parent
FILES = ("warp.cuh", "affine_block.cuh", "decode_warp.cuh", "decode_affine.cu", "pack_affine.cu", "unpack_affine.cu")

SHARED_LIMIT = 227 * 1024
"""Bytes of shared memory that one block may have on Hopper."""
MAX_SPLITS = 160
"""Beyond this the merge of the partial results takes longer than the splits save."""
CTYPES = {mx.float16: "__half", mx.bfloat16: "__nv_bfloat16", mx.float32: "float"}


def available() -> bool:
    """MLX's default device is an NVIDIA GPU of compute capability 9.0 or later (bulk copies, mbarriers)."""
    return mx.default_device() == mx.gpu and _hopper()


@functools.cache
def _hopper() -> bool:
    return bool(mx.cuda.is_available()) and _device_attribute(75) >= 9  # major compute capability


def source_hash() -> str:
    """Twelve digits that change whenever a CUDA source does; records in `results/` carry it."""
    digest = hashlib.sha256()
    for name in FILES:
        digest.update((HERE / name).read_bytes())
    return digest.hexdigest()[:12]


@functools.cache
def text(name: str, primitives: bool = True) -> str:
    """A source file with its local includes in front and comments gone (MLX hashes the text on every call)."""
    seen: set[str] = set()

    def expand(name: str) -> str:
        if name in seen or (name == "warp.cuh" and not primitives):
            return ""
        seen.add(name)
        body = (HERE / name).read_text()
        body = re.sub(r'^#include "(.+)"\n', lambda m: expand(m[1]), body, flags=re.M)
        return re.sub(r"[ \t]*//[^\n]*", "", body)

    return re.sub(r"\n\s*\n+", "\n", expand(name)).strip() + "\n"


@dataclass(frozen=True)
class KernelSource:
    """One instantiation: C types of inputs and outputs in order, and the body that MLX puts between the braces."""

    name: str
    file: str
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]
    body: str
    threads: int
    shared: int
    resident: int = 1  # blocks per multiprocessor that registers must leave room for

    @property
    def header(self) -> str:
        """The sources, and the launch bounds.

        MLX writes the kernel's signature itself and has no place for launch bounds, so `__global__` carries them until
        the body restores it.
        """
        bounds = f"__attribute__((global)) __launch_bounds__({self.threads}, {self.resident})"
        redefine = ['#pragma push_macro("__global__")', "#undef __global__", f"#define __global__ {bounds}"]
        return text(self.file) + "\n".join(redefine) + "\n"

    @property
    def full_body(self) -> str:
        return '\n#pragma pop_macro("__global__")\n' + self.body

    def build(self):
        """The `mx.fast.cuda_kernel` object; raises where MLX has no CUDA back end."""
        return mx.fast.cuda_kernel(
            name=self.name,
            input_names=[n for n, _ in self.inputs],
            output_names=[n for n, _ in self.outputs],
            source=self.full_body,
            header=self.header,
            shared_memory=self.shared,
        )

    def parameters(self) -> list[str]:
        """C parameters in MLX's order: every input, its shape where the body asks for it, then the outputs."""
        found = []
        for name, ctype in self.inputs:
            found.append(f"const {ctype}* {name}")
            if f"{name}_shape" in self.body:
                found.append(f"const Shape {name}_shape")
        return found + [f"{ctype}* {name}" for name, ctype in self.outputs]

    def translation_unit(self) -> str:
        """What MLX would generate, for nvcc."""
        shape = "struct Shape { int d[8]; __device__ int operator[](int i) const { return d[i]; } };"
        signature = f'extern "C" __global__ void {self.name}({", ".join(self.parameters())})'
        return f"{shape}\n{self.header}{signature} {{\n{self.full_body}\n}}\n"

    def emulated(self) -> str:
        """For the host's C++ compiler and `tests/cuda/emulate.hpp`: `run(grid, pointers, shapes)`."""
        lines = []
        for i, (name, ctype) in enumerate(self.inputs + self.outputs):
            lines.append(f"  auto* {name} = static_cast<{ctype}*>(pointers[{i}]);")
            if f"{name}_shape" in self.body:
                lines.append(f"  const int* {name}_shape = shapes + 8 * {i};")
        lines.append("  const Dim3 blocks{grid[0], grid[1], grid[2]};")
        lines.append(f"  emulate::launch(blocks, {self.threads}, {self.shared}, [&] {{")
        signature = 'extern "C" void run(const int* grid, void** pointers, const int* shapes)'
        code = "\n".join(lines)
        return f'#include "emulate.hpp"\n{text(self.file, False)}{signature} {{\n{code}\n{self.body}\n  }});\n}}\n'


@dataclass(frozen=True)
class Geometry:
    """Everything about a decode launch that is fixed at compile time, and the choice of splits.

    `rows` are the query rows of one KV head (GQA ratio x L); a row tile holds 8 * `tiles` of them.
    """

    k: MmaLayout
    v: MmaLayout
    dtype: str
    tiles: int
    warps: int
    stages: int

    @classmethod
    def choose(cls, k: MmaLayout, v: MmaLayout, dtype: str, rows: int) -> Geometry:
        """Eight warps and two stages unless shared memory says otherwise: measured best, `dev/kernels/cuda.md`."""
        tiles = 1 if rows <= 8 else 2 if rows <= 16 else 4
        tiles = max(1, min(tiles, 512 // max(k.head_dim, v.head_dim)))
        stage = 4 * (k.record_words + v.record_words)
        warps = 8
        while warps > 1 and 2 * warps * stage > 200 * 1024:
            warps //= 2
        stages = max(2, min(4, 80 * 1024 // (warps * stage)))
        return cls(k, v, dtype, tiles, warps, stages)

    @property
    def row_tile(self) -> int:
        return 8 * self.tiles

    @property
    def shared(self) -> int:
        """Bytes of shared memory: `Plan::BYTES` of decode_affine.cu, which asserts that it is enough."""
        rows, parts = self.row_tile, 2 if self.dtype == "float" else 1
        ring = self.warps * self.stages * 4 * (self.k.record_words + self.v.record_words)
        whole = self.warps * rows * (self.v.head_dim + 4) * 4
        area = max(ring, whole if whole <= max(ring, 49152) else self.warps * rows * (min(64, self.v.head_dim) + 4) * 4)
        query = self.k.head_dim // 16 * self.tiles * parts * 256
        sums = self.tiles * (2 if self.k.groups > 8 else 1) * 256
        small = rows * 8 + 2 * self.warps * rows * 4 + 16
        return area + query + sums + self.warps * self.stages * 8 + small

    @property
    def resident(self) -> int:
        """Blocks per multiprocessor: two where registers (one row tile, D up to 128) and shared memory allow."""
        small = self.tiles == 1 and max(self.k.head_dim, self.v.head_dim) <= 128 and self.dtype != "float"
        return 2 if small and 2 * (self.shared + 1024) <= SHARED_LIMIT else 1

    def splits(self, tiles: int, records: int, strips: int, multiprocessors: int) -> int:
        """How many blocks share the keys of one row tile; `tiles` = row tiles of all heads and sequences.

        One block per multiprocessor, if that leaves few of them idle, else as many as are resident at once. But a block
        should have four records of 32 tokens or eight dense strips of 16: below that a merge costs more than it saves.
        """
        fill = multiprocessors // tiles
        if fill * tiles < 0.75 * multiprocessors:
            fill = self.resident * multiprocessors // tiles
        work = max(-(-records // 4), -(-strips // 8))
        return max(1, min(fill, work, MAX_SPLITS))

    def source(self) -> KernelSource:
        t, sizes = self.dtype, f"{self.tiles}, {self.warps}, {self.stages}"
        name = f"opentq_decode_{t.strip('_')}_{self.k.name}_{self.v.name}_{self.tiles}_{self.warps}_{self.stages}"
        body = (
            "  opentq::Shape4 shape{\n"
            "      k_shape[2], v_shape[2], dense_k_shape[2], q_shape[1], q_shape[2], dense_k_shape[1]};\n"
            f"  opentq::decode<{t}, {affine_type(self.k)}, {affine_type(self.v)}, {sizes}, {self.shared}>(\n"
            "      q, k, v, dense_k, dense_v, lens, params, sinks, tickets, out, scratch, shape);"
        )
        return KernelSource(
            name=re.sub(r"\W", "_", name),
            file="decode_affine.cu",
            inputs=(
                ("q", t),
                ("k", "unsigned"),
                ("v", "unsigned"),
                ("dense_k", "__half"),
                ("dense_v", "__half"),
                ("lens", "int"),
                ("params", "int"),
                ("sinks", "float"),
                ("tickets", "unsigned"),
            ),
            outputs=(("out", t), ("scratch", "float")),
            body=body,
            threads=32 * self.warps,
            shared=self.shared,
            resident=self.resident,
        )

    def grid(self, batch: int, kv_heads: int, rows: int, splits: int) -> tuple[int, int, int]:
        """Blocks."""
        return splits, kv_heads * -(-rows // self.row_tile), batch


def affine_type(layout: MmaLayout) -> str:
    return f"opentq::Affine<{layout.head_dim}, {layout.bits}, {layout.group}>"


@functools.cache
def pack_source(layout: MmaLayout, dtype: str) -> KernelSource:
    """Rotated vectors `[B, H, T, D]` -> records; one block of 128 threads per record of 32 tokens."""
    keys = "true" if layout.side == "k" else "false"
    return KernelSource(
        name=re.sub(r"\W", "_", f"opentq_pack_{dtype}_{layout.name}"),
        file="pack_affine.cu",
        inputs=(("y", dtype),),
        outputs=(("records", "unsigned"),),
        body=f"  opentq::pack<{dtype}, {affine_type(layout)}, {keys}>(y, records);",
        threads=128,
        shared=4 * RECORD * (layout.head_dim + 1 + 2 * layout.groups),
    )


@functools.cache
def unpack_source(layout: MmaLayout, dtype: str) -> KernelSource:
    """Some KV heads of one sequence -> `[heads, tokens, D]` in logical order; four units of 32 tokens per block."""
    keys = "true" if layout.side == "k" else "false"
    return KernelSource(
        name=re.sub(r"\W", "_", f"opentq_unpack_{dtype}_{layout.name}"),
        file="unpack_affine.cu",
        inputs=(("records", "unsigned"), ("dense", "__half"), ("where", "int")),
        outputs=(("y", dtype),),
        body=(
            f"  opentq::unpack<{affine_type(layout)}, {keys}>(\n"
            "      records, dense, where, y, records_shape[2], dense_shape[1], dense_shape[2], where[5]);"
        ),
        threads=128,
        shared=0,
    )


@functools.cache
def compiled(source: KernelSource):
    return source.build()


def pack(layout: MmaLayout, y: mx.array) -> mx.array:
    """`layout.store(codec.encode(y))` on the GPU: rotated `y [B, H, T, D]`, T a multiple of 64."""
    batch, heads, tokens, _ = y.shape
    return compiled(pack_source(layout, CTYPES[y.dtype]))(
        inputs=[y],
        output_shapes=[(batch, heads, tokens // BLOCK, 2 * layout.record_words)],
        output_dtypes=[mx.uint32],
        grid=(batch * heads * tokens // RECORD * 128, 1, 1),
        threadgroup=(128, 1, 1),
    )[0]


def unpack(
    layout: MmaLayout,
    records: mx.array,
    dense: mx.array,
    lens: tuple[int, int, int],
    b: int,
    heads: range,
    dtype: mx.Dtype,
) -> mx.array:
    """Keys or values of sequence `b` and some KV heads in logical order: `[1, heads, tokens, D]` of `dtype`."""
    packed, sink, tail_start = lens
    columns = dense.shape[2]
    tokens = packed + sink + columns - tail_start
    where = mx.array([b, heads.start, packed, sink, tail_start, tokens, 0, 0], dtype=mx.int32)
    units = -(-packed // RECORD) + -(-columns // RECORD)
    return compiled(unpack_source(layout, CTYPES[dtype]))(
        inputs=[records, dense, where],
        output_shapes=[(1, len(heads), tokens, layout.head_dim)],
        output_dtypes=[dtype],
        grid=(-(-units // 4) * 128, len(heads), 1),
        threadgroup=(128, 1, 1),
    )[0]


@functools.lru_cache(maxsize=256)
def params_array(scale: float, softcap: float, window: int, causal: bool) -> mx.array:
    """int32 `[4]`: scale and softcap as float bits, window, causal."""
    bits = [struct.unpack("<i", struct.pack("<f", x))[0] for x in (scale, softcap)]
    return mx.array([*bits, window, int(causal)], dtype=mx.int32)


@functools.cache
def no_sinks() -> mx.array:
    return mx.array([float("nan")], dtype=mx.float32)


@functools.cache
def no_records() -> mx.array:
    """Stands for a packed buffer that does not exist yet."""
    return mx.zeros((1, 1, 1, 4), dtype=mx.uint32)


TICKET_RING = 256


@functools.cache
def _ticket_ring(slot: int, count: int) -> mx.array:
    zeros = mx.zeros((count,), dtype=mx.uint32)
    mx.eval(zeros)
    return zeros


_calls = itertools.count()


def tickets(count: int) -> mx.array:
    """`count` or more zeroed counters for the merge of one launch.

    A launch leaves its counters at zero, so they are never cleared. MLX may run independent kernels at the same time,
    and these arrays are written although they are inputs: taking them in turn keeps launches that could overlap apart
    (a CUDA graph of MLX holds fewer nodes than the ring has slots).
    """
    return _ticket_ring(next(_calls) % TICKET_RING, max(1024, 1 << (count - 1).bit_length()))


@functools.cache
def multiprocessors() -> int:
    return _device_attribute(16)


def _device_attribute(attribute: int) -> int:
    """`cuDeviceGetAttribute` of device 0; raises OSError without a driver, RuntimeError when it refuses."""
    driver = ctypes.CDLL("libcuda.so.1")
    value = ctypes.c_int()
    for status in (driver.cuInit(0), driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)):
        if status:
            raise RuntimeError(f"the CUDA driver answered error {status} when asked for device attribute {attribute}")
    return value.value
