"""The planner's predictions against the bytes that are really held, and its answers against known models."""

from __future__ import annotations

import gc
import json
import subprocess
import sys

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

from opentq.cli.plan import parse_count
from opentq.errors import UserError
from opentq.hosts import hooks
from opentq.hosts.mlx_lm.classes import classes
from opentq.memory import device as machines
from opentq.memory import shapes, skeleton, source
from opentq.memory.device import GIB
from opentq.memory.forecast import forecast
from opentq.memory.plan import capacity, payload, predict, price
from opentq.spec.kv import KVSpec
from opentq.spec.text import specs

CPU = machines.assumed(8 * GIB, "cpu")

BASE = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "vocab_size": 1024,
    "rope_theta": 1e4,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}
LINEAR = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
}
TINY = {
    "llama": {**BASE, "model_type": "llama"},
    "gemma3": {
        **BASE,
        "model_type": "gemma3_text",
        "sliding_window": 256,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 64,
    },
    "qwen3_moe": {**BASE, **MIXTURE, "model_type": "qwen3_moe", "decoder_sparse_step": 1, "mlp_only_layers": []},
    "qwen3_next": {
        **BASE,
        **MIXTURE,
        **LINEAR,
        "model_type": "qwen3_next",
        "shared_expert_intermediate_size": 128,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "partial_rotary_factor": 0.25,
    },
    "gpt_oss": {
        **BASE,
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 128,
    },
    "gemma4": {
        **BASE,
        "model_type": "gemma4_text",
        "num_hidden_layers": 6,
        "global_head_dim": 128,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 0,
        "sliding_window": 128,
        "sliding_window_pattern": 2,
    },
    "deepseek_v3": {
        **BASE,
        "model_type": "deepseek_v3",
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 32,
        "v_head_dim": 64,
        "n_routed_experts": None,
        "moe_intermediate_size": 128,
        "rope_scaling": None,
        "attention_bias": False,
        "tie_word_embeddings": False,
    },
}


def built(name: str):
    """(skeleton, real model with random weights)."""
    config = TINY[name]
    model_class, args_class, _ = classes(config)
    mx.random.seed(0)
    model = model_class(args_class.from_dict(json.loads(json.dumps(config))))
    skeleton.tie(model)
    mx.eval(model.parameters())
    return skeleton.build(config, name, float_bytes=4), model


def run(model, tokens: int, step: int):
    """Prefill in chunks and decode one token, as mlx-lm does; returns the caches."""
    caches = make_prompt_cache(model)
    prompt = mx.zeros((1, tokens), mx.int32)
    for start in range(0, tokens - 1, step):
        model(prompt[:, start : min(start + step, tokens - 1)], cache=caches)
        mx.eval([c.state for c in caches])
    mx.eval(model(prompt[:, -1:], cache=caches), [c.state for c in caches])
    return caches


SPECS = ["f16", "k8v4:g64:recent=40:sink=4", "int3:skip=first1", "int4:window=compress"]
CASES = [(name, spec) for name in TINY for spec in (None, "int4")] + [("gemma3", spec) for spec in SPECS]
CASES += [("llama", "tq5/tq3:nc")]


@pytest.mark.parametrize(("name", "spec"), CASES)
def test_cache_bytes_within_two_percent(name, spec):
    skel, model = built(name)
    if spec:
        hooks.compress(model, spec)
    caches = run(model, 500, 200)
    plans = skel.plans(KVSpec.parse(spec) if spec else None)
    measured = sum(c.nbytes for c in caches if not c.empty())
    assert price(plans, 500, float_bytes=4, step=200) == pytest.approx(measured, rel=0.02)


PEAKS = [(name, None) for name in ("llama", "gemma3", "gpt_oss")]
PEAKS += [(name, "int4") for name in ("llama", "gemma3", "qwen3_moe", "gemma4")] + [("llama", "tq5/tq3:nc")]


@pytest.mark.parametrize(("name", "spec"), PEAKS)
def test_peak_within_ten_percent(name, spec, monkeypatch):
    monkeypatch.setenv("OPENTQ_KERNELS", "tiled")
    skel, model = built(name)
    if spec:
        hooks.compress(model, spec)
    gc.collect()
    mx.clear_cache()
    others = mx.get_active_memory() - skel.weight_bytes(16, float_bytes=4)
    mx.reset_peak_memory()
    run(model, 1200, 256)
    measured = mx.get_peak_memory() - others
    plans = skel.plans(KVSpec.parse(spec) if spec else None)
    weights = skel.weight_bytes(16, float_bytes=4)
    assert predict(skel, plans, 1200, weights, CPU, step=256, reserve=0).total == pytest.approx(measured, rel=0.10)


