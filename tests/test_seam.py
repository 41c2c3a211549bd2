"""The seam with mlx-lm is live, exact where it must be, reversible, and refuses what it does not know."""

from __future__ import annotations

import copy
import subprocess
import sys

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models import base
from mlx_lm.models.cache import KVCache, make_prompt_cache

import opentq
from opentq.hosts import hooks, shim
from opentq.hosts.generation import fp16_bytes
from opentq.hosts.mlx_lm.host import HOST
from opentq.hosts.policy import NothingCompressed

from .conftest import random_llama

PROMPT = mx.array([(7 * i * i + 3 * i) % 251 for i in range(300)])


def greedy(model, prompt=PROMPT, tokens=20, **options):
    return [int(t) for t, _ in generate_step(prompt, model, max_tokens=tokens, prefill_step_size=128, **options)]


def test_the_seam_is_live(tiny_llama, kernels):
    """Fails when attention does not go through the compressed path, whatever the output looks like."""
    opentq.compress(tiny_llama, "int4")
    before = [row.calls for row in opentq.report(tiny_llama).rows]
    greedy(tiny_llama, tokens=5)
    after = [row.calls for row in opentq.report(tiny_llama).rows]
    # 300 tokens: chunks of 128, 128, 43, then the last prompt token and 5 more (one is computed ahead).
    assert [b - a for a, b in zip(before, after)] == [3 + 6, 3 + 6]


def test_f16_gives_the_tokens_of_mlx_lm(tiny_llama, kernels):
    expected = greedy(tiny_llama)
    opentq.compress(tiny_llama, "f16")
    assert greedy(tiny_llama) == expected


def test_int8_logits_are_near_fp32(tiny_llama, kernels):
    expected = tiny_llama(PROMPT[None])
    opentq.compress(tiny_llama, "int8")
    cache = make_prompt_cache(tiny_llama)
    parts = [tiny_llama(PROMPT[None, i : i + 50], cache=cache) for i in range(0, 300, 50)]
    error = mx.abs(mx.concatenate(parts, axis=1) - expected).max().item()
    assert error < 0.02 * mx.abs(expected).max().item()


def test_import_order_does_not_matter():
    """The model module is imported, and has copied the function's name, long before the shim is installed."""
    code = """
import mlx.core as mx
from mlx_lm.models.llama import scaled_dot_product_attention as copied
from tests.conftest import random_llama
model = random_llama()
import opentq
opentq.compress(model, "int4")
model(mx.array([[1, 2, 3]]), cache=opentq.make_cache(model))
print(sum(r.calls for r in opentq.report(model).rows))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split()[-1] == "4"


def test_uninstall_restores_everything(tiny_llama):
    expected = greedy(tiny_llama)
    opentq.compress(tiny_llama, "int2")
    opentq.uninstall(tiny_llama)
    assert "make_cache" not in vars(tiny_llama) and hooks.installed(tiny_llama) is None
    opentq.uninstall()
    assert not shim.installed(HOST)
    assert greedy(tiny_llama) == expected
    opentq.compress(tiny_llama, "int4")
    assert shim.installed(HOST)


def test_compress_twice_replaces_the_spec(tiny_llama):
    opentq.compress(tiny_llama, "int8")
    plans = opentq.compress(tiny_llama, "int4:skip=first1")
    assert [p.codec for p in plans] == ["f16", "int4"]
    assert len(make_prompt_cache(tiny_llama)) == 2


def test_caches_are_fresh_for_every_generation(tiny_llama):
    opentq.compress(tiny_llama, "int4")
    first = greedy(tiny_llama)
    assert greedy(tiny_llama) == first
    assert make_prompt_cache(tiny_llama)[0] is not make_prompt_cache(tiny_llama)[0]


def test_an_unknown_signature_is_refused(tiny_llama, monkeypatch):
    opentq.uninstall()

    def other(queries, keys, values, mask):
        raise AssertionError

    monkeypatch.setattr(base, "scaled_dot_product_attention", other)
    with pytest.raises(hooks.HookError, match="not supported"):
        opentq.compress(tiny_llama, "int4")


def test_nothing_to_compress_is_an_error():
    from mlx_lm.models import mamba

    args = mamba.ModelArgs(
        model_type="mamba",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        state_size=8,
        num_hidden_layers=2,
        conv_kernel=4,
        use_bias=False,
        use_conv_bias=True,
        time_step_rank=8,
    )
    with pytest.raises(NothingCompressed, match="recurrent state"):
        opentq.compress(mamba.Model(args), "int4")


def test_a_head_dim_that_no_group_divides_is_said(tiny_llama):
    from mlx_lm.models import llama

    args = llama.ModelArgs(
        model_type="llama",
        hidden_size=96,
        num_hidden_layers=1,
        intermediate_size=64,
        num_attention_heads=4,
        head_dim=24,
        rms_norm_eps=1e-5,
        vocab_size=64,
    )
    with pytest.raises(ValueError, match="head_dim 24"):
        opentq.compress(llama.Model(args), "int4")


@pytest.mark.parametrize("which", ["both", "target", "draft"])
def test_speculative_decoding_gives_the_same_tokens(which, kernels):
    """The draft model is another random model, so most proposals are rejected and trimmed."""
    model, draft = random_llama(), random_llama(seed=1)
    if which in ("both", "target"):
        opentq.compress(model, "f16")
    expected = greedy(model, tokens=24)
    if which in ("both", "draft"):
        opentq.compress(draft, "int4")
    caches = make_prompt_cache(model) + make_prompt_cache(draft)
    steps = speculative_generate_step(
        PROMPT, model, draft, max_tokens=24, num_draft_tokens=4, prefill_step_size=128, prompt_cache=caches
    )
    assert [int(t) for t, _, _ in steps] == expected
    assert caches[0].offset == caches[1].offset


def _prefill_peak(spec: str | None, tokens: int) -> int:
    """Bytes that a prompt in steps of 512 adds at its peak; None is mlx-lm's own cache."""
    model = random_llama()
    if spec:
        opentq.compress(model, spec)
    cache = make_prompt_cache(model)
    prompt = mx.tile(PROMPT, 28)[:tokens]
    mx.eval(model.parameters())
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for i in range(0, tokens, 512):
        model.model(prompt[None, i : i + 512], cache=cache)
        mx.eval([c.state for c in cache])
    return mx.get_peak_memory() - before


