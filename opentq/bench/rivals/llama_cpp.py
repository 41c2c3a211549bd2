"""llama.cpp's CPU flash attention (`ggml_flash_attn_ext`), called through ctypes on the libraries of llama-cpp-python.

Tensors are filled in ggml's own formats: f16, q8_0 and q4_0 keys and values. One graph with one node is planned once
and computed by a thread pool that stays, as in llama.cpp's own loop, so a call pays for attention and nothing else.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...errors import UserError
from . import Entry

if TYPE_CHECKING:
    from ..kernel import Problem

F32, F16, Q4_0, Q8_0 = 0, 1, 2, 8
TYPES = {"f16": F16, "q8_0": Q8_0, "q4_0": Q4_0}
BLOCK = 32
MAX_THREADS = 512


class InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class GraphPlan(ctypes.Structure):
    _fields_ = (
        ("work_size", ctypes.c_size_t),
        ("work_data", ctypes.c_void_p),
        ("n_threads", ctypes.c_int),
        ("threadpool", ctypes.c_void_p),
        ("abort_callback", ctypes.c_void_p),
        ("abort_callback_data", ctypes.c_void_p),
        ("use_ref", ctypes.c_bool),
    )


class PoolParams(ctypes.Structure):
    _fields_ = (
        ("cpumask", ctypes.c_bool * MAX_THREADS),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool),
        ("paused", ctypes.c_bool),
    )


def require() -> None:
    """Raise UserError unless the libraries of llama-cpp-python are there."""
    if _folder() is None:
        raise UserError("--against llama.cpp needs its libraries: pip install 'llama-cpp-python>=0.3.36,<0.4'")


def _folder() -> Path | None:
    found = importlib.util.find_spec("llama_cpp")
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(found.submodule_search_locations[0]) / "lib"
    return folder if any(folder.glob("libggml-base.*")) else None


class Library:
    """The functions that are called, with their types."""

    def __init__(self, folder: Path):
        suffix = next(folder.glob("libggml-base.*")).suffix.replace(".0", ".so")
        base = ctypes.CDLL(str(folder / f"libggml-base{suffix}"), ctypes.RTLD_GLOBAL)
        self.cpu = ctypes.CDLL(str(folder / f"libggml-cpu{suffix}"), ctypes.RTLD_GLOBAL)
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self.init = self._typed(base.ggml_init, pointer, InitParams)
        self.free = self._typed(base.ggml_free, None, pointer)
        self.tensor = self._typed(base.ggml_new_tensor_4d, pointer, pointer, ctypes.c_int, *(ctypes.c_int64,) * 4)
        self.data = self._typed(base.ggml_get_data, pointer, pointer)
        self.row_size = self._typed(base.ggml_row_size, size, ctypes.c_int, ctypes.c_int64)
        self.attend = self._typed(base.ggml_flash_attn_ext, pointer, *(pointer,) * 5, *(ctypes.c_float,) * 3)
        self.graph = self._typed(base.ggml_new_graph, pointer, pointer)
        self.expand = self._typed(base.ggml_build_forward_expand, None, pointer, pointer)
        self.quantize = self._typed(
            base.ggml_quantize_chunk, size, ctypes.c_int, pointer, pointer, *(ctypes.c_int64,) * 3, pointer
        )
        self.pool_init = self._typed(base.ggml_threadpool_params_init, None, ctypes.POINTER(PoolParams), ctypes.c_int)
        self.pool = self._typed(self.cpu.ggml_threadpool_new, pointer, ctypes.POINTER(PoolParams))
        self.pool_free = self._typed(self.cpu.ggml_threadpool_free, None, pointer)
        self.plan = self._typed(self.cpu.ggml_graph_plan, GraphPlan, pointer, ctypes.c_int, pointer)
        self.compute = self._typed(self.cpu.ggml_graph_compute, ctypes.c_int, pointer, ctypes.POINTER(GraphPlan))
        self.cpu.ggml_cpu_init()

    @staticmethod
    def _typed(function, result, *arguments):
        function.restype, function.argtypes = result, arguments
        return function


@functools.cache
def library() -> Library:
    folder = _folder()
    assert folder is not None
    return Library(folder)


def entries(dim: int) -> list[Entry]:
    """f16, q8_0 and q4_0 for keys and values alike."""
    if dim % BLOCK:
        raise UserError(f"--against llama.cpp: its q8_0 and q4_0 need a head dim that {BLOCK} divides, not {dim}")
    return [Entry("llama.cpp", kv, partial(Ggml, kv)) for kv in TYPES]


class Ggml:
    engine = "llama.cpp"
    served_by = "ggml_flash_attn_ext"

    def __init__(self, kv: str, problem: Problem, threads: int):
        self.kv, self.problem = kv, problem
        lib = self.lib = library()
        row = lib.row_size(TYPES[kv], problem.dim)
        rows = problem.kv_heads * problem.context
        room = 2 * rows * row + 8 * problem.q_heads * problem.dim + (4 << 20)
        self.context = lib.init(InitParams(room, None, False))
        q = lib.tensor(self.context, F32, problem.dim, 1, problem.q_heads, 1)
        ctypes.memmove(lib.data(q), np.ascontiguousarray(problem.q).ctypes.data, 4 * problem.q.size)
        shape = (problem.dim, problem.context, problem.kv_heads, 1)
        k, v = (lib.tensor(self.context, TYPES[kv], *shape) for _ in range(2))
        self.rows = [self._fill(t, x, row) for t, x in ((k, problem.k), (v, problem.v))]
        self.out = lib.attend(self.context, q, k, v, None, problem.scale, 0.0, 0.0)
        self.graph = lib.graph(self.context)
        lib.expand(self.graph, self.out)
        params = PoolParams()
        lib.pool_init(ctypes.byref(params), threads)
        self.pool = lib.pool(ctypes.byref(params))
        self.plan = lib.plan(self.graph, threads, self.pool)
        self.work = ctypes.create_string_buffer(max(1, self.plan.work_size))
        self.plan.work_data = ctypes.addressof(self.work)
        self.scratch = self.plan.work_size
        self.nbytes = 2 * rows * row

    def _fill(self, tensor: int, x: np.ndarray, row: int) -> np.ndarray:
        """Write `x [Hkv, N, D]` into a tensor in its own format; returns a view of its bytes `[Hkv * N, row]`."""
        x = np.ascontiguousarray(x)
        rows = x.shape[0] * x.shape[1]
        view = np.ctypeslib.as_array((ctypes.c_uint8 * (rows * row)).from_address(self.lib.data(tensor)))
        if self.kv == "f16":
            view[:] = x.astype(np.float16).reshape(-1).view(np.uint8)
        else:
            self.lib.quantize(TYPES[self.kv], x.ctypes.data, view.ctypes.data, 0, rows, x.shape[2], None)
        return view.reshape(rows, row)

    def call(self) -> np.ndarray:
        status = self.lib.compute(self.graph, ctypes.byref(self.plan))
        if status:
            raise RuntimeError(f"ggml_graph_compute failed with status {status}")
        count = self.problem.q_heads * self.problem.dim
        return np.ctypeslib.as_array((ctypes.c_float * count).from_address(self.lib.data(self.out)))

    def stored(self, heads: int) -> tuple[np.ndarray, np.ndarray]:
        p = self.problem
        k, v = (DECODE[self.kv](r[: heads * p.context]).reshape(heads, p.context, p.dim) for r in self.rows)
        return k, v

    def __del__(self) -> None:
        if hasattr(self, "pool"):
            self.lib.pool_free(self.pool)
            self.lib.free(self.context)


def _f16(rows: np.ndarray) -> np.ndarray:
    return rows.view(np.float16).astype(np.float32)


def _q8_0(rows: np.ndarray) -> np.ndarray:
    """Blocks of 32: an fp16 scale, then 32 signed bytes."""
    blocks = rows.reshape(rows.shape[0], -1, 2 + BLOCK)
    scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float32)
    return (np.ascontiguousarray(blocks[..., 2:]).view(np.int8) * scale).reshape(rows.shape[0], -1)


def _q4_0(rows: np.ndarray) -> np.ndarray:
    """Blocks of 32: an fp16 scale, then 16 bytes whose low nibbles are the first half, offset by 8."""
    blocks = rows.reshape(rows.shape[0], -1, 2 + BLOCK // 2)
    scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float32)
    codes = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=-1).astype(np.float32) - 8
    return (codes * scale).reshape(rows.shape[0], -1)


DECODE = {"f16": _f16, "q8_0": _q8_0, "q4_0": _q4_0}
