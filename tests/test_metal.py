"""The Metal kernels, executed in the emulator: conformance, counts, and that a broken kernel would be noticed."""

from __future__ import annotations

import re
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from opentq.attention import backends, dispatch, fused_metal
from opentq.caches.single import OpenTQCache
from opentq.codecs import Affine
from opentq.kernels import metal

from . import oracle
from .matrix import Shape
from .msl import compiler, cost, launch, mlx_sources, native

pytestmark = pytest.mark.skipif(launch.available() is not None, reason=launch.available() or "")

LANES, MATRIX = metal.Tuning(), metal.Tuning(variant="matrix")
SINKS = mx.array([0.3, 1.0, -2.0, 5.0, 0.0, 1.0])


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """Metal kernels run in the emulator, as on the smallest GPU; afterwards, no launch may have left a trace of trouble."""
    monkeypatch.setattr(metal, "make", launch.metal_kernel)
    monkeypatch.setattr(metal, "tuning", lambda: LANES)
    monkeypatch.setattr(metal, "cores", lambda: 2)
    metal_backend = backends.Backend("metal", fused_metal.attend, fused_metal.layouts)
    monkeypatch.setattr(backends, "active", lambda: metal_backend)
    monkeypatch.setenv("OPENTQ_KERNELS", "native")
    metal.kernel.cache_clear()
    before = len(launch.launches)
    yield
    metal.kernel.cache_clear()
    no_trouble_since(before)


def no_trouble_since(before: int) -> None:
    for name, report in launch.launches[before:]:
        if name.startswith("opentq"):
            assert report.allocas == [], f"{name}: an array that did not become registers"
            assert report.threadgroup_memory <= metal.THREADGROUP_BYTES
            assert not any(report.unwritten_bytes), f"{name}: output bytes that nobody wrote"


@pytest.fixture(scope="module", autouse=True)
def summary(request):
    yield
    reporter = request.config.pluginmanager.getplugin("terminalreporter")
    if reporter is not None:
        names = [name for name, _ in launch.launches]
        counts = ", ".join(f"{names.count(n)} {n}" for n in sorted(set(names)))
        reporter.write_line(f"\nMetal kernels executed in the emulator: {len(names)} ({counts})")


def step(spec: str, shape: Shape, tokens: int, length: int, dtype: mx.Dtype = mx.float16, **options):
    """The AttnArgs of a step of `length` tokens on a cache that then holds `tokens`."""
    cache = OpenTQCache(spec)
    handles = oracle.fill(cache, *oracle.vectors(shape, tokens), [n for n in (tokens - length, length) if n])
    return oracle.args_of(handles, oracle.queries(shape, length, dtype=dtype), **options)


def reports(kernel: str) -> list[launch.Report]:
    return [report for name, report in launch.launches if name == f"opentq_{kernel}"]


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
    out, first, second = native.sdpa_2pass(q, k, v, 0.125, 32, gqa_variant)
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


# ---- our kernels are what MLX would compile


@pytest.mark.parametrize("batch, space", [(1, "constant"), (3, "device")])
def test_the_compiled_text_is_the_one_mlx_generates(batch, space):
    """Small inputs come in constant memory, larger ones in device memory; the kernels must take both."""
    shape = Shape(batch=batch)
    args = step("int4", shape, 70, 1)
    oracle.judge(args)
    text = next(iter(metal.kernel("decode_lanes")._texts.values()))
    assert f"const {space} int32_t* lens [[buffer(7)]]" in text
    assert (
        "[[kernel]] void custom_kernel_opentq_decode_lanes" in text and "device float* partial [[buffer(10)]]" in text
    )
    assert mlx_sources.preamble().index("typedef half float16_t") < len(mlx_sources.preamble())


def test_every_pointer_names_its_address_space():
    """In MSL a pointer without an address space is an error, but for Clang it is a pointer to thread memory."""
    spaces = ("device", "constant", "threadgroup", "thread")
    seen = 0
    for path in metal.HERE.glob("*.metal"):
        for line in path.read_text().splitlines():
            code = line.split("//")[0]
            for match in re.finditer(r"((?:\b\w+ )*)\b[A-Za-z]\w*(?:<[^<>]*>)?[*&](?![*&=])(?= ?\w|\))", code):
                seen += 1
                assert any(word in match[1].split() for word in spaces), f"{path.name}: {line.strip()}"
    assert seen > 50


# ---- conformance

