"""The benchmark: its arithmetic, its rivals' formats, its records, tables and page."""

from __future__ import annotations

import json
import math
import time

import mlx.core as mx
import numpy as np
import pytest
from typer.testing import CliRunner

from opentq import records
from opentq.bench import build, kernel, long, report, svg, table, timing
from opentq.bench import model as models
from opentq.bench.chart import Chart, Series, charts
from opentq.bench.rivals import find
from opentq.cli.bench import bench
from opentq.errors import UserError
from opentq.spec.kv import KVSpec
from opentq.spec.text import specs

QUICK = timing.Windows(2, 0.0, 0.0)
TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "vocab_size": 256,
    "max_position_embeddings": 2048,
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return str(path)


@pytest.fixture(autouse=True)
def little_memory(monkeypatch):
    """What is measured of the machine is measured over 16 MiB."""
    read = timing.read_bandwidth
    monkeypatch.setattr(timing, "read_bandwidth", lambda *_: read(16, 2))


# ---- timing


def test_arms_take_turns_forwards_and_backwards():
    calls = []
    timings = timing.interleave([lambda: calls.append("a"), lambda: calls.append("b")], timing.Windows(4, 0.0, 0.0))
    assert calls == ["a", "b"] + ["a", "b", "b", "a"] * 2
    assert [len(t.windows) for t in timings] == [4, 4]


def test_timing_statistics():
    taken = timing.Timing((1.0, 2.0, 9.0))
    assert (taken.median, taken.mean) == (2.0, 4.0)
    assert taken.sd == pytest.approx(math.sqrt(19))


def test_read_bandwidth_is_plausible():
    assert 1e8 < timing.read_bandwidth(16, 2) < 2e13


# ---- kernel


def test_float64_attention_is_softmax_attention():
    q, k, v = (np.random.default_rng(0).standard_normal(s).astype(np.float32) for s in ((4, 8), (2, 5, 8), (2, 5, 8)))
    got = kernel.attend_float64(q, k, v, 0.5)
    args = (mx.array(x)[None] for x in (q[:, None], k, v))
    exact = mx.fast.scaled_dot_product_attention(*args, scale=0.5)
    np.testing.assert_allclose(got, np.array(exact)[0, :, 0], rtol=1e-5)


def test_kernel_rows_are_right():
    records = list(kernel.bench((4, 2, 64), [130, 256], specs("f16,int4,k8v4"), ["mlx", "mlx-lm"], QUICK))
    assert len(records) == 2 * (3 + 2 + 2)
    for r in records:
        assert r["error"] < (2e-3 if r["engine"] == "opentq" else 1e-3), r["engine"]
        assert r["gb_per_s"] == pytest.approx(r["bytes"] / r["ms"] / 1e6)
        assert r["versions"]["mlx"] and r["device"] and r["date"] and r["served_by"]
    rows = {(r["engine"], r["kv"]): r for r in records if r["context"] == 256}
    # 193 tokens are packed at 5 bits, the others wait in fp16.
    packed = 192
    assert rows["opentq", "int4"]["bytes"] == 2 * 2 * (packed * 40 + (256 - packed) * 128)
    assert rows["mlx", "f32"]["bytes"] == 2 * 2 * 256 * 64 * 4
    assert rows["opentq", "int4"]["error_with_codec"] > 10 * rows["opentq", "f16"]["error_with_codec"]


def test_stored_is_what_went_in():
    problem = kernel.Problem.random((4, 2, 64), 200)
    arm = kernel.Ours(KVSpec.parse("f16:sink=4"), problem)
    for got, exact in zip(arm.stored(1), (problem.k, problem.v)):
        np.testing.assert_array_equal(got, exact[:1])


def test_long_contexts_are_checked_in_some_heads(monkeypatch):
    monkeypatch.setattr(kernel, "CHECKED", 300 * 64)
    whole, part = kernel.bench((4, 2, 64), [150, 300], specs("int4"), windows=QUICK)
    assert (whole["checked_heads"], part["checked_heads"]) == (2, 1)
    assert whole["error"] < 2e-3 and part["error"] < 2e-3 < part["error_with_codec"]


def test_an_arm_that_takes_too_long_says_so():
    rows = list(kernel.bench((4, 2, 64), [64, 128, 1 << 14], specs("int4"), windows=QUICK, budget=1e-9))
    assert rows[0]["note"].startswith("timed once: 2 windows would take") and rows[0]["windows_ms"] == [rows[0]["ms"]]
    assert len(rows) > 1 and all(
        r["ms"] is None and r["note"].startswith("left out: a call would take") for r in rows[1:]
    )
    assert "left out" in table.render(rows, "md") and charts(rows)


