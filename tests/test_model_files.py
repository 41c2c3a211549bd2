"""Models that are not whole, and configurations that can't be: every command refuses them in the same words."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models import llama

import opentq
from opentq.errors import UserError
from opentq.evaluate import corpus
from opentq.hosts.mlx_lm import files
from opentq.hosts.plan import NothingCompressed
from opentq.memory import skeleton, source
from opentq.memory.forecast import forecast
from opentq.memory.loaded import model_context, weight_bytes
from opentq.spec.text import parse, specs

from . import architectures
from .test_habits import needs, taking

pytestmark = pytest.mark.usefixtures("all_extras")


@pytest.fixture
def copy(folder, tmp_path):
    target = tmp_path / "model"
    shutil.copytree(folder, target)
    return target


def change(folder: Path, **fields) -> Path:
    """The model in `folder` with other fields of its config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def shards(folder: Path, index: bool = True) -> Path:
    """The model in `folder` cut into two files."""
    whole = mx.load(str(folder / "model.safetensors"))
    names = sorted(whole)
    parts = [names[::2], names[1::2]]
    places = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for place, part in zip(places, parts):
        mx.save_safetensors(str(folder / place), {name: whole[name] for name in part})
    if index:
        where = {name: place for place, part in zip(places, parts) for name in part}
        (folder / files.INDEX).write_text(json.dumps({"weight_map": where}))
    return folder


# ---- weights


def half(folder):
    (shards(folder) / "model-00002-of-00002.safetensors").unlink()
    (folder / "model.safetensors").unlink()


def half_without_index(folder):
    half(folder)
    (folder / files.INDEX).unlink()


def nothing(folder):
    (folder / "model.safetensors").unlink()


def damaged(data: bytes):
    return lambda folder: (folder / "model.safetensors").write_bytes(data)


def header(entries: object, more: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + more


def cut(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])


def no_index(folder):
    (folder / files.INDEX).write_text('{"weight_map": 3}')


TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
NOT_WHOLE = {
    "half of the shards": (half, "lacks model-00002-of-00002.safetensors"),
    "half, no index": (half_without_index, "lacks model-00002-of-00002.safetensors"),
    "no weights": (nothing, "has no weights"),
    "a pointer": (damaged(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"), "git lfs pull"),
    "empty": (damaged(b""), "cut off"),
    "a page of HTML": (damaged(b"<!DOCTYPE html><html>404</html>"), "no safetensors file"),
    "a header of numbers": (damaged(header({"a": 3})), "is damaged"),
    "a header that is a list": (damaged(header([1, 2])), "is damaged"),
    "a tensor without a place": (damaged(header({"a": {"dtype": "F32", "shape": [1]}})), "is damaged"),
    "a negative size": (damaged(header({"a": TENSOR | {"shape": [-1]}}, b"1234")), "is damaged"),
    "the last byte": (cut, "is cut off"),
    "an index of numbers": (no_index, "is damaged"),
}


@pytest.mark.parametrize("fault", NOT_WHOLE)
def test_plan_and_load_refuse_what_is_not_whole(copy, fault):
    break_it, words = NOT_WHOLE[fault]
    break_it(copy)
    with pytest.raises(UserError, match=words):
        opentq.load(str(copy))
    if fault != "no weights":  # of which a plan may be made
        with pytest.raises(UserError, match=words):
            forecast(str(copy), specs("int4"), [1024], "8GB")


def test_a_whole_file_beside_old_shards_counts_once(copy):
    """Also with an index that names what is no longer there: mlx-lm loads it, and so do we."""
    real = source.find(str(copy)).weight_bytes(4)
    (shards(copy) / "model-00002-of-00002.safetensors").unlink()
    assert source.find(str(copy)).weight_bytes(4) == real
    model, _ = opentq.load(str(copy))
    assert weight_bytes(model) == real
    (copy / "consolidated.safetensors").write_bytes((copy / "model.safetensors").read_bytes())
    assert source.find(str(copy)).weight_bytes(4) == real


# ---- config.json


CONFIGS = {
    "a list": ([], "holds a list"),
    "no model type": ({"hidden_size": 3}, "no 'model_type'"),
    "a number as model type": ({"model_type": 3}, "no 'model_type'"),
    "a context in words": ({"model_type": "llama", "max_position_embeddings": "many"}, 'is "many", which is no number'),
    "a context below one": ({"model_type": "llama", "n_positions": -4}, "n_positions is -4"),
    "a context that is a list": ({"model_type": "llama", "max_position_embeddings": [1]}, "no number of tokens"),
    "a context of not a number": ({"model_type": "llama", "max_position_embeddings": float("nan")}, "no number of tok"),
}
MODELS = [name for name in taking("--model") if name not in ("cache use", "launch")]


@pytest.mark.parametrize("fault", CONFIGS)
def test_plan_and_load_refuse_a_config_that_can_not_be(copy, fault):
    config, words = CONFIGS[fault]
    (copy / "config.json").write_text(json.dumps(config))
    for use in (lambda: opentq.load(str(copy)), lambda: forecast(str(copy), specs("int4"), [1024], "8GB")):
        with pytest.raises(UserError, match=words):
            use()


@pytest.mark.parametrize("name", MODELS)
def test_every_command_looks_at_both_first(run, monkeypatch, copy, name):
    """Of a config that is a list and weights that are none, each command says so in a line, before any work."""
    monkeypatch.setattr(corpus, "load", lambda _: None)  # the model is looked at after the text
    monkeypatch.chdir(copy.parent)
    damaged(header({"a": 3}))(copy)
    code, _, err = run(*name.split(), *needs(name, str(copy)))
    assert code == 2 and "model.safetensors is damaged" in err and err.count("\n") == 1, err
    (copy / "config.json").write_text("[]")
    code, _, err = run(*name.split(), *needs(name, str(copy)))
    assert code == 2 and "holds a list" in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    "field", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "rope_theta"]
)
@pytest.mark.parametrize("value", [None, "many", [], 0])
def test_fields_of_the_wrong_type_are_said(copy, field, value):
    """mlx-lm's own words, or that what it makes of them does not fit the weights; never a traceback."""
    change(copy, **{field: value})
    for use in (lambda: opentq.load(str(copy)), lambda: forecast(str(copy), specs("int4"), [1024], "8GB")):
        try:
            use()
        except UserError as error:
            assert "\n" not in str(error)


# ---- the context


def test_the_context_is_found_under_every_name(copy):
    for name in files.CONTEXT:
        config = {"model_type": "llama", name: 4096}
        assert files.context_length(config) == 4096
        assert files.context_length({"model_type": "x", "text_config": config}) == 4096
    for none in (None, 1e30, 10**30):
        assert files.context_length({"max_position_embeddings": none}) == 0
    assert files.context_length({"max_position_embeddings": None, "n_positions": 1024.0}) == 1024
    path = copy / "config.json"
    config = json.loads(path.read_text())
    del config["max_position_embeddings"]
    path.write_text(json.dumps(config | {"max_seq_len": 2048}))
    assert model_context(opentq.load(str(copy))[0]) == 2048 == forecast(str(copy), [None], [512]).skeleton.context_limit


# ---- every architecture


NEEDED = {
    "mamba": {"time_step_rank": 8, "time_step_limit": [0, 1]},
    "mamba2": {"time_step_rank": 8, "time_step_limit": [0, 1], "num_heads": 4, "n_groups": 1, "chunk_size": 32},
    "rwkv7": {
        "hidden_size": 128,
        "head_dim": 32,
        "decay_low_rank_dim": 8,
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 8,
        "norm_eps": 1e-5,
    },
}


def own_config(name: str) -> dict:
    """The architecture's tiny configuration with the fields alone that it has itself, as real ones are."""
    fields = importlib.import_module(f"mlx_lm.models.{name}").ModelArgs.__dataclass_fields__
    config = {**architectures.config(name), **NEEDED.get(name, {})}
    return {key: value for key, value in config.items() if key in fields} | {"model_type": name}


