"""CUDA C++ to machine code: by NVRTC, which comes with MLX, once per source and card, kept in the user's cache folder.

MLX would compile its own kernels anew in every process. Compiled here, a kernel costs its second once, carries its own
signature and launch bounds, and runs through `mx.fast.precompiled_cuda_kernel`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import tempfile
from pathlib import Path

from .. import build, kept

LIBRARIES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


class CompileError(RuntimeError):
    """NVRTC refuses a kernel, or is not there; the message says which, and what it said."""


def cubin(name: str, source: str, architecture: str) -> bytes:
    """Machine code of `source` for `architecture` ("sm_90"), from the cache where it is known. Raises CompileError."""
    key = hashlib.sha256(f"{architecture}\0{version()}\0{source}".encode()).hexdigest()[:20]
    path = build.cache_folder() / f"{name}-{architecture}-{key}.cubin"
    if kept.whole(path):
        return path.read_bytes()
    code = compile_source(name, source, architecture)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".build-", delete=False) as file:
        file.write(code)
    kept.seal(Path(file.name), path)  # in one step: several processes may compile at once
    return code


def compile_source(name: str, source: str, architecture: str) -> bytes:
    """NVRTC's work alone. Raises CompileError with the compiler's own words."""
    program = ctypes.c_void_p()
    _check(_nvrtc().nvrtcCreateProgram(ctypes.byref(program), source.encode(), f"{name}.cu".encode(), 0, None, None))
    try:
        flags = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
        status = _nvrtc().nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags))
        if status:
            said = _text(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog").decode(errors="replace")
            raise CompileError(f"NVRTC could not compile {name} for {architecture}:\n{said[:4000]}")
        return _text(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN")
    finally:
        _nvrtc().nvrtcDestroyProgram(ctypes.byref(program))


@functools.cache
def version() -> str:
    """NVRTC's version, as "13.0"."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"{major.value}.{minor.value}"


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    for name in LIBRARIES:  # MLX has loaded it, so its name alone finds it
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    raise CompileError(f"NVRTC is not installed ({', '.join(LIBRARIES)} not found): install nvidia-cuda-nvrtc")


def _text(program: ctypes.c_void_p, size_call: str, call: str) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(_nvrtc(), size_call)(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(_nvrtc(), call)(program, buffer))
    return buffer.raw


def _check(status: int) -> None:
    if status:
        raise CompileError(f"NVRTC answered error {status}")