@pytest.mark.parametrize("rival", ["llama.cpp", "ort"])
def test_rivals_attend_to_what_they_store(rival):
    try:
        entries = find(rival)(64)
    except UserError as error:
        assert "pip install" in str(error)
        return
    problem = kernel.Problem.random((8, 2, 64), 100)
    for entry in entries:
        arm = entry.make(problem, 2)
        out = np.array(arm.call(), np.float64).reshape(8, 64)
        exact = kernel.attend_float64(problem.q, *arm.stored(2), problem.scale)
        assert np.array_equal(arm.stored(1)[0], arm.stored(2)[0][:1])
        assert kernel.relative(out, exact) < 2e-2, arm.kv
        assert kernel.relative(exact, kernel.attend_float64(problem.q, problem.k, problem.v, problem.scale)) < 0.5


def test_bad_input_is_said_in_words():
    with pytest.raises(UserError, match="multiple of KV heads"):
        next(kernel.bench((5, 2, 64), [64], specs("int4")))
    with pytest.raises(UserError, match="--against"):
        find("vllm")
    with pytest.raises(UserError, match="output format"):
        table.render([], "xml")
    with pytest.raises(UserError, match="--weights"):
        build.build("llama-3.1-8b", "random-3bit")
    with pytest.raises(UserError, match="--layers"):
        build.build("llama-3.1-8b", "random-4bit", 99)
    with pytest.raises(UserError, match="no benchmark"):
        report.page([{"kind": "other"}])


def test_a_window_that_the_hypervisor_disturbed_is_taken_again(monkeypatch):
    waits = iter([0.0, 5.0, 5.0, 9.0, 9.0, 9.0])  # before and after: 5 s stolen, 4 s stolen, none
    monkeypatch.setattr(timing, "stolen", lambda: next(waits))
    values = iter([3.0, 2.0, 1.0])
    assert timing.undisturbed(lambda: next(values)) == (1.0, 0.0)
    clock = iter(range(1000))
    monkeypatch.setattr(timing, "stolen", lambda: next(clock))
    value, share = timing.undisturbed(lambda: 7.0)
    assert value == 7.0 and share > timing.CALM, "never calm: the calmest, and its row says so"
    calls = []
    monkeypatch.setattr(timing, "PATIENCE", 0.05)
    timing.undisturbed(lambda: calls.append(time.sleep(0.02)) or 1.0)
    assert len(calls) in (1, 2), "a machine that is never calm is not waited for"


# ---- model


def test_model_rows(config):
    built = build.build(config, "random-4bit", layers=2)
    assert built.name.endswith("(2 layers, random-4bit)")
    rows = list(models.bench(built, specs("off,int4"), [0, 300], [32], [4], repetitions=2, fill="random"))
    assert [(r["test"], r["depth"], r["kv"]) for r in rows] == [
        (test, depth, kv) for depth in (0, 300) for test in ("pp32", "tg4") for kv in ("native", "int4")
    ]
    deep = {(r["test"], r["kv"]): r for r in rows if r["depth"]}
    assert deep["pp32", "native"]["vs_native"] == 1
    assert deep["tg4", "int4"]["kv_bytes"] < deep["tg4", "native"]["kv_bytes"]
    assert deep["tg4", "native"]["served_by"] == "mlx-lm" and deep["tg4", "int4"]["served_by"] != "mlx-lm"
    assert all(r["tokens_per_s"] > 0 and r["peak_bytes"] > r["weight_bytes"] for r in rows)
    assert rows[0]["fill"] == "" and deep["tg4", "int4"]["fill"] == "random"


def test_parallel_sequences_are_one_batch(config):
    built = build.build(config, "random-4bit", layers=2)
    rows = list(models.bench(built, specs("off,int4"), [300], [32], [4], repetitions=2, fill="random", parallel=3))
    assert [r["test"] for r in rows] == ["tg4x3", "tg4x3"], "prompts are not a batch's"
    (one,) = models.bench(built, specs("int4"), [300], [], [4], repetitions=1, fill="random")
    assert 2.5 < rows[1]["kv_bytes"] / one["kv_bytes"] < 3.5 and rows[1]["kv_bytes"] < rows[0]["kv_bytes"]
    assert all(r["tokens_per_s"] > 0 and r["peak_bytes"] > r["weight_bytes"] for r in rows)


def test_random_fill_equals_prefill_in_size(config):
    built = build.build(config, "random-f16")
    arms = [models.ModelArm(built, KVSpec.parse("int4"), 128, 0) for _ in range(2)]
    for arm, how in zip(arms, ("prefill", "random")):
        arm.fill(200, how)
    assert [c.offset for c in arms[0].caches] == [c.offset for c in arms[1].caches] == [200] * 3
    assert arms[0].nbytes == arms[1].nbytes


