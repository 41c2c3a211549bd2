"""The Metal kernels, executed in the emulator: conformance with the judge, counts, and geometry."""

from __future__ import annotations

import re
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from opentq.attention import dispatch
from opentq.bench import device, metal_tune, timing
from opentq.codecs import Affine
from opentq.codecs.qjl import QJL
from opentq.codecs.turbo import Fractional, Prod, Turbo
from opentq.errors import UserError
from opentq.kernels.metal import attention as fused_metal
from opentq.kernels.metal import launch as metal

from . import oracle
from .matrix import Shape
from .msl import launch, mlx_sources
from .msl.harness import LANES, MATRIX, gpu, needs_emulator, reports, step  # noqa: F401

pytestmark = needs_emulator
SINKS = mx.array([0.3, 1.0, -2.0, 5.0, 0.0, 1.0])
RNG = np.random.default_rng(7)


# ---- our kernels are what MLX would compile


@pytest.mark.parametrize("batch, space", [(1, "constant"), (3, "device")])
def test_the_compiled_text_is_the_one_mlx_generates(batch, space, monkeypatch):
    """Small inputs come in constant memory, larger ones in device memory; the kernels must take both."""
    made = {}

    def make(**creation):
        kernel = launch.metal_kernel(**creation)
        return made.setdefault(kernel.name, kernel)

    monkeypatch.setattr(metal, "make", make)
    shape = Shape(batch=batch)
    args = step("int4", shape, 70, 1)
    oracle.judge(args)
    text = next(iter(made["opentq_decode_whole"]._texts.values()))
    assert f"const {space} int32_t* lens [[buffer(9)]]" in text
    assert (
        "[[kernel]] void custom_kernel_opentq_decode_whole" in text and "device float* partial [[buffer(16)]]" in text
    )
    assert mlx_sources.preamble().index("typedef half float16_t") < len(mlx_sources.preamble())


def test_formats_have_one_numbering():
    text = (metal.HERE / "common.metal").read_text()
    listed = re.sub(r"//[^\n]*", "", re.search(r"enum OtqFormat : int \{(.*?)\};", text, re.S)[1])
    assert [name.strip() for name in listed.split(",") if name.strip()] == [f"OTQ_{f.name}" for f in metal.Format]
    assert [int(f) for f in metal.Format] == list(range(len(metal.Format)))


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

BOOKS = ["tq4", "tq2/int4", "int8/tq3", "tq5/tq1", "tq6:haar"]
RUNS = [
    "tq2.5",
    "tq1.5/tq3.5:nc",
    "tq2p/tq1.5",
    "tq4p/int8:sketch=orth",
    "qjl1/tq2",
    "qjl4/int4",
    "polar4",
    "polar4/int3",
]
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
@pytest.mark.parametrize("spec", ["int2", "int3", "int4", "int8", "k8v4:g64", "k4v2:g128", "f16", *BOOKS, *RUNS])
@pytest.mark.parametrize("tune", [LANES, MATRIX], ids=["lanes", "matrix"])
def test_every_shape_and_spec(shape, spec, tune, monkeypatch):
    monkeypatch.setattr(metal, "tuning", lambda: tune)
    if spec in RUNS and fused_metal.side(step(spec, shape, 70, 1).k) is None:
        assert shape.key_dim * (2 if spec.startswith("tq") else 4) > 512
        return
    for tokens, length, dtype in ((203, 1, mx.float16), (150, 5, mx.bfloat16), (140, 1, mx.float32)):
        oracle.judge(step(spec, shape, tokens, length, dtype, causal=length > 1))
    if tune is LANES:
        oracle.judge(step(spec, shape, 150, 19, causal=True, window=70))


@pytest.mark.parametrize("dim", [256, 512])
def test_decode_of_large_heads(dim):
    oracle.judge(step("int4", Shape(q_heads=2, kv_heads=1, key_dim=dim, value_dim=dim), 140, 1))


@pytest.mark.parametrize(
    "spec", ["int2", "int3", "int8", "k8v4:g64", "k4v2:g128", "f16", "int4:sink=4:recent=70", *BOOKS, *RUNS]
)
@pytest.mark.parametrize("tune", [LANES, MATRIX], ids=["lanes", "matrix"])
def test_decode_specs(spec, tune, monkeypatch):
    monkeypatch.setattr(metal, "tuning", lambda: tune)
    oracle.judge(step(spec, Shape(), 203, 1))


