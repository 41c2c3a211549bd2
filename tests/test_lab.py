"""The lab: no trial is lost or run twice, whatever is killed, and verdicts follow from the numbers."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

from opentq.errors import UserError
from opentq.lab import page, record, runner
from opentq.lab.measures import defaults
from opentq.lab.record import OPEN, REFUTED, SUPPORTED
from opentq.lab.study import Study, key, load

MINI = """
[study]
name = "mini"

[[sweep]]
measure = "vectors"
kv = ["int4", "int4:norot", "polar4"]
keys = ["gaussian", "outliers"]
dim = 64
tokens = 64
seed = [0, 1]

[[hypotheses]]
id = "rotation"
says = "Rotation of keys with outlier channels lowers the attention KL"
metric = "attention_kl"
a = { kv = "int4" }
b = { kv = "int4:norot" }
where = { keys = "outliers" }

[[hypotheses]]
id = "sure"
says = "The cosine of keys stays above one half"
metric = "key_cosine"
than = 0.5
relation = ">"
where = { measure = "vectors" }
"""


def write(folder: Path, text: str = MINI) -> Path:
    path = folder / "mini.toml"
    path.write_text(text)
    return path


def trial(settings: dict, **result: float) -> dict:
    settings = {"measure": "fidelity", **settings}
    return {
        "kind": "trial",
        "key": key(settings),
        "settings": settings,
        "result": result,
        "seconds": 1.0,
        "device": "d",
    }


def stated(**fields) -> dict:
    plain = {"where": {}, "a": {}, "b": {}, "than": None, "relation": "<", "factor": 1.0, "replicate": "seed"}
    return {"kind": "hypothesis", "id": "h", "says": "x", "metric": "kl", **plain, **fields}


def found(tmp_path: Path, rows: list[dict]) -> record.Finding:
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return record.findings(path)[0]


# ---- study files


def test_a_sweep_is_a_grid_with_defaults(tmp_path):
    study = load(write(tmp_path))
    assert len(study.trials) == 12
    assert study.trials[0] == {
        **defaults("vectors"),
        "kv": "int4",
        "keys": "gaussian",
        "dim": 64,
        "tokens": 64,
    }
    assert len({key(t) for t in study.trials}) == 12
    assert key({"a": 1, "b": 2}) == key({"b": 2, "a": 1})


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[study]", "needs a \\[study\\] table"),
        ("[study", "not valid TOML"),
        ('[study]\nname = "x"', "nothing to run"),
        ('[study]\nname = "x"\n[[sweep]]\nmeasure = "luck"', "measure 'luck' is not known"),
        ('[study]\nname = "x"\n[[sweep]]\nmeasure = "vectors"\nkvv = 1', "takes no kvv"),
        (MINI + '[[hypotheses]]\nid = "q"\n', "hypothesis 'q'"),
        (MINI.replace('relation = ">"', 'relation = "="'), "relation '='"),
        (MINI.replace("than = 0.5\n", ""), "either settings b or a number"),
        (MINI + "[search]\ntrials = 3\n", "\\[search\\]"),
    ],
)
def test_study_files_are_checked(tmp_path, text, match):
    with pytest.raises(UserError, match=match):
        load(write(tmp_path, text))
    with pytest.raises(UserError, match="no study file"):
        load(tmp_path / "other.toml")


def test_the_shipped_study_is_whole():
    root = Path(__file__).resolve().parents[1]
    study = load(root / "dev/studies/seeds.toml")
    assert len(study.trials) >= 330
    for h in study.hypotheses:
        rows = [t for t in study.trials if record.matches(t, {**h.where, **h.a})]
        assert len(rows) >= 2, h.id
        if h.than is None:
            assert any(record.matches(t, {**h.where, **h.b}) for t in study.trials), h.id


# ---- verdicts


def test_paired_differences_make_verdicts(tmp_path):
    def rows(a: list[float], b: list[float]) -> list[dict]:
        sides = (("int4", a), ("int8", b))
        return [trial({"kv": kv, "seed": s}, kl=x) for kv, values in sides for s, x in enumerate(values)]

    h = stated(a={"kv": "int4"}, b={"kv": "int8"}, relation=">")
    above = found(tmp_path, [h, *rows([2.0, 3.0, 2.5], [1.0, 1.1, 0.9])])
    assert above.whole.verdict == SUPPORTED and above.whole.n == 3
    assert above.whole.effect == pytest.approx(1.5)
    assert above.whole.low > 0
    assert found(tmp_path, [stated(**{**h, "relation": "<"}), *rows([2.0, 3.0], [1.0, 1.0])]).whole.verdict == REFUTED
    assert found(tmp_path, [h, *rows([2.0, 0.5], [1.0, 1.0])]).whole.verdict == OPEN
    assert found(tmp_path, [h, *rows([2.0], [1.0])]).whole.verdict == OPEN
    assert found(tmp_path, [h]).whole.n == 0
    assert found(tmp_path, [stated(**{**h, "factor": 5.0}), *rows([2.0, 3.0], [1.0, 1.0])]).whole.verdict == REFUTED


def test_a_claim_needs_every_replication(tmp_path):
    def rows(second: float) -> list[dict]:
        settings = [(kv, m, d) for kv in ("a", "b") for m in ("x", "y") for d in (1, 2)]
        values = {"a": {"x": 2.0, "y": second}, "b": {"x": 1.0, "y": 1.0}}
        return [trial({"kv": kv, "model": m, "depth": d}, kl=values[kv][m] + d / 100) for kv, m, d in settings]

    h = stated(a={"kv": "a"}, b={"kv": "b"}, relation=">", replicate="model")
    assert found(tmp_path, [h, *rows(3.0)]).claim
    refuted_once = found(tmp_path, [h, *rows(0.5)])
    assert not refuted_once.claim and [p.verdict for p in refuted_once.parts] == [SUPPORTED, REFUTED]


def test_the_record_is_searched_and_linked(tmp_path):
    results = tmp_path / "r.jsonl"
    h = stated(id="rotation", says="Rotation of keys helps", a={"kv": "int4"}, b={"kv": "int4:norot"})
    rows = [trial({"kv": kv, "seed": s}, kl=x + s) for kv, x in (("int4", 1.0), ("int4:norot", 2.0)) for s in (0, 1)]
    results.write_text("".join(json.dumps(r) + "\n" for r in [h, *rows]))
    database = tmp_path / "r.db"
    record.index(results, database)
    answers = record.ask(database, "rotation on keys")
    assert answers[0][0] == "insight" and "supported" in answers[0][2]
    assert {kind for kind, _, _ in answers} == {"insight", "hypothesis"}
    assert record.ask(database, "norot")[0][0] == "result"
    with pytest.raises(UserError, match="ask something"):
        record.ask(database, "?!")
    study = Study("s", tmp_path / "s.toml", "", (), ())
    text = page.markdown(study, results)
    assert "| Rotation of keys helps | supported |" in text and "graph LR" in text and "4 trials (4 fidelity" in text


# ---- running

RUN = (
    "import sys; from pathlib import Path; from opentq.lab import runner\n"
    "if __name__ == '__main__': runner.run(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))\n"
)


def start(folder: Path, study: Path, workers: int = 2) -> subprocess.Popen:
    script = folder / "run.py"
    script.write_text(RUN)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, str(script), str(study), str(workers), str(folder / "out")]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def trials(folder: Path) -> list[dict]:
    path = folder / "out" / "mini.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [r for r in rows if r["kind"] == "trial"]


def test_a_killed_run_goes_on_and_runs_nothing_twice(tmp_path):
    pytest.importorskip("optuna")
    study = write(tmp_path)
    first = start(tmp_path, study)
    deadline = time.time() + 120
    while len(trials(tmp_path)) < 2 and time.time() < deadline:
        time.sleep(0.05)
    with pytest.raises(UserError, match="already running"):
        runner.run(study, 1, tmp_path / "out")
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = start(tmp_path, study, 1)
    out, err = done.communicate(timeout=240)
    assert done.returncode == 0, err
    assert "12 trials done" in out.splitlines()[-1]
    # Workers that outlived the runner may have finished their own trial: nothing is lost, nothing is there twice.
    counts = Counter(r["key"] for r in trials(tmp_path))
    assert set(counts) == {key(t) for t in load(study).trials}
    assert set(counts.values()) == {1}
    findings = {f.hypothesis["id"]: f for f in record.findings(tmp_path / "out" / "mini.jsonl")}
    assert findings["rotation"].whole.verdict == findings["sure"].whole.verdict == SUPPORTED


def test_trials_of_dead_workers_are_settled(tmp_path):
    pytest.importorskip("optuna")
    from opentq.lab.store import Store

    store = Store(load(write(tmp_path)), tmp_path / "out")
    assert store.enqueue() == 12
    finished, lost = store.claim(), store.claim()
    for trial_, _ in (finished, lost):
        trial_.set_user_attr("worker", [trial_.user_attrs["worker"][0], 2**22 + 1, "1"])
    # The first one got as far as its record, the second one did not.
    told = store.optuna.tell
    store.optuna.tell = lambda *a, **k: None
    store.finish(*finished, {"attention_kl": 1.0}, 0.5)
    store.optuna.tell = told
    assert store.recover() == 1
    assert store.enqueue() == 11
    claimed = []
    while got := store.claim():
        claimed.append(key(got[1]))
        store.finish(*got, {}, 0.1)
    assert sorted(claimed) == sorted(key(t) for t in store.study.trials if key(t) != key(finished[1]))
    assert len(store.done()) == 12


def test_search_trials_are_chosen_and_counted(tmp_path):
    pytest.importorskip("optuna")
    from opentq.lab.store import Store

    text = """
