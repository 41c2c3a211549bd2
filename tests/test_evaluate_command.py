"""`opentq eval`: tables, records, pictures, and errors in a line."""

from __future__ import annotations

import json
import sys

import mlx.core as mx
import pytest

from opentq.errors import UserError
from opentq.evaluate import contenders, show
from opentq.evaluate.plot import heat_map
from opentq.evaluate.simulate import SimulatedCache, coded
from opentq.spec.kv import KVSpec, SpecError

from .test_evaluate import TEXT


def test_the_command_prints_tables_and_keeps_records(run, folder, tmp_path):
    (tmp_path / "t.txt").write_text(TEXT)
    common = ["--model", str(folder), "--text", str(tmp_path / "t.txt")]
    fast = ["--depths", "100", "--window", "16", "--sequences", "1"]
    specs = "int4,int4:norot,tq4,tq3,tq3p,polar4,qjl,k8v4,q4_0,mlx4"
    kept = ["--records", str(tmp_path / "r.jsonl")]
    code, out, err = run("eval", "fidelity", *common, *fast, "--kv", specs, "--format", "md", *kept)
    assert code == 0, err
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    assert len(rows) == 11 and "KL mean" in rows[0] and all(r.count("[") == 5 for r in rows[1:])
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 10
    code, out, err = run("eval", "fidelity", *common, *fast, "--kv", "tq4", "--format", "json", *kept)
    assert code == 0 and json.loads(out)["settings"]["spec"] == "tq4"
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 10
    code, out, err = run(
        "eval", "layers", *common, "--kv", "tq3", "--context", "100", "--window", "8", "--sequences", "1"
    )
    assert code == 0 and "key cos" in out and len(out.splitlines()) == 3, err
    small = ["--context", "100", "--tokens", "4", "--prompts", "1", "--questions", "0"]
    code, out, err = run("eval", "generate", *common, "--kv", "int4,native", *small)
    assert code == 0 and "tokens until different" in out, err
    grid = ["--lengths", "300", "--depths", "0,1", "--trials", "1"]
    code, out, err = run("eval", "needle", *common, "--kv", "int4", *grid)
    assert code == 0 and "of 2 found" in out and "100 %" in out, err


def test_a_heat_map_is_drawn_or_the_missing_extra_named(tmp_path, monkeypatch):
    record = {
        "settings": {"spec": "int4", "length": 8, "depth": 0.5, "trials": 2},
        "bits": 5.0,
        "accuracy": [0.5, 0, 1],
    }
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'opentq\[plot\]'"):
        heat_map([record], tmp_path / "x.png")


def test_a_heat_map_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    cells = [((8, 0.0), 0.5), ((8, 1.0), 1.0), ((16, 1.0), 0.0)]
    records = [
        {"settings": {"spec": "int4", "length": n, "depth": d}, "bits": 5.0, "accuracy": [a, 0, 1]}
        for (n, d), a in cells
    ]
    heat_map(records, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_characters_show_the_grid():
    records = [
        {
            "settings": {"spec": "s", "length": n, "depth": d, "trials": 2},
            "bits": 4.5,
            "correct": c,
            "accuracy": [c / 2],
        }
        for n, d, c in ((512, 0.0, 2), (512, 1.0, 0), (1024, 0.0, 1))
    ]
    text = show.needle(records, "text")
    assert "s (4.5 bits): 3 of 6 found" in text and "100 ██" in text and "50 ▒▒" in text
    assert text.splitlines()[-1].split() == ["1024", "50", "▒▒", "-"]


@pytest.mark.parametrize(
    "args, part",
    [
        ((), "no model given"),
        (("--kv", "tq9"), "unknown codec 'tq9'"),
        (("--kv", "int4/qjl"), "can't hold values"),
        (("--kv", "int4,int4"), "names a spec twice"),
        (("--depths", "1,x"), "must be numbers of tokens"),
        (("--depths", "500,100"), "ascending"),
        (("--window", "30"), "multiple of --step"),
        (("--depths", "100,120"), "windows overlap"),
        (("--depths", "9999999"), "the model was made for 4,096"),
        (("--format", "xml"), "output format 'xml'"),
        (("--text", "/nowhere.txt"), "does not exist"),
        (("--records", "/proc/x/y.jsonl"), "can't use the records file"),
    ],
)
def test_bad_input_is_one_line(run, folder, args, part):
    model = ["--model", str(folder)] if args else []
    code, _out, err = run("eval", "fidelity", *model, *args)
    assert code != 0 and part in err and err.startswith("opentq: ") and len(err.strip().splitlines()) == 1


def test_bad_needles_and_layers_are_refused(run, folder):
    model = ["--model", str(folder)]
    for args, part in (
        (["needle", "--depths", "2"], "between 0 and 1"),
        (["needle", "--kind", "colour"], "needle kind 'colour'"),
        (["needle", "--trials", "0"], "--trials"),
        (["layers", "--kv", "mlx4"], "leave out mlx4"),
        (["layers", "--window", "0"], "--window"),
        (["generate", "--prompts", "0"], "--prompts"),
    ):
        code, _out, err = run("eval", args[0], *model, *args[1:])
        assert code != 0 and part in err and len(err.strip().splitlines()) == 1, err


def test_a_model_without_a_tokenizer_is_refused(run, folder, tmp_path):
    for file in folder.iterdir():
        if not file.name.startswith(("tokenizer", "special", "chat", "vocab")):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    code, _out, err = run("eval", "fidelity", "--model", str(tmp_path))
    assert code != 0 and "has no tokenizer" in err and len(err.strip().splitlines()) == 1


def test_unknown_contenders_raise():
    with pytest.raises(SpecError):
        contenders.check("mlx5")


def test_a_simulated_cache_is_not_for_saving():
    cache = SimulatedCache("int4")
    with pytest.raises(ValueError, match="can't be loaded"):
        cache.state = []
    y = mx.random.normal((1, 1, 64, 64), key=mx.random.key(0))
    codec = KVSpec.parse("tq4").codecs()[0]
    assert coded(codec, y).dtype == mx.float16