@pytest.mark.parametrize("tune", [LANES, MATRIX], ids=["lanes", "matrix"])
def test_codebooks_where_lanes_are_left_over(tune, monkeypatch):
    """A look-up takes a whole simdgroup, also where 32 does not divide what is to be decoded."""
    monkeypatch.setattr(metal, "tuning", lambda: tune)
    odd = Shape(q_heads=5, kv_heads=1, key_dim=80, value_dim=112)
    oracle.judge(step("tq3/tq6", odd, 197, 1))
    oracle.judge(step("tq5/tq3", odd, 130, 1, mx.float32))
    oracle.judge(step("tq2/tq4", Shape(q_heads=2, kv_heads=1, key_dim=256, value_dim=192), 140, 1))
    oracle.judge(step("tq2.5/tq3.5", odd, 197, 1))  # runs of 40 and of 56 channels
    oracle.judge(step("polar4/tq1.5", odd, 130, 1, mx.float32))
    oracle.judge(step("tq3p/polar4", Shape(q_heads=2, kv_heads=1, key_dim=256, value_dim=256), 140, 1))


WIDE = Shape(q_heads=2, kv_heads=1, key_dim=512, value_dim=512)


@pytest.mark.parametrize(
    "spec, shape, length, handover",
    [
        ("tq5/tq3:nc:sink=4", Shape(batch=2, q_heads=6, kv_heads=2), 1, 16),
        ("int4", Shape(batch=2, q_heads=4, kv_heads=2, key_dim=128), 3, 32),
        ("tq2.5/int3:sink=2", replace(WIDE, q_heads=1, key_dim=192), 1, 32),
        ("int4", WIDE, 1, 32),  # four simdgroups hand over more than a page, unless they are held back
    ],
)
def test_the_pages_of_a_list_are_read_where_they_lie(spec, shape, length, handover, monkeypatch):
    """The newest page may be a part of one, and a sequence may have fewer pages than its list."""
    monkeypatch.setattr(metal, "tuning", lambda: replace(LANES, handover=handover))
    args = step(spec, shape, 620, length, causal=length > 1)
    packed, *ends = args.lens[0]
    newest = (packed - 20) // 64
    lists = [[[0, 3, 4, newest], [1, 2, 6, newest]], [[0, 1, 2, 0]] * 2][: shape.batch]
    args.lens = ((packed - 20, *ends), (130, *ends))[: shape.batch]
    args.pages = mx.array(lists, dtype=mx.int32)[:, : shape.kv_heads]
    out = fused_metal.attend(args)
    assert out is not None
    oracle.judge(args.picked(), out)
    oracle.judge(args, out)
    monkeypatch.setattr(metal, "tuning", lambda: MATRIX)
    assert fused_metal.attend(args) is None


def test_calls_without_a_kernel_are_not_served():
    wide = Shape(q_heads=2, kv_heads=1, key_dim=128, value_dim=128)
    for spec, shape in (("int4:out=2", Shape()), ("qjl8/int4", wide), ("qjl4/int4", replace(wide, key_dim=192))):
        assert fused_metal.attend(step(spec, shape, 140, 1)) is None


@pytest.mark.parametrize("spec", ["tq2.5:sink=4", "polar4/tq2.5", "qjl2/int4:sink=4:recent=70"])
def test_runs_in_ragged_sequences(spec):
    """Several sequences, heads and query tokens, which every array has its own stride for; a window, and float32."""
    shape = Shape(batch=2)
    args = step(spec, shape, 230, 2, mx.float32, causal=True, window=100)
    packed, sink, start = args.lens[0]
    args = replace(args, lens=((packed, sink, start), (packed - 50, sink, start)))
    for tune in (LANES, MATRIX):
        metal.forget()
        metal.tuning = lambda tune=tune: tune
        oracle.judge(args)


