"""Runs a CUDA kernel on the CPU: compiles `KernelSource.emulated()` with the host's C++ compiler and calls it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np

from opentq.kernels import build
from opentq.kernels.cuda.launch import KernelSource, Scalars

HERE = Path(__file__).parent
NUMPY = {
    mx.float16: np.float16,
    mx.float32: np.float32,
    mx.bfloat16: np.uint16,
    mx.uint32: np.uint32,
    mx.int32: np.int32,
}


@functools.cache
def folder() -> Path:
    """Where kernels are compiled: the emulator is there, precompiled (GCC takes it so, Clang reads its text)."""
    place = Path(tempfile.mkdtemp(prefix="opentq-emulated-"))
    shutil.copy(HERE / "emulate.hpp", place)
    _compile("-x", "c++-header", place / "emulate.hpp", "-o", place / "emulate.hpp.gch")
    return place


def _compile(*arguments: str | Path) -> None:
    flags = ["-O1", "-std=c++20", "-fPIC", "-w"]
    subprocess.run([*build.find_compiler().command, *flags, *arguments], check=True)


@functools.cache
def compiled(source: KernelSource) -> ctypes.CDLL:
    text = source.emulated()
    name = hashlib.sha256(text.encode()).hexdigest()[:20]
    path = folder() / f"{name}.so"
    path.with_suffix(".cpp").write_text(text)
    _compile("-shared", path.with_suffix(".cpp"), "-o", path)
    return ctypes.CDLL(str(path))


def run(
    source: KernelSource,
    grid: tuple[int, int, int],
    inputs: list[mx.array],
    outputs: list[tuple[tuple, mx.Dtype]],
    scalars: Scalars = (),
) -> tuple[list[mx.array], list[np.ndarray]]:
    """Outputs, and the inputs as the kernel left them. Outputs start as NaN bytes, so that a missed element shows."""
    given = [np.array(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a) for a in inputs]
    made = [np.full(shape, 255, dtype=np.uint8).repeat(dtype.size, -1) for shape, dtype in outputs]
    made = [np.ascontiguousarray(m).view(NUMPY[dtype]) for m, (_, dtype) in zip(made, outputs)]
    arrays = given + made
    pointers = (ctypes.c_void_p * len(arrays))(*[a.ctypes.data for a in arrays])
    assert len(scalars) == len(source.scalars)
    compiled(source).run((ctypes.c_int * 3)(*grid), pointers, (ctypes.c_double * len(scalars))(*scalars))
    out = [mx.array(m).view(dtype) if dtype == mx.bfloat16 else mx.array(m) for m, (_, dtype) in zip(made, outputs)]
    return out, given
