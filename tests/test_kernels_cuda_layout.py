"""The CUDA kernels' storage layout and launch geometry."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from opentq.attention import backends
from opentq.codecs import packing
from opentq.codecs.affine import Affine
from opentq.codecs.polar import Polar
from opentq.codecs.qjl import QJL
from opentq.codecs.turbo import Fractional, Prod, Turbo
from opentq.contracts.layout import CANONICAL
from opentq.kernels.cuda import geometry as cuda_geometry
from opentq.kernels.cuda import layout as cuda_layout
from opentq.kernels.cuda.geometry import Geometry
from opentq.kernels.cuda.layout import BOOK, SIGNS, MmaLayout, Run, layout_for

INT4 = Affine(4)
PLAIN = (CANONICAL, CANONICAL)


# ---- storage layout


def codecs() -> list:
    affine = [*(Affine(bits, 32) for bits in (2, 3, 4, 8)), Affine(4, 64), Affine(8, 128)]
    return [
        *affine,
        *map(Turbo, range(1, 6)),
        *map(Fractional, (1.5, 2.5, 3.5)),
        *map(Prod, (2, 4)),
        QJL(1),
        QJL(3),
        Polar(),
    ]


@pytest.mark.parametrize("codec", codecs(), ids=str)
@pytest.mark.parametrize("dim", [64, 80, 112, 128])
@pytest.mark.parametrize("side", ["k", "v"])
def test_the_layout_is_a_permutation_of_the_canonical_bits(side, codec, dim):
    layout = layout_for(side, codec, dim)
    if layout is None:
        assert (isinstance(codec, Fractional) and dim % 32) or (isinstance(codec, Prod | QJL) and side == "v")
        return
    packed = codec.encode(mx.random.normal((2, 3, 128, dim)))
    stored = layout.store(packed)
    assert stored[0].shape == (2, 3, 2, 2 * layout.record_words)
    size = dim * 128 * 2 * 3 // 2 if isinstance(codec, Polar) else sum(a.nbytes for a in packed)
    assert stored[0].nbytes == size
    for mine, theirs in zip(layout.load(stored), packed, strict=True):
        assert mx.array_equal(mine, theirs)


def test_a_code_lies_where_the_contract_says():
    """formats.cuh, 4 bits: word `tile` of lane 4g+t, bit 4r + 16 (e%2); K rows are keys, V rows are dims."""
    key, dim = 16 + 8 + 5, 16 * 3 + 8 + 2 * 2 + 1  # strip 1, row 13; tile 3, column 13
    for side in "kv":
        row, column = (13, 13) if side == "k" else (dim % 16, key % 16)
        values = np.zeros((1, 1, 64, 64), np.uint32)
        values[0, 0, key, dim] = 9
        packed = (packing.pack(mx.array(values), 4), mx.zeros((1, 1, 64, 4), mx.float16))
        words = np.array(layout_for(side, Affine(4), 64).store(packed)[0]).reshape(-1)
        lane, register = 4 * (row % 8) + column % 8 // 2, row // 8 + 2 * (column // 8)
        word = 4 + dim // 16  # tiles of strip 1 follow the four of strip 0
        at = word // 4 * 128 + lane * 4 + word % 4
        assert np.flatnonzero(words).tolist() == [at]
        assert words[at] == 9 << (4 * register + 16 * (column % 2))


def test_layout_names_are_read_back_and_others_are_refused():
    for layout in filter(None, (layout_for(side, codec, 96) for side in "kv" for codec in codecs())):
        assert cuda_layout.layout_named(layout.name) == backends.layout_named(layout.name) == layout
    assert layout_for("k", Prod(3), 128).name == "mma64-k-2d128+1s128-d128"
    assert cuda_layout.layout_named("mma64-k-3t128-d128") is None, "other bits under that name, once"
    assert cuda_layout.layout_named("canonical") is cuda_layout.layout_named("mma64-k-d128") is None
    assert cuda_layout.layouts(Affine(4), Turbo(6), (128, 128)) == PLAIN, "64 magnitudes do not fit the registers"
    assert cuda_layout.layouts(Affine(4), Affine(8), (128, 640)) == PLAIN
    assert cuda_layout.layouts(QJL(8), Affine(8), (128, 128)) == PLAIN, "1,024 signs"
    assert cuda_layout.layouts(Fractional(2.5), Turbo(4), (80, 80)) == PLAIN, "half a tile"
    assert cuda_layout.layouts(Turbo(4), Affine(8), (128, 64)) == (
        MmaLayout("k", 128, (Run(4, BOOK, 128),)),
        MmaLayout("v", 64, (Run(8, 32, 64),)),
    )
    assert cuda_layout.layouts(QJL(2), Fractional(2.5), (64, 128)) == (
        MmaLayout("k", 64, (Run(1, SIGNS, 128),)),
        MmaLayout("v", 128, (Run(3, BOOK, 64), Run(2, BOOK, 64))),
    )


# ---- launch geometry


def geometry(k=INT4, v=INT4, dims=(128, 128), dtype="opentq::f16", rows=8) -> Geometry:
    return Geometry.choose(*cuda_layout.layouts(k, v, dims), dtype, rows)


def test_every_shape_has_a_geometry_that_fits():
    for dim in (64, 80, 96, 112, 128, 192, 256, 512):
        for k in (Affine(2), Affine(3), INT4, Affine(8), Turbo(1), Turbo(5), Prod(4), QJL(4)):
            for rows in (1, 8, 9, 16, 64, 1024):
                if layout_for("k", k, dim) is None:
                    assert isinstance(k, Prod | QJL) and dim >= 192
                    continue
                g = geometry(k, Affine(8), (dim, dim), rows=rows)
                assert g.shared <= cuda_geometry.SHARED_LIMIT
                assert g.stages >= 2 and g.warps in (1, 2, 4, 8, 12, 16)
                # Output accumulators: D/16 tiles x row tiles x 4 registers of at most 255.
                assert dim // 16 * g.tiles * 4 <= 128
                assert g.resident * (g.shared + 1024) <= cuda_geometry.SHARED_LIMIT


def test_the_headline_shape_gets_what_was_measured_best():
    g = geometry()
    assert (g.tiles, g.warps, g.stages, g.resident) == (1, 8, 2, 2)
    assert g.splits(8, 131072 // 32, 4, 132) == 16
    assert g.grid(1, 8, 8, 16) == (16, 8, 1)
    light = geometry(Turbo(3), Turbo(3))
    assert (light.tiles, light.warps, light.stages, light.resident) == (1, 16, 2, 1)
    assert geometry(Turbo(5), Turbo(3)).warps == 16 and geometry(Prod(3), Turbo(3)).warps == 12


@pytest.mark.parametrize(
    "tiles, records, strips, splits", [(8, 2, 4, 1), (8, 32, 4, 8), (256, 4096, 4, 1), (70, 999, 1, 3)]
)
def test_splits(tiles, records, strips, splits):
    assert geometry().splits(tiles, records, strips, 132) == splits


def test_splits_never_fill_more_than_the_machine_or_drop_below_one():
    for tiles in (1, 3, 8, 100, 132, 500):
        for records in (0, 1, 100, 10**6):
            g = geometry()
            n = g.splits(tiles, records, 1, 132)
            assert 1 <= n <= cuda_geometry.MAX_SPLITS
            assert n == 1 or n * tiles <= 132 * g.resident