@pytest.mark.parametrize("tune", [LANES, MATRIX], ids=["lanes", "matrix"])
def test_decode_options(tune, monkeypatch):
    monkeypatch.setattr(metal, "tuning", lambda: tune)
    few = Shape(q_heads=2, kv_heads=1)
    oracle.judge(step("int4:sink=4:recent=70", Shape(), 203, 3, causal=True, window=100, sinks=SINKS[:4]))
    oracle.judge(step("int4:sink=4", Shape(), 203, 3, mx.float32, causal=True, softcap=20.0))
    oracle.judge(step("int4", Shape(), 203, 1, mx.bfloat16, sinks=SINKS[:4], window=13))
    oracle.judge(step("int4", few, 203, 8, causal=True))
    oracle.judge(step("int4", few, 203, 16, causal=True))
    oracle.judge(step("int4", few, 3, 3, causal=True))
    oracle.judge(step("int4:sink=8", few, 3, 3, causal=True))


@pytest.mark.parametrize(
    "spec", ["int4", "int3:g64:sink=5:recent=33", "k8v4:g64", "f16", "tq4/tq3", "tq5/int2", *RUNS[::3], "qjl2/polar4"]
)
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
        metal.forget()
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
    for expected, got in zip(codec.encode(y), fused_metal.pack(codec.format(dim), y)):
        assert mx.array_equal(expected, got).item()


@pytest.mark.parametrize("fit", ["length", "norm"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 1.5, 2.5, 3.5])
def test_a_codebook_packs_bit_for_bit(bits, fit):
    codec = Fractional(bits, fit=fit) if bits % 1 else Turbo(int(bits), fit=fit)
    for dim, dtype in ((80, np.float16), (128, np.float32)):
        y = mx.array(RNG.standard_normal((1, 2, 9, dim)).astype(dtype))
        y[0, 0, 3] = 0  # scale 0
        y[0, 1, 4, 0] = 60000.0
        y[0, 1, 5] = 65504.0  # as long as can be
        y[0, 1, 6] *= 1e-5  # a scale that is not a normal half
        for expected, got in zip(codec.encode(y), fused_metal.PACKED.encode(codec, y), strict=True):
            assert mx.array_equal(expected, got).item()
    assert len(reports("pack_book")) >= 2


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
    assert reports("decode_whole") and reports("matrix") and reports("pack")


# ---- geometry


FORMATS = metal.Format
PLANNED = (
    *((FORMATS.INT2, 32), (FORMATS.INT3, 32), (FORMATS.INT4, 32), (FORMATS.INT4, 128), (FORMATS.INT8, 64)),
    *((FORMATS.HALF, 512), (FORMATS.POLAR, 512)),
)


def test_every_plan_fits_into_threadgroup_memory():
    for dim in (64, 80, 96, 112, 128, 192, 256, 512):
        sides = [metal.Side(form, min(group, dim), dim) for form, group in PLANNED]
        wide = (fused_metal.codec_side(codec, dim) for codec in (Prod(3), QJL(1), QJL(2), QJL(4)))
        sides += [side for side in wide if side]
        for side in sides:
            for rows in (1, 2, 3, 4, 7, 8, 16, 24, 256):
                for tune in (LANES, metal.Tuning(teams=8, handover=32), metal.Tuning(keys=1, handover=8)):
                    if rows <= metal.lane_rows(side, side):
                        plan = metal.plan_decode(side, side, rows, 8, 131072, tune, 40)
                        assert plan.threadgroup_bytes(side, side) <= metal.THREADGROUP_BYTES
                        assert plan.rows >= rows and plan.splits * plan.teams <= metal.MAX_SPLITS
                for own in (False, True):
                    for wide in (False, True):
                        plan = metal.plan_matrix(side, side, rows, 8, 131072, own, wide, LANES, 40)
                        assert plan.threadgroup_bytes(side, side, wide) <= metal.THREADGROUP_BYTES
                        height = 8 if own else 8 * plan.simdgroups
                        assert plan.row_tiles * height >= rows


@pytest.mark.parametrize("shape", [Shape(), Shape(q_heads=16, key_dim=128, value_dim=128)], ids=str)
def test_planned_threadgroup_memory_is_what_the_kernel_declares(shape):
    args = step("int4", shape, 130, 1)
    oracle.judge(args)
    k, v = fused_metal.side(args.k), fused_metal.side(args.v)
    plan = metal.plan_decode(k, v, args.gqa, shape.kv_heads, 131, LANES, metal.cores())
    declared = reports("decode_whole")[-1].threadgroup_memory
    assert abs(declared - plan.threadgroup_bytes(k, v)) < 7 * 16  # each of seven arrays is rounded up to 16 bytes


