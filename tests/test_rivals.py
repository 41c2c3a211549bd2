"""What stands beside the CUDA decode kernel: the choice of the best rival, its tables, and how a rival fails."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from opentq.codecs.affine import Affine

sys.path.insert(0, str(Path(__file__).parents[1] / "dev"))
import tables
from gpu import goals, rivals
from gpu.graph import Shape

SHAPE = Shape(256, Affine(4), Affine(4), batch=2, kv_heads=3, gqa=2, dim=4)
TORCH = SimpleNamespace(cuda=SimpleNamespace(empty_cache=lambda: None))


def record(engine: str, us: float, harness: str = "graph", kernels: str = "new", date: str = "2026-11-30", **changed):
    row = {"what": "decode", "engine": engine, "harness": harness, "us": us, "kernels": kernels, "date": date}
    row |= {"device": "NVIDIA H200", "versions": {"mlx": "1", "torch": "2"}, "gb_per_s": 1000, "share_of_read": 0.5}
    return row | {"bytes": 10**8} | goals.BASE | changed


def run(*rows: dict) -> list[dict]:
    """As a run records them: the read rate first; every codec and context was timed in the last run of everything."""
    first = record("ours", 0) | {"what": "read bandwidth", "by": "a sum"}
    return [first, first | {"what": "prefill", "date": "2026-11-29"}, *rows]


# ---- the best of all


def test_the_best_of_each_kind_is_the_rival():
    f = goals.Figures(
        run(
            record("ours", 45),
            record("mlx_sdpa", 132, "mlx"),
            record("flashinfer-xqa", 130),
            record("flashinfer-xqa-fp8", 96),
            record("flash-attn-3-fp8", 97),
            record("mlx_lm_quantized", 1, "mlx"),
            record("torch-cudnn", 3, n=1024),
        )
    )
    assert f.best_fp16() == (130, "flashinfer-xqa")
    assert f.best(goals.FP8) == (96, "flashinfer-xqa-fp8")
    assert f.best_fp16(n=1024) == (3, "torch-cudnn")
    assert f.best(goals.FP8, n=1024) is None


def test_every_way_has_a_kind_and_a_name_in_words():
    for way in rivals.WAYS:
        assert goals.bits(way.name) == way.bits
    assert {*goals.FP16, *goals.FP8} <= set(tables.RIVALS)
    assert goals.bits("ours") is goals.bits("mlx_lm_quantized") is None


# ---- the table


@pytest.fixture
def table(monkeypatch):
    def make(*rows: dict) -> str:
        monkeypatch.setattr(tables, "records", lambda name: run(*rows))
        return tables.nvidia()

    return make


def test_a_table_without_fp8_records_has_no_column_for_them(table):
    text = table(record("ours", 50), record("torch-flash", 120), record("flashinfer-fa2", 100))
    assert "| 100.0 (flashinfer-fa2) | 2.00x |" in text
    assert "The best fp16 is that of FlashAttention 2 and FlashInfer's fa2. NVIDIA" in text
    assert "fp8" not in text


def test_a_table_names_the_best_of_both_kinds(table):
    fp8 = [record("flash-attn-3-fp8", 80), record("flashinfer-xqa-fp8", 75)]
    text = table(record("ours", 50), record("mlx_sdpa", 150, "mlx"), *fp8, record("ours", 20, n=1024))
    assert "| 150.0 (mlx_sdpa) | 3.00x | 75.0 (flashinfer-xqa-fp8) | 1.50x |" in text
    assert "| 1 x 1K | 20.0 | 1.00 | 50% |  |  |  |  |" in text
    assert "The best fp8 is that of FlashInfer's XQA and FlashAttention 3." in text


def test_a_run_of_a_few_shapes_does_not_hide_the_others(table):
    old = [record("ours", 60, kernels="old"), record("ours", 30, kernels="old", k="tq4", v="tq4")]
    gone = record("ours", 70, kernels="older", date="2026-11-20", k="tq2", v="tq2")
    text = table(gone, *old, record("ours", 50))
    assert "int4:g32 | 1 x 128K | 50.0 |" in text and "60.0" not in text
    assert "tq4 | 1 x 128K | 30.0* |" in text and "*: an earlier version of the kernels." in text
    assert "tq2" not in text


# ---- ways


@pytest.mark.parametrize("layout, page", [("NHD", 64), ("HND", 64), ("NHD", 0), ("HND", 0)])
def test_a_cache_is_read_by_head(layout, page):
    way = rivals.Way("x", ("x",), list, "float16", layout, page)
    shape = way.cache(SHAPE)
    x = np.arange(np.prod(shape)).reshape(shape)
    found = way.by_head(x, SHAPE)
    assert found.shape == (2, 3, 256, 4)
    for b, h, t in ((0, 0, 0), (0, 2, 63), (1, 1, 64), (1, 2, 255)):
        block, row = divmod(t, page or 256)
        block += b * (256 // (page or 256))
        assert (found[b, h, t] == (x[block, row, h] if layout == "NHD" else x[block, h, row])).all()


def test_the_fastest_way_counts_and_a_failure_is_said(monkeypatch, capsys):
    times = {"HND": 3e-5, "NHD": 2e-5}

    def seconds(torch, way, shape):
        if way.dtype == "bfloat16":
            raise ValueError("wrong: relative error 1")
        if way.name == "flashinfer-fa2-fp8":
            raise RuntimeError("not\ncompiled")
        return times[way.layout] + 1e-6 * (way.page == 128)

    monkeypatch.setattr(rivals, "seconds", seconds)
    found = rivals.fastest(TORCH, rivals.WAYS, SHAPE)
    settings = {name: (taken, way.setting) for name, (taken, way) in found.items()}
    assert settings["flashinfer-xqa"] == (2e-5, "float16, NHD, pages of 64")
    assert settings["flash-attn-3-fp8"] == (2e-5, "float8_e4m3fn, NHD")
    assert not {"flash-attn-3", "flashinfer-fa2-fp8"} & set(found)
    said = capsys.readouterr().out
    assert "flash-attn-3 (bfloat16, HND) does not serve" in said and "ValueError: wrong: relative error 1" in said
    assert "RuntimeError: not compiled" in said


def test_what_is_not_installed_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr(rivals.Way, "package", lambda way: "there" if "flashinfer" in way.packages else None)
    assert {rivals.WAYS[n].packages for n in rivals.installed()} == {("flashinfer",)}
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "  flash_attn_interface or fa3_fwd_interface is not installed: no flash-attn-3, flash-attn-3-fp8"


def test_a_way_that_breaks_its_process_is_left_out(monkeypatch, capsys):
    ways = [rivals.Way(name, ("sys",), list, "float16", "NHD") for name in ("crash", "fine")]
    monkeypatch.setattr(rivals, "WAYS", ways)
    code = "import os, sys; sys.argv[2] == 'rival 0' and (print('boom', file=sys.stderr, flush=True) or os.abort())"
    assert [way.name for way in rivals.usable([sys.executable, "-c", code])] == ["fine"]
    assert "crash (float16, NHD) is left out: status -6: boom" in capsys.readouterr().out


def test_a_way_that_does_not_end_is_left_out(monkeypatch):
    monkeypatch.setattr(rivals, "PATIENCE", 0.1)
    assert rivals.attempt([sys.executable, "-c", "import time; time.sleep(9)"]) == "no answer within 0.1 s"


def test_our_launch_has_all_scalars_of_the_kernel():
    shape = Shape(1024, Affine(4), Affine(4))
    given = dict(zip([name for name, _ in shape.geometry().source().scalars], shape.scalars, strict=True))
    assert given["packed"] == 1024 and given["q_heads"] == 64 and given["columns"] == 64 and given["scale"] == 128**-0.5
