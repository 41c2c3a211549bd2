"""The CUDA kernels without a GPU: run by a warp emulator, compiled by nvcc where there is one, held to their record."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from opentq.attention import dispatch
from opentq.caches import single
from opentq.caches.single import OpenTQCache
from opentq.codecs import Raw, codebooks, rotation, rounding
from opentq.codecs.affine import Affine
from opentq.codecs.polar import Polar
from opentq.codecs.qjl import QJL
from opentq.codecs.turbo import Fractional, Prod, Turbo
from opentq.contracts.attention import AttnArgs, PackedKV
from opentq.contracts.codec import packable
from opentq.kernels.cuda import attention as fused_cuda
from opentq.kernels.cuda import launch as cuda
from opentq.kernels.cuda import layout as cuda_layout
from opentq.kernels.cuda import nvrtc
from opentq.kernels.cuda.geometry import Fused
from opentq.kernels.cuda.layout import BLOCK, layout_for

from .cuda import emulator
from .matrix import Shape
from .oracle import args_of, fill, judge, queries, vectors
from .test_kernels_cuda_layout import geometry

INT4 = Affine(4)
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


# ---- the source


def test_a_source_spells_its_instance_and_its_signature():
    source = geometry().source()
    assert source.name == "opentq_decode_f16_mma64_k_4g32_d128_mma64_v_4g32_d128_1_8_2"
    instance = "opentq::decode<opentq::f16, opentq::Affine<128, 4, 32>, opentq::Affine<128, 4, 32>, 1, 8, 2, "
    assert f"{instance}{source.shared}, opentq::Fused<false, false, false, false, false>>(" in source.body
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
        cuda.unpack_source((layout_for("k", Turbo(4), 128), layout_for("v", INT4, 128)), "opentq::bf16"),
    ]
    for file in dict.fromkeys(source.file for source in sources):
        text = cuda.text(file)
        kernels = [s.translation_unit().removeprefix(text) for s in sources if s.file == file]
        (tmp_path / "k.cu").write_text("".join((text, *kernels)))
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
    source = cuda.unpack_source((layout,), cuda.CTYPES[dtype])
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
    outputs, left = emulated(args, Fused(listed=args.pages is not None, capped=args.softcap > 0), splits)
    assert not left[7].any(), "tickets must be zero after a launch"
    return outputs[0]


def emulated(args: AttnArgs, fused: Fused, splits: int, fresh=None, center=None):
    """A decode launch of `splits` splits in the emulator."""
    launch = fused_cuda.Launch(args, fused, center is not None)
    call = launch.launches.call(args.dense_k.shape[2], args.lens, splits)
    more = () if fresh is None else (*fresh, cuda.no_halves() if center is None else center)
    inputs = launch.inputs(args, call, fused_cuda.query(args), more)
    return emulator.run(launch.launches.geometry.source(), call.grid, inputs, call.outputs, call.scalars)


STEPS = {
    "one token": (3, lambda: packed_args(INT4, Turbo(3), (64, 128), (1, 8), 1, [(300, 4, 4)], 20), True, False),
    "a batch, centred": (
        2,
        lambda: packed_args(Turbo(5), INT4, (128, 64), (2, 2), 1, [(100, 4, 9), (37, 4, 4), (0, 0, 30)], 40),
        True,
        True,
    ),
    "some tokens, unrotated keys": (
        2,
        lambda: packed_args(Affine(8, rotated=False), Turbo(2), (80, 64), (2, 3), 4, [(70, 2, 2)], 9, window=60),
        True,
        False,
    ),
    "the first tokens": (
        1,
        lambda: packed_args(INT4, Turbo(4), (64, 64), (1, 8), 2, [(0, 0, 0)], 2, mx.bfloat16),
        True,
        False,
    ),
    "a list of pages": (
        3,
        lambda: packed_args(
            *(Turbo(5), Turbo(3), (64, 64), (2, 3), 1, [(410, 4, 4), (130, 4, 4)], 20),
            pages=mx.array([[[0, 2, 4, 6], [1, 3, 5, 6]], [[0, 1, 2, 0], [0, 1, 2, 5]]], dtype=mx.int32),
        ),
        True,
        True,
    ),
    "one split, lent columns": (
        1,
        lambda: packed_args(INT4, INT4, (64, 64), (1, 8), 2, [(90, 0, 0)], 9, mx.bfloat16, sinks=mx.ones((8,))),
        False,
        False,
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_in_one_launch_is_rotate_extend_attend_and_rotate(name):
    mx.random.seed(len(name))
    splits, make, append, centered = STEPS[name]
    args = make()
    (batch, heads, held, _), length = args.dense_k.shape, args.q.shape[2]
    codecs, dtype = (args.k.codec, args.v.codec), args.q.dtype
    fresh, center = None, None
    old = [args.dense_k, args.dense_v]
    wanted = list(old)
    if append:
        old = [mx.contiguous(x[:, :, : held - length]) for x in old]
        shapes = [(batch, heads, length, side.head_dim) for side in (args.k, args.v)]
        fresh = tuple((mx.random.normal(shape) * 5).astype(dtype) for shape in shapes)
        center = mx.random.normal((batch, heads, 1, args.k.head_dim)).astype(mx.float16) if centered else None
        news = [single.shifted(single.dense(codecs[0], fresh[0]), center), single.dense(codecs[1], fresh[1])]
        wanted = [mx.concatenate(pair, axis=2) for pair in zip(old, news)]
    turned = [bool(fused_cuda.hadamard(codec, side.head_dim)) for codec, side in zip(codecs, (args.k, args.v))]
    fused = Fused(append, *turned, listed=args.pages is not None, capped=args.softcap > 0)
    call = replace(args, dense_k=old[0], dense_v=old[1])
    (out, _, *dense), left = emulated(call, fused, splits, fresh, center)
    assert not left[7].any(), "tickets must be zero after a launch"
    for mine, theirs in zip(dense, wanted):
        assert mx.allclose(mine, theirs, rtol=2e-3, atol=2e-2)
        assert mx.array_equal(mine[:, :, : held - length], theirs[:, :, : held - length])
    if append:  # the judge takes the columns that the kernel made
        args = replace(args, dense_k=dense[0], dense_v=dense[1])
    turn = codecs[1].rotate if turned[1] else lambda x: x
    query = codecs[0].rotate(args.q.astype(mx.float32)).astype(dtype) if turned[0] else args.q
    judge_finite_part(replace(args, q=query), turn(out))


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
    "a list of pages": (
        2,
        lambda: packed_args(
            *(INT4, Turbo(3), (128, 64), (2, 8), 2, [(350, 4, 4), (200, 2, 2)], 20),
            pages=mx.array([[[0, 3, 5], [1, 4, 5]], [[0, 2, 3], [1, 2, 3]]], dtype=mx.int32),
        ),
    ),
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
    assert asked == ([4] * 2 if at_once else [1] * 8)


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
    monkeypatch.setattr(nvrtc, "_nvfatbin", lambda: None)
    monkeypatch.setattr(nvrtc, "compile_source", lambda *a: calls.append(a) or b"code of " + a[1].encode())
    for source in ("one", "one", "two"):
        assert nvrtc.cubin("kernel", source, "sm_90") == b"code of " + source.encode()
    nvrtc.cubin("kernel", "one", "sm_100")
    assert [source for _, source, _ in calls] == ["one", "two", "one"]
    assert not list(tmp_path.glob(".build-*"))


def test_compiled_kernels_are_compressed(monkeypatch, tmp_path, caplog):
    """Where nvFatbin is installed; code that was kept without it is made anew."""
    compressor = Compressor()
    monkeypatch.setattr(nvrtc.build, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(nvrtc, "version", lambda: "13.0")
    monkeypatch.setattr(nvrtc, "compile_source", lambda *a: b"code" * 9)
    monkeypatch.setattr(nvrtc, "_nvfatbin", lambda: None)
    assert nvrtc.cubin("kernel", "one", "sm_90") == b"code" * 9
    monkeypatch.setattr(nvrtc, "_nvfatbin", lambda: compressor)
    assert [nvrtc.cubin("kernel", "one", "sm_90") for _ in range(2)] == [b"90:code"] * 2
    assert compressor.open == 0
    compressor.status = 6
    assert nvrtc.cubin("kernel", "two", "sm_90") == b"code" * 9
    assert "kernel is not compressed" in caplog.text and "nvFatbinAddCubin answered error 6" in caplog.text
    assert compressor.open == 0


class Compressor:
    """nvFatbin's calls, as the kernels' cache makes them."""

    def __init__(self):
        self.open, self.status, self.kept = 0, 0, b""

    def nvFatbinCreate(self, handle, options, count):
        self.open += 1
        return int(list(options) != [b"-compress-all", b"-compress-mode=size"] or count.value != 2)

    def nvFatbinAddCubin(self, handle, code, size, arch, name):
        self.kept = arch + b":" + code[:4]
        return self.status

    def nvFatbinSize(self, handle, size):
        size._obj.value = len(self.kept)
        return 0

    def nvFatbinGet(self, handle, buffer):
        buffer.raw = self.kept
        return 0

    def nvFatbinDestroy(self, handle):
        self.open -= 1
        return 0


def test_who_is_not_served():
    args = packed_args(INT4, INT4, (64, 64), (1, 2), 1, [(0, 0, 0)], 4)
    assert fused_cuda.attend(args) is None, "no GPU here"
    assert not fused_cuda.prefers_prefill(args)
    long = packed_args(INT4, INT4, (64, 64), (1, 2), 64, [(0, 0, 0)], 64)
    assert fused_cuda.prefers_prefill(long)
