"""The emulator's own proof: MLX's kernels agree with MLX, and kernels that are known to be wrong are caught."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from . import compiler, launch, native
from .harness import needs_emulator

pytestmark = needs_emulator


# ---- the emulator on kernels that are known to run on Apple GPUs

RNG = np.random.default_rng(7)


def halves(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) * 0.5).astype(np.float16)


def mlx_attention(q, k, v, scale, mask=None):
    return np.array(
        mx.fast.scaled_dot_product_attention(
            *(mx.array(x.astype(np.float32)) for x in (q, k, v)), scale=scale, mask=mask
        )
    )


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_mlx_sdpa_vector_agrees_with_mlx(dim, causal):
    q, k, v = halves(2, 4, 3, dim), halves(2, 2, 70, dim), halves(2, 2, 70, dim)
    out, _ = native.sdpa_vector(q, k, v, dim**-0.5, causal)
    assert np.abs(out - mlx_attention(q, k, v, dim**-0.5, "causal" if causal else None)).max() < 1e-3


@pytest.mark.parametrize("gqa_variant", [False, True])
def test_mlx_two_pass_sdpa_agrees_with_mlx(gqa_variant):
    q, k, v = halves(1, 16, 1, 64), halves(1, 2, 130, 64), halves(1, 2, 130, 64)
    out, first, _ = native.sdpa_2pass(q, k, v, 0.125, 32, gqa_variant)
    assert np.abs(out - mlx_attention(q, k, v, 0.125)).max() < 1e-3
    # What the source says of itself: every K/V byte 8 / HPT = 2 times, or once per query head.
    assert first.fetched_bytes[1] == (2 if gqa_variant else 8) * k.nbytes == first.fetched_bytes[2]


@pytest.mark.parametrize("looped", [False, True])
def test_mlx_softmax_agrees_with_mlx(looped):
    x = RNG.standard_normal((3, 200)).astype(np.float32)
    assert np.abs(native.softmax(x, looped) - np.array(mx.softmax(mx.array(x), axis=-1))).max() < 1e-6


@pytest.mark.parametrize("size", [64, 128, 512])
def test_mlx_hadamard_agrees_with_mlx(size):
    x = RNG.standard_normal((2, size)).astype(np.float32)
    assert np.abs(native.hadamard(x, size**-0.5) - np.array(mx.hadamard_transform(mx.array(x)))).max() < 1e-5


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mlx_quantized_matvec_agrees_with_mlx(bits):
    w, scales, biases = mx.quantize(mx.array(halves(16, 512)), 64, bits)
    x = halves(512)
    wide = [a.astype(mx.float32) for a in (mx.array(x)[None], scales, biases)]
    expected = np.array(mx.quantized_matmul(wide[0], w, wide[1], wide[2], True, 64, bits))[0]
    out = native.qmv_fast(*map(np.array, (w, scales, biases)), x, 64, bits)
    assert np.abs(out - expected).max() < 1e-2


# ---- the emulator on kernels that are known to be wrong

SETUP = "uint i = thread_position_in_threadgroup.x, n = thread_position_in_grid.x; threadgroup float buf[64];\n"
STORE = "buf[i] = x[n];\n"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
WRONG = {
    "missing barrier": (SETUP + STORE + "out[n] = buf[63 - i];", "race in threadgroup memory|uninitialised"),
    "barrier without memory": (
        SETUP + STORE + "threadgroup_barrier(mem_flags::mem_none); out[n] = buf[63 - i];",
        "race in threadgroup memory",
    ),
    "simdgroup barrier for a threadgroup": (
        SETUP + STORE + "simdgroup_barrier(mem_flags::mem_threadgroup); out[n] = buf[63 - i];",
        "race in threadgroup memory|uninitialised",
    ),
    "two writers": (SETUP + "buf[i / 2] = x[n];" + BARRIER + "out[n] = buf[i / 2];", "two threads write"),
    "write over a read": (
        SETUP + STORE + BARRIER + "float y = buf[63 - i]; buf[i] = y; out[n] = y;",
        "write over what another thread reads|read of what another thread wrote",
    ),
    "uninitialised": (
        SETUP + "if (i < 63) " + STORE + BARRIER + "out[n] = buf[i];",
        "uninitialised threadgroup memory",
    ),
    "read out of bounds": (
        "uint n = thread_position_in_grid.x; out[n] = x[n + 1];",
        "out of bounds: read of 4 bytes at byte 512",
    ),
    "write out of bounds": ("uint n = thread_position_in_grid.x; out[n + 1] = x[n];", "out of bounds: write"),
    "threadgroup out of bounds": (SETUP + "buf[i + 1] = x[n]; out[n] = 0;", "out of bounds"),
    "misaligned": (
        "uint n = thread_position_in_grid.x; float2 v = *(const device float2*)(x + min(n, 125u)); out[n] = v.x + v.y;",
        "misaligned",
    ),
    "divergent sum": (
        "uint n = thread_position_in_grid.x; out[n] = n % 2 ? simd_sum(x[n]) : 0.0f;",
        "divergent simdgroup",
    ),
    "divergent barrier": (
        SETUP + STORE + "if (i < 32) { " + BARRIER + "} out[n] = buf[i];",
        "finished while others wait|another threadgroup_barrier",
    ),
    "too much threadgroup memory": (
        "uint n = thread_position_in_grid.x; threadgroup float big[8200]; big[n % 64] = x[n]; out[n] = big[n % 64];",
        "limit is 32768",
    ),
    "race in device memory": ("uint n = thread_position_in_grid.x; out[n / 2] = x[n];", "race in device memory"),
    "reads an output before it is written": (
        "uint n = thread_position_in_grid.x; out[n] += x[n];",
        "before anything was written",
    ),
}
FORBIDDEN = {
    "device pointer as thread pointer": "thread float* p = x; out[0] = p[0];",
    "threadgroup pointer as device pointer": "threadgroup float b[4]; device float* p = b; out[0] = p[0];",
    "device pointer as threadgroup pointer": "threadgroup float* p = out; out[0] = p[0];",
    "write through a const input": "x[0] = 1.0f; out[0] = 0;",
}


def tiny(body: str, threads: int = 64) -> mx.array:
    kernel = launch.metal_kernel("tiny", input_names=["x"], output_names=["out"], source=body)
    (out,) = kernel(
        inputs=[mx.arange(128, dtype=mx.float32)],
        grid=(128, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(128,)],
        output_dtypes=[mx.float32],
    )
    return out


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_kernel_is_caught(case):
    body, message = WRONG[case]
    with pytest.raises(launch.KernelError, match=message):
        tiny(body)


@pytest.mark.parametrize("case", FORBIDDEN)
def test_a_wrong_address_space_does_not_compile(case):
    with pytest.raises(compiler.CompileError, match="error"):
        tiny(FORBIDDEN[case])


def test_a_right_kernel_passes_with_its_counts():
    out = tiny(SETUP + STORE + BARRIER + "out[n] = buf[63 - i] * 2.0f;")
    expected = np.arange(128, dtype=np.float32).reshape(2, 64)[:, ::-1].reshape(-1) * 2
    assert np.array_equal(np.array(out), expected)
    report = launch.launches[-1][1]
    assert (report.threadgroups, report.barriers, report.ops["fmul"] + report.ops["fadd"]) == (2, 2, 128)
    assert (report.unique_bytes[0], report.written_bytes[1], report.threadgroup_memory) == (512, 512, 256)


def test_ragged_grids_have_smaller_last_threadgroups():
    body = (
        "uint n = thread_position_in_grid.x; out[n] = x[n] + threads_per_threadgroup.x + 100 * threadgroups_per_grid.x;"
    )
    out = np.array(tiny(body, threads=48)) - np.arange(128)
    assert out.tolist() == [348] * 96 + [332] * 32


def test_lanes_and_matrices_match_numpy():
    """Shuffles, reductions and a matrix product against plain arithmetic."""
    body = """
      uint l = thread_index_in_simdgroup; float v = x[l];
      threadgroup float a[64]; threadgroup float c[64];
      a[l] = x[l]; a[l + 32] = x[l + 32];
      simdgroup_barrier(mem_flags::mem_threadgroup);
      simdgroup_float8x8 m, t, r = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);
      simdgroup_load(m, a, 8); simdgroup_load(t, a, 8, ulong2(0, 0), true);
      simdgroup_multiply_accumulate(r, m, t, r);
      simdgroup_store(r, c, 8);
      simdgroup_barrier(mem_flags::mem_threadgroup);
      out[l] = c[l]; out[l + 32] = c[l + 32];
      out[64 + l] = simd_shuffle_xor(v, 5) + 1000 * simd_max(v) + simd_prefix_exclusive_sum(v);
      out[96 + l] = simd_shuffle(v, 31 - l) + float(simd_sum(int(l)));
    """
    kernel = launch.metal_kernel("lanes", input_names=["x"], output_names=["out"], source=body)
    x = mx.arange(128, dtype=mx.float32)
    (out,) = kernel(
        inputs=[x], grid=(32, 1, 1), threadgroup=(32, 1, 1), output_shapes=[(128,)], output_dtypes=[mx.float32]
    )
    m, v = np.arange(64.0).reshape(8, 8), np.arange(32)
    assert np.array_equal(np.array(out)[:64], (m @ m.T + 1).reshape(-1))
    assert np.array_equal(np.array(out)[64:96], (v ^ 5) + 31000 + np.cumsum(v) - v)
    assert np.array_equal(np.array(out)[96:], v[::-1] + 496)
