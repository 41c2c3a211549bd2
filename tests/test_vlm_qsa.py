"""Qwen's sparse attention: the tokens that the model's indexer chooses are gathered from packed bytes."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import pytest

pytest.importorskip("mlx_vlm")

from mlx_vlm.models.cache import make_prompt_cache

import opentq
from opentq.attention import selected
from opentq.caches import disk
from opentq.hosts import hooks
from opentq.hosts.mlx_vlm import qsa
from opentq.hosts.mlx_vlm.qsa import VLMQSACache, bytes_per_token

from .oracle import judge
from .vlm_architectures import build

CHUNKS = (100, 60, 37)
"""Tokens of a prompt, read in three parts; 64 and three more are chosen of them."""


@pytest.fixture(scope="module")
def model():
    return build("qwen4_exp")


@pytest.fixture(scope="module")
def x():
    mx.random.seed(5)
    return mx.random.normal((1, 260, 128))


def layer_and_cache(model, kv):
    """A layer of full attention and a fresh cache of it; `kv` None is the model's own."""
    opentq.compress(model, kv) if kv else hooks.uninstall(model)
    return model.layers[1].self_attn, make_prompt_cache(model)[1]


def read(layer, cache, x, chunks=CHUNKS):
    """The last output of every chunk of `x [1, T, E]`, read after each other."""
    out, start = [], cache.offset
    for count in chunks:
        mask = "causal" if count > 1 else None
        out.append(layer(x[:, start : start + count], mask=mask, cache=cache, position_ids=None)[:, -1])
        start += count
    return mx.concatenate(out)


