"""lm-evaluation-harness on compressed caches: its scores are the model's, and its tasks run without a network."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from opentq.errors import UserError
from opentq.evaluate import contenders, harness, metrics
from opentq.evaluate.evaluation import Evaluation
from opentq.hosts.mlx_lm.load import load
from opentq.records import Records

MODEL = str(Path(__file__).parents[1] / "models" / "tiny-llama")
WORDS = "The secret code of Lumo is 70966.\n" + "# nothing of interest stands here\n" * 30

TASK = """
task: codes
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}]
"""


def test_without_the_package_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def missing(name, *args):
        if name.startswith("lm_eval"):
            raise ModuleNotFoundError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"pip install 'opentq\[eval\]'"):
        harness.need()


@pytest.fixture
def on():
    pytest.importorskip("lm_eval", reason="pip install 'opentq[eval]'")
    model, tokenizer = load(MODEL)
    return Evaluation(model, {"name": "tiny-llama"}, tokenizer, None, ["native", "int2"], Records())


def test_scores_are_the_models_own_and_a_coarse_cache_is_seen(on):
    tokenizer, context = on.tokenizer, WORDS + "The secret code of Lumo is"
    whole = tokenizer.encode(context + " 70966")
    count = len(whole) - len(tokenizer.encode(context))
    logs = np.array(metrics.log_probs(on.model(mx.array([whole])))[0], np.float64)
    expected = sum(logs[i - 1, whole[i]] for i in range(len(whole) - count, len(whole)))
    asked = [SimpleNamespace(args=(context, " 70966")), SimpleNamespace(args=(context, " 11111"))]
    found = {}
    for name in on.names:
        bridge = harness.bridge(on, contenders.enter(name, on.model))
        (right, sure), (wrong, _) = bridge.loglikelihood(asked, disable_tqdm=True)
        (rolled,) = bridge.loglikelihood_rolling([SimpleNamespace(args=(context,))])
        (said,) = bridge.generate_until([SimpleNamespace(args=(context, {"until": ["\n"], "max_gen_toks": 20}))])
        found[name] = right
        assert right > wrong and rolled < right and "\n" not in said
        assert (" 70966" in said) == sure
    assert found["native"] == pytest.approx(expected, abs=1e-3)
    assert abs(found["int2"] - expected) > 1e-3


def test_a_task_from_a_folder_runs_offline_and_is_kept(on, run, tmp_path):
    rows = [{"text": WORDS + "The secret code of Lumo is", "choices": ["11111", "70966"], "label": 1}] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "codes.yaml").write_text(TASK.replace("DATA", str(tmp_path / "rows.jsonl")))
    kept = tmp_path / "r.jsonl"
    common = ["--include", str(tmp_path), "--records", str(kept), "--format", "md"]
    code, out, err = run("eval", "harness", MODEL, "--tasks", "codes", *common, "--kv", "off,int4")
    assert code == 0, err
    assert out.count("codes") == 2 and "acc 1 ±" in out
    assert [json.loads(line)["metrics"]["acc"] for line in kept.read_text().splitlines()] == [1.0, 1.0]
    code, _, err = run("eval", "harness", MODEL, "--tasks", "nonsense", *common)
    assert code and "has no task nonsense" in err and "--include" in err