SHAPES = [
    Shape(),
    Shape(q_heads=2, key_dim=128, value_dim=128),
    Shape(q_heads=16, key_dim=128, value_dim=128),
    Shape(batch=3, q_heads=6, kv_heads=3, key_dim=192, value_dim=128),
    Shape(q_heads=7, kv_heads=1, key_dim=80, value_dim=80),
]
MORE_SHAPES = [Shape(q_heads=2, key_dim=d, value_dim=d, kv_heads=1) for d in (64, 80, 96, 112, 128, 192, 256, 512)] + [
    Shape(q_heads=g, kv_heads=1, key_dim=128, value_dim=128) for g in (1, 2, 4, 7, 8, 16)
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tune", [LANES, MATRIX], ids=["lanes", "matrix"])
def test_decode_shapes(shape, tune, monkeypatch):
    monkeypatch.setattr(metal, "tuning", lambda: tune)
    oracle.judge(step("int4", shape, 203, 1))
    oracle.judge(step("int4", shape, 130, 1))


@pytest.mark.slow
@pytest.mark.parametrize("shape", MORE_SHAPES, ids=str)
@pytest.mark.parametrize("spec", ["int2", "int3", "int4", "int8", "k8v4:g64", "k4v2:g128", "f16"])
@pytest.mark.parametrize("tune", [LANES, MATRIX], ids=["lanes", "matrix"])
def test_every_shape_and_spec(shape, spec, tune, monkeypatch):
    monkeypatch.setattr(metal, "tuning", lambda: tune)
    for tokens, length, dtype in ((203, 1, mx.float16), (150, 5, mx.bfloat16), (140, 1, mx.float32)):
        oracle.judge(step(spec, shape, tokens, length, dtype, causal=length > 1))
    if tune is LANES:
        oracle.judge(step(spec, shape, 150, 19, causal=True, window=70))


@pytest.mark.parametrize("dim", [256, 512])
def test_decode_of_large_heads(dim):
    oracle.judge(step("int4", Shape(q_heads=2, kv_heads=1, key_dim=dim, value_dim=dim), 140, 1))


@pytest.mark.parametrize("spec", ["int2", "int3", "int8", "k8v4:g64", "k4v2:g128", "f16", "int4:sink=4:recent=70"])
@pytest.mark.parametrize("tune", [LANES, MATRIX], ids=["lanes", "matrix"])
def test_decode_specs(spec, tune, monkeypatch):
    monkeypatch.setattr(metal, "tuning", lambda: tune)
    oracle.judge(step(spec, Shape(), 203, 1))


@pytest.mark.parametrize("tune", [LANES, MATRIX], ids=["lanes", "matrix"])
def test_decode_options(tune, monkeypatch):
    monkeypatch.setattr(metal, "tuning", lambda: tune)
    few = Shape(q_heads=2, kv_heads=1)
    oracle.judge(step("int4:sink=4:recent=70", Shape(), 203, 3, causal=True, window=100, sinks=SINKS[:4]))
    oracle.judge(step("int4:sink=4", Shape(), 203, 3, mx.float32, causal=True, softcap=20.0))
    oracle.judge(step("int4", Shape(), 203, 1, mx.bfloat16, sinks=SINKS[:4], window=13))
    oracle.judge(step("int4", few, 203, 16, causal=True))
    oracle.judge(step("int4", few, 3, 3, causal=True))
    oracle.judge(step("int4:sink=8", few, 3, 3, causal=True))


@pytest.mark.parametrize("spec", ["int4", "int3:g64:sink=5:recent=33", "k8v4:g64", "int2:norot", "f16"])
def test_prefill_over_a_compressed_prefix(spec):
    oracle.judge(step(spec, Shape(), 203, 35, causal=True))


@pytest.mark.parametrize(
    "shape", [SHAPES[2], SHAPES[3], Shape(q_heads=1, kv_heads=1, key_dim=256, value_dim=256)], ids=str
)
def test_prefill_shapes(shape):
    oracle.judge(step("int4", shape, 140, 18, causal=True))


def test_prefill_options(monkeypatch):
    shape = Shape(q_heads=2, kv_heads=1)
    oracle.judge(step("int4:sink=4", shape, 203, 40, causal=True, window=50, sinks=SINKS[:2]))
    oracle.judge(step("int4", shape, 203, 40, mx.float32, causal=True, softcap=20.0))
    oracle.judge(step("int4", shape, 203, 40, mx.bfloat16))
    monkeypatch.setattr(metal, "cores", lambda: 0)  # one split: no merge kernel
    merges = len(reports("merge"))
    oracle.judge(step("int4", shape, 203, 40, causal=True, sinks=SINKS[:2]))
    assert len(reports("merge")) == merges


def test_one_call_over_ragged_sequences():
    """Batches by `lens`: packed lengths, sinks and tails differ from sequence to sequence."""
    shape = Shape(batch=3)
    args = step("int4:sink=4:recent=70", shape, 230, 2, causal=True)
    packed, _, _ = args.lens[0]
    ragged = replace(args, lens=((packed, 4, 4), (packed - 50, 3, 9), (0, 0, 30)))
    for tune in (LANES, MATRIX):
        metal.kernel.cache_clear()
        metal.tuning = lambda tune=tune: tune
        oracle.judge(ragged)
    oracle.judge(replace(ragged, q=oracle.queries(shape, 20, dtype=mx.float16)))


def test_a_row_that_sees_nothing_is_zero():
    args = step("int4", Shape(), 100, 1)
    empty = replace(args, lens=((0, 0, args.dense_k.shape[2]),))
    out, _ = dispatch.attend(empty)
    assert not mx.any(out).item()


def test_a_mask_is_not_served():
    args = step("int4", Shape(), 100, 1, mask=mx.zeros((1, 100)))
    assert fused_metal.attend(args) is None


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dim, group", [(64, 32), (80, 32), (112, 64), (128, 128)])
def test_pack_is_the_codec_bit_for_bit(bits, dim, group):
    codec = Affine(bits, group)
    y = mx.array(RNG.standard_normal((1, 2, 9, dim)).astype(np.float16))
    y[0, 0, 3] = 1.5  # a constant token: scale 0
    y[0, 1, 4, 0] = 60000.0
    for expected, got in zip(codec.encode(y), fused_metal.pack(codec, y)):
        assert mx.array_equal(expected, got).item()


def test_a_model_decodes_through_the_kernels():
    """The whole seam: a small Llama generates with every attention call in the emulator, like on the portable path."""
    from mlx_lm.generate import generate_step

    import opentq

    from .conftest import random_llama

    tokens = {}
    for mode in ("native", "tiled"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OPENTQ_KERNELS", mode)
            model = random_llama()
            opentq.compress(model, "int8")
            steps = generate_step(mx.arange(90) % 256, model, max_tokens=4)
            tokens[mode] = [int(t) for t, _ in steps]
    assert tokens["native"] == tokens["tiled"]
    assert reports("decode_lanes") and reports("matrix") and reports("pack")


# ---- counts


def per_element(spec: str, gqa: int, tune: metal.Tuning) -> tuple[float, float]:
    """(arithmetic operations per KV element beyond the 2 * gqa multiply-adds, bytes fetched / unique packed bytes), D 128.

    The difference of two lengths, so that what a launch costs once is not counted as a cost per token.
    """
    shape = Shape(q_heads=gqa, kv_heads=1, key_dim=128, value_dim=128)
    found = []
    for tokens in (2049, 4097):
        oracle.judge(step(spec, shape, tokens, 1))
        found.append(reports("decode_lanes" if tune.variant == "lanes" else "matrix")[-1])
    short, long = found
    elements = 2048 * 128
    arithmetic = (long.arithmetic() - short.arithmetic()) / elements
    multiplies = 0 if tune.variant == "lanes" else (long.matrix_multiplies - short.matrix_multiplies) * 512 / elements
    fetched = sum(long.fetched_bytes[1:5]) - sum(short.fetched_bytes[1:5])
    unique = sum(long.unique_bytes[1:5]) - sum(short.unique_bytes[1:5])
    assert unique == 2048 * 2 * 128 * Affine(4, 32).bits_per_value(128) / 8
    return arithmetic + multiplies - 2 * gqa, fetched / unique


@pytest.mark.parametrize("gqa", [1, 2, 4, 8, 16])
def test_every_packed_byte_is_read_once(gqa, monkeypatch):
    monkeypatch.setattr(metal, "cores", lambda: 1)
    one_threadgroup = metal.Tuning(simdgroups=4)
    monkeypatch.setattr(metal, "tuning", lambda: one_threadgroup)
    beyond, bytes_ratio = per_element("int4", gqa, one_threadgroup)
    assert 0.95 <= bytes_ratio <= 1.05
    if gqa == 8:
        assert beyond <= 6.0


def test_fewer_bytes_and_operations_than_mlx_fp16_attention():
    """GQA 8, against the kernel MLX itself would use there, counted in the same emulator."""
    theirs, mine = cost.mlx_fp16(8, 128), cost.ours("int4", 8, 128, "lanes")
    assert theirs.unique / mine.unique == pytest.approx(3.2)
    assert theirs.fetched / mine.fetched > 6
    assert mine.operations < theirs.operations


def test_the_cost_model_says_that_it_is_one(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["cost", "--shape", "16,2,64", "--ctx", "4k", "--kv", "int8"])
    monkeypatch.setattr(cost, "TOKENS", (256, 512))
    cost.main()
    printed = capsys.readouterr().out
    assert printed.startswith("MODEL, not a measurement") and "M1 Max" in printed and "opentq int8, matrix" in printed


def test_no_reduction_per_key_and_head(monkeypatch):
    monkeypatch.setattr(metal, "cores", lambda: 1)
    shape = Shape(q_heads=8, kv_heads=1, key_dim=128, value_dim=128)
    step_args = step("int4", shape, 2049, 1)
    oracle.judge(step_args)
    report = reports("decode_lanes")[-1]
    assert report.reductions + report.shuffles < 2048 * 8 / 25


def test_the_order_of_lanes_does_not_matter():
    """A different schedule of simdgroups and lanes gives the same bits."""
    args = [step("int4", SHAPES[3], 150, 1), step("int4", Shape(), 150, 20, causal=True)]
    outs = []
    for order in (0, 3):
        metal.kernel.cache_clear()
        for name in ("decode_lanes", "matrix", "merge"):
            metal.kernel(name).order = order
        outs.append([dispatch.attend(a)[0] for a in args])
    assert all(mx.array_equal(a, b).item() for a, b in zip(*outs))


# ---- mutations: deleting any barrier or bending any stride must be noticed

BARRIERS = re.compile(r"\b(?:threadgroup|simdgroup)_barrier\(mem_flags::mem_threadgroup\);")
STRIDES = {
    "decode_lanes": [
        ("safe * KW", "safe * (KW + 1)"),
        ("size_t(head) * capacity * VW", "size_t(head) * capacity * (VW - 1)"),
        ("size_t(head) * capacity * GK", "size_t(head) * capacity * (GK + 1)"),
        ("vs_head[min(key[k], limit - 1) * GV + g]", "vs_head[min(key[k], limit - 1) * GV]"),
        ("q[q0 + r * DK + d]", "q[q0 + r * DK + (d ^ 1)]"),
        ("size_t(head) * Td * (DK / 2)", "size_t(head) * Td * (DV / 4)"),
        ("lens[3 * b + 2]", "lens[3 * b + 1]"),
    ],
    "matrix": [
        ("rows + at * W", "rows + at * (W + 1)"),
        ("scales[at * G + d0 / GROUP]", "scales[at * G]"),
        ("tile + t * 8 * (DV + 8) + d * 8, DV + 8", "tile + t * 8 * (DV + 8) + d * 8, DV"),
        ("size_t(head) * capacity * GV", "size_t(head) * capacity"),
    ],
    "merge": [("partial[(first + s) * DV + d]", "partial[(first + s) * DV + d / 2]"), ("(first + s) + 1]", "(first + s)]")],
    "pack": [
        ("codes[size_t(token) * W + w]", "codes[size_t(token) * W + (w ^ 1)]"),
        ("* G + g) * 2 + 1]", "* G + g) * 2]"),
    ],
}


def mutants() -> list[tuple[str, str, object]]:
    found: list[tuple[str, str, object]] = []
    for name in ("decode_lanes", "matrix", "merge", "pack"):
        body = metal.source(metal.KERNELS[name].file)[1]
        found += [(name, f"barrier {i}", i) for i in range(len(BARRIERS.findall(body)))]
        found += [(name, f"{a} -> {b}", (a, b)) for a, b in STRIDES[name]]
    return found


def exercise(name: str) -> None:
    """A few calls that between them reach every line of a kernel; raises when something is wrong."""
    if name == "pack":
        test_pack_is_the_codec_bit_for_bit(4, 80, 32)
        return
    long = 20 if name == "matrix" else 1
    args = step("int4:sink=4", Shape(batch=2), 220, long, causal=long > 1)
    (packed, sink, start), (_, columns) = args.lens[0], (0, args.dense_k.shape[2])
    oracle.judge(replace(args, lens=((packed, sink, start), (packed - 30, sink - 1, columns - long))))
    if name == "decode_lanes":
        oracle.judge(step("int4", Shape(q_heads=2, kv_heads=1, key_dim=192, value_dim=192), 220, 1))
    if name == "matrix":
        metal.tuning = lambda: MATRIX
        oracle.judge(step("int4", Shape(batch=2), 220, 1))


@pytest.mark.parametrize("name, what, mutation", mutants(), ids=lambda v: v if isinstance(v, str) else "")
def test_a_mutant_does_not_survive(name, what, mutation, monkeypatch):
    monkeypatch.setattr(metal, "tuning", lambda: LANES)

    def change(text: str) -> str:
        start = text.index("[[kernel]]")
        if isinstance(mutation, int):
            at = list(BARRIERS.finditer(text, start))[mutation]
            return text[: at.start()] + ";" + text[at.end() :]
        assert mutation[0] in text
        return text.replace(*mutation)

    before = len(launch.launches)
    metal.kernel(name).change = change
    with pytest.raises((launch.KernelError, AssertionError)):
        exercise(name)
        no_trouble_since(before)
    del launch.launches[before:]
