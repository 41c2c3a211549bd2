"""Tables of the real network: the best spec is found, ratios are paired, missing records leave a sentence."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "dev"))
import study_tables as study

from opentq.spec.recipe import Recipe

ROOT = Path(__file__).parents[1]


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(" | ".join(row) for row in (head, *rows))


def row(
    spec: str, bits: float, kl: float, text: str = "python-stdlib", depth: int = 512, name: str = "smollm2"
) -> dict:
    protocol = {"depths": [512, 2048]}
    settings = {"kind": "fidelity", "model": {"name": name}, "text": {"name": text}, "protocol": protocol}
    blocks = [kl * (1 + 0.1 * (i % 3 - 1)) for i in range(12)]
    return {
        "settings": {**settings, "spec": spec, "depth": depth},
        "bits": bits,
        "kl_mean": [kl, kl / 2, kl * 2],
        "kl_blocks": blocks,
        "device": "a CPU",
        "versions": {"mlx": "0"},
        "date": "2026-01-01T00:00",
    }


ROWS = [
    row("q4_0", 4.5, 0.008),
    row("mlx4", 4.5, 0.12),
    row("int4", 5.0, 0.001),
    row("tq5/tq3:nc", 4.25, 0.006),
    row("tq5/tq3:nc:center:sink=4", 4.25, 0.004),
    row("tq5/tq3:nc:center:sink=4", 4.25, 9.0, name="tiny-llama"),
]


def test_the_best_spec_within_the_limit_stands_against_its_rivals():
    text = study.goal(ROWS, markdown)
    assert "`tq5/tq3:nc:center:sink=4`, 4.25 bits" in text and "int4" not in text
    # Blocks move together, so that a paired ratio has no width.
    assert "0.500 [0.500, 0.500]" in text and "0.033 [0.033, 0.033]" in text


def test_later_records_replace_earlier_ones_and_other_models_are_left_out():
    text = study.divergences([*ROWS, row("q4_0", 4.5, 0.5)], ["q4_0", "tq5/tq3:nc:center:sink=4", "tq1"], markdown)
    assert "0.50" in text and "9.00" not in text and "tq1" not in text


@pytest.mark.parametrize(
    "table", ["command", "goal", "tuned", "recipes", "needles", "use", "tasks", "depth", "scale", "cpu"]
)
def test_without_records_a_sentence_says_how_to_make_them(table):
    assert getattr(study, table)([], markdown).startswith("No record yet")


def test_other_protocols_change_no_table_of_the_study():
    other = row("q4_0", 4.5, 0.9)
    other["settings"]["protocol"] = {"depths": [512]}
    assert study.goal([*ROWS, other], markdown) == study.goal(ROWS, markdown)


def test_the_recipe_is_what_was_found_and_meets_the_goal():
    """At most half of q4_0's divergence and a twentieth of mlx-lm's in 4.5 bits, on two texts at four depths."""
    found = Recipe.read(str(study.RECIPE))
    tuned = [json.loads(line) for line in (ROOT / "results" / "tune.jsonl").read_text().splitlines()]
    assert str(found) in [r["recipe"] for r in tuned] and len(found.layers) == 30
    rows = [json.loads(line) for line in (ROOT / "results" / "fidelity.jsonl").read_text().splitlines()]
    compared = 0
    for cells in study.texts(rows).values():
        for (depth, spec), own in cells.items():
            if spec == str(found):
                q4, mlx = (cells[depth, rival] for rival in study.RIVALS)
                assert study.held(own) <= study.LIMIT
                assert study.ratio(own, q4)[0] <= 1 / 2 and study.ratio(own, mlx)[0] <= 1 / 20
                compared += 1
    assert compared >= 8


def test_bits_count_the_tokens_that_stay_in_fp16():
    row = {"bits": 4.0, "settings": {"spec": "tq4:sink=4:recent=28", "depth": 128}}
    assert study.held(row) == 4 + 12 * 32 / 128


def test_recipes_are_shown_by_the_layers_that_are_alike():
    spec = "tq5/tq3:sink=4|tq5/tq4:sink=4|tq5/tq3:sink=4"
    assert study.held({"bits": 4.0, "settings": {"spec": spec, "depth": 128}}) == 4 + 12 * 4 / 128
    assert study.label(spec) == "2 x `tq5/tq3:sink=4` + 1 x `tq5/tq4:sink=4`" and study.label("int4") == "`int4`"


def test_a_table_keeps_to_one_of_two_texts_that_have_a_name():
    rows = [row("native", 16, 0.0), row("q4_0", 4.5, 0.5), row("int4", 5.0, 0.4)]
    rows[0]["settings"]["text"] = {"name": "python-stdlib", "digest": "a"}
    rows[1]["settings"]["text"] = {"name": "python-stdlib", "digest": "a"}
    rows[2]["settings"]["text"] = {"name": "python-stdlib", "digest": "b"}
    assert study.one_text(rows) == rows[:2]


def test_what_is_recommended_stands_in_a_record():
    rows = [json.loads(line) for line in (ROOT / "results" / "fidelity.jsonl").read_text().splitlines()]
    for family in tomllib.loads((ROOT / "opentq" / "spec" / "recommended.toml").read_text()).values():
        asked = family["measured"], family["spec"], family.get("depth", 4096)
        found = [
            r for r in rows if (r["settings"]["model"]["name"], r["settings"]["spec"], r["settings"]["depth"]) == asked
        ]
        shown = {(f"{r['kl_mean'][0]:.1e}", f"{r['top1'][0]:.3f}") for r in found}
        assert (f"{family['kl']:.1e}", f"{family['top1']:.3f}") in shown, family