def test_caches_are_put_back_after_each_run(config):
    arm = models.ModelArm(build.build(config, "random-f16"), KVSpec.parse("int4"), 64, 0)
    arm.fill(100, "prefill")
    arm.prompt(40, 0)
    arm.generate(3, 0)
    assert {c.offset for c in arm.caches} == {100}


@pytest.fixture
def same_limit():
    """What a benchmark sets, it restores: over a limit that was left behind, MLX waits in every later test."""
    before = mx.set_memory_limit(1 << 34)
    yield
    assert mx.set_memory_limit(before) == 1 << 34


def test_an_arm_over_the_memory_limit_is_out_and_says_so(config, same_limit):
    built = build.build(config, "random-f16")
    rows = list(models.bench(built, [None], [64], [16], [], repetitions=1, limit=1 << 10))
    assert rows[0]["tokens_per_s"] is None and "the limit is" in rows[0]["note"]
    assert "the limit is" in table.render(rows, "md")


def test_long_goes_on_when_an_arm_ends(config, monkeypatch):
    built = build.build(config, "random-f16")

    def measure(built, contender, context, limits, step, depth):
        if contender.name == "native" and context > 256:
            raise long.Stopped("out of memory: pretended")
        return {"prefill_per_s": 1.0, "decode_per_s": 1.0, "kv_bytes": 1, "peak_bytes": 1, "needle": None}

    monkeypatch.setattr(long, "_measure", measure)
    rows = list(long.bench(built, ["native", "int4"], 256, 4096, long.Bounds(tokens=1024)))
    assert [(r["arm"], r["context"], r["note"]) for r in rows] == [
        ("native", 256, ""),
        ("int4", 256, ""),
        ("native", 512, "out of memory: pretended"),
        ("int4", 512, ""),
        ("int4", 1024, ""),
        ("int4", 2048, "the model was made for 1,024 tokens"),
    ]


def test_long_measures(config, same_limit):
    built = build.build(config, "random-f16")
    rows = list(long.bench(built, ["native", "mlx4", "int4"], 128, 128, long.Bounds()))
    assert rows and all(r["prefill_per_s"] > 0 and r["decode_per_s"] > 0 for r in rows)
    rows = list(long.bench(built, ["native"], 128, 128, long.Bounds(memory=1 << 10)))
    assert "out of memory" in rows[0]["note"]


# ---- records, tables, page


def test_command_prints_tables_and_keeps_records(tmp_path):
    results = tmp_path / "r.jsonl"
    args = ["kernel", "--shape", "4,2,64", "--ctx", "128", "--kv", "int4", "--windows", "2", "--warm", "0", "--window"]
    done = CliRunner().invoke(bench, [*args, "0", "--results", str(results)])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[0].startswith("| engine | kv | context | ms |")
    for form in ("csv", "json", "jsonl"):
        text = table.render(records.read([results]), form)
        assert "opentq" in text
    page = tmp_path / "page.html"
    done = CliRunner().invoke(bench, ["report", str(results), "-o", str(page)])
    assert done.exit_code == 0, done.output
    html = page.read_text()
    assert html.count("<svg") == 1 and "prefers-color-scheme: dark" in html
    assert "<script" not in html and "http" not in html.replace("http-equiv", "")


def test_rows_are_compared_with_mlx_over_fp16():
    records = list(kernel.bench((4, 2, 64), (128,), specs("int4"), ("mlx",), QUICK))
    fp16 = next(r["ms"] for r in records if (r["engine"], r["kv"]) == ("mlx", "f16"))
    text = table.render(records, "md")
    assert f"| {records[0]['ms'] / fp16:.2f}x |" in text and "| 1.00x |" in text
    assert "x |" not in table.render(records[:1], "md")


def test_charts_keep_the_newest_value_of_a_point():
    base = {"kind": "kernel", "shape": [4, 2, 64], "device": "d", "engine": "opentq", "kv": "int4"}
    rows = [{**base, "context": c, "ms": ms} for c, ms in ((1024, 5.0), (2048, 9.0), (1024, 4.0))]
    ((chart, behind),) = charts(rows)
    assert chart.series == (Series("opentq int4", ((1024, 4.0), (2048, 9.0))),) and len(behind) == 3


def test_axes_and_markup():
    axis = svg.Axis([1024, 131072], (0, 100), True)
    assert (axis.at(1024), round(axis.at(131072))) == (0, 100)
    assert axis.ticks(powers_of_two=True) == [2.0**e for e in range(10, 18)]
    text = svg.draw(Chart("n", "t <&>", "x", "y", (Series("a<b", ((1, 1), (2, 0))),), log_y=True, limit=(2.0, "limit")))
    assert "a&lt;b" in text and "NaN" not in text and 'class="limit"' in text
    assert svg.draw(Chart("n", "t", "x", "y", ())) == "<p>no points</p>"
