"""Running kernels: `run` launches a compiled one, `metal_kernel` stands in for `mx.fast.metal_kernel`.

The stand-in asks MLX itself for the text: the real `mx.fast.metal_kernel` object is traced inside `mx.export_function`
with `verbose=True`, which prints on any machine the very source that MLX would hand to Apple's compiler.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from . import compiler, instrument, mlx_sources, rewrite


class KernelError(RuntimeError):
    """The kernel did something a GPU would punish: out of bounds, a race, divergence, too much memory."""


@dataclass
class Report:
    """What one launch did. Bytes are per buffer index; `ops` are scalar operations summed over all threads."""

    ops: Counter[str] = field(default_factory=Counter)
    unique_bytes: list[int] = field(default_factory=list)
    fetched_bytes: list[int] = field(default_factory=list)
    lane_bytes: list[int] = field(default_factory=list)
    written_bytes: list[int] = field(default_factory=list)
    unwritten_bytes: list[int] = field(default_factory=list)
    threads: int = 0
    threadgroups: int = 0
    barriers: int = 0
    simd_barriers: int = 0
    reductions: int = 0
    shuffles: int = 0
    matrix_multiplies: int = 0
    threadgroup_read: int = 0
    threadgroup_written: int = 0
    threadgroup_memory: int = 0
    allocas: list[str] = field(default_factory=list)

    def arithmetic(self) -> int:
        """All operations on data: not memory, free resizing or 64-bit address arithmetic."""
        return sum(self.ops[kind] for kind in instrument.ARITHMETIC)


TOTALS = (
    "threads",
    "threadgroups",
    "barriers",
    "simd_barriers",
    "reductions",
    "shuffles",
    "matrix_multiplies",
    "threadgroup_read",
    "threadgroup_written",
    "threadgroup_memory",
)
"""Fields of `Report` in the order of runtime.cpp's `counts`."""

launches: list[tuple[str, Report]] = []
"""Every launch of this process, in order: (kernel, report)."""


def run(
    library: compiler.Library,
    inputs: dict[int, np.ndarray],
    outputs: dict[int, np.ndarray],
    grid: Sequence[int],
    threadgroup: Sequence[int],
    order: int = 0,
) -> Report:
    """Launch over `grid` threads; `inputs` and `outputs` map buffer indices to contiguous arrays.

    `order` permutes who runs first (bit 0: simdgroups, bit 1: lanes); a correct kernel does not notice.
    Outputs are filled in. Raises KernelError.
    """
    count = max((*inputs, *outputs, *(s for s in library.slots if s >= 0))) + 1
    arrays = [outputs.get(i, inputs.get(i)) for i in range(count)]
    data = (ctypes.c_void_p * count)(*[None if a is None else a.ctypes.data for a in arrays])
    sizes = (ctypes.c_uint64 * count)(*[0 if a is None else a.nbytes for a in arrays])
    is_output = (ctypes.c_int * count)(*[int(i in outputs) for i in range(count)])
    dims = [(ctypes.c_uint32 * 3)(*v) for v in (grid, threadgroup)]
    error = ctypes.create_string_buffer(2048)
    per_buffer, totals = (ctypes.c_uint64 * (5 * count))(), (ctypes.c_uint64 * 11)()
    ctypes.memset(library.counters, 0, ctypes.sizeof(library.counters))
    failed = compiler.runtime().msl_run(
        library.entry, count, data, sizes, is_output, *dims, order, error, len(error), per_buffer, totals
    )
    if failed:
        raise KernelError(error.value.decode())
    rows = [list(per_buffer[i : 5 * count : 5]) for i in range(5)]
    report = Report(Counter(), *rows, allocas=library.allocas)
    per_block = np.array(library.blocks, dtype=np.int64).reshape(-1, len(instrument.KINDS))
    executed = np.array(library.counters[: len(per_block)], dtype=np.int64) @ per_block
    report.ops.update({kind: int(n) for kind, n in zip(instrument.KINDS, executed, strict=True) if n})
    for name, value in zip(TOTALS, totals):
        setattr(report, name, value)
    return report


def to_numpy(x: mx.array) -> np.ndarray:
    """A contiguous copy of the bits; bfloat16 comes as uint16."""
    x = mx.contiguous(x)
    return np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x, copy=True, order="C")


def row_contiguous(x: mx.array) -> bool:
    """Whether the elements lie in memory in order, without gaps (a view may begin anywhere)."""
    mx.eval(x)
    return memoryview(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x).c_contiguous


def from_numpy(x: np.ndarray, dtype: mx.Dtype) -> mx.array:
    return mx.array(x).view(mx.bfloat16) if dtype == mx.bfloat16 else mx.array(x)


_NUMPY = {
    mx.float16: np.float16,
    mx.bfloat16: np.uint16,
    mx.float32: np.float32,
    mx.uint32: np.uint32,
    mx.int32: np.int32,
}


