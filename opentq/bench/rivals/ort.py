"""ONNX Runtime's GroupQueryAttention on the CPU, over float32, int8 and int4 caches (one scale per tensor).

The cache is bound as past and as present, so that nothing is copied: a call writes one token and attends.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ...errors import UserError
from . import Entry

if TYPE_CHECKING:
    from ..kernel import Problem

BITS = {"f32": 32, "int8": 8, "int4": 4}


def require() -> None:
    """Raise UserError unless onnxruntime and onnx are installed."""
    missing = [name for name in ("onnxruntime", "onnx") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--against ort needs {' and '.join(missing)}: pip install 'onnxruntime>=1.31' 'onnx>=1.17'")


def entries(dim: int) -> list[Entry]:
    """float32, int8 and int4."""
    return [Entry("ort", kv, partial(Ort, kv)) for kv in BITS]


class Ort:
    engine = "ort"
    served_by = "GroupQueryAttention"
    scratch = None

    def __init__(self, kv: str, problem: Problem, threads: int):
        import onnxruntime

        self.kv, self.problem = kv, problem
        bits = BITS[kv]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        model = _model(problem, bits)
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        (k, k_scale), (v, v_scale) = (_encode(x, bits) for x in (problem.k, problem.v))
        self.scales = k_scale, v_scale
        value = onnxruntime.OrtValue.ortvalue_from_numpy
        cache = {"key": value(k[None]), "value": value(v[None])}
        self.nbytes = k.nbytes + v.nbytes
        self.output = value(np.zeros((1, 1, problem.q_heads * problem.dim), np.float32))
        inputs = {
            "query": problem.q.reshape(1, 1, -1),
            "key": problem.k[:, -1].reshape(1, 1, -1),
            "value": problem.v[:, -1].reshape(1, 1, -1),
            "seqlens_k": np.array([problem.context - 1], np.int32),
            "total": np.array(problem.context, np.int32),
        }
        if bits < 32:
            inputs |= {"k_scale": k_scale, "v_scale": v_scale}
        self.binding = self.session.io_binding()
        for name, array in inputs.items():
            self.binding.bind_ortvalue_input(name, value(np.ascontiguousarray(array)))
        for name, array in cache.items():
            self.binding.bind_ortvalue_input(f"past_{name}", array)
        self.binding.bind_ortvalue_output("out", self.output)
        for name, array in cache.items():
            self.binding.bind_ortvalue_output(f"present_{name}", array)

    def call(self) -> np.ndarray:
        self.session.run_with_iobinding(self.binding)
        return self.output.numpy()

    def stored(self, heads: int) -> tuple[np.ndarray, np.ndarray]:
        sides = zip((self.problem.k, self.problem.v), self.scales)
        k, v = (x[:heads] if self.kv == "f32" else _codes(x[:heads], s, BITS[self.kv]) * s for x, s in sides)
        return k, v


def _model(problem: Problem, bits: int) -> bytes:
    """A graph of one GroupQueryAttention node."""
    from onnx import TensorProto, helper

    kind = {32: TensorProto.FLOAT, 8: TensorProto.INT8, 4: TensorProto.UINT8}[bits]
    info, number = helper.make_tensor_value_info, TensorProto.FLOAT
    cache = [1, problem.kv_heads, problem.context, problem.dim // 2 if bits == 4 else problem.dim]
    rows = [1, 1, problem.kv_heads * problem.dim]
    whole = [1, 1, problem.q_heads * problem.dim]
    names = ["query", "key", "value", "past_key", "past_value", "seqlens_k", "total"]
    inputs = [
        info("query", number, whole),
        info("key", number, rows),
        info("value", number, rows),
        info("past_key", kind, cache),
        info("past_value", kind, cache),
        info("seqlens_k", TensorProto.INT32, [1]),
        info("total", TensorProto.INT32, []),
    ]
    attributes: dict = {"num_heads": problem.q_heads, "kv_num_heads": problem.kv_heads, "scale": problem.scale}
    if bits < 32:
        names += ["", "", "", "", "", "k_scale", "v_scale"]
        inputs += [info("k_scale", number, [1]), info("v_scale", number, [1])]
        attributes |= {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR", "kv_cache_bit_width": bits}
    outputs = [info("out", number, whole), info("present_key", kind, cache), info("present_value", kind, cache)]
    names_out = [o.name for o in outputs]
    node = helper.make_node("GroupQueryAttention", names, names_out, domain="com.microsoft", **attributes)
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "attention", inputs, outputs)
    return helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString()


def _encode(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(stored, scale `[1]`); int4 holds two values a byte, the even one low, offset by 8."""
    if bits == 32:
        return np.ascontiguousarray(x), np.ones(1, np.float32)
    top = 2 ** (bits - 1) - 1
    scale = np.array([max(x.max(), -x.min())], np.float32) / top
    heads = []
    for head in x:  # one at a time: what this needs besides is small
        codes = _codes(head, scale, bits)
        if bits == 4:
            halves = (codes + 8).view(np.uint8)
            codes = halves[..., 0::2] | (halves[..., 1::2] << 4)
        heads.append(codes)
    return np.stack(heads), scale


def _codes(x: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """int8, the shape of x."""
    top = 2 ** (bits - 1) - 1
    codes = np.rint(x / scale)
    return np.clip(codes, -top - 1, top, out=codes).astype(np.int8)
