"""Calibration: moments against plain numpy, pairs for every way of turning keys, and files that must be refused."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from opentq.attention.channels import choose, energies
from opentq.cli.main import app
from opentq.contracts.rotary import Rotary
from opentq.errors import UserError
from opentq.hosts import hooks, rotary
from opentq.hosts.identity import fingerprint
from opentq.spec.calibration import CalibrationError
from opentq.spec.recipe import Recipe
from opentq.spec.text import parse
from opentq.tuning.calibrate import Calibrator, Reading

from .architectures import build
from .conftest import random_llama

READING = Reading(tokens=600, context=256, step=100)


def rows(seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, n).tolist() for n in READING.lengths]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A calibrated model, its calibrator and its recipe."""
    model, path = random_llama(), tmp_path_factory.mktemp("calibrated") / "r.toml"
    calibrator = Calibrator(model, "int4:sink=4", READING)
    calibrator.run(rows())
    calibrator.save(path, {"why": "test"})
    return model, calibrator, path


def test_moments_are_those_of_all_queries_and_keys_after_rope(made, monkeypatch):
    model, calibrator, _ = made
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def attention(q, k, v, cache, scale, mask, sinks=None):
        seen.append((np.array(q), np.array(k)))
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)

    monkeypatch.setattr(llama, "scaled_dot_product_attention", attention)
    for row in rows():  # whole texts in one step each, through the model's own caches
        mx.eval(model(mx.array([row]), cache=make_prompt_cache(model)))
    assert calibrator.tokens == sum(READING.lengths) == 600
    for layer in range(2):
        q, k = (np.concatenate([s[i][0] for s in seen[layer::2]], axis=1).astype(np.float64) for i in (0, 1))
        q = q.reshape(2, -1, 64)  # four query heads to a KV head
        found = calibrator.moments[layer]
        for side, x in (("q", q), ("k", k)):
            assert np.allclose(found.mean(side), x.mean(1), atol=1e-4)  # keys of lower layers were fp16
            assert np.allclose(found.covariance(side), [np.cov(h.T, bias=True) for h in x], atol=1e-3)
        pair = (q[1, :, [3, 35]] ** 2).mean(1).sum() * k[1, :, [3, 35]].var(1).sum()
        assert found.energy()[1, 3] == pytest.approx(pair, rel=1e-3)


def test_the_channels_with_most_energy_are_chosen():
    q, k = np.ones((1, 16)), np.ones((1, 16))
    q[0, [2, 9]] = 10
    k[0, 5] = 7
    split = energies(q, k, Rotary(16))[0]
    assert choose(split, Rotary(16), 16, 4) == [1, 2, 9, 10]  # pairs (1, 9) and (2, 10)
    assert choose(energies(q, k, Rotary(16, True))[0], Rotary(16, True), 16, 4) == [2, 3, 8, 9]
    # Of eight channels that are turned, (1, 5) and (2, 6) are pairs; the others stand alone.
    assert choose(energies(q, k, Rotary(8))[0], Rotary(8), 16, 5) == [1, 2, 5, 6, 9]
    assert choose(energies(q, k, Rotary())[0], Rotary(), 16, 3) == [2, 5, 9]
    assert Rotary(4).units(6) == ((0, 2), (1, 3), (4,), (5,))
    with pytest.raises(ValueError, match="can't be chosen"):
        choose(split, Rotary(16), 16, 20)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("llama", (32, False)), ("cohere", (32, True)), ("gpt_neox", (16, False)), ("gpt2", (0, False))],
)
def test_how_keys_are_turned_is_seen(name, expected):
    model = build(name)
    hooks.compress(model, "int4")
    caches = make_prompt_cache(model)
    hooks.uninstall(model)
    with rotary.watch(caches) as seen:
        mx.eval(model(mx.array([[1, 2]]), cache=caches))
    assert [seen[id(c)] for c in caches] == [Rotary(*expected)] * len(caches)
    assert "update_and_fetch" not in vars(caches[0])


def test_a_stopped_run_goes_on_and_gives_the_same(made, tmp_path):
    model, whole, _ = made
    partial = tmp_path / "r.partial"

    class Stop(Exception):
        pass

    def stop(count, seen=[0]):  # noqa: B006
        seen[0] += count
        if seen[0] > 400:
            raise Stop

    with pytest.raises(Stop):
        Calibrator(model, "int4", READING, partial).run(rows(), "text", stop)
    other = Calibrator(model, "int4", READING, partial)
    other._resume(f"{other.model_print} {READING} another text")
    assert other.done == 0
    again, read = Calibrator(model, "int4", READING, partial), []
    again.run(rows(), "text", read.append)
    assert again.done == 3 and read[0] == 256
    for layer in range(2):
        for name, array in whole.moments[layer].sums.items():
            assert np.array_equal(array, again.moments[layer].sums[name])
        assert again.moments[layer].rotary == whole.moments[layer].rotary
    partial.write_bytes(partial.read_bytes()[:50])
    other._resume("")
    assert other.done == 0


