"""`opentq doctor --bench`: it runs for real, a wrong kernel fails it, and its file tells nothing private."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from typer.testing import CliRunner

from dev import community
from opentq.attention import dispatch
from opentq.bench import device, device_times, report, timing
from opentq.cli.main import app


@pytest.fixture
def doctor(monkeypatch, tmp_path):
    """Run `opentq doctor ARGS` in an empty folder, bandwidths over little memory: (exit code, output, records)."""
    monkeypatch.chdir(tmp_path)
    read, copied = timing.read_bandwidth, device_times.copy_bandwidth
    monkeypatch.setattr(timing, "read_bandwidth", lambda: read(16, 2))
    monkeypatch.setattr(device_times, "copy_bandwidth", lambda: copied(16, 2))

    def call(*args: str):
        done = CliRunner().invoke(app, ["doctor", *args])
        files = list(tmp_path.rglob("*.jsonl"))
        return done, [json.loads(line) for f in files for line in f.read_text().splitlines()]

    return call


def test_bench_writes_what_it_finds(doctor, tmp_path):
    done, records = doctor("--bench", "--quick")
    assert done.exit_code == 0, done.output
    assert {r["kind"] for r in records} == {"device", "conformance", "pack", "pages", "kernel", "call"}
    judged = {r["served_by"] for r in records if r["kind"] == "conformance"}
    assert judged == {name for name, _ in dispatch.candidates()}
    compared = [r for r in records if "max_error" in r]
    assert compared and all(r["ok"] and r["max_error"] <= 2 * r["naive_error"] + device.ATOL for r in compared)
    assert all(r["identical"] == 1 for r in records if r["kind"] == "pack")
    assert f"{len(records)} lines" in done.output and "Nothing was sent" in done.output
    (told,) = (r for r in records if r["kind"] == "device")
    assert told["copy_bandwidth"] > 0 and told["os"] and "gpu_cores" not in told  # which is of Macs
    engines = {r["engine"] for r in records if r["kind"] == "kernel"}
    assert engines == {"opentq", "mlx", "mlx-lm"}
    calls = {(r["what"], r["kv"]) for r in records if r["kind"] == "call"}
    assert calls >= {("prefill", "int4"), ("append", "int4"), ("prefill", "mlx float32")}
    (file,) = tmp_path.glob("*.jsonl")
    assert community.problems(file, [r | {"commit": "0123456789ab"} for r in records]) == []
    html = report.page(records)
    assert html.count("<svg") == 2 and f"{len([r for r in records if r['kind'] == 'conformance'])} passed" in html
    assert not any(str(secret) in json.dumps(records) for secret in (tmp_path, Path.home(), Path.cwd()))


def test_a_wrong_kernel_fails_the_bench(doctor, monkeypatch):
    def zeros(args):
        return mx.zeros((*args.q.shape[:3], args.v.head_dim), args.q.dtype)

    def refused(args):
        raise RuntimeError("[metal::Device] Unable to build metal library from source\nerror: no such thing")

    for function, words in ((zeros, "max_error"), (refused, "Unable to build metal library")):
        monkeypatch.setattr(dispatch, "native_candidates", lambda function=function: [("broken", function)])
        done, _ = doctor("--bench", "--quick", "-o", "deep/er.jsonl")
        assert done.exit_code == 1 and "FAILED conformance, broken, int4" in done.output and words in done.output


@pytest.mark.parametrize("args", [["--quick"], ["--kv", "int4"], ["-o", "x.jsonl"], ["--bench", "--json"]])
def test_options_that_do_not_go_together(doctor, args):
    done, records = doctor(*args)
    assert done.exit_code != 0 and "--bench" in str(done.exception) and not records


# ---- files that people send in


def change(records, kind, **fields):
    i = next(i for i, r in enumerate(records) if r["kind"] == kind)
    return [*records[:i], records[i] | fields, *records[i + 1 :]]


@pytest.fixture(scope="module")
def sent():
    """What a Mac of fakes would send: a line of each kind, its name, and no trouble."""
    common = {
        "device": "Apple M9",
        "backend": "mac",
        "system": "Darwin arm64",
        "versions": {"mlx": "0.32.4"},
        "threads": 8,
    }
    common |= {"threads": 8, "commit": "0123456789ab", "command": device.COMMAND, "kernels": ""}
    common["date"] = "2026-11-30T00:00:00+00:00"
    told = {"device_info": {}, "os": "macOS 26.1", "gpu_cores": 40, "virtual": False, "backend_kernels": "metal"}
    told |= {"tuning": {}, "read_bandwidth": 5e11, "copy_bandwidth": 4e11}
    judged = {"kv": "int4", "shape": [8, 2, 128], "length": 1, "dtype": "float16", "window": 0, "served_by": "metal"}
    judged |= {"variant": "lanes", "ok": True, "max_error": 1e-4, "naive_error": 1e-3, "first_seconds": 1.0}
    arm = {"shape": [32, 8, 128], "context": 32768, "stolen": 0.0, "checked_heads": 8, "scratch_bytes": 0, "note": ""}
    arm |= {"ms_sd": 0.0, "windows_ms": [], "bandwidth_share": 0.5, "read_bandwidth": 5e11, "error": 1e-4}
    arm |= {"error_with_codec": 1e-2, "served_by": "metal"}
    ours = arm | {"engine": "opentq", "kv": "int4", "bytes": 4e7}
    rows = [
        ("device", told),
        ("conformance", judged | {"again_seconds": 0.1}),
        (
            "kernel",
            ours | {"variant": "lanes", "ms": 0.2, "gb_per_s": 200},
        ),
        (
            "kernel",
            ours | {"variant": "matrix", "ms": 0.3, "gb_per_s": 130},
        ),
        ("kernel", arm | {"engine": "mlx", "kv": "f16", "ms": 0.4, "bytes": 13e7, "gb_per_s": 330}),
    ]
    return Path("apple-m9-2026-11-30.jsonl"), [{"kind": kind, **fields, **common} for kind, fields in rows]


def test_a_file_is_taken_as_the_doctor_wrote_it(sent):
    assert community.problems(*sent) == []


@pytest.mark.parametrize(
    "kind, fields, words",
    [
        ("kernel", {"host": "ann"}, "unknown field"),
        ("kernel", {"note": "/Users/ann/x"}, "a path or an address"),
        ("kernel", {"gb_per_s": 900.0, "bytes": 1 << 30}, "faster than the memory"),
        ("kernel", {"error": 0.5}, "wrong"),
        ("kernel", {"device": "Apple M8"}, "one machine"),
        ("device", {"commit": "0123456789ab+"}, "changed source"),
        ("device", {"commit": ""}, "commit"),
        ("conformance", {"ok": False}, "ok"),
        ("device", {"kernels": "tiled"}, "OPENTQ_KERNELS"),
    ],
)
def test_other_files_are_refused(sent, kind, fields, words):
    name, records = sent
    found = community.problems(name, change(records, kind, **fields))
    assert any(words in line for line in found), found


def test_a_file_is_named_after_its_device(sent):
    assert "name" in community.problems(Path("mine.jsonl"), sent[1])[0]
    assert community.problems(sent[0], sent[1][1:])  # no word of the device


def test_the_readme_takes_real_macs_only(sent):
    _, records = sent
    assert "None yet" in community.table([]) and "None yet" in community.table(
        [change(records, "device", virtual=True)]
    )
    text = community.table([records])
    assert "| Apple M9, 40 cores | 0.20 (lanes) | 2.00x |" in text, text
