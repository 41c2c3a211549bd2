"""The CPU kernels behind ctypes: one shared library, five calls, and how many threads they may use.

What is handed over are the structures of `kernels/cpu/abi.h`, read from that file.

Pointers are taken from evaluated arrays and only live as long as one call. Strides go with them, so sliced and
over-allocated buffers are read where they lie.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import re
from ctypes import c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ...machine import threads
from .. import build

log = logging.getLogger("opentq")

KINDS = (*((bits, 0) for bits in (2, 3, 4, 8)), *((bits, 1) for bits in range(1, 7)))
"""Widths of codes, and whether they are looked up in a codebook."""
SOURCES = (
    "attend.cpp",
    "pack.cpp",
    "pages.cpp",
    *(f"products.cpp -DOPENTQ_BITS={bits} -DOPENTQ_LOOKUP={lookup}" for bits, lookup in KINDS),
)
AFFINE, BOOK, RAW, POLAR = range(4)
DTYPES = {mx.float32: 0, mx.float16: 1, mx.bfloat16: 2}


TYPES = {"int32_t": c_int32, "int64_t": c_int64, "float": c_float}


@functools.cache
def _structures() -> dict[str, str]:
    """The bodies of the structures of abi.h, by name: the one place that says what crosses the border."""
    return dict(re.findall(r"struct (\w+) \{(.*?)\n\};", (build.HERE / "abi.h").read_text(), flags=re.S))


def _fields(name: str) -> list[tuple[str, Any]]:
    """A structure's fields in order; pointers are addresses, and structures in it those of this file."""
    found: list[tuple[str, Any]] = []
    for kind, names in re.findall(r"^  (?:const )?(\w+\*?) ([^(;]+);", _structures()[name], flags=re.M):
        base: Any = c_void_p if kind.endswith("*") else TYPES.get(kind) or globals()[kind]
        for field, count in re.findall(r"(\w+)(?:\[(\d+)\])?", names):
            found.append((field, base * int(count) if count else base))
    return found


class Packed(ctypes.Structure):
    """Stored keys or values."""

    _fields_ = _fields("Packed")


class Strided(ctypes.Structure):
    """Rows of tokens, with the strides of each axis."""

    _fields_ = _fields("Strided")


class Outliers(ctypes.Structure):
    """Outlier channels of tokens, and their values."""

    _fields_ = _fields("Outliers")


class Dense(ctypes.Structure):
    """fp16 columns."""

    _fields_ = _fields("Dense")


class Queries(ctypes.Structure):
    """Queries in one basis."""

    _fields_ = _fields("Queries")


class Call(ctypes.Structure):
    """One attention call."""

    _fields_ = _fields("Call")


class PageCall(ctypes.Structure):
    """One choice of pages."""

    _fields_ = _fields("PageCall")


class Format(ctypes.Structure):
    """What one packed token is made of."""

    _fields_ = _fields("Format")


class Grid(ctypes.Structure):
    """Blocks, and where the strided side of a copy lies."""

    _fields_ = _fields("Grid")


@dataclass(frozen=True)
class Status:
    """What `opentq doctor` says about the CPU kernels: the instructions they use, or why there are none."""

    isa: str = ""
    compiler: str = ""
    path: str = ""
    error: str = ""


def library() -> ctypes.CDLL:
    """The compiled kernels. Raises build.BuildError."""
    lib, error = _load()
    if lib is None:
        raise build.BuildError(error)
    return lib


def available() -> bool:
    """Whether the kernels can run here; compiles them on the first question, and warns once when that fails."""
    return _load()[0] is not None


def status() -> Status:
    lib, error = _load()
    if lib is None:
        return Status(error=error)
    return Status(lib.opentq_isa().decode(), build.find_compiler().version(), lib._name)


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    try:
        lib = build.load("kernels", SOURCES)
    except build.BuildError as error:
        log.warning("CPU kernels are not available, the portable path serves: %s", error)
        return None, str(error)
    lib.opentq_isa.restype = c_char_p
    lib.opentq_call_bytes.restype = c_int64
    assert lib.opentq_call_bytes() == ctypes.sizeof(Call)
    lib.opentq_page_call_bytes.restype = c_int64
    assert lib.opentq_page_call_bytes() == ctypes.sizeof(PageCall)
    for name, arguments in (("attend", 1), ("pack", 5), ("pages", 1), ("store", 5), ("load", 5)):
        function = getattr(lib, f"opentq_{name}")
        function.argtypes, function.restype, function.errcheck = [c_void_p] * arguments, c_int, _checked
    return lib, ""


def call(name: str, *arguments: ctypes.Structure | int | None) -> None:
    """Run one kernel: structures go by reference, integers are addresses. Raises MemoryError."""
    function(name)(*[ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in arguments])


def function(name: str) -> Any:
    """One kernel. It raises MemoryError."""
    return getattr(library(), name)


def _checked(status: int, called: Any, _: Any) -> None:
    if status:
        raise MemoryError(f"{called.__name__}: not enough memory for the scratch of {threads()} threads")


def view(x: mx.array) -> np.ndarray:
    """An evaluated array's memory as numpy, without a copy; bfloat16 appears as uint16."""
    if x.dtype == mx.bfloat16:
        x = x.view(mx.uint16)
    return np.array(x, copy=False)


def rows_view(x: mx.array) -> np.ndarray:
    """`view`, with contiguous last axis (copied only where it isn't)."""
    found = view(x)
    if found.shape[-1] > 1 and found.strides[-1] != found.itemsize:
        found = np.ascontiguousarray(found)
    return found
