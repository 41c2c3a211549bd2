"""CUDA kernels: their sources, and the calls that launch them.

A kernel is a `.cu` file of templates plus one line that instantiates it. `KernelSource` holds both and can spell itself
in two ways: as a translation unit, which NVRTC compiles on first use (`nvrtc.py`) and nvcc checks on machines without a
GPU, and as one for the warp emulator of the tests. The decode kernel's launches are in `geometry.py`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import math
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ...codecs import codebooks
from ...codecs.rounding import lengths
from ...contracts.codec import Codebook, Codebooks, Format
from .. import repeat
from . import nvrtc
from .layout import BLOCK, RECORD, MmaLayout, PolarLayout, Run

HERE = Path(__file__).parent
FILES = (
    *("warp.cuh", "vector.cuh", "formats.cuh", "record.cuh", "decode_warp.cuh"),
    *("decode.cu", "pack.cu", "unpack.cu", "rotate.cu", "pages.cu"),
)
"""Sources that `dev/gpu_check.py` proves on a GPU."""


CTYPES = {mx.float16: "opentq::f16", mx.bfloat16: "opentq::bf16", mx.float32: "float", mx.uint32: "unsigned"}

Scalars = tuple[int | float, ...]


def available() -> bool:
    """MLX's default device is an NVIDIA GPU of compute capability 9.0 or later (bulk copies, mbarriers)."""
    return mx.default_device() == mx.gpu and _hopper()


@functools.cache
def _hopper() -> bool:
    return bool(mx.cuda.is_available()) and _device_attribute(MAJOR) >= 9


@functools.cache
def architecture() -> str:
    """What NVRTC compiles for: "sm_90" on Hopper."""
    return f"sm_{_device_attribute(MAJOR)}{_device_attribute(MINOR)}"


def source_hash() -> str:
    """Twelve digits that change whenever a kernel's code does, comments apart; records in `results/` carry it."""
    digest = hashlib.sha256()
    for name in FILES:
        digest.update(text(name).encode())
    return digest.hexdigest()[:12]


@functools.cache
def text(name: str, primitives: bool = True) -> str:
    """A source file with its local includes in front and comments gone."""
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
    """One instantiation: names and C types of inputs, outputs and scalars in order, and the body between the braces."""

    name: str
    file: str
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]
    scalars: tuple[tuple[str, str], ...]
    body: str
    threads: int
    shared: int
    resident: int = 1  # blocks per multiprocessor that registers must leave room for

    def __hash__(self) -> int:
        return hash(self.name)

    def translation_unit(self) -> str:
        """For NVRTC and nvcc."""
        parameters = [f"const {ctype}* {name}" for name, ctype in self.inputs]
        parameters += [f"{ctype}* {name}" for name, ctype in self.outputs]
        parameters += [f"{ctype} {name}" for name, ctype in self.scalars]
        bounds = f"__launch_bounds__({self.threads}, {self.resident})"
        signature = f'extern "C" __global__ {bounds} void {self.name}({", ".join(parameters)})'
        return f"{text(self.file)}{signature} {{\n{self.body}\n}}\n"

    def emulated(self) -> str:
        """For the host's C++ compiler and `tests/cuda/emulate.hpp`: `run(grid, pointers, scalars)`."""
        lines = []
        for i, (name, ctype) in enumerate(self.inputs + self.outputs):
            lines.append(f"  auto* {name} = static_cast<{ctype}*>(pointers[{i}]);")
        for i, (name, ctype) in enumerate(self.scalars):
            lines.append(f"  const auto {name} = static_cast<{ctype}>(scalars[{i}]);")
        lines.append(f"  emulate::launch({{grid[0], grid[1], grid[2]}}, {self.threads}, {self.shared}, [&] {{")
        signature = 'extern "C" void run(const int* grid, void** pointers, const double* scalars)'
        code = "\n".join(lines)
        return f'#include "emulate.hpp"\n{text(self.file, False)}{signature} {{\n{code}\n{self.body}\n  }});\n}}\n'


KEPT = 16
"""Calls that a kernel remembers, each with a copy of its code."""


class Kernel:
    """A compiled `KernelSource`, ready to launch."""

    def __init__(self, source: KernelSource):
        self.source = source
        self.code = nvrtc.cubin(source.name, source.translation_unit(), architecture())
        self._remembered = functools.lru_cache(maxsize=KEPT)(self.repeated)

    def __call__(
        self,
        inputs: list[mx.array],
        outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
        scalars: Scalars,
        blocks: tuple[int, int, int],
    ) -> list[mx.array]:
        """Outputs of the given shapes and dtypes, made by `blocks` blocks."""
        return self._remembered(tuple(outputs), scalars, blocks)(inputs)

    def repeated(
        self, outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]], scalars: Scalars, blocks: tuple[int, int, int]
    ) -> repeat.Call:
        """Such a call, for many inputs."""
        given = {
            "name": self.source.name,
            "compiled_source": self.code,
            "output_shapes": [shape for shape, _ in outputs],
            "output_dtypes": [dtype for _, dtype in outputs],
            "scalars": scalars,
            "grid": (blocks[0] * self.source.threads, blocks[1], blocks[2]),
            "threadgroup": (self.source.threads, 1, 1),
            "shared_memory": self.source.shared,
            "ensure_row_contiguous": True,
        }
        return repeat.repeated(mx.fast.precompiled_cuda_kernel, given)


