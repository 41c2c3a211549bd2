"""MLX's own kernels, launched the way MLX's Metal back end launches them: the emulator's proof, and our baseline.

Launch geometry follows mlx/backend/metal/{scaled_dot_product_attention,softmax,hadamard,quantized}.cpp of MLX 0.32.
"""

from __future__ import annotations

import numpy as np

from . import compiler, mlx_sources
from .launch import Report, launches, run


def _launch(text, instance, inputs, outputs, grid, threadgroup, constants=()) -> Report:
    library = compiler.build(text, instance, tuple(constants))
    report = run(library, inputs, outputs, [g * t for g, t in zip(grid, threadgroup, strict=True)], threadgroup)
    launches.append((f"mlx:{instance.split('<')[0]}", report))
    return report


def _header(name: str) -> str:
    return mlx_sources.source("utils.h", name)


def _quantized() -> str:
    """quantized.h without its matrix-matrix kernels, which would pull in all of MLX's GEMM library."""
    text = mlx_sources.source("utils.h", "steel/utils.h", "quantized.h")
    cuts = [
        text.rindex("template <", 0, text.index(f"void {name}(")) for name in ("qmm_t_impl", "adjust_matrix_offsets")
    ]
    end = text.rindex("template <", 0, text.index("[[kernel]] void affine_qmv("))
    return text[: cuts[0]] + text[cuts[1] : end]


def _scalar(value, dtype) -> np.ndarray:
    return np.array([value], dtype=dtype)


def sdpa_vector(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, causal: bool = False
) -> tuple[np.ndarray, Report]:
    """One pass. `q [B, Hq, L, D]`, `k`, `v` `[B, Hkv, T, D]`, fp16 -> output and counts."""
    (batch, heads, length, dim), (kv_heads, tokens) = q.shape, k.shape[1:3]
    out = np.zeros_like(q)
    inputs = {0: q, 1: k, 2: v, 4: _scalar(heads // kv_heads, np.int32), 5: _scalar(tokens, np.int32)}
    for i, step in zip((6, 7, 8, 9), (tokens * dim, dim) * 2, strict=True):
        inputs[i] = _scalar(step, np.uint64)
    inputs[10] = _scalar(scale, np.float32)
    constants = (("do_causal", int(causal)),)
    report = _launch(
        _header("sdpa_vector.h"),
        f"sdpa_vector<half, {dim}>",
        inputs,
        {3: out},
        (batch * heads, length, 1),
        (1024, 1, 1),
        constants,
    )
    return out, report


def sdpa_2pass(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, blocks: int, gqa_variant: bool
) -> tuple[np.ndarray, Report, Report]:
    """Two passes for one query token; `gqa_variant` takes the kernel in which a simdgroup serves four query heads."""
    (batch, heads, length, dim), (kv_heads, tokens) = q.shape, k.shape[1:3]
    ratio = heads // kv_heads
    partial = np.zeros((batch, heads, length, blocks, dim), np.float16)
    sums, maxs = (np.zeros((batch, heads, length, blocks), np.float32) for _ in range(2))
    inputs = {0: q, 1: k, 2: v, 7: _scalar(tokens, np.int32), 12: _scalar(scale, np.float32)}
    for i, step in zip((8, 9, 10, 11), (tokens * dim, dim) * 2, strict=True):
        inputs[i] = _scalar(step, np.uint64)
    instance = (
        f"sdpa_vector_2pass_1_gqa<half, {dim}, {dim}, {ratio}, 4>"
        if gqa_variant
        else f"sdpa_vector_2pass_1<half, {dim}>"
    )
    threadgroup = (32, ratio, 1 if gqa_variant else length)
    first = _launch(
        _header("sdpa_vector.h"),
        instance,
        inputs,
        {3: partial, 4: sums, 5: maxs},
        (kv_heads, batch, blocks),
        threadgroup,
        (("blocks", blocks),),
    )
    out = np.zeros_like(q)
    second = _launch(
        _header("sdpa_vector.h"),
        f"sdpa_vector_2pass_2<half, {dim}>",
        {0: partial, 1: sums, 2: maxs, 4: _scalar(blocks, np.int32)},
        {3: out},
        (batch * heads, length, 1),
        (1024, 1, 1),
    )
    return out, first, second


def softmax(x: np.ndarray, looped: bool) -> np.ndarray:
    """Rows of a float32 matrix."""
    rows, size = x.shape
    out = np.zeros_like(x)
    threads = 1024 if looped else (-(-size // 4) + 31) // 32 * 32
    name = "softmax_looped" if looped else "softmax_single_row"
    inputs = {0: x, 2: _scalar(size, np.int32)}
    _launch(_header("softmax.h"), f"{name}<float, float, 4>", inputs, {1: out}, (rows, 1, 1), (threads, 1, 1))
    return out


def hadamard(x: np.ndarray, scale: float) -> np.ndarray:
    """Rows of a float32 matrix whose width is a power of two of at least 16."""
    rows, size = x.shape
    out = np.zeros_like(x)
    inputs = {0: x, 2: _scalar(scale, np.float32)}
    _launch(
        _header("hadamard.h"), f"hadamard_n<float, {size}, 16, 4>", inputs, {1: out}, (1, rows, 1), (size // 16, 1, 1)
    )
    return out


def qmv_fast(w: np.ndarray, scales: np.ndarray, biases: np.ndarray, x: np.ndarray, group: int, bits: int) -> np.ndarray:
    """Quantised matrix times one vector: `w` packed `[N, K*bits/32]`, `x [K]` fp16 -> `[N]` fp16."""
    rows = w.shape[0]
    out = np.zeros(rows, np.float16)
    inputs = {0: w, 1: scales, 2: biases, 3: x, 5: _scalar(x.shape[0], np.int32), 6: _scalar(rows, np.int32)}
    inputs |= {i: np.zeros(1, np.int64 if i in (9, 12, 13, 14) else np.int32) for i in range(7, 15)}
    _launch(
        _quantized(), f"affine_qmv_fast<half, {group}, {bits}, false>", inputs, {4: out}, (1, rows // 8, 1), (32, 2, 1)
    )
    return out