@pytest.mark.parametrize("name", TINY)
def test_weight_bytes_are_those_of_the_real_model(name):
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    skel, model = built(name)
    real = sum(p.nbytes for _, p in tree_flatten(model.parameters()))
    assert skel.weight_bytes(16, float_bytes=4) == real
    predicate = getattr(model, "quant_predicate", None)

    def choose(path, module):
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % 32:
            return False
        return predicate(path, module) if predicate else True

    nn.quantize(model, group_size=32, bits=4, class_predicate=choose)
    quantised = sum(p.nbytes for _, p in tree_flatten(model.parameters()))
    assert skel.weight_bytes(4, 32, float_bytes=4) == pytest.approx(quantised, rel=0.001)


def test_buffer_growth_is_that_of_the_cache():
    from opentq.caches.buffer import Buffer

    for ends in [(64,), (256, 320), (2048, 4096, 6144, 6208), (8192, 16384, 16448), (65536, 65600)]:
        buffer, done = Buffer(1), 0
        for end in ends:
            buffer.write(done, (mx.zeros((1, 1, end - done, 1), mx.uint32),))
            done = end
        assert buffer.rows == capacity(ends)


# ---- known models


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-3.1-8b", 8.03),
        ("llama-3.1-70b", 70.55),
        ("qwen2.5-3b", 3.09),
        ("qwen3-30b-a3b", 30.53),
        ("gemma-3-27b", 27.01),
        ("gemma-4-31b", 30.70),
        ("gpt-oss-20b", 20.91),
        ("gpt-oss-120b", 116.83),
    ],
)
def test_named_shapes_have_the_published_parameter_counts(name, billions):
    skel = skeleton.build(shapes.NAMED[name], name)
    assert skel.parameters / 1e9 == pytest.approx(billions, rel=0.002)


def test_llama_70b_table_of_the_original_system():
    """Their figures are GiB for the cache and nearly decimal GB for the weights, so their totals mix units."""
    skel = skeleton.build(shapes.NAMED["llama-3.1-70b"], "llama-3.1-70b")
    table = {16: (5.0, 1.6), 64: (20.0, 6.3), 128: (40.0, 12.5)}
    for k, (fp16, int4) in table.items():
        for spec, expected in (("f16", fp16), ("int4", int4)):
            assert payload(skel.plans(KVSpec.parse(spec)), k * 1024) / GIB == pytest.approx(expected, abs=0.051)
    weights = skel.weight_bytes(4)
    assert weights / 1e9 == pytest.approx(39.7, abs=0.05)
    assert weights / GIB == pytest.approx(37.0, abs=0.05)


def test_gemma_4_counts_windows_once_and_full_layers_by_their_own_heads():
    skel = skeleton.build(shapes.NAMED["gemma-4-31b"], "gemma-4-31b")
    plans = skel.plans(KVSpec.parse("f16"))
    windows = 50 * 1024 * 16 * 512 * 2
    full = 10 * 131072 * 4 * 1024 * 2
    assert payload(plans, 131072) == windows + full


def test_a_64_gb_mac_and_its_wired_limit():
    result = forecast("meta-llama/Llama-3.1-70B", specs("off,int4"), [131072], "64GB")
    assert result.device.usable == 48 * GIB
    assert [r.fits for r in result.rows] == ["no", "raised"]
    total = result.rows[1].estimate.total
    megabytes = int(result.sysctl.rpartition("=")[2])
    assert result.sysctl.startswith("sudo sysctl iogpu.wired_limit_mb=")
    assert total <= megabytes << 20 <= 58 * GIB
    text = result.table()
    assert "48 GB by default" in text and "not persistent" in text and result.sysctl in text
    assert result.largest["int4"][1] > 131072 > result.largest["int4"][0]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("meta-llama/Llama-3.1-70B", "llama-3.1-70b"),
        ("mlx-community/Meta-Llama-3.1-8B-Instruct-4bit", "llama-3.1-8b"),
        ("Qwen/Qwen2.5-3B-Instruct", "qwen2.5-3b"),
        ("google/gemma-4-31b-it", "gemma-4-31b"),
        ("llama-3.1-7b", None),
        ("someone/other", None),
    ],
)
def test_names_find_shapes(name, shape):
    found = shapes.find(name)
    assert (found and found[0]) == shape


