"""A decode step on Metal: three launches, and what they read and compute, counted in the emulator."""

from __future__ import annotations

import functools
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from opentq.attention import dispatch
from opentq.caches import single
from opentq.caches.single import OpenTQCache
from opentq.codecs import Affine
from opentq.codecs.turbo import Turbo
from opentq.kernels.metal import attention as fused_metal
from opentq.kernels.metal import launch as metal
from opentq.spec.kv import KVSpec

from . import oracle
from .matrix import Shape
from .msl import cost, launch
from .msl.harness import LANES, MATRIX, gpu, needs_emulator, reports, step  # noqa: F401

pytestmark = needs_emulator


# ---- a decode step in three launches


def plain_columns(codecs, dense, fresh, center):
    done = [single.dense(codec, x) for codec, x in zip(codecs, fresh)]
    done[0] = single.shifted(done[0], center)
    return [mx.concatenate([old, new], axis=2) for old, new in zip(dense, done)]


@pytest.mark.parametrize(
    "dims, dtype, columns, length, centred",
    [
        ((64, 64), mx.float16, 5, 1, True),
        ((128, 128), mx.bfloat16, 0, 3, False),
        ((128, 128), mx.float32, 2, 1, True),
        ((256, 512), mx.float16, 2, 4, False),
        ((32, 96), mx.float16, 7, 1, True),
    ],
    ids=str,
)
def test_columns_are_appended_as_the_cache_does(dims, dtype, columns, length, centred):
    codecs = (KVSpec.parse("int4").codecs()[0], KVSpec.parse("int4:norot").codecs()[1])

    rng = np.random.default_rng(7)

    def draw(heads, tokens, dim, kind):
        return mx.array(rng.standard_normal((2, heads, tokens, dim), np.float32) * 3).astype(kind)

    dense = tuple(draw(2, columns, dim, mx.float16) for dim in dims)
    fresh = tuple(draw(2, length, dim, dtype) for dim in dims)
    q, center = draw(4, length, dims[0], dtype), draw(2, 1, dims[0], mx.float16) if centred else None
    found = fused_metal.append(q, fused_metal.rotated(codecs), dense, fresh, center)
    expected = (codecs[0].rotate(q), *plain_columns(codecs, dense, fresh, center))
    for got, wanted in zip(found, expected):
        assert got.dtype == wanted.dtype and got.shape == wanted.shape
        # Additions in another order: a last place of the result's dtype.
        step = 2.0**-7 if got.dtype == mx.bfloat16 else 2.0**-10 if got.dtype == mx.float16 else 2.0**-20
        error = mx.abs(got.astype(mx.float32) - wanted.astype(mx.float32))
        assert (error <= step * mx.maximum(mx.abs(wanted.astype(mx.float32)), 1)).all().item()
    if not centred:
        pair = fused_metal.extend(codecs, dense, fresh)
        assert all(mx.array_equal(a, b) for a, b in zip(pair, found[1:]))


def test_what_is_not_appended():
    assert fused_metal.extend((Affine(4), Affine(4)), (mx.zeros((1, 1, 0, 80), mx.float16),) * 2, (None, None)) is None
    assert not fused_metal.appends((Turbo(3, rotation="haar"), Affine(4)), (64, 64))
    assert fused_metal.appends((Affine(4), Turbo(3)), (128, 64))


def decode_step(spec: str | KVSpec, length: int, dim: int = 64, held: int = 150) -> tuple[OpenTQCache, list[str]]:
    """A step on a cache of `held` tokens, held to the portable path: the cache, and the launches."""
    shape = Shape(q_heads=4, kv_heads=2, key_dim=dim, value_dim=dim)
    k, v = oracle.vectors(shape, held + length, dtype=mx.float16)
    q = oracle.queries(shape, length, dtype=mx.float16)

    def outputs():
        cache = OpenTQCache(spec)
        oracle.fill(cache, k[:, :, :held], v[:, :, :held], [held])
        before = len(launch.launches)
        handles = cache.update_and_fetch(k[:, :, held:], v[:, :, held:])
        out = handles[0].step.attend(q, scale=0.125, mask="causal" if length > 1 else None)
        return out, cache, [name for name, _ in launch.launches[before:]]

    out, cache, names = outputs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENTQ_KERNELS", "tiled")
        expected, plain, none = outputs()
    assert none == [] and cache.stats.served_by == "metal"
    assert mx.allclose(out, expected, rtol=1e-2, atol=2e-3)
    for mine, theirs in ((cache.dense_k, plain.dense_k), (cache.dense_v, plain.dense_v)):
        assert mine.shape == theirs.shape and mx.allclose(mine, theirs, rtol=2e-3, atol=2e-3)
    return cache, names


@pytest.mark.parametrize(
    "spec, length",
    [("int4", 1), ("int4", 3), ("tq5/tq3:nc", 3), ("int4:center:sink=4", 1), ("k8v4:norot", 3), ("tq3p/int4", 1)],
)
def test_a_decode_step_is_two_launches_or_three(spec, length):
    """The cache leaves new tokens to the launch that appends and rotates; one attends and rotates back, or two where
    the keys are shared out.
    """
    assert decode_step(spec, length)[1] == ["opentq_append", "opentq_decode_whole"]
    assert decode_step(spec, length, held=600)[1] == ["opentq_append", "opentq_decode_lanes", "opentq_merge"]


