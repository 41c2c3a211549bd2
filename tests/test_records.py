"""Records: one format, one environment, and files that survive whatever is killed while it writes."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from opentq import records
from opentq.cli.bench import bench
from opentq.errors import UserError
from opentq.lab.store import Store
from opentq.lab.study import Study, key
from opentq.records import Records

ROOT = Path(__file__).parents[1]
TORN = (b'{"a": ', b'{"a": "\xc3', b"{", b'{"kind": "trial", "key": "x')


@pytest.mark.parametrize("torn", TORN)
def test_a_torn_last_line_is_left_out_and_replaced(tmp_path, torn):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"a": 1}\n' + torn)
    assert records.read([path]) == [{"a": 1}]
    records.append(path, [{"a": 2}, {"a": 3}])
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n{"a": 3}\n'


def test_a_torn_only_line_and_a_long_one(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"a')
    records.append(path, [{"a": 1}])
    assert records.read([path]) == [{"a": 1}]
    with path.open("ab") as file:
        file.write(b'{"a": "' + b"x" * 3 * records.SAMPLE)
    records.append(path, [{"a": 2}])
    assert records.read([path]) == [{"a": 1}, {"a": 2}]


def test_a_whole_last_line_without_its_end_is_kept(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"a": 1}')
    assert records.read([path]) == [{"a": 1}]
    records.append(path, [{"a": 2}])
    assert records.read([path]) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("damaged", [b'{broken\n{"a": 2}\n', b'{"a": 1}\n{broken\n', b"[1]\n", b'{"a": 1}\n\xff\n'])
def test_any_other_damage_is_named(tmp_path, damaged):
    path = tmp_path / "r.jsonl"
    path.write_bytes(damaged)
    line = 1 + damaged.startswith(b'{"a": 1}')
    for use in (lambda: records.read([path]), lambda: Records(path)):
        with pytest.raises(UserError, match=f"line {line} is damaged"):
            use()


def test_what_is_no_regular_file_is_refused_unread(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero"), tmp_path):
        for use in (lambda p: records.read([p]), Records, records.check, lambda p: records.append(p, [{}])):
            with pytest.raises(UserError, match="not a regular file"):
                use(path)
    with pytest.raises(UserError, match="No such file"):
        records.read([tmp_path / "missing"])


def _write_beyond(path: Path, limit: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        records.append(path, [{"a": "x" * limit}])
    except UserError:
        sys.exit(7)


def test_a_full_disk_leaves_whole_records_only(tmp_path):
    path = tmp_path / "r.jsonl"
    records.append(path, [{"a": 1}])
    child = multiprocessing.get_context("spawn").Process(target=_write_beyond, args=(path, 1000))
    child.start()
    child.join()
    assert child.exitcode == 7
    assert path.read_text() == '{"a": 1}\n'


def test_several_processes_append_to_one_file(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"torn": ')
    context = multiprocessing.get_context("spawn")
    crew = [context.Process(target=_append_many, args=(path, w)) for w in range(2)]
    for process in crew:
        process.start()
    for process in crew:
        process.join()
    found = records.read([path])
    assert sorted((r["w"], r["i"]) for r in found) == [(w, i) for w in range(2) for i in range(50)]


def _append_many(path: Path, worker: int) -> None:
    for i in range(50):
        records.append(path, [{"w": worker, "i": i}])


def test_one_environment_for_every_store():
    made = records.record("kind", x=1)
    assert {"device", "backend", "threads", "system", "versions", "command", "date", "commit"} <= made.keys()
    assert made["versions"]["mlx"] and made["device"] and made["date"].endswith("+00:00")
    assert Records().add({"s": 1}, {"x": 1}).keys() == made.keys() - {"kind"} | {"settings"}


def test_a_checkout_on_a_machine_without_git_still_measures(tmp_path, monkeypatch):
    package = tmp_path / "opentq"
    package.mkdir()
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(records, "__file__", str(package / "records.py"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("GITHUB_SHA", raising=False)
    assert records._commit() == ""


# ---- a stopped run goes on, in every store


TEAR = b'{"settings": {"a": 1}, "kl'


def tear(path: Path) -> None:
    with path.open("ab") as file:
        file.write(TEAR)


def test_evaluation_and_tuning_go_on(tmp_path):
    path = tmp_path / "r.jsonl"
    Records(path).add({"a": 0}, {"x": 1})
    tear(path)
    kept = Records(path)
    assert len(kept.all) == 1 and kept.find({"a": 0}) and kept.find({"a": 1}) is None
    kept.add({"a": 1}, {"x": 2})
    assert [r["settings"]["a"] for r in Records(path).all] == [0, 1]


def test_bench_goes_on(tmp_path):
    path = tmp_path / "r.jsonl"
    records.append(path, [records.record("kernel", x=1)])
    tear(path)
    args = ["kernel", "--shape", "2,1,64", "--ctx", "64", "--kv", "int4", "--windows", "2", "--warm", "0", "--window"]
    done = CliRunner().invoke(bench, [*args, "0", "--results", str(path)])
    assert done.exit_code == 0, done.output
    assert [r["kind"] for r in records.read([path])] == ["kernel", "kernel"]


def test_lab_goes_on(tmp_path):
    pytest.importorskip("optuna")
    settings = [{"measure": "vectors", "seed": n} for n in range(2)]
    study = Study("s", tmp_path / "s.toml", "", tuple(settings), ())
    store = Store(study, tmp_path)
    store.enqueue()
    trial, taken = store.claim()
    store.finish(trial, taken, {"x": 1.0}, 0.1)
    tear(store.results)
    again = Store(study, tmp_path)
    assert set(again.done()) == {key(taken)} and again.enqueue() == 1
    trial, taken = again.claim()
    again.finish(trial, taken, {"x": 2.0}, 0.1)
    assert set(again.done()) == {key(s) for s in settings}


# ---- what is committed


def test_committed_records_are_whole_and_name_the_models_that_are_here():
    files = sorted((ROOT / "results").glob("*.jsonl"))
    assert len(files) > 5
    current = {m.name: records.model_name(str(m)) for m in (ROOT / "models").glob("tiny-*")}
    named = 0
    for file in files:
        for row in records.read([file]):
            model = row.get("settings", {}).get("model")
            if isinstance(model, dict) and model.get("name") in current:
                named += 1
                assert model["digest"] == current[model["name"]]["digest"], f"{file.name}: {json.dumps(model)}"
    assert named > 100


def test_fingerprints_change_with_config_and_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(300_000))
    seen = {records.fingerprint(tmp_path)}
    (tmp_path / "config.json").write_text('{"a":1}')
    seen.add(records.fingerprint(tmp_path))
    for place in (0, 150_001, 299_999):
        data = bytearray(300_000)
        data[place] = 1
        weights.write_bytes(data)
        seen.add(records.fingerprint(tmp_path))
    assert len(seen) == 5