@pytest.mark.parametrize("axes", [0, 3])
def test_it_answers_as_on_its_own_caches(model, x, axes, monkeypatch):
    places = mx.broadcast_to(mx.arange(260) // 2 + 5, (3, 1, 260)) if axes else None

    monkeypatch.setattr(qsa, "ROWS", 40)

    def run(kv):
        layer, cache = layer_and_cache(model, kv)
        parts = [slice(0, 100), slice(100, 197), *(slice(i, i + 1) for i in range(197, 206))]
        where = [None if places is None else places[..., p] for p in parts]
        return mx.stack([layer(x[:, p], "causal", cache, w)[0, -1] for p, w in zip(parts, where)])

    want = run(None)
    assert mx.abs(run("f16") - want).max().item() < 2e-3 * mx.abs(want).max().item()
    assert mx.abs(run("int8") - want).max().item() < 0.05 * mx.abs(want).max().item()


@pytest.mark.parametrize("spec", ["f16", "int4", "int4:sink=4", "tq5/tq3:nc:center:sink=4"])
def test_a_step_gathers_what_the_models_mask_lets_through(model, x, spec, monkeypatch):
    """Judged by fp32 attention over all decoded tokens under the mask that the model itself builds."""
    seen = []
    gather = selected.attend

    def spy(args, positions):
        out = gather(args, positions)
        seen.append((args, positions, out))
        return out

    layer, cache = layer_and_cache(model, spec)
    read(layer, cache, x)
    monkeypatch.setattr(selected, "attend", spy)
    choices = []
    choose = type(cache).choose
    monkeypatch.setattr(type(cache), "choose", lambda *given: choices.append(choose(*given)) or choices[-1])
    read(layer, cache, x, (1,) * 6)
    assert len(seen) == 6 and cache.stats.served_by == "selected"
    for (args, positions, out), (choice,) in zip(seen, choices):
        mask = layer.indexer.build_mask(choice)
        assert positions.shape[1] == 64 + 3 and mask.sum().item() == (positions >= 0).sum().item() < mask.shape[-1]
        judge(replace(args, mask=mask), out)


def test_a_short_context_is_read_whole(model, x):
    layer, cache = layer_and_cache(model, "int4")
    read(layer, cache, x, (60, 1))
    assert cache.stats.served_by != "selected" and cache.indices[0].offset == 61
    read(layer, cache, x, (7,))
    assert cache.stats.served_by == "tiled"
    read(layer, cache, x, (1,))
    assert cache.stats.served_by == "selected"


def test_every_sequence_of_a_batch_chooses_as_it_does_alone(model, x):
    layer, _ = layer_and_cache(model, "int4")
    lengths, singles = (197, 61, 120), []
    for n in lengths:
        cache = make_prompt_cache(model)[1]
        read(layer, cache, x, (n,))
        singles.append(cache)
    batch = VLMQSACache.merge(singles)
    for step in range(5):
        new = mx.concatenate([x[:, n + step : n + step + 1] for n in lengths])
        together = layer(new, mask="left_padded_decode", cache=batch, position_ids=None)
        alone = [read(layer, c, x, (1,)) for c in singles]
        assert mx.abs(together[:, 0] - mx.concatenate(alone)).max().item() < 1e-5
    batch.filter([2, 0])
    out = layer(mx.concatenate([x[:, 125:126], x[:, 202:203]]), mask=None, cache=batch, position_ids=None)
    third = batch.extract(1)
    assert type(third) is VLMQSACache and third.indices[0].offset == third.offset == 203
    alone = [read(layer, singles[i], x, (1,)) for i in (2, 0)]
    assert mx.abs(out[:, 0] - mx.concatenate(alone)).max().item() < 1e-5


def test_a_prompt_padded_on_the_left_is_what_it_is_alone(model, x):
    layer, cache = layer_and_cache(model, "f16")
    batch = cache.to_batch([0, 20])
    padded = mx.concatenate([x[:, :90], mx.concatenate([mx.ones((1, 20, 128)), x[:, :70]], axis=1)])
    together = layer(padded, mask="causal", cache=batch, position_ids=None)
    other = make_prompt_cache(model)[1]
    alone = [layer(x[:, :n], "causal", c, None)[0, -1] for n, c in ((90, cache), (70, other))]
    assert mx.abs(together[:, -1] - mx.stack(alone)).max().item() < 1e-4
    assert [i.offset for i in batch.indices] == [90, 70] == batch.offset.tolist()


def test_tokens_taken_back_leave_no_trace(model, x):
    layer, cache = layer_and_cache(model, "int4")
    read(layer, cache, x, (*CHUNKS, 1))
    kept = VLMQSACache.from_state(cache.state)
    read(layer, cache, x, (9, 1, 1))
    cache.trim(11)
    assert mx.array_equal(read(layer, cache, x, (1,) * 6), read(layer, kept, x, (1,) * 6))


def test_drafts_are_verified_as_steps(model, x):
    layer, cache = layer_and_cache(model, "int4")
    read(layer, cache, x)
    other = VLMQSACache.from_state(cache.state)
    steps = [layer(x[:, i : i + 1], None, cache, None) for i in range(197, 201)]
    from mlx_vlm.models.qwen4_exp import language

    together = language._QWEN4_BATCH_INVARIANT_FORWARD._qsa_attention(layer, x[:, 197:201], other, None, "causal")
    assert mx.array_equal(together, mx.concatenate(steps, axis=1))


def test_a_file_holds_the_index_too(model, x, tmp_path):
    layer, cache = layer_and_cache(model, "int4")
    read(layer, cache, x)
    disk.save(tmp_path / "c.safetensors", [cache], range(197))
    fresh = make_prompt_cache(model)[1]
    disk.load(tmp_path / "c.safetensors", into=[fresh])
    assert mx.array_equal(read(layer, fresh, x, (1,) * 5), read(layer, cache, x, (1,) * 5))


def test_bytes_and_scratch_follow_what_is_packed_and_chosen():
    """What a cache of 8,192 tokens holds, and what a step takes on top of it, are below two fifths of its own cache."""
    heads, dim, tokens, chosen = 2, 128, 8192, 512
    cache = VLMQSACache("int4")
    x = mx.random.normal((1, heads, tokens, dim)).astype(mx.float16)
    keys, _ = cache.update_and_fetch(x, x)
    keys, _ = cache.update_and_fetch(x[:, :, :1], x[:, :, :1])
    mx.eval(cache._arrays())
    own = 2 * x.nbytes
    del x
    q, positions = mx.random.normal((1, 8, 1, dim)), mx.arange(0, tokens, tokens // chosen)[None]
    mx.eval(q, positions, keys.step.dense_k)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(keys.step.attend_rows(q, positions, scale=0.1))
    scratch = mx.get_peak_memory() - before
    assert scratch < 6 * 2 * chosen * heads * dim * 4, "512 decoded rows, a few times over, and not 8,192"
    assert cache.nbytes < 0.33 * own and scratch < 0.4 * own


def test_the_report_and_plans_count_the_index(model):
    plans = opentq.compress(model, "int4:pages=128")
    packed = [p for p in plans if p.compressed]
    beside = bytes_per_token(model.layers[1].self_attn.indexer)
    assert [p.index for p in packed] == [1, 3] and all(p.beside == beside for p in packed)
    text = str(opentq.report(model))
    assert f"({beside:.0f} of them the indexer's)" in text and "no pages: the model chooses tokens itself" in text
    caches = make_prompt_cache(model)
    mx.eval(model(mx.array([[3] * 640]), cache=caches).logits)
    assert isinstance(caches[1], VLMQSACache)
    index = sum(a.nbytes for a in caches[1].indices[0].arrays)
    assert index == (768 + 640 / 4) * 32 * 4 + 768 * 3 * 4, "float32 here; buffers grow by 256 tokens"