[study]
name = "mini"
[search]
trials = 4
fixed = { measure = "vectors", dim = 64, tokens = 64 }
parameters = { kv = ["int2", "int3", "int4", "int8"] }
objectives = ["bits", "attention_kl"]
"""
    store = Store(load(write(tmp_path, text)), tmp_path / "out")
    assert store.enqueue() == 0
    count = 0
    while got := store.claim():
        store.finish(*got, {"bits": 4.0, "attention_kl": 0.1}, 0.1)
        count += 1
    assert count == 4


def test_a_damaged_database_is_said_and_nothing_is_lost(tmp_path):
    pytest.importorskip("optuna")
    from opentq.lab import runner

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mini.db").write_bytes(b"this is not a database, but it is long enough to be looked at" * 20)
    with pytest.raises(UserError, match="damaged"):
        runner.run(write(tmp_path), 1, tmp_path / "out")


@pytest.fixture
def postgresql(tmp_path):
    """The URL of a fresh PostgreSQL server on a socket of its own."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    initdb = shutil.which("initdb", path=os.pathsep.join([*map(str, folders), os.environ["PATH"]]))
    if initdb is None or importlib.util.find_spec("psycopg2") is None:
        pytest.skip("needs a PostgreSQL server (apt-get install postgresql) and psycopg2 (pip install psycopg2-binary)")
    # A server refuses to run as root, and its socket's path must be short.
    home = Path(tempfile.mkdtemp(prefix="pg"))
    user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    if user:
        shutil.chown(home, "postgres", "postgres")
    bin_folder, data = Path(initdb).parent, home / "data"

    def call(*command: str) -> None:
        subprocess.run(
            [*user, str(bin_folder / command[0]), *command[1:]], check=True, cwd=home, stdout=subprocess.DEVNULL
        )

    call("initdb", "-D", str(data), "-A", "trust", "-U", "lab")
    call("pg_ctl", "-D", str(data), "-w", "-l", str(home / "log"), "-o", f"-k {home} -h ''", "start")
    try:
        yield f"postgresql+psycopg2://lab@/postgres?host={home}"
    finally:
        call("pg_ctl", "-D", str(data), "-m", "immediate", "stop")
        shutil.rmtree(home, ignore_errors=True)


def test_two_machines_share_a_postgresql_storage(tmp_path, postgresql):
    pytest.importorskip("optuna")
    from opentq.lab.store import Store

    text = MINI.replace('name = "mini"', f'name = "mini"\nstorage = "{postgresql}"')
    one, two = (Store(load(write(tmp_path, text)), tmp_path / "out") for _ in range(2))
    assert one.enqueue() == 12
    keys = []
    while (a := one.claim()) and (b := two.claim()):
        for store, got in ((one, a), (two, b)):
            keys.append(key(got[1]))
            store.finish(*got, {}, 0.1)
    assert len(keys) == len(set(keys)) == 12