def test_peak_memory_of_a_long_prefill_is_below_mlx_lm(kernels):
    """Packed cache and bounded scratch against fp32 cache and whole score matrices."""
    assert _prefill_peak("int4", 4096) < _prefill_peak(None, 4096)


def test_what_mlx_lm_would_bound_or_compress_itself_is_refused_by_name(tiny_llama):
    """Options of mlx-lm that a compressed cache can't honour are never dropped without a word."""
    from mlx_lm.models import qwen2

    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 64, "rms_norm_eps": 1e-5}
    model = qwen2.Model(qwen2.ModelArgs("qwen2", num_attention_heads=1, num_key_value_heads=1, **sizes))
    opentq.compress(model, "int4")
    with pytest.raises(ValueError, match="max_kv_size=256 can't be used"):
        make_prompt_cache(model, max_kv_size=256)
    with pytest.raises(ValueError, match="max_kv_size=64"):
        list(generate_step(mx.array([1, 2]), model, max_tokens=2, max_kv_size=64))
    with pytest.raises(ValueError, match="kv_bits is mlx-lm's own"):
        list(generate_step(mx.array([1, 2]), model, max_tokens=2, kv_bits=4))
    opentq.compress(tiny_llama, "int4")
    assert make_prompt_cache(tiny_llama, max_kv_size=256), "a model that makes its own caches: mlx-lm drops it, too"
    opentq.uninstall(model)
    assert type(make_prompt_cache(model, max_kv_size=256)[0]).__name__ == "RotatingKVCache"


def test_caches_that_outlive_the_seam_say_so(tiny_llama):
    opentq.compress(tiny_llama, "int4")
    caches = make_prompt_cache(tiny_llama)
    tiny_llama(mx.array([[1, 2, 3]]), cache=caches)
    opentq.uninstall()
    for old in (caches, copy.deepcopy(caches)):
        with pytest.raises(ValueError, match="taken out"):
            tiny_llama(mx.array([[4]]), cache=old)
    opentq.compress(tiny_llama, "int4")
    tiny_llama(mx.array([[4]]), cache=caches)


FORKED = """
import os, sys
import mlx.core as mx
mx.set_default_device(mx.cpu)
import opentq
from tests.conftest import random_llama
model = random_llama()
opentq.compress(model, "int4")
caches = model.make_cache()
model(mx.array([[1, 2, 3]]), cache=caches)
if os.fork() == 0:
    for use in (lambda: model(mx.array([[4]]), cache=caches), lambda: opentq.compress(model, "int8")):
        try:
            use()
        except ValueError as error:
            print("spawn" in str(error), flush=True)
    os._exit(0)
print(os.wait()[1])
"""


def test_a_forked_child_is_told_to_spawn_and_never_hangs():
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["True", "True", "0"], done.stderr


def test_half_precision_after_compressing_a_mixture_says_what_happened():
    from mlx_lm.models import mixtral

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = mixtral.Model(mixtral.ModelArgs("mixtral", **sizes, **heads))
    opentq.compress(model, "int4")
    model.set_dtype(mx.float16)
    if mx.default_device() != mx.Device(mx.cpu):
        pytest.skip("only CPUs multiply in float32 alone")
    with pytest.raises(ValueError, match=r"call model.set_dtype\(mx.float32\)"):
        mx.eval(model(mx.array([[1, 2, 3]]), cache=make_prompt_cache(model)))


def test_caches_that_stay_as_they_are_count_in_the_ratio():
    model = random_llama()
    hooks.compress(model, "int4")
    caches = [*model.make_cache(), KVCache()]
    mx.eval(model(mx.arange(128)[None], cache=caches))
    caches[-1].update_and_fetch(*[mx.zeros((1, 2, 128, 64), mx.float16)] * 2)
    dense = sum(p.kv_heads * (p.key_dim + p.value_dim) * 2 * 128 for p in hooks.installed(model).plans)
    assert fp16_bytes(model, 128, caches) == dense + caches[-1].nbytes
    hooks.uninstall(model)
    assert fp16_bytes(model, 128, caches) == 0
