"""A decode step on the CPU: appended and rotated by step.cpp, attended by attend.cpp, as one operation of MLX's graph.

MLX evaluates an operation of a few hundred numbers in some ten microseconds; a step of a small model has thirty of them
in every layer, and the numbers are done in one. Where MLX's graph can't be extended (`extension.py`), every layer is
waited for.
"""

from __future__ import annotations

import ctypes
import functools
import math
from ctypes import c_int32, c_int64, c_void_p
from typing import Any

import mlx.core as mx
import numpy as np

from ...contracts.attention import AttnArgs, Lengths
from ...contracts.backend import Pair, StepFn, Stepped
from ...contracts.codec import Codec
from ...errors import explained
from .. import build, extension
from . import library as cpu
from .call import check, prepared, serves
from .outliers import CpuOutliers

MAX_DIM = 1024


class StepCall(ctypes.Structure):
    """`struct StepCall` of step.cpp."""

    _fields_ = [
        *((name, c_void_p) for name in ("q", "k", "v", "old_k", "old_v", "center", "q_out", "k_out", "v_out")),
        *((name, c_int64) for name in ("batch", "q_heads", "kv_heads", "length", "columns")),
        *((name, c_int32) for name in ("dim_k", "dim_v", "turn_k", "turn_v")),
    ]


