"""A decode step on the CPU: appended and rotated by step.cpp, attended by attend.cpp, with one evaluation in between.

MLX evaluates an operation of a few hundred numbers in some ten microseconds; a step of a small model has thirty of them
in every layer, and the numbers are done in one.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_int32, c_int64, c_void_p

import mlx.core as mx
import numpy as np

from ...contracts.attention import AttnArgs, Lengths
from ...contracts.backend import Pair
from ...contracts.codec import Codec
from .. import build
from . import library as cpu

MAX_DIM = 1024

Stepped = tuple[mx.array, mx.array, mx.array]


class StepCall(ctypes.Structure):
    """`struct StepCall` of step.cpp; strides in elements."""

    _fields_ = [
        *((name, cpu.Queries) for name in "qkv"),
        *((name, cpu.Dense) for name in ("old_k", "old_v")),
        *((name, c_void_p) for name in ("center", "q_out", "k_out", "v_out")),
        *((name, c_int64) for name in ("batch", "q_heads", "kv_heads", "length", "columns")),
        *((name, c_int32) for name in ("dim_k", "dim_v", "turn_k", "turn_v")),
    ]


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

    `call` is the attention's call, complete but for queries, columns, lengths and output.
    """

    def __init__(self, args: AttnArgs, call: cpu.Call, held: object, turns: tuple[bool, bool]) -> None:
        self.values, self.call, self.held, self.turns = args.v, call, held, turns
        self.shape = args.q.shape
        self.append: Callable[[object], None] = library().opentq_append  # type: ignore[union-attr]

    def __call__(self, args: AttnArgs, fresh: Pair, center: mx.array | None) -> Stepped:
        keys, values = fresh
        batch, heads, length, dim_k = self.shape
        columns, kv_heads, dim_v = args.dense_k.shape[2], args.dense_k.shape[1], self.call.dim_v
        q = np.empty(self.shape, np.float32)
        k = np.empty((batch, kv_heads, columns + length, dim_k), np.float16)
        v = np.empty((batch, kv_heads, columns + length, dim_v), np.float16)
        out = np.empty((batch, heads, length, dim_v), np.float32)
        old = [cpu.rows_view(x) for x in (args.dense_k, args.dense_v)]
        new = [cpu.rows_view(x) for x in (args.q, keys, values)]
        mean = None if center is None else np.ascontiguousarray(cpu.view(center))
        step = StepCall(
            *(cpu.Queries(*strided(x)) for x in new),
            *(cpu.Dense(*strided(x)) for x in old),
            None if mean is None else mean.ctypes.data,
            q.ctypes.data,
            k.ctypes.data,
            v.ctypes.data,
            batch,
            heads,
            kv_heads,
            length,
            columns,
            dim_k,
            dim_v,
            *self.turns,
        )
        self.append(ctypes.addressof(step))
        call = self.call
        call.columns = columns + length
        call.q = call.projected = call.plain = cpu.Queries(*strided(q))
        call.dense_k, call.dense_v = cpu.Dense(*strided(k)), cpu.Dense(*strided(v))
        lens = _lens(args.lens)
        sinks = None if args.sinks is None else np.array(args.sinks.astype(mx.float32))
        call.lens, call.sinks = lens.ctypes.data, None if sinks is None else sinks.ctypes.data
        call.out, call.threads = out.ctypes.data, cpu.threads()
        cpu.call("opentq_attend", call)
        if self.turns[1]:
            library().opentq_turn(out.ctypes.data, batch * heads * length, dim_v)  # type: ignore[union-attr]
        return mx.array(out), mx.array(k), mx.array(v)


@functools.lru_cache(maxsize=64)
def _lens(lens: tuple[Lengths, ...]) -> np.ndarray:
    return np.array(lens, np.int32)


def strided(view: np.ndarray) -> tuple[int, ...]:
    """Address, and strides in elements of all axes but the last."""
    size, strides = view.itemsize, view.strides
    return view.ctypes.data, strides[0] // size, strides[1] // size, strides[2] // size
