"""The CPU's storage layouts: canonical bits there and back, fused encoding bit for bit, and what they refuse."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from opentq.codecs import Affine, Codec, Turbo
from opentq.kernels import build
from opentq.kernels.cpu import library as cpu
from opentq.kernels.cpu.blocks import load_numpy
from opentq.kernels.cpu.layout import CpuLayout, layout_for, layout_named

from .cpu_blocks import store_numpy
from .cpu_forms import BITS, BOOKS, HALVES, SKETCHES, codec_of, layout_of

pytestmark = pytest.mark.skipif(
    build.active_dialect() != "cpu" or not cpu.available(), reason="no CPU kernels here: another device, or no compiler"
)


@pytest.mark.parametrize("kind", ["k", "v"])
@pytest.mark.parametrize("form", [*BITS, *BOOKS])
@pytest.mark.parametrize("dim,group", [(16, 32), (64, 128), (80, 32), (112, 64), (128, 32), (192, 128)])
def test_layout_moves_canonical_bits_exactly(kind, form, dim, group):
    codec = codec_of(form, group)
    layout = layout_of(kind, codec, dim)
    packed = codec.encode(mx.random.normal((2, 3, 128, dim), key=mx.random.key(1)))
    (stored,) = layout.store(packed)
    assert stored.shape == (2, 3, 2, layout.block_bytes) and layout_named(layout.name) == layout
    assert layout.block_bytes * 8 == 64 * (layout.bits * dim + 16 * layout.params), "no padding"
    assert np.array_equal(np.array(stored), store_numpy(layout, *map(np.array, packed)))
    for loaded in (layout.load((stored,)), load_numpy(layout, np.array(stored))):
        for a, b in zip(loaded, packed):
            assert np.array_equal(np.array(a), np.array(b))
    part = layout.load((stored[:, 1:, 1:],))  # a strided view
    assert np.array_equal(np.array(part[0]), np.array(packed[0][:, 1:, 64:]))


def same_codes(layout: CpuLayout, codec: Codec, y: mx.array) -> None:
    """encode == store(codec.encode), except that a zero may be -0 for +0."""
    got, want = layout.load(layout.encode(codec, y)), codec.encode(y)
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert np.array_equal(np.array(a), np.array(b))  # as floats: -0 == +0


@pytest.mark.parametrize("kind,form", [*(("v", form) for form in HALVES), *(("k", form) for form in SKETCHES)])
@pytest.mark.parametrize("dim", [32, 96, 256])
def test_layout_of_runs(kind, form, dim):
    codec = codec_of(form)
    layout = layout_of(kind, codec, dim)
    y = mx.random.normal((2, 3, 128, dim), key=mx.random.key(1))
    packed = codec.encode(y)
    stored = layout.store(packed)
    assert [a.shape for a in stored] == [(2, 3, 2, run.block_bytes) for run in layout.runs]
    assert layout_named(layout.name) == layout
    assert sum(a.nbytes for a in stored) <= sum(a.nbytes for a in packed), "codes of 16 bits don't fill a word"
    for back in (layout.load(stored), layout.load(tuple(a[:, 1:, 1:] for a in stored))):
        assert all(
            np.array_equal(np.array(a), np.array(b)[:, -a.shape[1] :, -a.shape[2] :]) for a, b in zip(back, packed)
        )
    for x in (y, y.astype(mx.float16), y[:, 1:, 64:]):
        same_codes(layout, codec, x)


def test_what_has_no_layout():
    assert layout_for("v", codec_of("qjl1"), 64) is None, "a sketch of values decodes to noise"
    assert layout_for("k", codec_of("tq2.5"), 80) is None, "half of 80 channels are no whole tiles"


@pytest.mark.parametrize("form", ["polar4", "polar4:out=3", "tq4:out=1", "tq2.5:out=2"])
@pytest.mark.parametrize("dim", [32, 96, 288])
def test_layout_of_angles_and_outliers(form, dim):
    codec = codec_of(form)
    layout = layout_of("v", codec, dim)
    y = mx.random.normal((2, 3, 128, dim), key=mx.random.key(1))
    packed = codec.encode(y)
    stored = layout.encode(codec, y)
    assert sum(a.nbytes for a in stored) <= sum(a.nbytes for a in packed) and layout_named(layout.name) == layout
    assert len({a.shape[2] for a in stored}) == 1
    for a, b in zip(layout.load(tuple(a[:, 1:, a.shape[2] // 2 :] for a in stored)), packed):
        assert np.array_equal(np.array(a), np.array(b[:, 1:, 64:]))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_encode_makes_the_codecs_bits(bits, dtype):
    codec = Affine(bits, 64)
    y = (mx.random.normal((2, 2, 128, 80), key=mx.random.key(2)) * 3).astype(dtype)
    same_codes(layout_of("k", codec, 80), codec, y)
    wide = mx.random.normal((2, 256, 4, 80), key=mx.random.key(3)).astype(dtype)
    same_codes(layout_of("v", codec, 80), codec, wide.swapaxes(1, 2)[:, 1:3, 64:192])  # strided, unaligned


@pytest.mark.parametrize("bits", BITS)
def test_encode_of_extreme_vectors(bits):
    codec = Affine(bits, 32)
    rows = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    rows[0], rows[1], rows[2] = 0, 7.25, -0.0
    rows[3, 5], rows[4, 6], rows[5] = np.inf, -np.inf, 1e9
    rows[6] *= 1e-7
    rows[7] *= 1e-12
    rows[8, ::2], rows[8, 1::2] = 65504, -65504
    rows[9, 40:] = rows[9, 40]
    same_codes(layout_of("v", codec, 64), codec, mx.array(rows.reshape(1, 1, 64, 64)))


@pytest.mark.parametrize("bits", range(1, 7))
@pytest.mark.parametrize("fit", ["length", "norm", "unbiased"])
def test_encode_makes_the_codebooks_bits(bits, fit):
    codec = Turbo(bits, fit=fit)
    y = mx.random.normal((2, 2, 192, 80), key=mx.random.key(2)) * 3
    y[0, 0, 0], y[0, 0, 1, 3], y[0, 0, 2], y[0, 0, 3] = 0.0, mx.inf, 65504.0, 1e-9
    for x in (y, y.astype(mx.float16), y[:, 1:, 64:]):
        same_codes(layout_of("k", codec, 80), codec, x)


def test_encode_of_nan_ends():
    layout, codec = layout_of("k", Affine(4, 32), 64), Affine(4, 32)
    (stored,) = layout.encode(codec, mx.full((1, 1, 64, 64), mx.nan))
    assert stored.shape == (1, 1, 1, layout.block_bytes)


def test_layout_refuses_what_it_cannot_hold():
    layout = layout_of("k", Affine(4, 32), 64)
    with pytest.raises(ValueError, match="64 tokens"):
        layout.encode(Affine(4, 32), mx.zeros((1, 1, 65, 64)))
    with pytest.raises(ValueError, match="can't hold"):
        layout.encode(Affine(3, 32), mx.zeros((1, 1, 64, 64)))
    with pytest.raises(ValueError, match="channels"):
        layout.encode(Affine(4, 32), mx.zeros((1, 1, 64, 128)))
    with pytest.raises(ValueError, match="bytes"):
        layout.load((mx.zeros((1, 1, 1, 7), mx.uint8),))