ROOM = 64
"""Columns beyond those of a step for which its scratch has room."""

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = c_void_p, [ctypes.py_object, ctypes.c_char_p]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled step, or None where there is no compiler, which `library.available` has said."""
    try:
        lib = build.load("step", ("step.cpp",))
    except build.BuildError:
        return None
    lib.opentq_step_call_bytes.restype = c_int64
    assert lib.opentq_step_call_bytes() == ctypes.sizeof(StepCall)
    lib.opentq_append.argtypes, lib.opentq_append.restype = [c_void_p], None
    lib.opentq_turn.argtypes, lib.opentq_turn.restype = [c_void_p, c_int64, c_int64], None
    return lib


@functools.lru_cache(maxsize=64)
def turned(codec: Codec, dim: int) -> bool | None:
    """Whether the step rotates vectors of this codec; None where it does not know their basis."""
    hadamard = codec.basis == "hadamard"
    if dim > MAX_DIM or codec.basis not in ("none", "hadamard") or (hadamard and dim & (dim - 1)):
        return None
    return hadamard


class Launch:
    """Steps over packed arrays that do not change: what is the same in every step is made once.

    MLX copies what it is given, so outputs are written where those of the step before were.
    """

    def __init__(self, args: AttnArgs, turns: tuple[bool, bool]) -> None:
        batch, heads, length, dim_k = args.q.shape
        self.turns, self.dims = turns, (dim_k, args.v.head_dim)
        self.lead, self.rows = (batch, args.kv_heads), batch * heads * length
        lib = library()
        assert lib is not None
        self.append, self.turn, self.attend = lib.opentq_append, lib.opentq_turn, cpu.function("opentq_attend")
        self.graph = extension.module("graph")
        self.q = np.empty((batch, heads, length, dim_k), np.float32)
        self.out = np.empty((batch, heads, length, self.dims[1]), np.float32)
        self.step = StepCall(
            q_out=self.q.ctypes.data,
            **dict(zip(("batch", "q_heads", "kv_heads", "length"), (batch, heads, args.kv_heads, length))),
            **dict(zip(("dim_k", "dim_v", "turn_k", "turn_v"), (*self.dims, *turns))),
        )
        self.call: cpu.Call | None = None  # but for columns, lengths and sinks
        self.held: object = None  # packed arrays that it points to
        self.columns: list[np.ndarray] = []
        self.room = -1
        self.lens: tuple[Lengths, ...] = ()
        self.lengths: np.ndarray | None = None  # what the call points to
        self.least = 0  # columns that they need
        self.packed: list[mx.array] = []
        self.addresses: list[Any] = []  # of step, call, lengths and functions

    def __call__(self, args: AttnArgs, fresh: Pair, center: mx.array | None) -> Stepped:
        step, length, total = self.step, self.q.shape[2], args.dense_k.shape[2] + self.q.shape[2]
        call = self.call or self._prepared(args)
        if args.lens is not self.lens:
            check(args, length)
            self.lens, self.lengths = args.lens, _lens(args.lens)
            self.least = max(tail for _, _, tail in args.lens) + length
            self.addresses[2] = call.lens = self.lengths.ctypes.data
        if total < self.least:
            check(args, length)
        step.columns, call.columns = total - length, total
        for dense, dim in zip((call.dense_k, call.dense_v), self.dims):
            dense.token_stride, dense.head_stride, dense.batch_stride = dim, total * dim, self.lead[1] * total * dim
        arrays = [args.q, *fresh, args.dense_k, args.dense_v]
        if center is not None:
            arrays.append(center)
        if self.graph is None:
            return self._now(args, arrays, call, total)
        if args.sinks is not None:
            arrays.append(mx.contiguous(args.sinks.astype(mx.float32)))
        return self.graph.step(*self.addresses, arrays + self.packed, center is not None, args.sinks is not None)

    def _now(self, args: AttnArgs, arrays: list[mx.array], call: cpu.Call, total: int) -> Stepped:
        """The step, evaluated."""
        _evaluate(arrays)
        step = self.step
        if total > self.room:
            self._make_room(call, total + ROOM)
        views = [x.__dlpack__() for x in arrays]
        step.q, step.k, step.v, step.old_k, step.old_v, *mean = [_pointer(x, b"dltensor") for x in views]
        step.center = mean[0] if mean else None
        self.append(ctypes.byref(step))
        sinks = None if args.sinks is None else np.array(args.sinks.astype(mx.float32))
        call.sinks = None if sinks is None else sinks.ctypes.data
        self.attend(ctypes.byref(call))
        if self.turns[1]:
            self.turn(call.out, self.rows, self.dims[1])
        size = self.lead[0] * self.lead[1] * total
        k, v = (x[: size * dim].reshape(*self.lead, total, dim) for x, dim in zip(self.columns, self.dims))
        return mx.from_dlpack(self.out, copy=True), mx.from_dlpack(k, copy=True), mx.from_dlpack(v, copy=True)

    def _prepared(self, args: AttnArgs) -> cpu.Call:
        """The call but for columns, lengths and sinks."""
        self.packed = [*args.k.arrays, *args.v.arrays]
        _evaluate(self.packed)
        # Also before the first tokens are packed: the step that packs them has them in the arrays, not in its lengths.
        sides = [[cpu.rows_view(a) for a in s.arrays if a.size] for s in (args.k, args.v)]
        self.call = call = prepared(args, *sides)
        self.held = sides
        if any(view.base is None for side in sides for view in side):  # a copy, which MLX does not keep
            self.graph = None
        call.dtype, call.threads, call.out = cpu.DTYPES[mx.float32], cpu.threads(), self.out.ctypes.data
        call.q = call.projected = call.plain = cpu.Queries(*strided(self.q))
        functions = (ctypes.cast(f, c_void_p).value for f in (self.append, self.attend, self.turn))
        self.addresses = [ctypes.addressof(self.step), ctypes.addressof(call), 0, *functions]
        return call

    def _make_room(self, call: cpu.Call, columns: int) -> None:
        """Scratch for so many columns of keys and of values."""
        tokens = math.prod(self.lead) * columns
        self.columns = [np.empty(tokens * dim, np.float16) for dim in self.dims]
        self.step.k_out, self.step.v_out = (x.ctypes.data for x in self.columns)
        call.dense_k.data, call.dense_v.data = self.step.k_out, self.step.v_out
        self.room = columns


def step(args: AttnArgs, fresh: Pair, center: mx.array | None) -> StepFn | None:
    """Decode steps (`contracts.backend.Backend.step`) of float32, or None: outliers, sketches, other rotations."""
    sides, kinds = (args.k, args.v), (args.q.dtype, fresh[0].dtype, fresh[1].dtype)
    turns = tuple(turned(side.codec, side.head_dim) for side in sides)
    plain = type(args.k.codec).project is Codec.project and not any(isinstance(s.layout, CpuOutliers) for s in sides)
    served = serves(args) and args.pages is None and kinds == (mx.float32,) * 3 and args.q.shape[2] > 0
    if None in turns or not plain or not served or library() is None:
        return None
    return Launch(args, (bool(turns[0]), bool(turns[1])))


def _evaluate(arrays: list[mx.array]) -> None:
    try:
        mx.eval(arrays)
    except RuntimeError as error:  # of the model's own arithmetic before this call
        raise explained(error) or error from error


@functools.lru_cache(maxsize=64)
def _lens(lens: tuple[Lengths, ...]) -> np.ndarray:
    return np.array(lens, np.int32)


def strided(view: np.ndarray) -> tuple[int, ...]:
    """Address, and strides in elements of all axes but the last."""
    size, strides = view.itemsize, view.strides
    return view.ctypes.data, strides[0] // size, strides[1] // size, strides[2] // size
