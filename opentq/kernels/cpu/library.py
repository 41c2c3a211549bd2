"""The CPU kernels behind ctypes: one shared library, five calls, and how many threads they may use.

Pointers are taken from evaluated arrays and only live as long as one call. Strides go with them, so sliced and
over-allocated buffers are read where they lie.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from ctypes import c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass

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


class Packed(ctypes.Structure):
    """`struct Packed` of abi.h: strides in bytes."""

    _fields_ = [
        ("data", c_void_p),
        ("batch_stride", c_int64),
        ("head_stride", c_int64),
        ("block_stride", c_int64),
        ("bits", c_int32),
        ("group", c_int32),
        ("dim", c_int32),
        ("form", c_int32),
        ("book", c_void_p),
        ("step", c_float),
        ("pad", c_int32),
    ]


class Strided(ctypes.Structure):
    """`struct Strided` of abi.h: strides in bytes."""

    _fields_ = [
        ("data", c_void_p),
        ("batch_stride", c_int64),
        ("head_stride", c_int64),
        ("block_stride", c_int64),
        ("token_stride", c_int64),
    ]


class Outliers(ctypes.Structure):
    """`struct Outliers` of abi.h."""

    _fields_ = [("channels", Strided), ("values", Strided), ("count", c_int32), ("width", c_int32)]


class Dense(ctypes.Structure):
    """`struct Dense` of abi.h: strides in elements."""

    _fields_ = [("data", c_void_p), ("batch_stride", c_int64), ("head_stride", c_int64), ("token_stride", c_int64)]


class Queries(ctypes.Structure):
    """`struct Queries` of abi.h: strides in elements."""

    _fields_ = [("data", c_void_p), ("batch_stride", c_int64), ("head_stride", c_int64), ("row_stride", c_int64)]


class Call(ctypes.Structure):
    """`struct Call` of abi.h."""

    _fields_ = [
        ("batch", c_int64),
        ("kv_heads", c_int64),
        ("gqa", c_int64),
        ("length", c_int64),
        ("columns", c_int64),
        ("q", Queries),
        ("projected", Queries),
        ("plain", Queries),
        ("dtype", c_int32),
        ("causal", c_int32),
        ("dim_k", c_int32),
        ("dim_v", c_int32),
        ("k", Packed * 2),
        ("v", Packed * 2),
        ("k_outliers", Outliers),
        ("v_outliers", Outliers),
        ("dense_k", Dense),
        ("dense_v", Dense),
        ("lens", c_void_p),
        ("sinks", c_void_p),
        ("out", c_void_p),
        ("scale", c_float),
        ("softcap", c_float),
        ("window", c_int64),
        ("pages", c_void_p),
        ("page_count", c_int64),
        ("threads", c_int32),
        ("pad", c_int32),
    ]


class PageCall(ctypes.Structure):
    """`struct PageCall` of abi.h."""

    _fields_ = [
        ("sketches", c_void_p),
        ("batch_stride", c_int64),
        ("head_stride", c_int64),
        ("page_stride", c_int64),
        ("queries", c_void_p),
        ("packed", c_void_p),
        ("out", c_void_p),
        ("batch", c_int64),
        ("kv_heads", c_int64),
        ("rows", c_int64),
        ("channels", c_int64),
        ("dim", c_int64),
        ("count", c_int64),
        ("threads", c_int32),
        ("pad", c_int32),
    ]


class Format(ctypes.Structure):
    """`struct Format` of abi.h."""

    _fields_ = [
        ("bits", c_int32),
        ("group", c_int32),
        ("dim", c_int32),
        ("is_values", c_int32),
        ("form", c_int32),
        ("norm", c_int32),
        ("cuts", c_void_p),
        ("book", c_void_p),
        ("step", c_float),
        ("pad", c_int32),
    ]


class Grid(ctypes.Structure):
    """`struct Grid` of abi.h."""

    _fields_ = [
        ("batch", c_int64),
        ("heads", c_int64),
        ("blocks", c_int64),
        ("batch_stride", c_int64),
        ("head_stride", c_int64),
        ("token_stride", c_int64),
        ("dtype", c_int32),
        ("threads", c_int32),
    ]


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
        function.argtypes, function.restype = [c_void_p] * arguments, c_int
    return lib, ""


def call(name: str, *arguments: ctypes.Structure | int | None) -> None:
    """Run one kernel: structures go by reference, integers are addresses. Raises MemoryError."""
    pointers = [ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in arguments]
    if getattr(library(), name)(*pointers):
        raise MemoryError(f"{name}: not enough memory for the scratch of {threads()} threads")


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