@pytest.mark.parametrize("dim", [128, 256])
def test_longer_heads_rotate_back_in_the_last_launch(dim):
    assert decode_step("int4", 1, dim)[1][-1] == "opentq_decode_whole"
    assert decode_step("int4", 1, dim, held=600)[1][-1] == "opentq_merge"


@pytest.mark.parametrize("budget, chosen", [(192, "weigh pick"), (128, "sketches pick weigh pick")])
def test_a_decode_step_reads_the_pages_of_a_list_where_they_lie(budget, chosen):
    """Sketches are asked where there are more than four times as many pages as are read."""
    spec = replace(KVSpec.parse(f"int4:sink=4:pages={budget}"), channels=((0, 1, 2, 32, 33, 34),) * 2)
    cache, names = decode_step(spec, 1, held=600)
    assert names == [f"opentq_{name}" for name in (*chosen.split(), "append", "decode_whole")]
    assert cache.stats.read == budget < cache.stats.held


def test_a_decode_step_with_matrices(monkeypatch):
    monkeypatch.setattr(metal, "tuning", lambda: MATRIX)
    assert "opentq_matrix" in decode_step("int4", 1)[1]


# ---- counts


@functools.cache
def per_element(spec: str, gqa: int, tune: metal.Tuning) -> tuple[float, float]:
    """(operations per KV element beyond the 2 * gqa multiply-adds, packed bytes fetched / packed bytes) at D 128.

    The difference of two lengths, so that what a launch costs once is not counted as a cost per token.
    """
    shape = Shape(q_heads=gqa, kv_heads=1, key_dim=128, value_dim=128)
    found = []
    first = 1537 if gqa == 8 else 257  # operations of few tokens are more: the maximum moves more often
    for tokens in (first, first + 512):
        oracle.judge(step(spec, shape, tokens, 1))
        found.append(reports("decode_whole" if tune.variant == "lanes" else "matrix")[-1])
    short, long = found
    elements = 512 * 128
    arithmetic = (long.arithmetic() - short.arithmetic()) / elements
    multiplies = 0 if tune.variant == "lanes" else (long.matrix_multiplies - short.matrix_multiplies) * 512 / elements
    fetched = sum(long.fetched_bytes[i] - short.fetched_bytes[i] for i in cost.PACKED)
    unique = sum(long.unique_bytes[i] - short.unique_bytes[i] for i in cost.PACKED)
    assert unique == 512 * 2 * 128 * KVSpec.parse(spec).bits_per_value(128) / 8
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


def test_a_codebook_costs_no_more_than_integers(monkeypatch):
    """Operations beyond the multiply-adds at GQA 8, with a look-up, which is not among them, counted as one."""
    monkeypatch.setattr(metal, "cores", lambda: 1)
    one_threadgroup = metal.Tuning(simdgroups=4)
    monkeypatch.setattr(metal, "tuning", lambda: one_threadgroup)
    integers, _ = per_element("int4", 8, one_threadgroup)
    book, bytes_ratio = per_element("tq4", 8, one_threadgroup)
    assert 0.95 <= bytes_ratio <= 1.05
    assert book + 2 <= integers + 1


@pytest.mark.parametrize("spec, most", [("tq2.5", 9.0), ("polar4", 16.0)])
def test_runs_and_polar_blocks_are_read_once(spec, most, monkeypatch):
    monkeypatch.setattr(metal, "cores", lambda: 1)
    one_threadgroup = metal.Tuning(simdgroups=4)
    monkeypatch.setattr(metal, "tuning", lambda: one_threadgroup)
    beyond, bytes_ratio = per_element(spec, 8, one_threadgroup)
    assert 0.95 <= bytes_ratio <= 1.1  # a polar block's bytes do not end with a word
    assert beyond <= most


def test_fewer_bytes_and_operations_than_mlx_fp16_attention(monkeypatch):
    """GQA 8, against the kernel MLX itself would use there, counted in the same emulator."""
    monkeypatch.setattr(cost, "TOKENS", (512, 1024))
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
    step_args = step("int4", shape, 513, 1)
    oracle.judge(step_args)
    report = reports("decode_lanes")[-1]
    assert report.reductions + report.shuffles < 512 * 8 / 25


def test_the_order_of_lanes_does_not_matter():
    """A different schedule of simdgroups and lanes gives the same bits."""
    args = [
        step("int4", Shape(batch=3, q_heads=6, kv_heads=3, key_dim=192, value_dim=128), 150, 1),
        step("int4", Shape(), 150, 20, causal=True),
    ]
    outs = []
    for order in (0, 3):

        def make(order=order, **creation):
            kernel = launch.metal_kernel(**creation)
            kernel.order = order
            return kernel

        metal.forget()
        metal.make = make
        outs.append([dispatch.attend(a)[0] for a in args])
    assert all(mx.array_equal(a, b).item() for a, b in zip(*outs))
