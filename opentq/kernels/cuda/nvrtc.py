"""CUDA C++ to machine code: by NVRTC, which comes with MLX, once per source and card, kept in the user's cache folder.

MLX would compile its own kernels anew in every process. Compiled here, a kernel costs its second once, carries its own
signature and launch bounds, and runs through `mx.fast.precompiled_cuda_kernel`. MLX hashes the code in every
evaluation, some .2 ns a byte: nvFatbin makes a third of it or less.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .. import build, kept

log = logging.getLogger("opentq")

COMPILER = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")
COMPRESSOR = ("libnvfatbin.so.13", "libnvfatbin.so.12", "libnvfatbin.so")


class CompileError(RuntimeError):
    """NVRTC refuses a kernel, or is not there; the message says which, and what it said."""


def cubin(name: str, source: str, architecture: str) -> bytes:
    """Machine code of `source` for `architecture` ("sm_90"), from the cache where it is known. Raises CompileError."""
    compressor, options = _nvfatbin(), compression()
    key = f"{architecture}\0{version()}\0{compressor and options}\0{source}"
    key = hashlib.sha256(key.encode()).hexdigest()[:20]
    path = build.cache_folder() / f"{name}-{architecture}-{key}.cubin"
    if kept.whole(path):
        return path.read_bytes()
    code = compile_source(name, source, architecture)
    if compressor:
        try:
            code = compress(compressor, code, architecture, options)
        except CompileError as error:
            log.warning("%s is not compressed, so every call of it costs more: %s", name, error)
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


def compression() -> list[bytes]:
    """nvFatbin's options; drivers for CUDA 12 may not read what is smallest."""
    return [b"-compress-all"] + [b"-compress-mode=size"] * (int(version().partition(".")[0]) >= 13)


def compress(compressor: ctypes.CDLL, code: bytes, architecture: str, options: list[bytes]) -> bytes:
    """`code` as a compressed fat binary, which the driver loads as well. Raises CompileError."""
    handle, size = ctypes.c_void_p(), ctypes.c_size_t()

    def call(name: str, *arguments: object) -> None:
        if status := getattr(compressor, name)(*arguments):
            raise CompileError(f"{name} answered error {status}")

    call(
        "nvFatbinCreate",
        ctypes.byref(handle),
        (ctypes.c_char_p * len(options))(*options),
        ctypes.c_size_t(len(options)),
    )
    try:
        number = architecture.removeprefix("sm_").encode()
        call("nvFatbinAddCubin", handle, code, ctypes.c_size_t(len(code)), number, b"opentq")
        call("nvFatbinSize", handle, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        call("nvFatbinGet", handle, buffer)
        return buffer.raw
    finally:
        compressor.nvFatbinDestroy(ctypes.byref(handle))


@functools.cache
def version() -> str:
    """NVRTC's version, as "13.0"."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"{major.value}.{minor.value}"


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    library = _library(COMPILER)  # MLX has loaded it, so its name alone finds it
    if library is None:
        raise CompileError(f"NVRTC is not installed ({', '.join(COMPILER)} not found): install nvidia-cuda-nvrtc")
    return library


@functools.cache
def _nvfatbin() -> ctypes.CDLL | None:
    """None where it is not installed: kernels are then passed on as they are."""
    folders = [Path(folder) / "lib" for package in ("nvidia.cu13", "nvidia.nvfatbin") for folder in _folders(package)]
    return _library([str(folder / name) for folder in folders for name in COMPRESSOR] + list(COMPRESSOR))


def _folders(package: str) -> list[str]:
    """Where an installed package lies."""
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # of the package above
        return []
    return list(spec.submodule_search_locations or []) if spec else []


def _library(names: Sequence[str]) -> ctypes.CDLL | None:
    for name in names:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    return None


def _text(program: ctypes.c_void_p, size_call: str, call: str) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(_nvrtc(), size_call)(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(_nvrtc(), call)(program, buffer))
    return buffer.raw


def _check(status: int) -> None:
    if status:
        raise CompileError(f"NVRTC answered error {status}")
