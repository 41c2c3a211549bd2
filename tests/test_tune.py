"""Recipes everywhere a spec goes, and a tuner that chooses well when the truth is known."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

from opentq.errors import UserError
from opentq.hosts import hooks
from opentq.spec.kv import KVSpec, SpecError
from opentq.spec.recipe import Recipe, text
from opentq.spec.text import parse
from opentq.tuning.sensitivity import WIDTHS, Sensitivity, Widths, frontier, probes
from opentq.tuning.tune import Goal, Tuner, free

from .conftest import random_llama

LINE = "k8v4|int4:g64|int3"


def test_a_recipe_is_a_spec_that_round_trips(tmp_path):
    recipe = parse(LINE)
    assert isinstance(recipe, Recipe) and str(recipe) == LINE and parse(str(recipe)) == recipe
    assert [str(recipe.for_layer(i, 3)) for i in range(3)] == LINE.split("|")
    assert recipe.compresses and not parse("f16|f16").compresses
    assert recipe.bits_per_value(64) == pytest.approx((7 + 4.5 + 4) / 3)
    path = tmp_path / "Recipe.toml"
    path.write_text(text(LINE.split("|"), "two\nlines", {"kl": 0.01, "model": 'a "b"'}))
    assert parse(str(path)) == recipe


def test_bad_recipes_are_said_in_words(tmp_path):
    for line, match in (("int4|", "KV spec"), ("int4|int5", "int5"), ("int4|int4:window=compress", "agree")):
        with pytest.raises(SpecError, match=match):
            parse(line)
    path = tmp_path / "r.toml"
    with pytest.raises(SpecError, match="can't be read"):
        parse(str(path))
    for content, match in (("layers = [", "not valid TOML"), ("layers = 3", "needs layers")):
        path.write_text(content)
        with pytest.raises(SpecError, match=match):
            parse(str(path))
    with pytest.raises(UserError, match="made for another model"):
        parse(LINE).for_layer(0, 4)


def test_a_recipe_serves_a_model():
    model = random_llama(layers=3)
    plans = hooks.compress(model, LINE)
    assert [p.codec for p in plans] == LINE.split("|")
    caches = make_prompt_cache(model)
    out = model(mx.arange(100)[None], cache=caches)
    mx.eval(out)
    assert not mx.isnan(out).any().item()
    assert [str(c.spec) for c in caches] == LINE.split("|")
    with pytest.raises(UserError, match="another model"):
        hooks.compress(model, "int4|int4")


def test_probes_change_one_side_of_one_block():
    asked = list(probes(3, [[0, 1], [2]]))
    assert len(asked) == 2 * 2 * 5
    assert asked[0] == (0, "k", 6, "tq6/int8:nc|tq6/int8:nc|int8")
    assert asked[-1] == (1, "v", 2, "int8|int8|int8/tq2:nc")
    assert all(str(KVSpec.parse(str(choice))) == str(choice) for choice in WIDTHS)


def test_the_frontier_spends_bits_where_they_matter():
    weak = {(side, bits): 1e-4 / bits for side in "kv" for bits in (6, 5, 4, 3, 2)}
    strong = {**weak, **{("k", bits): 1.0 / bits for bits in (6, 5, 4, 3, 2)}}
    bits = {c: KVSpec.parse(str(c)).bits_per_value(32) for c in WIDTHS}
    recipes = frontier([Sensitivity(strong), Sensitivity(weak)], bits)
    assert recipes[0] == [Widths(8, 8)] * 2 and recipes[-1] == [Widths(2, 2)] * 2
    middle = [r for r in recipes if r[0].keys == 8 and r[1].keys == 2]
    assert middle and any(r[0].values == 2 for r in middle)


def test_recipes_have_what_is_free():
    model = random_llama(layers=2)
    assert free(model) == ":center:sink=4"
    lines = "|".join(f"{c}{free(model)}" for c in ("tq5/tq3:nc", "int8"))
    assert [p.codec for p in hooks.compress(model, lines)] == lines.split("|")
    model.model_type = "unknown"
    assert free(model) == ""


def width(codec: str) -> int:
    return int(codec.strip("intq"))


class Known(Tuner):
    """A tuner whose measurements are a formula: keys of layer 1 are fragile, everything else hardly matters."""

    def __init__(self, goal: Goal, held_out_factor: float = 1.0):
        self.goal, self.factor, self.suffix = goal, held_out_factor, ""
        self.blocks = [[0], [1], [2]]
        self.plans = hooks.compress(random_llama(layers=3), "int4")
        self.protocol = type("P", (), {"seed": 0, "depths": (64,)})
        self.measured: list[str] = []
        self.said: list[str] = []
        self.say = self.said.append

    def measure(self, names, seed=None):
        self.measured += names
        found = {}
        for name in names:
            layers = parse(name).layers if "|" in name else (KVSpec.parse(name),) * 3
            kl = (
                sum(
                    (100 if i == 1 else 1) * 4.0 ** -width(s.keys) + 4.0 ** -width(s.values)
                    for i, s in enumerate(layers)
                )
                / 100
            )
            found[name] = (sum(s.bits_per_value(64) for s in layers) / 3, kl * (self.factor if seed else 1))
        return found

    def needles(self, name):
        return {"needles": "1/1", "needles_native": "1/1"}


def test_the_tuner_protects_the_fragile_layer():
    pytest.importorskip("optuna")
    tuner = Known(Goal(max_kl=0.02))
    winner = tuner.run(generations=3)
    assert winner.kl <= 0.02 and winner.saving > 0.1
    layers = [KVSpec.parse(layer) for layer in winner.layers]
    assert width(layers[1].keys) > width(layers[0].keys)
    assert any("best so far" in line for line in tuner.said)


def test_a_winner_must_hold_on_other_text():
    pytest.importorskip("optuna")
    loose, strict = Known(Goal(max_kl=0.02)).run(2), Known(Goal(max_kl=0.02), held_out_factor=4.0).run(2)
    assert strict.bits > loose.bits and strict.held_out["kl"] <= 0.02


def test_when_there_is_none_it_says_so():
    pytest.importorskip("optuna")
    with pytest.raises(UserError, match=r"no recipe stays within KL 1e-12"):
        Known(Goal(max_kl=1e-12)).run(1)