@pytest.mark.parametrize(
    "tune", [metal.Tuning(teams=2, keys=1, handover=8), metal.Tuning(teams=8, handover=32)], ids=str
)
def test_every_tuning_is_right(tune, monkeypatch):
    """What `--tune` may try on a device."""
    monkeypatch.setattr(metal, "tuning", lambda: tune)
    oracle.judge(step("int4", Shape(), 203, 1))


# ---- tuning


@pytest.fixture
def m9(monkeypatch, tmp_path):
    """A GPU of a generation that nobody has measured, and its owner's empty configuration."""
    monkeypatch.undo()
    monkeypatch.setenv("OPENTQ_KERNELS", "tiled")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(metal, "architecture", lambda: "applegpu_g99s")
    metal._known.cache_clear()
    yield tmp_path / "opentq" / "metal.json"
    metal._known.cache_clear()


def seconds(tune: metal.Tuning) -> float:
    """A GPU on which the matrix variant with 24 simdgroups is best, and the lane layout likes 8 teams."""
    if tune.variant == "matrix":
        return 1 + abs(tune.simdgroups - 24)
    return 2 + abs(tune.teams - 8) + abs(tune.keys - 1) + abs(tune.handover - 8) / 8 + abs(tune.simdgroups - 16)


def test_tune_finds_the_fastest_and_the_kernels_use_it(m9, monkeypatch):
    monkeypatch.setattr(metal_tune, "SHAPES", ((4, 2, 64),))
    monkeypatch.setattr(metal_tune, "CONTEXTS", (65, 130))
    monkeypatch.setattr(metal_tune.kernel.Ours, "call", lambda self: metal.tuning())
    monkeypatch.setattr(timing, "interleave", lambda calls, *_: [timing.Timing((seconds(c()),)) for c in calls])
    assert metal.tuning() == metal.Tuning()
    lines = list(metal_tune.tune(timing.Windows(2, 0.0, 0.0)))
    assert "applegpu_g99s" in lines[0] and lines[1].startswith("matrix") and str(m9) in lines[-1]
    assert len(lines) > 12 and sum("in use" in line for line in lines[1:-1]) == 1
    assert (metal.tuning().variant, metal.tuning().simdgroups) == ("matrix", 24)
    lanes = next(line for line in lines if line.startswith("lanes"))
    assert "teams 8 keys 1 handover  8 simdgroups 16" in lanes
    with metal.trying(metal.Tuning(teams=1)):
        assert metal.tuning().teams == 1
    monkeypatch.setattr(metal, "architecture", lambda: "applegpu_g13s")
    metal.keep(metal.Tuning(keys=1))
    assert metal.tuning() == metal.Tuning(keys=1) and set(metal.measured()) == {"applegpu_g99s", "applegpu_g13s"}


def test_doctor_judges_both_variants(monkeypatch):
    """`opentq doctor --bench` by the code that will run on a Mac, kernels in the emulator."""
    monkeypatch.setattr(metal, "architecture", lambda: "applegpu_g13s")
    monkeypatch.setattr(metal, "tuning", lambda: metal._trial or LANES)
    small = {"specs": ("tq4/int3",), "shapes": ((4, 2, 64),), "options": (), "tokens": 130, "timed": ("int4",)}
    before = len(launch.launches)
    records = list(device.examine(replace(device.QUICK, **small, contexts=(600,), deep=(130,), prompt=20)))
    assert not any(device.failed(r) for r in records)
    assert records[0]["tuning"]["variant"] == "lanes"
    for kind in ("conformance", "kernel"):
        own = [r for r in records if r["kind"] == kind and r.get("engine", "opentq") == "opentq"]
        assert {r["variant"] for r in own} == {"lanes", "matrix"}
    assert {name for name, _ in launch.launches[before:]} >= {f"opentq_{name}" for name in metal.KERNELS}


@pytest.mark.parametrize("text", ["{", "[1]", '{"applegpu_g99s": {"teams": 3}}', '{"applegpu_g99s": {"what": 3}}'])
def test_a_damaged_tuning_file_is_named(m9, text):
    m9.parent.mkdir()
    m9.write_text(text)
    with pytest.raises(UserError, match=f"{m9} is damaged.*--tune again"):
        metal.tuning()


def test_tune_needs_metal():
    with pytest.raises(UserError, match="no Metal here"):
        next(metal_tune.tune(timing.Windows(2, 0.0, 0.0)))