@contextlib.contextmanager
def _captured() -> Iterator[list[str]]:
    """What C++ prints to standard output meanwhile."""
    text: list[str] = []
    sys.stdout.flush()
    with tempfile.TemporaryFile() as file:
        saved = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            yield text
        finally:
            os.dup2(saved, 1)
            os.close(saved)
            file.seek(0)
            text.append(file.read().decode())


def trace(call: Callable[..., Any], inputs: Sequence[mx.array]) -> str:
    """The source MLX generates for one call of an `mx.fast.metal_kernel` object, `call(*inputs)`, with no GPU."""
    with tempfile.TemporaryDirectory() as folder, _captured() as printed:
        mx.export_function(str(Path(folder) / "traced.mlxfn"), call, *[mx.zeros(x.shape, x.dtype) for x in inputs])
    match = printed[0].split("```\n")
    if len(match) < 2:
        raise RuntimeError(f"MLX printed no kernel source, only: {printed[0]!r}")
    return match[1]


class MetalKernel:
    """Takes the place of an `mx.fast.metal_kernel` object: the same call, executed in the emulator.

    `change` may edit the generated text before it is compiled (mutation tests).
    """

    def __init__(self, name: str, change: Callable[[str], str] | None = None, **creation: Any) -> None:
        self.name = re.sub(r"_[0-9a-f]{8}$", "", name)  # less what tells its constants
        self.creation, self.change = creation, change
        self.real = mx.fast.metal_kernel(name=name, **creation)
        self._texts: dict[Any, str] = {}
        self.order = 0

    def text(self, inputs: Sequence[mx.array], **call: Any) -> str:
        """The complete source, MLX's preamble excepted."""
        key = (
            tuple((x.dtype, x.ndim, x.size < 8) for x in inputs),
            tuple(call.get("template") or ()),
            tuple(call["output_dtypes"]),
        )
        if key not in self._texts:
            self._texts[key] = trace(lambda *xs: self.real(inputs=list(xs), verbose=True, **call), inputs)
        return self._texts[key]

    def __call__(
        self,
        *,
        inputs: Sequence[mx.array],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        template: Sequence[tuple[str, Any]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        if init_value is not None:
            raise NotImplementedError("the emulator finds reads of unwritten outputs, and has no init_value")
        inputs = [mx.array(x) for x in inputs]
        call: dict[str, Any] = {"output_shapes": output_shapes, "output_dtypes": output_dtypes}
        call |= {"grid": grid, "threadgroup": threadgroup}
        if template is not None:
            call["template"] = list(template)
        text = self.text(inputs, **call)
        if verbose:
            print(text)
        if self.change is not None:
            text = self.change(text)
        instance = rewrite.instantiation(text) or next(reversed(rewrite.kernels(text)))
        library = compiler.build(mlx_sources.preamble() + text, instance)
        parameters = rewrite.kernels(text)[instance.split("<")[0]].parameters
        mx.eval(*inputs)
        buffers: dict[int, np.ndarray] = {}
        outputs: dict[int, np.ndarray] = {}
        names, slot = self.creation["input_names"], 0
        for name, x in zip(names, inputs, strict=True):
            if not self.creation.get("ensure_row_contiguous", True) and not row_contiguous(x):
                raise KernelError(f"input '{name}' {x.shape} is strided; this kernel takes row-contiguous arrays")
            buffers[slot] = to_numpy(x)
            slot += 1
            for suffix, value in (("shape", x.shape), ("strides", _strides(x)), ("ndim", [x.ndim])):
                if any(p.split("[[")[0].rstrip().endswith(f"{name}_{suffix}") for p in parameters):
                    buffers[slot] = np.array(value, dtype=np.int64 if suffix == "strides" else np.int32)
                    slot += 1
        for shape, dtype in zip(output_shapes, output_dtypes, strict=True):
            outputs[slot] = np.full(tuple(shape), 0, dtype=_NUMPY[dtype])
            slot += 1
        report = run(library, buffers, outputs, _three(grid), _three(threadgroup), self.order)
        launches.append((self.name, report))
        return [from_numpy(a, d) for a, d in zip(outputs.values(), output_dtypes, strict=True)]


def metal_kernel(name: str, **creation: Any) -> MetalKernel:
    """Drop-in for `mx.fast.metal_kernel`."""
    return MetalKernel(name, **creation)


def _three(v: Sequence[int]) -> tuple[int, ...]:
    return tuple(v) + (1,) * (3 - len(v))


def _strides(x: mx.array) -> list[int]:
    strides, step = [], 1
    for n in reversed(x.shape):
        strides.insert(0, step)
        step *= n
    return strides


@functools.cache
def available() -> str | None:
    """None when the emulator can run here, else the reason why not."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return "the Metal emulator's fibers are written for Linux on x86-64"
    if compiler.clang() is None:
        return "the Metal emulator needs clang++ 18 or newer (apt-get install clang-19) or the ziglang wheel"
    return mlx_sources.missing()