def test_a_calibrated_recipe_goes_wherever_a_spec_does(made):
    model, calibrator, path = made
    recipe = parse(str(path))
    assert isinstance(recipe, Recipe) and str(recipe) == str(path) and parse(str(recipe)) == recipe
    assert recipe.calibration.channels[1][0] == tuple(choose(calibrator.moments[1].energy()[0], Rotary(64), 64, 6))
    assert [str(s) for s in recipe.layers] == ["int4:sink=4"] * 2
    more = parse(f"{path}:recent=70")
    assert str(more) == f"{path}:recent=70" and str(more.layers[0]) == "int4:sink=4:recent=70"
    plans = hooks.compress(model, more)
    assert [p.codec for p in plans] == ["int4:sink=4:recent=70"] * 2
    hooks.uninstall(model)
    tensors = load_file(path.with_suffix(".safetensors"))
    assert tensors["0.k_covariance"].shape == (2, 64, 64) and tensors["0.rotary"].tolist() == [64, 0]


def test_another_model_is_refused(made):
    model, _, path = made
    other = random_llama(seed=1)
    with pytest.raises(CalibrationError, match="calibrated on another model"):
        hooks.compress(other, str(path))
    before = fingerprint(model)
    model.set_dtype(mx.float16)
    model.set_dtype(mx.float32)
    assert before != fingerprint(other)


def change(path, folder, **tensors):
    """A copy of a recipe whose tensors are other ones, with the right checksum."""
    from opentq.spec.calibration import sha256

    copy = folder / "copy.toml"
    file = copy.with_suffix(".safetensors")
    save_file({**load_file(path.with_suffix(".safetensors")), **tensors}, file)
    old = sha256(path.with_suffix(".safetensors"))
    copy.write_text(path.read_text().replace(old, sha256(file)).replace("r.safetensors", file.name))
    return copy


def test_damaged_recipes_are_refused(made, tmp_path):
    _, _, path = made
    text = path.read_text()
    copy = change(path, tmp_path, **{"1.energy": np.full((2, 32), np.nan, np.float32)})
    with pytest.raises(CalibrationError, match=r"tensor 1\.energy is not finite"):
        parse(str(copy))
    file = copy.with_suffix(".safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CalibrationError, match="cut, changed or of another"):
        parse(str(copy))
    file.unlink()
    with pytest.raises(CalibrationError, match="can't be read"):
        parse(str(copy))
    copy.write_text(text.replace("tokens = 600", "tokens = 100"))
    with pytest.raises(CalibrationError, match="100 tokens, and at least 512"):
        parse(str(copy))
    copy.write_text(text.replace("sha256", "sha"))
    with pytest.raises(CalibrationError, match="lacks sha256"):
        parse(str(copy))


def test_what_can_not_be_calibrated_is_said(tmp_path):
    with pytest.raises(UserError, match="at least 512 are needed"):
        Reading(tokens=100)
    model = random_llama()
    few = Calibrator(model, "int4", READING)
    few.run(rows()[:1])
    with pytest.raises(UserError, match="256 tokens are too few"):
        few.save(tmp_path / "r.toml", {})
    model.model.layers[1].self_attn.k_proj.weight *= np.inf
    broken = Calibrator(model, "f16|int4", READING)
    broken.run(rows())
    with pytest.raises(UserError, match="layer 1 gave queries or keys that are not finite"):
        broken.save(tmp_path / "r.toml", {})
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="no layer of this model has keys that can be calibrated"):
        Calibrator(build("deepseek_v3"), "int4", READING)


def test_the_command(folder, tmp_path):
    run = CliRunner().invoke
    path = tmp_path / "r.toml"
    text = tmp_path / "text.txt"
    text.write_text("It was a dark and stormy night. " * 40)
    options = ["--tokens", "600", "--context", "600", "--text", str(text), "-o", str(path), "--kv", "int4"]
    done = run(app, ["calibrate", str(folder), *options], catch_exceptions=False)
    assert "600 tokens, 2 of 2 layers calibrated" in done.output
    assert not path.with_suffix(".partial").exists() and isinstance(parse(str(path)), Recipe)
    for arguments, match in (
        ([], "no model given"),
        ([str(folder), "-o", "r.json"], "must end in .toml"),
        ([str(folder), "-o", "no/folder/r.toml"], "does not exist"),
        ([str(folder), "--tokens", "64"], "at least 512"),
        ([str(folder), *options[:-2], "--tokens", "64k", "--context", "64k"], "the model was made for 4,096"),
    ):
        with pytest.raises(UserError, match=match):
            run(app, ["calibrate", *arguments], catch_exceptions=False)
