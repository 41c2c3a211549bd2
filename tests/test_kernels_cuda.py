"""The CUDA kernels without a GPU: run by a warp emulator, compiled by nvcc where there is one, held to their record."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from opentq.attention import backends, dispatch
from opentq.caches import single
from opentq.caches.single import OpenTQCache
from opentq.codecs import Raw, codebooks, packing, rotation, rounding
from opentq.codecs.affine import Affine
from opentq.codecs.polar import Polar
from opentq.codecs.qjl import QJL
from opentq.codecs.turbo import Fractional, Prod, Turbo
from opentq.contracts.attention import AttnArgs, PackedKV
from opentq.contracts.codec import packable
from opentq.contracts.layout import CANONICAL
from opentq.kernels.cuda import attention as fused_cuda
from opentq.kernels.cuda import geometry as cuda_geometry
from opentq.kernels.cuda import launch as cuda
from opentq.kernels.cuda import layout as cuda_layout
from opentq.kernels.cuda import nvrtc
from opentq.kernels.cuda.geometry import Geometry
from opentq.kernels.cuda.layout import BLOCK, BOOK, SIGNS, MmaLayout, Run, layout_for

from .cuda import emulator
from .matrix import Shape
from .oracle import args_of, fill, judge, queries, vectors

INT4 = Affine(4)
PLAIN = (CANONICAL, CANONICAL)
RECORDS = Path(__file__).parent.parent / "results" / "cuda.jsonl"


# ---- the record


def test_the_newest_gpu_record_is_of_these_kernels():
    """Every dtype that is served passed on a GPU with exactly these sources."""
    rows = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    checks = [row for row in rows if row["what"] == "conformance" and row["kernels"] == cuda.source_hash()]
    assert checks and rows[-1]["kernels"] == cuda.source_hash(), (
        "the CUDA sources changed: run dev/gpu_check.py on a GPU machine"
    )
    chosen = [row for row in rows if row["what"] == "pages" and row["kernels"] == cuda.source_hash()]
    assert chosen and not any(row["failed"] for row in chosen)
    served = [row for row in checks if getattr(mx, row["dtype"]) in fused_cuda.SERVED]
    assert {row["dtype"] for row in served} == {"float16", "bfloat16"}
    failed = sum(row["failed"] + row.get("steps_failed", 0) for row in served)
    assert failed == 0 and sum(row["cases"] for row in served) >= 100


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
    assert layout_for("k", Prod(3), 128).name == "mma64-k-2t128+1s128-d128"
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
                assert g.stages >= 2 and g.warps in (1, 2, 4, 8, 12)
                # Output accumulators: D/16 tiles x row tiles x 4 registers of at most 255.
                assert dim // 16 * g.tiles * 4 <= 128
                assert g.resident * (g.shared + 1024) <= cuda_geometry.SHARED_LIMIT


def test_the_headline_shape_gets_what_was_measured_best():
    g = geometry()
    assert (g.tiles, g.warps, g.stages, g.resident) == (1, 8, 2, 2)
    assert g.splits(8, 131072 // 32, 4, 132) == 16
    assert g.grid(1, 8, 8, 16) == (16, 8, 1)
    light = geometry(Turbo(3), Turbo(3))
    assert (light.tiles, light.warps, light.stages, light.resident) == (1, 12, 2, 1)


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


# ---- the source


def test_a_source_spells_its_instance_and_its_signature():
    source = geometry().source()
    assert source.name == "opentq_decode_f16_mma64_k_4g32_d128_mma64_v_4g32_d128_1_8_2"
    instance = "opentq::decode<opentq::f16, opentq::Affine<128, 4, 32>, opentq::Affine<128, 4, 32>, 1, 8, 2, "
    assert f"{instance}{source.shared}>(" in source.body
    unit = source.translation_unit()
    assert "//" not in unit and "#include" not in unit
    assert f'extern "C" __global__ __launch_bounds__(256, 2) void {source.name}(const opentq::f16* q, ' in unit
    assert "float* scratch, int k_blocks, int v_blocks, int columns, " in unit
    assert unit.count(f"struct {'Call'} {{") == 1


def test_a_codebook_reaches_the_kernel_as_bytes_and_a_step():
    book, step = codebooks.integers(3, 128)
    kind = cuda.format_type(layout_for("k", Turbo(3), 128))
    word = sum(entry << (8 * i) for i, entry in enumerate(book[4:]))
    assert kind == f"opentq::Book<128, 3, 0x{word:08x}u, 0x00000000u, 0x00000000u, 0x00000000u, {round(step * 2**31)}>"


def test_two_runs_and_sketches_are_made_of_books():
    def kind(codec):
        return cuda.format_type(layout_for("k", codec, 128))

    sign = "1, 0x7f7f7f7fu, 0u, 0u, 0u, 16909320>"
    assert kind(Fractional(2.5)) == f"opentq::Pair<{half_book(3)}, {half_book(2)}, 128>"
    assert kind(Prod(3)) == f"opentq::Pair<{kind(Turbo(2))}, opentq::Book<128, {sign}, 128>"
    assert kind(QJL(2)) == f"opentq::Sketch<opentq::Book<256, {sign}, 128>"


def half_book(bits: int) -> str:
    return cuda.format_type(layout_for("k", Turbo(bits), 64))


def test_the_source_hash_covers_every_kernel_file():
    folder = Path(cuda.__file__).parent
    assert {p.name for p in folder.glob("*.cu*") if p.suffix in (".cu", ".cuh")} == set(cuda.FILES)
    assert len(cuda.source_hash()) == 12


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_nvcc_compiles_the_kernels_without_warnings(tmp_path):
    sources = [
        geometry().source(),
        geometry(Turbo(5), Turbo(3)).source(),
        geometry(Prod(3), Fractional(2.5)).source(),
        geometry(Affine(8, 64), Affine(3), (80, 112), "opentq::bf16", 20).source(),
        cuda.pack_source(layout_for("v", Affine(3, 64), 80), "opentq::f16"),
        cuda.pack_source(layout_for("k", Fractional(2.5), 128), "opentq::f16", norm=True),
        cuda.unpack_source(layout_for("k", Turbo(4), 128), "opentq::bf16"),
    ]
    for source in sources:
        (tmp_path / "k.cu").write_text(source.translation_unit())
        target = "-gencode=arch=compute_90a,code=sm_90a"
        command = ["nvcc", target, "-std=c++17", "-Xptxas", "-v", "-cubin", "k.cu", "-o", "k.cubin"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr, done.stderr


# ---- kernels under the emulator


@pytest.mark.parametrize(
    "side, codec, dim, dtype",
    [
        ("k", Affine(4), 128, mx.float16),
        ("v", Affine(3, 64), 80, mx.bfloat16),
        ("v", Affine(8, 128), 64, mx.float32),
        ("k", Affine(2), 96, mx.float16),
        ("v", Turbo(1), 80, mx.bfloat16),
        ("k", Turbo(2, fit="norm"), 112, mx.float16),
        ("v", Turbo(3, fit="norm"), 64, mx.float16),
        ("k", Turbo(4), 128, mx.float32),
        ("k", Turbo(5, fit="norm"), 80, mx.bfloat16),
        ("v", Fractional(2.5, fit="norm"), 96, mx.float16),
    ],
    ids=str,
)
def test_pack_is_bit_for_bit_the_codec(side, codec, dim, dtype):
    layout = layout_for(side, codec, dim)
    y = mx.random.normal((1, 2, 128, dim)) * 3
    y[0, 0, 5], y[0, 0, 6] = 1.5, 0  # constant groups
    y[0, 1, 7] = y[0, 1, 7] * 1e-7
    y[0, 1, 8, : dim // 2] = 60000
    y = y.astype(dtype)
    (want,) = layout.store(codec.encode(y))
    source = cuda.pack_source(layout, cuda.CTYPES[dtype], getattr(codec, "fit", "") == "norm")
    inputs = [y] if layout.zeroed else [y, rounding.lengths(y, layout.groups)]
    (got,), _ = emulator.run(source, (8, 1, 1), inputs, [(want.shape, mx.uint32)])
    assert mx.array_equal(got, want)


def test_what_the_pack_kernel_makes():
    assert all(packable(c.format(64)) for c in (INT4, Turbo(4), Turbo(3, fit="norm"), Fractional(1.5)))
    assert not any(packable(c.format(64)) for c in (Turbo(4, fit="unbiased"), Prod(3), QJL(2), Raw()))


@pytest.mark.parametrize(
    "side, codec, dtype",
    [("k", Affine(4), mx.float16), ("v", Affine(3), mx.bfloat16)]
    + [("kv"[bits % 2], Turbo(bits), (mx.float16, mx.bfloat16)[bits // 3]) for bits in range(1, 6)]
    + [("k", Fractional(3.5), mx.float16)]
    + [("v", Polar(), mx.bfloat16)],
    ids=str,
)
def test_unpack_is_the_codecs_decode_in_logical_order(side, codec, dtype):
    dim = 96 if isinstance(codec, Fractional) else 80
    layout = layout_for(side, codec, dim)
    packed, sink, tail_start, columns = 100, 3, 5, 30
    canonical = codec.encode(mx.random.normal((2, 3, 128, dim)))
    (records,) = layout.store(canonical)
    dense = mx.random.normal((2, 3, columns, dim)).astype(mx.float16)
    tokens = packed + sink + columns - tail_start
    shape = (1, 2, tokens, dim)
    source = cuda.unpack_source(layout, cuda.CTYPES[dtype])
    scalars = (1, 1, packed, sink, tail_start, records.shape[2], 3, columns, tokens)
    (got,), _ = emulator.run(source, (2, 2, 1), [records, dense], [(shape, dtype)], scalars)
    middle = codec.decode(canonical, mx.float32, dim)[1:2, 1:, :packed]
    parts = [dense[1:2, 1:, :sink].astype(mx.float32), middle, dense[1:2, 1:, tail_start:].astype(mx.float32)]
    want = mx.concatenate(parts, axis=2).astype(dtype)
    # The kernel rounds scale * (number * step), the codec scale * entry: fp32's last place may differ, and then fp16's.
    # Polar numbers are fp16 before they are scaled.
    tolerance = 0 if layout.zeroed else mx.finfo(dtype).eps + isinstance(codec, Polar) * 2**-11
    assert (mx.abs(got - want) <= tolerance * mx.abs(want)).all()


def emulated_attend(args: AttnArgs, splits: int) -> mx.array:
    """`fused_cuda.decode` with the emulator in place of the launch; checks that the tickets are zero again."""
    rows = args.gqa * args.q.shape[2]
    g = Geometry.choose(args.k.layout, args.v.layout, cuda.CTYPES[args.q.dtype], rows)
    blocks = g.grid(args.q.shape[0], args.kv_heads, rows, splits)
    inputs = fused_cuda.inputs(args, mx.zeros((blocks[1] * blocks[2],), mx.uint32))
    outputs, left = emulator.run(
        g.source(), blocks, inputs, fused_cuda.outputs(args, g, blocks), fused_cuda.scalars(args)
    )
    assert not left[-1].any(), "tickets must be zero after a launch"
    return outputs[0]


def packed_args(k, v, dims, heads, length, lens, columns, dtype=mx.float16, **options) -> AttnArgs:
    """Random args in the mma layout. What lies beyond a sequence's packed tokens is NaN."""
    batch, kv_heads, gqa = len(lens), *heads
    capacity = -(-max(n for n, _, _ in lens) // BLOCK) * BLOCK or BLOCK
    sides = []
    for side, codec, dim in (("k", k, dims[0]), ("v", v, dims[1])):
        layout = layout_for(side, codec, dim)
        *codes, scales = codec.encode(mx.random.normal((batch, kv_heads, capacity, dim)) + 0.3)
        exists = mx.arange(capacity).reshape(1, 1, -1, 1) < mx.array([n for n, _, _ in lens]).reshape(-1, 1, 1, 1)
        scales = mx.where(exists, scales, mx.array(float("nan"), mx.float16))
        sides.append(PackedKV(codec, layout, layout.store((*codes, scales)), dim))
    dense = [mx.random.normal((batch, kv_heads, columns, dim)).astype(mx.float16) for dim in dims]
    q = mx.random.normal((batch, kv_heads * gqa, length, dims[0])).astype(dtype)
    return AttnArgs(q, *sides, *dense, tuple(lens), scale=dims[0] ** -0.5, causal=True, **options)


CASES = {
    "headline shape": (1, lambda: packed_args(INT4, INT4, (128, 128), (1, 8), 1, [(300, 0, 0)], 20)),
    "many splits": (7, lambda: packed_args(INT4, INT4, (128, 128), (1, 8), 1, [(300, 4, 4)], 50, sinks=mx.ones((8,)))),
    "ragged batch": (
        2,
        lambda: packed_args(INT4, INT4, (128, 128), (1, 8), 1, [(100, 4, 9), (37, 4, 4), (0, 0, 30)], 40),
    ),
    "even batch": (2, lambda: packed_args(INT4, INT4, (64, 64), (1, 8), 1, [(70, 4, 9)] * 2, 40)),
    "window": (2, lambda: packed_args(INT4, INT4, (128, 128), (1, 4), 2, [(200, 2, 2)], 20, window=60, softcap=20.0)),
    "k3v2, odd dims": (2, lambda: packed_args(Affine(3), Affine(2, 64), (80, 112), (1, 3), 2, [(111, 0, 0)], 9)),
    "k8v3, bf16": (2, lambda: packed_args(Affine(8, 64), Affine(3), (96, 64), (1, 5), 3, [(70, 0, 0)], 9, mx.bfloat16)),
    "tq4": (3, lambda: packed_args(Turbo(4), Turbo(4), (128, 128), (1, 8), 1, [(300, 4, 4)], 50)),
    "tq5/tq3, bf16": (2, lambda: packed_args(Turbo(5), Turbo(3), (80, 112), (1, 5), 3, [(70, 0, 0)], 9, mx.bfloat16)),
    "tq2/tq1": (1, lambda: packed_args(Turbo(2), Turbo(1), (96, 64), (2, 2), 1, [(100, 0, 0), (37, 0, 0)], 9)),
    "k8tq4": (2, lambda: packed_args(Affine(8), Turbo(4), (64, 64), (1, 4), 5, [(90, 0, 0)], 9, window=60)),
    "tq3 and int2 of 512": (1, lambda: packed_args(Turbo(3), Affine(2), (512, 512), (1, 8), 1, [(70, 0, 0)], 9)),
    "tq2.5": (3, lambda: packed_args(Fractional(2.5), Fractional(2.5), (128, 128), (1, 8), 1, [(300, 4, 4)], 50)),
    "tq3.5/tq1.5, bf16": (
        1,
        lambda: packed_args(
            Fractional(3.5), Fractional(1.5), (96, 64), (2, 1), 2, [(100, 0, 0), (37, 2, 4)], 9, mx.bfloat16
        ),
    ),
    "tq3p/tq3.5": (2, lambda: packed_args(Prod(3), Fractional(3.5), (64, 64), (2, 1), 1, [(90, 3, 3)], 20, window=70)),
    "tq4p, bf16": (1, lambda: packed_args(Prod(4), Turbo(4), (80, 80), (1, 5), 2, [(70, 0, 0)], 9, mx.bfloat16)),
    "qjl2/int4": (2, lambda: packed_args(QJL(2), INT4, (64, 64), (1, 8), 1, [(300, 4, 4), (37, 4, 9)], 50)),
    "qjl4 of 128": (1, lambda: packed_args(QJL(4), Turbo(3), (128, 128), (1, 16), 1, [(70, 0, 0)], 9)),
    "polar4": (3, lambda: packed_args(Polar(), Polar(), (128, 128), (1, 8), 1, [(300, 4, 4)], 50, window=200)),
    "qjl1/polar4, bf16": (
        1,
        lambda: packed_args(QJL(1), Polar(), (80, 112), (2, 1), 2, [(100, 0, 0), (37, 2, 4)], 9, mx.bfloat16),
    ),
    "polar4/tq1": (2, lambda: packed_args(Polar(), Turbo(1), (80, 64), (1, 3), 1, [(90, 3, 3)], 20, softcap=20.0)),
    "a sketch's chunk of rows": (1, lambda: packed_args(Prod(3), INT4, (64, 64), (1, 2), 40, [(90, 3, 3)], 60)),
    "D 512": (1, lambda: packed_args(INT4, INT4, (512, 512), (1, 8), 1, [(70, 0, 0)], 9)),
    "a chunk of rows": (1, lambda: packed_args(INT4, INT4, (64, 64), (1, 2), 40, [(90, 3, 3)], 60, window=37)),
    "nothing packed": (1, lambda: packed_args(INT4, INT4, (64, 64), (1, 2), 40, [(0, 0, 0)], 60)),
}


@pytest.mark.parametrize("name", CASES)
def test_decode_kernel(name):
    mx.random.seed(len(name))
    splits, make = CASES[name]
    args = make()
    judge_finite_part(args, emulated_attend(args, splits))


def judge_finite_part(args: AttnArgs, out: mx.array) -> None:
    """The rule, after the NaN beyond the packed tokens is cleared for the sake of the judge."""
    clean = []
    for kv in (args.k, args.v):
        *codes, scales = kv.layout.load(kv.arrays)
        scales = mx.where(mx.isnan(scales), 0, scales)
        clean.append(PackedKV(kv.codec, kv.layout, kv.layout.store((*codes, scales)), kv.head_dim))
    values = {name: getattr(args, name) for name in AttnArgs.__dataclass_fields__}
    judge(AttnArgs(**{**values, "k": clean[0], "v": clean[1]}), out)


def test_decode_over_a_real_cache_after_a_trim(monkeypatch):
    """The cache writes, trims inside a block and grows in this layout, and the kernel reads what it left."""
    layouts = cuda_layout.layouts(INT4, INT4, (64, 64))
    monkeypatch.setattr(dispatch, "layouts", lambda k, v, dims: layouts)
    shape = Shape(q_heads=4, kv_heads=2)
    k, v = vectors(shape, 320)
    cache = OpenTQCache("int4:sink=4")
    fill(cache, k[:, :, :300], v[:, :, :300], [300])
    cache.trim(77)
    handles = fill(cache, k[:, :, 223:305], v[:, :, 223:305], [80, 2])
    args = args_of(handles, queries(shape, 2, dtype=mx.float16), causal=True)
    assert args.k.layout == layouts[0] and args.max_packed % BLOCK == 0
    judge(args, emulated_attend(args, 2))


@pytest.mark.parametrize("dim, dtype", [(32, mx.float32), (128, mx.float16), (512, mx.bfloat16)])
def test_rotate_is_the_hadamard_transform(dim, dtype):
    x = mx.random.normal((2, 3, 5, dim)).astype(dtype)
    source = cuda.rotate_source(dim, cuda.CTYPES[dtype])
    (got,), _ = emulator.run(source, (8, 1, 1), [x], [(x.shape, dtype)], (30,))
    want = rotation.rotate(x).astype(mx.float32)
    assert mx.allclose(got.astype(mx.float32), want, rtol=2 * mx.finfo(dtype).eps, atol=1e-6)
    assert not cuda.rotates(80) and not cuda.rotates(16) and not cuda.rotates(1024)


@pytest.mark.parametrize("k, v, dims", [(INT4, Turbo(4), (64, 128)), (Affine(8, rotated=False), INT4, (80, 32))])
def test_extend_rotates_what_is_new_and_copies_the_rest(k, v, dims):
    rotated = [fused_cuda.hadamard(codec, dim) for codec, dim in zip((k, v), dims)]
    old = [mx.random.normal((2, 3, 7, dim)).astype(mx.float16) for dim in dims]
    new = [(mx.random.normal((2, 3, 4, dim)) * 100).astype(mx.bfloat16) for dim in dims]
    new[0][0, 0, 0] = 1e30  # must stay finite
    source = cuda.extend_source((dims[0], rotated[0]), (dims[1], rotated[1]), "opentq::bf16")
    shapes = [((2, 3, 11, dim), mx.float16) for dim in dims]
    got, _ = emulator.run(source, (17, 2, 1), [*old, *new], shapes, (6, 7, 4))
    for side, codec, mine in zip(range(2), (k, v), got):
        assert mx.array_equal(mine[:, :, :7], old[side])
        assert mx.allclose(mine[:, :, 7:], single.dense(codec, new[side]), rtol=2e-3, atol=0.1)


def test_who_extends():
    assert fused_cuda.hadamard(INT4, 80) is None and fused_cuda.hadamard(Turbo(4, "haar"), 64) is None
    assert fused_cuda.hadamard(Prod(3), 64) is True and fused_cuda.hadamard(Fractional(2.5), 64) is None
    assert fused_cuda.hadamard(QJL(2), 80) is False
    assert fused_cuda.hadamard(Turbo(4, "none"), 80) is False and fused_cuda.hadamard(Raw(), 64) is None
    columns = (mx.zeros((1, 1, 1, 64), mx.float16),) * 2
    assert fused_cuda.extend((INT4, INT4), columns, columns) is None, "no GPU here"


@pytest.mark.parametrize("at_once", [0, 1 << 30])
def test_prefill_attends_some_heads_at_a_time(monkeypatch, at_once):
    asked = emulate_launches(monkeypatch)
    monkeypatch.setattr(fused_cuda, "AT_ONCE", at_once)
    args = packed_args(Turbo(4), INT4, (64, 64), (4, 2), 70, [(90, 3, 3), (64, 3, 5)], 80)
    judge_finite_part(args, fused_cuda.prefill(args))
    assert asked == ([4] * 4 if at_once else [1] * 16)


def emulate_launches(monkeypatch) -> list[int]:
    """Kernels run in the emulator, called as they are; the list takes the y blocks of every launch."""
    asked: list[int] = []

    def launch(source):
        def call(inputs, outputs, scalars, blocks):
            asked.append(blocks[1])
            return emulator.run(source, blocks, inputs, outputs, scalars)[0]

        return call

    monkeypatch.setattr(cuda, "compiled", launch)
    return asked


@pytest.mark.parametrize("codec, dtype", [(Prod(3), mx.float16), (QJL(2), mx.bfloat16)], ids=str)
def test_prefill_brings_sketches_back(monkeypatch, codec, dtype):
    emulate_launches(monkeypatch)
    args = packed_args(codec, Polar(), (64, 64), (1, 2), 66, [(90, 3, 3), (0, 3, 5)], 80, dtype)
    judge_finite_part(args, fused_cuda.prefill(args))


def test_compiled_kernels_are_kept(monkeypatch, tmp_path):
    """One compilation per source, card and compiler."""
    calls = []
    monkeypatch.setattr(nvrtc.build, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(nvrtc, "version", lambda: "13.0")
    monkeypatch.setattr(nvrtc, "compile_source", lambda *a: calls.append(a) or b"code of " + a[1].encode())
    for source in ("one", "one", "two"):
        assert nvrtc.cubin("kernel", source, "sm_90") == b"code of " + source.encode()
    nvrtc.cubin("kernel", "one", "sm_100")
    assert [source for _, source, _ in calls] == ["one", "two", "one"]
    assert not list(tmp_path.glob(".build-*"))


def test_who_is_not_served():
    args = packed_args(INT4, INT4, (64, 64), (1, 2), 1, [(0, 0, 0)], 4)
    assert fused_cuda.attend(args) is None, "no GPU here"
    assert not fused_cuda.prefers_prefill(args)
    long = packed_args(INT4, INT4, (64, 64), (1, 2), 64, [(0, 0, 0)], 64)
    assert fused_cuda.prefers_prefill(long)
