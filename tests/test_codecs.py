"""What every codec owes: finite numbers from any input, bytes as advertised, vectors back within a known bound."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from opentq.codecs import REGISTRY, Affine, codebooks, packing, rotation, sketch
from opentq.codecs.outliers import Outliers
from opentq.codecs.polar import Polar
from opentq.codecs.qjl import QJL
from opentq.codecs.rounding import nearest
from opentq.codecs.turbo import Fractional, Prod, Turbo
from opentq.contracts.codec import Codebooks
from opentq.spec.kv import KVSpec

# Relative error of a decoded Gaussian vector, |x - x'| / |x|, that a codec may not exceed.
BOUNDS = {
    "f16": 0.001,
    "int8": 0.007,
    "int4": 0.09,
    "int4:g64": 0.10,
    "int4:norot": 0.09,
    "int3": 0.19,
    "int2": 0.45,
    "tq6": 0.030,
    "tq5": 0.055,
    "tq4": 0.105,
    "tq4:haar": 0.105,
    "tq4:nc": 0.105,
    "tq4:ub": 0.105,
    "tq4:norot": 0.12,
    "tq3": 0.20,
    "tq2": 0.36,
    "tq1": 0.62,
    "tq3.5": 0.16,
    "tq2.5": 0.30,
    "tq1.5": 0.52,
    "polar4": 0.20,
    "int4:out=2": 0.09,
    "tq3:out=4": 0.20,
    "tq2p/tq2": None,  # sketches estimate inner products; test_estimators.py judges them
    "tq3p/tq3": None,
    "tq4p/tq4:sketch=orth": None,
    "qjl2/int4": None,
    "qjl4/int4:sketch=gauss:out=2": None,
}
DIMS = (64, 80, 96, 112, 128, 192, 256, 512)


def codec_of(spec: str):
    return KVSpec.parse(spec).codecs()[0]


def round_trip(codec, x: mx.array, dtype=mx.float32) -> mx.array:
    """Through the codec and back, in the original basis."""
    return codec.unrotate(codec.decode(codec.encode(codec.rotate(x)), dtype, x.shape[-1]))


def test_every_method_has_a_row():
    tested = {name for spec in BOUNDS for name in (KVSpec.parse(spec).keys, KVSpec.parse(spec).values)}
    assert REGISTRY.keys() - tested <= {"qjl", "qjl1", "qjl6", "qjl8", "int2", "int3"}


@pytest.mark.parametrize("spec", BOUNDS)
@pytest.mark.parametrize("dim", DIMS)
def test_round_trip_and_bytes(spec, dim):
    codec, x = codec_of(spec), mx.random.normal((2, 2, 70, dim), key=mx.random.key(dim))
    packed = codec.encode(codec.rotate(x))
    assert all(a.shape[:3] == (2, 2, 70) for a in packed)
    bits = 8 * sum(a.nbytes for a in packed) / x.size
    assert codec.bits_per_value(dim) == pytest.approx(bits, rel=1e-9)
    back = round_trip(codec, x)
    assert back.shape == x.shape
    if BOUNDS[spec] is not None:
        error = mx.linalg.norm(x - back, axis=-1) / mx.linalg.norm(x, axis=-1)
        assert error.mean().item() <= BOUNDS[spec]


EDGES = {
    "zeros": lambda d: np.zeros(d),
    "constant": lambda d: np.full(d, 3.7),
    "huge constant": lambda d: np.full(d, -65504.0),
    "beyond fp16": lambda d: np.linspace(-1e30, 1e30, d),
    "alternating maxima": lambda d: np.where(np.arange(d) % 2, 65504.0, -65504.0),
    "offset": lambda d: 5e4 + np.random.RandomState(0).randn(d),
    "one outlier": lambda d: np.where(np.arange(d) == 5, 6e4, np.random.RandomState(1).randn(d)),
    "subnormal": lambda d: 1e-7 * np.random.RandomState(2).randn(d),
    "tiny": lambda d: 1e-30 * np.random.RandomState(3).randn(d),
    "one channel": lambda d: np.eye(d)[7],
}


@pytest.mark.parametrize("spec", BOUNDS)
@pytest.mark.parametrize("dim", [64, 80])
def test_edges_give_finite_numbers(spec, dim):
    codec = codec_of(spec)
    x = mx.array(np.stack([make(dim) for make in EDGES.values()]).astype(np.float32))[None, None]
    packed = codec.encode(codec.rotate(x))
    for a in packed:
        if a.dtype == mx.float16:
            assert mx.isfinite(a).all().item(), "metadata"
    for dtype in (mx.float16, mx.bfloat16, mx.float32):
        back = codec.decode(packed, dtype, dim)
        assert back.dtype == dtype and mx.isfinite(back).all().item(), dtype
    zeros = codec.decode(codec.encode(mx.zeros((1, 1, 1, dim))), mx.float32, dim)
    assert mx.array_equal(zeros, mx.zeros_like(zeros)).item()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(BOUNDS)),
    hnp.arrays(np.float32, (3, 64), elements=st.floats(-65504, 65504, width=32)),
)
def test_no_vector_breaks_a_codec(spec, x):
    codec, x = codec_of(spec), mx.array(x)[None, None]
    y = codec.rotate(x)
    back = codec.decode(codec.encode(y), mx.float32, 64)
    assert mx.isfinite(back).all().item()
    if BOUNDS[spec] is not None and spec != "f16":
        # Whatever the vector, a codec with a scale of its own never returns one much longer than the clipped input.
        length = mx.linalg.norm(mx.clip(y, -65504, 65504), axis=-1)
        assert (mx.linalg.norm(back, axis=-1) <= 4 * length + 1e-3).all().item()


@pytest.mark.parametrize("spec", BOUNDS)
def test_a_codec_scales_with_its_input_and_knows_no_neighbours(spec):
    codec = codec_of(spec)
    x = mx.random.normal((1, 2, 9, 64), key=mx.random.key(1))
    y = codec.rotate(x)
    whole = codec.encode(y)
    part = codec.encode(y[:, :, 3:4])
    assert all(mx.array_equal(a[:, :, 3:4], b).item() for a, b in zip(whole, part))
    twice = codec.decode(codec.encode(y * 4), mx.float32, 64)
    assert mx.allclose(twice, 4 * codec.decode(whole, mx.float32, 64), rtol=2e-3, atol=2e-3).item()


# ---- rotations


@pytest.mark.parametrize("dim", [*DIMS, 16, 32, 40, 48, 56, 72, 160, 176])
def test_rotations_are_orthonormal(dim):
    x = mx.random.normal((5, dim), key=mx.random.key(0))
    for codec in (Affine(4), Turbo(4, "haar"), *([Fractional(2.5)] if dim % 16 == 0 else [])):
        y = codec.rotate(x)
        assert mx.allclose(mx.linalg.norm(y, axis=-1), mx.linalg.norm(x, axis=-1), rtol=1e-4).item()
        assert mx.allclose(codec.unrotate(y), x, atol=1e-4).item()
    matrix = np.array(rotation.matrix(dim))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(dim), atol=1e-5)
    np.testing.assert_allclose(np.array(rotation.rotate(x)), np.array(x) @ matrix.T, atol=1e-4)


def test_a_rotation_spreads_an_outlier():
    for dim in DIMS:
        assert mx.abs(rotation.rotate(mx.eye(dim))).max().item() <= (2 / dim) ** 0.5 + 1e-5, dim


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_rotations_keep_the_dtype(dtype):
    for codec in map(codec_of, BOUNDS):
        x = mx.ones((1, 1, 2, 64), dtype=dtype)
        assert codec.rotate(x).dtype == dtype and codec.unrotate(x).dtype == dtype


def test_outlier_channels_rescue_keys_with_outliers():
    x = mx.random.normal((1, 1, 500, 128), key=mx.random.key(0))
    x[..., [3, 70]] = x[..., [3, 70]] * 50

    def error(spec):  # of the ordinary channels, which is where an outlier's rounding error goes
        rest = (x - round_trip(codec_of(spec), x))[..., 4:70]
        return mx.sqrt(mx.square(rest).mean()).item()

    assert error("int4:out=2") < 0.25 * error("int4") < 0.25 * error("int4:norot:g128")


# ---- packing


@given(st.sampled_from(packing.WIDTHS), st.integers(1, 200), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_packing_is_lossless(bits, count, seed):
    values = np.random.RandomState(seed).randint(0, 2**bits, (2, count))
    packed = packing.pack(mx.array(values), bits)
    assert packed.dtype == mx.uint32 and packed.shape[-1] == packing.words(count, bits)
    np.testing.assert_array_equal(np.array(packing.unpack(packed, bits, count)), values)


def test_fields_are_little_endian_and_three_bits_are_two_planes():
    assert np.array(packing.pack(mx.array([1, 2, 3, 4, 5, 6, 7, 8]), 4)).tolist() == [0x87654321]
    assert np.array(packing.pack(mx.array([0, 1, 2, 3, 4, 5, 6, 7]), 3)).tolist() == [0b1110010011100100, 0xF0]


# ---- codebooks


@pytest.mark.parametrize("spec", ["tq4", "tq3:nc", "tq2.5", "tq3.5:ub", "tq2p", "tq4p", "qjl2", "qjl4:sketch=gauss"])
def test_books_and_projected_queries_say_what_decoding_says(spec):
    """`Codebooks`: what kernels multiply is what attention over decoded keys multiplies."""
    dim, (codec, _) = 64, KVSpec.parse(spec).codecs()
    form = codec.format(dim)
    assert isinstance(form, Codebooks)
    q, keys = (codec.rotate(mx.random.normal((1, 2, n, dim))) for n in (5, 64))
    *codes, scales = packed = codec.encode(keys)
    books, projected = form.books, codec.project(q)
    assert projected.shape[-1] == sum(book.dim for book in books)
    scores, at = mx.array(0.0), 0
    for i, (book, code) in enumerate(zip(books, codes, strict=True)):
        entries = mx.array(book.entries)[packing.unpack(code, book.bits, book.dim)] * book.step
        part = projected[..., at : at + book.dim] @ entries.swapaxes(-1, -2)
        scores, at = scores + part * scales[..., i][:, :, None], at + book.dim
    assert mx.allclose(scores, q @ codec.decode(packed, mx.float32, dim).swapaxes(-1, -2), atol=1e-4)


def test_codebooks_are_those_of_the_paper():
    root = (2 / np.pi) ** 0.5
    np.testing.assert_allclose(codebooks._sphere(1, 4096), [-root, root], rtol=1e-3)
    np.testing.assert_allclose(codebooks._sphere(2, 4096)[2:], [0.453, 1.51], rtol=2e-3)
    # Max 1960, for the normal distribution.
    np.testing.assert_allclose(codebooks._sphere(3, 4096)[4:], [0.2451, 0.7560, 1.3439, 2.1520], rtol=3e-3)
    np.testing.assert_allclose(
        codebooks._sphere(4, 4096)[8:], [0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326], rtol=3e-3
    )
    assert codebooks._sphere(4, 32)[-1] < codebooks._sphere(4, 128)[-1] < 2.70, "a small sphere has short tails"
    for level, expected in ((2, (0.3098, 0.634, 0.9368, 1.261)), (4, (0.5242, 0.7059, 0.8649, 1.0465))):
        np.testing.assert_allclose(codebooks.angle(2, level), expected, atol=2e-4)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_codebooks_satisfy_lloyds_conditions(bits, dim):
    book = np.array(codebooks.sphere(bits, dim))
    assert np.all(np.diff(book) > 0) and np.allclose(book, -book[::-1])
    t = np.linspace(-(dim**0.5), dim**0.5, 400_001)
    mass = np.clip(1 - t * t / dim, 0, None) ** ((dim - 3) / 2)
    cell = np.searchsorted((book[1:] + book[:-1]) / 2, t)
    means = np.bincount(cell, mass * t) / np.bincount(cell, mass)
    step = codebooks.integers(bits, dim)[1]
    np.testing.assert_allclose(means, book, atol=step + 2e-4)  # midpoints move as centroids are rounded


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6])
def test_codebooks_are_bytes_times_a_step(bits):
    """Kernels look codes up in tables of signed bytes, and must get the very numbers of the codec."""
    entries, step = codebooks.integers(bits, 128)
    assert len(set(entries)) == 1 << bits and entries[-1] == 127 == -entries[0]
    assert codebooks.sphere(bits, 128) == tuple(entry * step for entry in entries)


def test_nearest_is_nearest():
    book = codebooks.sphere(4, 128)
    t = mx.random.normal((1000,), key=mx.random.key(0)) * 1.5
    expected = np.abs(np.array(t)[:, None] - np.array(book)[None]).argmin(-1)
    np.testing.assert_array_equal(np.array(nearest(t, book)), expected)


def test_sketch_matrices_are_fixed_numbers():
    """A cache on disk is decoded by the same matrix on another machine."""
    np.testing.assert_allclose(np.array(sketch.matrix(64, 64, False))[0, :3], GAUSSIAN_HEAD, rtol=1e-6)
    rows = np.array(sketch.matrix(256, 128, True))
    np.testing.assert_allclose(rows[:128] @ rows[:128].T, 128 * np.eye(128), atol=1e-3)
    assert np.abs(rows[:128] @ rows[128:].T).max() > 5, "blocks are independent"


GAUSSIAN_HEAD = np.random.RandomState(sketch.SEED).standard_normal(3)


# ---- refusals


@pytest.mark.parametrize(
    "codec", [Affine(4), Turbo(4), Prod(3), Fractional(2.5), Polar(), QJL(2), Outliers(Turbo(4), 2)]
)
@pytest.mark.parametrize("dim", [72, 100, 7])
def test_head_dims_that_no_format_holds_are_refused(codec, dim):
    with pytest.raises(ValueError, match=f"head_dim {dim}.*multiple of 16; use --kv f16"):
        codec.check(dim)


@pytest.mark.parametrize(
    "make, part",
    [
        (lambda: Affine(5), "5 bits"),
        (lambda: Affine(4, 48), "group 48"),
        (lambda: Turbo(7), "7 bits"),
        (lambda: Turbo(4, "fourier"), "'fourier'"),
        (lambda: Turbo(4, fit="best"), "'best'"),
        (lambda: Prod(1), "1 bits"),
        (lambda: Fractional(2.25), "2.25 bits"),
        (lambda: QJL(0), "0 sketch bits"),
        (lambda: Outliers(Turbo(4), 9), "9 is not available"),
        (lambda: codebooks.sphere(7, 64), "7 bits"),
        (lambda: codebooks.sphere(2, 2), "dimension 2"),
        (lambda: packing.pack(mx.array([1]), 7), "7-bit"),
    ],
)
def test_bad_parameters_are_named(make, part):
    with pytest.raises(ValueError, match=part):
        make()