@pytest.mark.parametrize("name", [*architectures.NAMES, *NEEDED])
def test_every_architecture_of_mlx_lm_is_planned(name):
    result = skeleton.build(own_config(name), name)
    hidden, inner, heads = result.widths
    assert hidden == 128 and inner > 0 and (heads in (4, 8) or name in NEEDED)
    assert result.parameters > 1000 and not result.notes
    assert all(p.kv_heads or p.constant or p.kind == "KVCache" for p in result.plans(None))


def test_what_mlx_lm_can_not_build_here_is_said():
    for name, words in {"bitnet": "on this machine", "olmo": "package that is not installed"}.items():
        config = {**architectures.COMMON, "model_type": name}
        with pytest.raises(files.ModelError, match=words):
            skeleton.build(config, name)


def test_a_mixture_that_looks_at_its_numbers_is_planned_in_full_size():
    """dbrx asks its router for numbers; 132 B parameters are never computed with."""
    config = {
        "model_type": "dbrx",
        "d_model": 6144,
        "n_layers": 40,
        "n_heads": 48,
        "vocab_size": 100352,
        "max_seq_len": 32768,
        "attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 500000},
        "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
    }
    result = skeleton.build(config, "dbrx")
    assert result.parameters / 1e9 == pytest.approx(131.6, abs=0.1)
    assert result.widths[2] == 48 and result.context_limit == 32768
    assert {(p.kv_heads, p.key_dim) for p in result.plans(None)} == {(8, 128)}


# ---- head dims


def narrow(dim: int) -> tuple[dict, llama.Model]:
    """(configuration, model) of a small Llama with this head dim."""
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "head_dim": dim,
        "rms_norm_eps": 1e-5,
        "vocab_size": 64,
        "max_position_embeddings": 512,
    }
    return config, llama.Model(llama.ModelArgs.from_dict(config))


@pytest.mark.parametrize("dim", [8, 24, 40, 80, 100, 120])
def test_policy_and_plan_ask_the_codec(dim):
    """What `plan` says of a head dim is what happens: compressed and served, or refused with the codec's reason."""
    config, model = narrow(dim)
    made = skeleton.build(config, "narrow", float_bytes=4)
    for text in ("tq5/tq3:nc", "int4", "int8:g128", "k8v4", "tq3p", "tq2.5", "polar4", "qjl", "f16", "int4:center"):
        try:
            planned = [(p.compressed, p.reason, p.key_dim) for p in made.plans(parse(text))]
        except NothingCompressed as error:
            assert f"head_dim {dim}" in str(error) and "use --kv f16" in str(error) and dim % 16
            with pytest.raises(NothingCompressed, match=f"head_dim {dim}"):
                opentq.compress(model, text)
            continue
        assert [(p.compressed, p.reason, p.key_dim) for p in opentq.compress(model, text)] == planned
        caches = model.make_cache()
        mx.eval(model(mx.arange(70)[None] % 64, cache=caches), model(mx.array([[1]]), cache=caches))


def test_a_layer_of_another_head_dim_stays_native_with_the_reason():
    """OpenELM's layers differ; a model with one that no codec serves is compressed in the others."""
    from opentq.hosts.mlx_lm.host import HOST
    from opentq.hosts.policy import decide

    caches = [HOST.caches.KVCache() for _ in range(3)]
    for cache, dim in zip(caches, (64, 100, 64)):
        cache.update_and_fetch(mx.zeros((1, 2, 1, dim)), mx.zeros((1, 2, 1, dim)))
    plans = decide(caches, parse("int4"), HOST.caches)
    assert [p.compressed for p in plans] == [True, False, True] and "head_dim 100" in plans[1].reason


def test_a_spec_that_skips_every_layer_says_so():
    config, model = narrow(64)
    for use in (lambda s: opentq.compress(model, s), skeleton.build(config, "narrow").plans):
        with pytest.raises(NothingCompressed, match="skip leaves all 2 layers in fp16"):
            use(parse("int4:skip=first99"))
    assert all(p.compressed for p in opentq.compress(model, "f16"))
