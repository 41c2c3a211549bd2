"""A new codec costs one file: what it says of itself is enough for specs, caches, files and all kernels."""

from __future__ import annotations

import mlx.core as mx
import pytest

from opentq.attention import dispatch
from opentq.caches import disk
from opentq.caches.single import OpenTQCache
from opentq.kernels.cuda import launch as cuda
from opentq.kernels.cuda import layout as cuda_layout
from opentq.kernels.metal import attention as metal
from opentq.spec.kv import KVSpec

from . import toy_codec
from .matrix import Shape
from .oracle import args_of, fill, judge, queries, same_state, vectors


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    toy_codec.register(monkeypatch)


@pytest.mark.parametrize("text", ["toy", "int4/toy", "toy/tq3:norot:sink=4"])
def test_its_name_is_a_spec(text):
    spec = KVSpec.parse(text)
    assert str(KVSpec.parse(str(spec))) == str(spec) and "toy" in str(spec)
    assert 3 < spec.bits_per_value(128) < 5


@pytest.mark.parametrize("spec", ["toy", "toy:norot:sink=4", "int4/toy"])
@pytest.mark.parametrize("length", [1, 40])
def test_the_kernels_serve_it(spec, length, kernels):
    shape = Shape(key_dim=64, value_dim=64)
    handles = fill(cache := OpenTQCache(spec), *vectors(shape, 300), [300 - length, length])
    args = args_of(handles, queries(shape, length, dtype=mx.float16), causal=True)
    out, served_by = dispatch.attend(args)
    judge(args, out)
    assert cache.n_packed >= 192 and (served_by == "tiled") == (kernels == "tiled")


def test_it_is_saved_and_read_back(tmp_path):
    cache = OpenTQCache("toy")
    fill(cache, *vectors(Shape(), 200), [200])
    disk.save(tmp_path / "c", [cache], [0] * 200)
    assert same_state(disk.load(tmp_path / "c").caches[0], cache)


def test_cuda_and_metal_take_its_book():
    codec = toy_codec.Toy()
    layout = cuda_layout.layout_for("k", codec, 128)
    upper = bytes(toy_codec.ENTRIES[4:])
    assert f"0x{int.from_bytes(upper, 'little'):08x}u" in cuda.format_type(layout)
    assert layout.name == "mma64-k-3d128-d128"  # codes of 3 bits are looked up as they are stored
    y = mx.random.normal((1, 2, 64, 128))
    loaded = layout.load(layout.store(codec.encode(y)))
    assert all(mx.array_equal(a, b).item() for a, b in zip(loaded, codec.encode(y), strict=True))
    assert metal.codec_side(codec, 128).group == 128