# ---- machines


def test_this_machine_has_memory():
    here = machines.here()
    assert GIB < here.usable < here.memory


def test_working_sets_of_macs():
    gib = [machines.working_set(n * GIB) / GIB for n in (16, 32, 36, 64, 128)]
    assert gib == pytest.approx([10.67, 21.33, 27, 48, 96], abs=0.01)


@pytest.mark.parametrize(
    ("text", "size"), [("64GB", 64 * GIB), ("64", 64 * GIB), ("1.5 GiB", 3 * GIB // 2), ("512MB", 1 << 29)]
)
def test_memory_sizes(text, size):
    assert machines.parse_memory(text) == size


def test_lists_and_counts():
    assert [parse_count(t) for t in ("128k", "1M", "500")] == [131072, 1 << 20, 500]


# ---- the command, and what it says about bad input


def test_folder_with_weights_is_counted_from_the_files(tmp_path):
    from mlx.utils import tree_flatten

    _, model = built("llama")
    (tmp_path / "config.json").write_text(json.dumps(TINY["llama"]))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    real = sum(p.nbytes for _, p in tree_flatten(model.parameters()))
    result = forecast(str(tmp_path), specs("int4"), [1024], "8GB", "cpu")
    assert result.rows[0].estimate.weights == real
    assert "from the files" in result.weights_said
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(UserError, match="cut off"):
        forecast(str(tmp_path), specs("int4"), [1024])


def test_bad_input_is_said_in_words(tmp_path):
    def refuse(match, model="llama-3.1-8b", kv=("int4",), **more):
        with pytest.raises(UserError, match=match):
            forecast(model, specs(",".join(kv)), [1024], **more)

    refuse("no folder, config.json or known shape", model="nonsense")
    refuse("no config.json", model=str(tmp_path))
    refuse("not a size", memory="lots")
    refuse("--device", memory="8GB", device="tpu")
    refuse("--weights", weights="3.5bit")
    refuse("unknown codec", kv=["int5"])
    config = tmp_path / "config.json"
    config.write_text("{")
    refuse("damaged", model=str(config))
    config.write_text('{"hidden_size": 3}')
    refuse("model_type", model=str(config))
    config.write_text('{"model_type": "llama"}')
    refuse("hidden_size", model=str(config))
    for text in ("many", "0", "-5"):
        with pytest.raises(UserError, match="number of tokens"):
            parse_count(text)


def test_an_unknown_model_type_is_assumed_a_llama_and_said():
    skel = skeleton.build({**BASE, "model_type": "frobnicator9"}, "x")
    assert "read as a Llama" in skel.notes[0]


def test_contexts_beyond_the_model_and_memory_below_the_weights():
    text = forecast("llama-3.1-70b", specs("int4"), [1 << 18], "16GB").table()
    assert "beyond the model's 128K" in text
    assert "weights alone" in text and "no context fits" in text


def test_named_shape_needs_no_transformers_and_no_network():
    code = (
        "import sys, json, time; from opentq.cli.plan import plan\n"
        "plan('llama-3.1-70b', '', 'int4', '128k', '64GB', 'mac', '', 2048, None, True)\n"
        "assert 'transformers' not in sys.modules and 'huggingface_hub' not in sys.modules\n"
        "from mlx_lm import generate; assert callable(generate)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    document = json.loads(done.stdout)
    assert document["rows"][0]["spec"] == "int4" and document["rows"][0]["tokens"] == 131072
    assert document["largest"]["int4"]["wired_limit_raised"] > 131072


def test_source_knows_quantisation_by_name_and_config():
    assert source.find("mlx-community/Meta-Llama-3.1-8B-Instruct-8bit").quantization == (8, 64)
    assert source.find("llama-3.1-8b").quantization is None
    assert source.Source("x", {"quantization": {"bits": 4, "group_size": 32}}).quantization == (4, 32)


def test_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from opentq.memory.plot import draw

    path = tmp_path / "plan.svg"
    draw(forecast("llama-3.1-8b", specs("off,int4"), [8192, 131072], "64GB"), path)
    assert "<svg" in path.read_text()
    with pytest.raises(UserError, match="must end in"):
        draw(forecast("llama-3.1-8b", [None], [8192], "64GB"), tmp_path / "plan.bmp")