def single(x: float) -> float:
    """`x` rounded to float32: as a scalar of a kernel MLX refuses a float that would have to be rounded."""
    return struct.unpack("f", struct.pack("f", x))[0]


def short(ctype: str) -> str:
    """A C type as part of a kernel's name."""
    return ctype.rpartition(":")[2]


def format_type(layout: MmaLayout) -> str:
    """The C++ type of formats.cuh that reads this layout."""
    if isinstance(layout, PolarLayout):
        levels = [codebooks.angle(4, 1)[:4], *(codebooks.angle(2, level) for level in (2, 3, 4))]
        units = (", ".join(str(round(math.cos(angle) * 2**30)) for angle in angles) for angles in levels)
        quadrants = ", ".join(f"opentq::Quadrant<{cosines}>" for cosines in units)
        return f"opentq::Polar<{layout.head_dim}, {'true' if layout.side == 'k' else 'false'}, {quadrants}>"
    formats = [_run_type(run) for run in layout.runs]
    if len(formats) == 2:
        return f"opentq::Pair<{formats[0]}, {formats[1]}, {layout.head_dim}>"
    return f"opentq::Sketch<{formats[0]}, {layout.head_dim}>" if layout.sketched else formats[0]


def _run_type(run: Run) -> str:
    if run.zeroed:
        return f"opentq::Affine<{run.dim}, {run.bits}, {run.group}>"
    book = _book(run)
    magnitudes = bytes(book.entries[len(book.entries) // 2 :]).ljust(16, b"\0")
    words = ", ".join(f"0x{int.from_bytes(magnitudes[i : i + 4], 'little'):08x}u" for i in range(0, 16, 4))
    if run.bits == 1:
        words = "0x7f7f7f7fu, 0u, 0u, 0u"  # no rank to look up: all four bytes
    return f"opentq::Book<{run.dim}, {run.bits}, {words}, {round(book.step * 2**31)}>"


def _book(run: Run) -> Codebook:
    if run.book is None:
        raise ValueError(f"run {run} was read from a file's name: what its codes mean is known to its codec only")
    return run.book


@functools.cache
def pack_source(layout: MmaLayout, dtype: str, norm: bool = False) -> KernelSource:
    """Rotated vectors `[B, H, T, D]` -> records; one block of 128 threads per record of 32 tokens.

    Codebooks take the `lengths` of every run, too; `norm` is their fit.
    """
    keys = "true" if layout.side == "k" else "false"
    if layout.zeroed:
        body = f"  opentq::pack_affine<{dtype}, {format_type(layout)}, {keys}>(y, records);"
        shared = RECORD * (4 * (layout.head_dim + 1 + 2 * layout.groups) + layout.head_dim + 4)
    else:
        body = "\n".join(
            _pack_run(layout, i, f"{keys}, {'true' if norm else 'false'}", dtype) for i in range(layout.groups)
        )
        shared = RECORD * (layout.runs[0].dim + 4)
    return KernelSource(
        name=re.sub(r"\W+", "_", f"opentq_pack_{short(dtype)}_{layout.name}{'_norm' * norm}"),
        file="pack.cu",
        inputs=(("y", dtype), *((("lengths", "float"),) if not layout.zeroed else ())),
        outputs=(("records", "unsigned"),),
        scalars=(),
        body=body,
        threads=128,
        shared=shared,
    )


def _pack_run(layout: MmaLayout, i: int, flags: str, dtype: str) -> str:
    """The call that encodes run i: boundaries and step go into its text, exactly."""
    run = layout.runs[i]
    book = _book(run)
    cuts = ", ".join(f"{single(cut).hex()}f" for cut in codebooks.boundaries(book.values))
    types = f"{dtype}, {format_type(layout)}, {_run_type(run)}, {i}, {flags}"
    return (
        f"  const float cuts_{i}[] = {{{cuts}}};\n"
        f"  opentq::pack_book<{types}>(y, lengths, records, cuts_{i}, {single(book.step).hex()}f);"
    )


@functools.cache
def unpack_source(layouts: tuple[MmaLayout, ...], dtype: str) -> KernelSource:
    """Some KV heads of one sequence -> `[heads, tokens, D]` in logical order; four units of 32 tokens per block.

    `layouts`: one side, or keys and values, which are then two of the grid's z.
    """
    sides = [layout.side for layout in layouts]
    calls = []
    for z, (side, layout) in enumerate(zip(sides, layouts)):
        types = f"{format_type(layout)}, {'true' if side == 'k' else 'false'}"
        given = f"records_{side}, dense_{side}, where, {side}, blocks_{side}, heads, columns, tokens"
        calls.append(f"  if (blockIdx.z == {z}) opentq::unpack<{types}>(\n      {given});")
    inputs = [x for side in sides for x in ((f"records_{side}", "unsigned"), (f"dense_{side}", "opentq::f16"))]
    names = (*UNPACK, *(f"blocks_{side}" for side in sides), "heads", "columns", "tokens")
    return KernelSource(
        name=re.sub(r"\W+", "_", f"opentq_unpack_{short(dtype)}_{'_'.join(layout.name for layout in layouts)}"),
        file="unpack.cu",
        inputs=tuple(inputs),
        outputs=tuple((side, dtype) for side in sides),
        scalars=tuple((name, "int") for name in names),
        body="\n".join([f"  const int where[] = {{{', '.join(UNPACK)}}};", *calls]),
        threads=128,
        shared=4 * 16 * 2 * (max(layout.channels for layout in layouts) + 8),
    )


UNPACK = ("sequence", "first_head", "packed", "sink", "tail_start")


@functools.cache
def compiled(source: KernelSource) -> Kernel:
    return Kernel(source)


def pack(layout: MmaLayout, form: Format | None, y: mx.array) -> mx.array:
    """`layout.store(codec.encode(y))` on the GPU for a codec of this `packable` format: y `[B, H, T, D]`, T = 64 n."""
    batch, heads, tokens, _ = y.shape
    shape = (batch, heads, tokens // BLOCK, 2 * layout.record_words)
    records = batch * heads * tokens // RECORD
    source = pack_source(layout, CTYPES[y.dtype], isinstance(form, Codebooks) and form.fit == "norm")
    inputs = [y] if layout.zeroed else [y, _fused_lengths(layout.groups)(y)]
    return compiled(source)(inputs, [(shape, mx.uint32)], (), (records, 1, 1))[0]


@functools.cache
def _fused_lengths(runs: int) -> Callable[[mx.array], mx.array]:
    """`lengths` with its steps in as few launches as MLX makes of them."""
    return mx.compile(functools.partial(lengths, runs=runs))


Stored = tuple[MmaLayout, mx.array, mx.array]
"""One side of a cache: its layout, its records, its fp16 columns."""


def unpack(
    sides: Sequence[Stored], lens: tuple[int, int, int], b: int, heads: range, dtype: mx.Dtype
) -> list[mx.array]:
    """Keys or values of sequence `b` and some KV heads in logical order: `[1, heads, tokens, D]` of `dtype` each.

    Both sides in one launch. Of sketches, which come alone, the packed tokens, in the basis of their codes.
    """
    packed, sink, tail_start = lens
    layouts, dense = tuple(layout for layout, _, _ in sides), sides[0][2]
    columns = 0 if layouts[0].sketched else dense.shape[2]
    tokens = packed + sink + columns - tail_start
    blocks = (records.shape[2] for _, records, _ in sides)
    scalars = (b, heads.start, packed, sink, tail_start, *blocks, dense.shape[1], columns, tokens)
    units = -(-packed // RECORD) + -(-columns // RECORD)
    shapes = [((1, len(heads), tokens, layout.channels), dtype) for layout in layouts]
    kernel = compiled(unpack_source(layouts, CTYPES[dtype]))
    arrays = [array for _, *pair in sides for array in pair]
    return kernel(arrays, shapes, scalars, (-(-units // 4), len(heads), len(sides)))


@functools.cache
def rotate_source(dim: int, dtype: str) -> KernelSource:
    """Vectors of `dim` channels, rotated; four per block."""
    return KernelSource(
        name=f"opentq_rotate_{short(dtype)}_{dim}",
        file="rotate.cu",
        inputs=(("x", dtype),),
        outputs=(("y", dtype),),
        scalars=(("vectors", "int"),),
        body=f"  opentq::rotate<{dtype}, {dim}>(x, y, vectors);",
        threads=128,
        shared=0,
    )


Side = tuple[int, bool]
"""Head dim, and whether the codec rotates."""


@functools.cache
def extend_source(k: Side, v: Side, dtype: str) -> KernelSource:
    """fp16 columns of keys and of values with new vectors behind them; four columns per block."""

    def call(dim: int, rotated: bool, old: str, fresh: str, out: str) -> str:
        flag = "true" if rotated else "false"
        return f"opentq::extend<{dtype}, {dim}, {flag}>({old}, {fresh}, {out}, heads, columns, length);"

    return KernelSource(
        name=f"opentq_extend_{short(dtype)}_{k[0]}_{int(k[1])}_{v[0]}_{int(v[1])}",
        file="rotate.cu",
        inputs=(("old_k", "opentq::f16"), ("old_v", "opentq::f16"), ("keys", dtype), ("values", dtype)),
        outputs=(("dense_k", "opentq::f16"), ("dense_v", "opentq::f16")),
        scalars=(("heads", "int"), ("columns", "int"), ("length", "int")),
        body=(
            f"  if (blockIdx.y == 0) {call(*k, 'old_k', 'keys', 'dense_k')}\n"
            f"  if (blockIdx.y == 1) {call(*v, 'old_v', 'values', 'dense_v')}"
        ),
        threads=128,
        shared=0,
    )


def rotates(dim: int) -> bool:
    """Whether `rotate` serves vectors of this many channels."""
    return 32 <= dim <= 512 and not dim & (dim - 1)


def rotate(x: mx.array) -> mx.array | None:
    """`codecs.rotation.rotate` in one launch: `[..., D]` of float16, bfloat16 or float32; None where it can't serve."""
    if not rotates(x.shape[-1]) or not available():
        return None
    vectors = x.size // x.shape[-1]
    kernel = compiled(rotate_source(x.shape[-1], CTYPES[x.dtype]))
    return kernel([x], [(x.shape, x.dtype)], (vectors,), (-(-vectors // 4), 1, 1))[0]


def extend(
    k_rotated: bool, v_rotated: bool, dense: tuple[mx.array, mx.array], fresh: tuple[mx.array, mx.array]
) -> tuple[mx.array, mx.array]:
    """fp16 columns `[B, H, T, D]` of keys and values with `fresh` vectors `[B, H, L, D]` behind them, rotated."""
    batch, heads, columns, _ = dense[0].shape
    length = fresh[0].shape[2]
    k, v = ((d.shape[-1], rotated) for d, rotated in zip(dense, (k_rotated, v_rotated)))
    kernel = compiled(extend_source(k, v, CTYPES[fresh[0].dtype]))
    shapes = [((batch, heads, columns + length, dim), mx.float16) for dim, _ in (k, v)]
    blocks = -(-batch * heads * (columns + length) // 4)
    old = dense if columns else (no_halves(), no_halves())  # a kernel takes no empty array
    out = kernel([*old, *fresh], shapes, (batch * heads, columns, length), (blocks, 2, 1))
    return out[0], out[1]


@functools.cache
def no_sinks() -> mx.array:
    return mx.array([float("nan")], dtype=mx.float32)


@functools.cache
def no_lens() -> mx.array:
    """Stands for the lengths where they travel with the call."""
    return mx.zeros((1,), dtype=mx.int32)


@functools.cache
def no_halves() -> mx.array:
    """Stands for fp16 columns that do not exist, and for the center of keys that have none."""
    return mx.zeros((1,), dtype=mx.float16)


@functools.cache
def no_records() -> mx.array:
    """Stands for a packed buffer that does not exist yet."""
    return mx.zeros((1, 1, 1, 4), dtype=mx.uint32)


TICKET_RING = 256


@functools.cache
def _ticket_ring(count: int) -> Iterator[mx.array]:
    zeros = [mx.zeros((count,), dtype=mx.uint32) for _ in range(TICKET_RING)]
    mx.eval(zeros)
    return itertools.cycle(zeros)


def tickets(count: int) -> Iterator[mx.array]:
    """Arrays of `count` or more zeroed counters, one for the merge of each launch.

    A launch leaves its counters at zero, so they are never cleared. MLX may run independent kernels at the same time,
    and these arrays are written although they are inputs: taking them in turn keeps launches that could overlap apart
    (a CUDA graph of MLX holds fewer nodes than the ring has slots).
    """
    return _ticket_ring(max(1024, 1 << (count - 1).bit_length()))


@functools.cache
def multiprocessors() -> int:
    return _device_attribute(MULTIPROCESSORS)


MULTIPROCESSORS, MAJOR, MINOR = 16, 75, 76  # CUdevice_attribute; the last two are the compute capability


def _device_attribute(attribute: int) -> int:
    """`cuDeviceGetAttribute` of device 0; raises OSError without a driver, RuntimeError when it refuses."""
    driver = ctypes.CDLL("libcuda.so.1")
    value = ctypes.c_int()
    for status in (driver.cuInit(0), driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)):
        if status:
            raise RuntimeError(f"the CUDA driver answered error {status} when asked for device attribute {attribute}")
    return value.value
