"""`opentq doctor --bench`: it runs for real, a wrong kernel fails it, and its file tells nothing private."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from typer.testing import CliRunner

from opentq.attention import dispatch
from opentq.bench import device
from opentq.cli.main import app


@pytest.fixture
def doctor(monkeypatch, tmp_path):
    """Run `opentq doctor ARGS` in an empty folder: (exit code, output, records)."""
    monkeypatch.chdir(tmp_path)

    def call(*args: str):
        done = CliRunner().invoke(app, ["doctor", *args])
        files = list(tmp_path.rglob("*.jsonl"))
        return done, [json.loads(line) for f in files for line in f.read_text().splitlines()]

    return call


def test_bench_writes_what_it_finds(doctor, tmp_path):
    done, records = doctor("--bench", "--quick")
    assert done.exit_code == 0, done.output
    assert {r["kind"] for r in records} == {"device", "conformance", "pack", "kernel", "call"}
    judged = {r["served_by"] for r in records if r["kind"] == "conformance"}
    assert judged == {name for name, _ in dispatch.candidates()}
    assert all(r["ok"] and r["max_error"] <= 2 * r["naive_error"] + device.ATOL for r in records if "max_error" in r)
    assert all(r["identical"] == 1 for r in records if r["kind"] == "pack")
    assert "Please send opentq-" in done.output and f"Its {len(records)} lines" in done.output
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
