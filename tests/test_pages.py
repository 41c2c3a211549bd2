"""Page selection: sketches that follow packed tokens, the same lists everywhere, and attention over lists of pages."""

from __future__ import annotations

import re
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from opentq.attention import dispatch, pages, reference
from opentq.attention.channels import count as count_of_channels
from opentq.attention.channels import count as kept
from opentq.caches import disk
from opentq.caches.batch import BatchOpenTQCache
from opentq.caches.single import OpenTQCache
from opentq.contracts.rotary import Rotary
from opentq.errors import UserError
from opentq.evaluate.contenders import enter
from opentq.hosts import hooks
from opentq.hosts.report import report
from opentq.spec.kv import KVSpec, SpecError

from .conftest import random_llama
from .cuda.choice import emulated_choose
from .matrix import Shape
from .oracle import args_of, fill, judge, queries, vectors

SHAPE = Shape(q_heads=4, kv_heads=2)
LISTS = [[[0, 3, 7], [1, 6, 7]], [[2, 3, 4], [0, 1, 4]]]


def sketched(spec: str, tokens: int, seed: int = 0, batch: int = 1) -> OpenTQCache:
    """A cache with channels of its own, and queries seen with its keys."""
    cache = OpenTQCache(spec)
    cache.rotary = Rotary(64)
    shape = replace(SHAPE, batch=batch)
    k, v = vectors(shape, tokens, seed)
    for start in range(0, tokens, 600):
        part = slice(start, min(start + 600, tokens))
        handles = cache.update_and_fetch(k[:, :, part], v[:, :, part])
        q = queries(shape, part.stop - start, seed)
        mx.eval(handles[0].step.attend(q, scale=0.125, mask="causal"))
    return cache


def step(cache: OpenTQCache, seed: int = 5):
    """One decode step: its handles and its queries."""
    batch = cache.dense_k.shape[0]
    shape = replace(SHAPE, batch=batch)
    return cache.update_and_fetch(*vectors(shape, 1, seed)), queries(shape, 1, seed)


# ---- the spec


def test_the_dial():
    spec = KVSpec.parse("int4:sink=4:pages=1024")
    assert str(spec) == "int4:sink=4:pages=1024" and spec.pages == 1024
    for text, match in (
        ("int4:pages=100", "multiple of 64"),
        ("int4:pages=0", "multiple of 64"),
        ("int4:pages=x", "multiple of 64"),
        ("int4:pages=64:pages=128", "given twice"),
        ("int4:pages=64:sink=4", "at least pages=128"),
        ("int4:sink=4:recent=128:pages=128", "at least pages=256"),
    ):
        with pytest.raises(SpecError, match=match):
            KVSpec.parse(text)


# ---- sketches


def test_sketches_keep_four_bits_of_some_channels_and_the_mean_of_the_others():
    x = mx.random.normal((2, 3, 192, 8), key=mx.random.key(0)) * mx.array([1.0, 9, 0.1, 1, 1, 0, 3, 2]) + 0.5
    chosen = mx.broadcast_to(mx.array([1, 2, 5], dtype=mx.int32), (2, 3, 3))
    made = pages.encode(x, chosen)
    assert made.shape == (2, 3, 3, 3 * 34 + 10) and made.dtype == mx.uint8 and pages.row_bytes(3, 8) == 112
    few, mean = pages.decode(made, 3)
    back, want = few.swapaxes(-1, -2), x[..., 1:6][..., mx.array([0, 1, 4])].reshape(2, 3, 3, 64, 3)
    assert (mx.abs(back - want) <= mx.abs(want).max(3, keepdims=True) / 15 * 1.01 + 1e-6).all().item()
    exact = x.reshape(2, 3, 3, 64, 8).mean(3) * mx.array([1, 0, 0, 1, 1, 0, 1, 1])
    assert (mx.abs(mean - exact) <= mx.abs(exact).max(-1, keepdims=True) / 254 * 1.01).all().item()
    for dim, limit in ((64, 0.06), (96, 0.036), (128, 0.035), (256, 0.035)):
        held = KVSpec.parse("tq5/tq3:nc").bits_per_value(dim) * 2 * dim / 8
        assert pages.bytes_per_token(dim) / (held + pages.bytes_per_token(dim)) <= limit


def lists(cache: OpenTQCache, q: mx.array, lens: list[int]) -> mx.array:
    selector = cache.sketches.selector(lens)
    return selector.choose(selector.queries(q, 0.125), tuple(lens), cache.sketches.budget // 64)


def test_sketches_are_of_the_packed_keys():
    cache = sketched("int4:pages=128", 700)
    assert cache.sketches.ready == [True] and cache.sketches.seen == [600]
    step(cache)
    assert cache.sketches.ready == [True] and cache.sketches.sketched == [10]
    keys = cache.k_codec.unrotate(cache.k_codec.decode(cache.canonical()[0], mx.float32, 64))
    assert mx.array_equal(cache.sketches.buffer.arrays[0][:, :, :10], pages.encode(keys, cache.sketches.channels))
    # Channel 3 is six times the others: its pair is chosen in every head.
    chosen = np.array(cache.sketches.channels)[0]
    assert chosen.shape == (2, 6) and all({3, 35} <= set(head) for head in chosen.tolist())
    assert cache.nbytes == sum(a.nbytes for a in cache._arrays())


def test_the_pages_that_queries_look_for_are_chosen():
    cache = sketched("int4:pages=128", 1300)
    (handles, q), channel = step(cache), 3
    target = cache.canonical()[0]
    keys = cache.k_codec.unrotate(cache.k_codec.decode(target, mx.float32, 64))
    for page in (2, 9, 15):
        q = mx.zeros((1, 4, 1, 64))
        best = keys[0, :, page * 64 : page * 64 + 64, channel].max(1)
        q[:, :, :, channel] = 40.0
        top = mx.argmax(keys[0, :, : 20 * 64, channel].reshape(2, 20, 64).max(-1), axis=1)
        found = lists(cache, q, [1280])
        assert found.shape == (1, 2, 2) and all(int(t) in found[0, h].tolist() for h, t in enumerate(top.tolist()))
        assert (found[0, :, 1] == 19).all().item() and best.size == 2
    assert handles[0].step.lens[0][0] == 1280


def test_the_newest_page_and_missing_pages():
    weights = mx.zeros((2, 1, 1, 5)) + mx.array([5.0, 4, 3, 2, 1])
    found = pages.top(weights, (320, 320), 3)
    assert found.tolist() == [[[0, 1, 4]]] * 2
    assert pages.top(weights[..., :4], (319, 130), 3).tolist() == [[[0, 1, 4]], [[0, 1, 2]]]
    short = pages.top(weights, (320, 64), 3).tolist()[1][0]
    assert short[0] == 0  # what follows is left alone


@pytest.mark.parametrize("choosing, read", [(0, 128), (1 << 30, 1280)])
def test_pages_are_chosen_where_that_takes_less_time_than_reading_all(monkeypatch, choosing, read):
    cache = sketched("int4:pages=128", 1300)
    backend = dispatch.backends.active()
    if backend is None:
        pytest.skip("no fused kernels on this machine")
    monkeypatch.setattr(dispatch.backends, "active", lambda: replace(backend, choosing=choosing))
    handles, q = step(cache)
    before = cache.stats.read
    handles[0].step.attend(q, scale=0.125)
    assert cache.stats.read - before == read
    held = 1280 * 2 * 2 * cache.spec.bits_per_value(64) * 64 / 8
    assert args_of(handles, q).packed_bytes == pytest.approx(held, rel=0.1)


@pytest.mark.parametrize("by", ["portable", "native", "cuda"])
def test_kernels_choose_what_the_reference_chooses(by):
    """Lists are sets, and a page may only differ where its weight ties with that of the last one chosen."""
    backend = dispatch.backends.active()
    sums = by == "cuda" or (by == "native" and backend is not None and backend.sums)
    choosers = {"native": backend.choose if backend else None, "cuda": emulated_choose}
    if by == "native" and not backend:
        pytest.skip("no fused kernels on this machine")
    rng = np.random.default_rng(0)
    cases = [((1300, 700), 6, 64, 8, 4), ((2050, 2050), 16, 40, 3, 9), ((64 * 40, 100), 4, 128, 1, 1)]
    if by == "cuda":
        cases = [((700, 130), 6, 40, 2, 3)]
    heads, held = (1, 12) if by == "cuda" else (3, 40)
    for packed, channels, dim, rows, count in cases:
        keys = mx.array(rng.standard_normal((2, heads, 64 * held, dim), dtype=np.float32))
        chosen = mx.broadcast_to(mx.arange(1, channels + 1, dtype=mx.int32), (2, heads, channels))
        selector = pages.Selector(pages.encode(keys, chosen), chosen, 64 * count, sums)
        queries = selector.queries(mx.array(rng.standard_normal((2, heads * rows, 1, dim), dtype=np.float32)), 1.0)
        choose = choosers.get(by)
        found = choose(selector.sketches, queries, packed, count) if choose else selector.choose(queries, packed, count)
        few, mean = pages.decode(selector.sketches, channels)
        scores = (queries[:, :, None, :, :channels] @ few) + (queries[..., channels:] @ mean.swapaxes(-1, -2)).swapaxes(
            -1, -2
        )[..., None]
        for b in range(2):
            whole, there = packed[b] // 64, -(-packed[b] // 64)
            weights = mx.logsumexp(scores[b, :, :whole], axis=-1) if sums else scores[b, :, :whole].max(-1)
            mass = mx.softmax(weights, axis=1).sum(2)  # [H, pages]
            for h in range(heads):
                chosen = found[b, h].tolist()
                if there <= count:
                    assert chosen[:there] == list(range(there))
                    continue
                best = sorted(range(there - 1), key=lambda p: -mass[h, p].item())[: count - 1]
                assert chosen == sorted(set(chosen)) and chosen[-1] == there - 1
                got, most = (sum(mass[h, p].item() for p in pick) for pick in (chosen[:-1], best))
                assert got == pytest.approx(most, rel=1e-4)


@pytest.mark.parametrize("spec", ["int4:pages=128", "tq5/tq3:nc:center:sink=4:pages=128"])
def test_sketches_follow_trims_and_come_back_the_same(spec):
    once, twice = sketched(spec, 1300), sketched(spec, 1300)
    for cache in (once, twice):
        step(cache)
    twice.trim(300)
    assert twice.sketches.sketched[0] == twice.n_packed // 64
    k, v = vectors(SHAPE, 1301)
    again = vectors(SHAPE, 1300)
    twice.update_and_fetch(*(x[:, :, 1001:1300] for x in again))
    step(twice)
    kept = slice(0, 15)
    assert mx.array_equal(*(c.sketches.buffer.arrays[0][:, :, kept] for c in (once, twice)))
    assert k.shape == v.shape


def test_batches_merge_filter_extract_and_extend_sketches():
    singles = [sketched("int4:pages=128", n, seed) for seed, n in enumerate((900, 1300, 200))]
    for cache in singles:
        step(cache)
    states = [[np.array(a) for a in c.sketches.pick([0]).arrays[:2]] for c in singles[:2]]
    batch = BatchOpenTQCache.merge(singles)
    assert batch.sketches.sketched == [14, 20, 0] and batch.sketches.ready == [True, True, False]
    batch.filter([1, 0])
    batch.extend(BatchOpenTQCache.merge([singles[2], singles[0]]))
    assert batch.sketches.sketched == [20, 14, 0, 14]
    for lane, n in ((0, 1), (1, 0), (3, 0)):
        alone = batch.extract(lane)
        assert all(np.array_equal(a, b) for a, b in zip(states[n], map(np.array, alone.sketches.arrays[:2])))
    # A lane that does not know its channels yet keeps everything exact.
    assert batch.sketches.selector([1280, 896, 192, 896]) is None
    copy = BatchOpenTQCache.from_state(batch.state)
    assert copy.sketches.sketched == batch.sketches.sketched and copy.sketches.ready == batch.sketches.ready


def test_a_batch_reads_what_single_sequences_read(kernels):
    singles = [sketched("int4:pages=128", n, seed) for seed, n in enumerate((900, 1300))]
    for cache in singles:
        step(cache)
    batch = BatchOpenTQCache.merge(singles)
    k, v = vectors(replace(SHAPE, batch=2), 1, 9)
    q = queries(replace(SHAPE, batch=2), 1, 9)
    together = batch.update_and_fetch(k, v)[0].step.attend(q, scale=0.125)
    for b, cache in enumerate(singles):
        alone = cache.update_and_fetch(k[b : b + 1], v[b : b + 1])[0].step.attend(q[b : b + 1], scale=0.125)
        assert mx.allclose(alone[0], together[b], atol=1e-3).item()
        assert cache.stats.read and cache.stats.read < cache.stats.held


def test_saved_and_loaded(tmp_path):
    from opentq.caches import disk

    cache = sketched("tq4:pages=128", 900)
    step(cache)
    disk.save(tmp_path / "c.safetensors", [cache], [1])
    loaded = disk.load(tmp_path / "c.safetensors").caches[0]
    assert loaded.sketches.sketched == cache.sketches.sketched == [14]
    assert mx.array_equal(loaded.sketches.channels, cache.sketches.channels)
    assert mx.array_equal(*(c.sketches.buffer.arrays[0][:, :, :14] for c in (cache, loaded)))
    assert loaded.sketches.rotary == Rotary(64) and isinstance(loaded.sketches.rotary, Rotary)
    empty = OpenTQCache("int4:pages=128")
    disk.save(tmp_path / "e.safetensors", [empty], [])
    assert disk.load(tmp_path / "e.safetensors").caches[0].sketches is None


# ---- attention over lists


@pytest.mark.parametrize("shape", [SHAPE, Shape(batch=2, q_heads=6, kv_heads=2, key_dim=96, value_dim=64)], ids=str)
@pytest.mark.parametrize("spec", ["int4", "tq5/tq3:nc:sink=4", "f16", "polar4", "tq2.5", "k8tq4:out=2"])
@pytest.mark.parametrize("length", [1, 3])
def test_attention_over_pages_is_judged_by_the_reference(spec, shape, length, kernels):
    tokens = 8 * 64 + 40
    cache = OpenTQCache(spec)
    fill(cache, *vectors(shape, tokens), [300, 100])
    handles = cache.update_and_fetch(*vectors(shape, length, seed=3))
    listed = mx.array([LISTS[0]] * shape.batch, dtype=mx.int32)
    args = args_of(handles, queries(shape, length), causal=length > 1, pages=listed)
    assert args.lens[0][0] == 512
    judge(replace(args, q=args.q), dtype=mx.float16 if kernels == "native" else None)
    exact = reference.attend(replace(args, pages=None))
    assert not mx.allclose(reference.attend(args), exact, atol=1e-3).item()


@pytest.mark.parametrize("shape", [SHAPE, Shape(batch=2, q_heads=6, kv_heads=2, key_dim=96, value_dim=64)], ids=str)
@pytest.mark.parametrize("spec", ["int4", "tq5/tq3:nc:sink=4", "f16", "polar4", "tq2.5", "k8tq4:out=2"])
@pytest.mark.parametrize("listed", [True, False])
def test_pages_are_weighed_by_their_keys(spec, shape, listed, kernels):
    cache = OpenTQCache(spec)
    fill(cache, *vectors(shape, 8 * 64 + 40), [300, 100])
    some = mx.array([LISTS[0]] * shape.batch, dtype=mx.int32)
    handles = cache.update_and_fetch(*vectors(shape, 3, seed=3))
    args = args_of(handles, queries(shape, 3), causal=True, pages=some if listed else None)
    keys = args.k.decode(0, 512, mx.float32).reshape(shape.batch, 2, 1, 8, 64, shape.key_dim)
    rows = args.q.reshape(shape.batch, 2, -1, 1, 1, shape.key_dim)
    every = mx.logsumexp((rows * keys).sum(-1) * args.scale, axis=-1)
    expected = mx.take_along_axis(every, some[:, :, None], axis=-1) if listed else every
    weigh = dispatch.backends.active().weigh if kernels == "native" else pages.weigh
    found = weigh(args)
    if found is None and kernels == "native" and dispatch.backends.active().name != "cpu":
        pytest.skip("the portable path weighs pages here")
    assert found.shape == expected.shape and mx.allclose(found, expected, atol=2e-3).item()


def test_what_sketches_name_is_chosen_by_its_keys(kernels, monkeypatch):
    """Of `CANDIDATES` times the budget the pages of most softmax; of fewer pages than that, sketches are not asked."""
    cache = sketched("int4:pages=192", 1500)
    handles, q = step(cache)
    args = args_of(handles, q, scale=0.125)
    whole = mx.softmax(pages.weigh(replace(args, pages=None)), axis=-1).sum(2)[0]
    for times, known in ((8, range(23)), (3, None)):
        monkeypatch.setattr(pages, "CANDIDATES", times)
        selector = cache.sketches.selector([1472])
        found = dispatch.choose(selector, replace(args, q=q), args.q)[0]
        for head in range(2):
            rows = selector.queries(q, 0.125)
            there = known or selector.choose(rows, (1472,), 3 * times)[0, head].tolist()
            best = sorted(there, key=lambda p: -(whole[head, p].item() if p != 22 else 9))[:3]
            assert found[head].tolist() == sorted(best)


@pytest.mark.parametrize("spec", ["int4", "tq5/tq3:nc:sink=4", "f16"])
@pytest.mark.parametrize("many", [5, 9], ids=["sketches", "keys alone"])
def test_a_kernel_selects_what_the_portable_path_selects(spec, many, monkeypatch):
    """Both choices in one call, of sequences of ragged length, and the same with any number of threads."""
    backend = dispatch.backends.active()
    if backend is None or backend.name != "cpu":
        pytest.skip("one call of the CPU kernels")
    shape = Shape(batch=2, q_heads=6, kv_heads=2, key_dim=96, value_dim=64)
    cache = OpenTQCache(spec)
    fill(cache, *vectors(shape, 8 * 64 + 40), [300, 100])
    handles, plain = cache.update_and_fetch(*vectors(shape, 3, seed=3)), queries(shape, 3)
    args = args_of(handles, plain, causal=True)
    args = replace(args, lens=(args.lens[0], (261, *args.lens[1][1:])))
    index = mx.broadcast_to(mx.arange(0, 8, 2, dtype=mx.int32), (2, 2, 4))
    keys = args.k.codec.unrotate(args.k.decode(0, 512, mx.float32))
    selector = pages.Selector(pages.encode(keys, index), index, 192)
    expected = pages.select(selector, args, plain, many, 3)
    for threads in ("1", "2", "5"):
        monkeypatch.setenv("OPENTQ_THREADS", threads)
        found = backend.select(selector.sketches, index, args, plain, many, 3)
        assert found.tolist() == expected.tolist()


def test_every_page_listed_is_everything(kernels):
    cache = OpenTQCache("int4")
    fill(cache, *vectors(SHAPE, 500), [300, 100])
    args = args_of(cache.update_and_fetch(*vectors(SHAPE, 1, 3)), queries(SHAPE, 1))
    whole = mx.broadcast_to(mx.arange(7, dtype=mx.int32), (1, 2, 7))
    listed = replace(args, pages=whole)
    assert mx.allclose(reference.attend(args), reference.attend(listed), atol=1e-6).item()
    assert mx.allclose(dispatch.attend(args)[0], dispatch.attend(listed)[0], atol=1e-4).item()


def test_a_page_that_was_trimmed_is_read_as_far_as_it_goes(kernels):
    cache = OpenTQCache("int4")
    fill(cache, *vectors(SHAPE, 530), [300, 100])
    cache.trim(50)
    handles = cache.update_and_fetch(*vectors(SHAPE, 1, 3))
    packed = handles[0].step.lens[0][0]
    assert packed % 64
    last = packed // 64
    listed = mx.array([[[0, 3, last], [1, 2, last]]], dtype=mx.int32)
    judge(args_of(handles, queries(SHAPE, 1), pages=listed), dtype=mx.float16)


def test_few_tokens_are_read_bit_for_bit(kernels):
    outs = []
    for spec in ("int4", "int4:pages=640"):
        cache = sketched(spec, 700)
        for seed in range(3):
            handles, q = step(cache, seed)
            outs.append(handles[0].step.attend(q, scale=0.125))
    assert all(mx.array_equal(a, b).item() for a, b in zip(outs[:3], outs[3:]))


def test_masks_windows_and_prefill_are_exact():
    cache = sketched("int4:pages=128", 900)
    (handles, q), plain = step(cache), sketched("int4", 900)
    exact, _ = step(plain)
    step_, whole = handles[0].step, exact[0].step
    mask = mx.ones((1, 1, 1, 901), dtype=mx.bool_)
    assert mx.array_equal(step_.attend(q, scale=0.125, mask=mask), whole.attend(q, scale=0.125, mask=mask))
    assert not mx.array_equal(step_.attend(q, scale=0.125), whole.attend(q, scale=0.125))
    long = cache.update_and_fetch(*vectors(SHAPE, 9, 6)), plain.update_and_fetch(*vectors(SHAPE, 9, 6))
    many = queries(SHAPE, 9)
    a, b = (h[0].step.attend(many, scale=0.125, mask="causal") for h in long)
    assert mx.array_equal(a, b)


def test_constant_keys_choose_and_attend():
    cache = OpenTQCache("int4:pages=128")
    x = mx.ones((1, 2, 700, 64))
    handles = cache.update_and_fetch(x, x)
    handles[0].step.attend(mx.ones((1, 4, 700, 64)), scale=0.1, mask="causal")
    handles = cache.update_and_fetch(x[:, :, :1], x[:, :, :1])
    out = handles[0].step.attend(mx.ones((1, 4, 1, 64)), scale=0.1)
    assert mx.isfinite(out).all().item() and cache.sketches.ready == [True]


# ---- models


def test_a_model_reads_in_pages_with_and_without_a_recipe(tmp_path):
    from opentq.tuning.calibrate import Calibrator, Reading

    model, path = random_llama(), tmp_path / "r.toml"
    calibrator = Calibrator(model, "int4:sink=4", Reading(600, 300))
    text = mx.random.randint(0, 256, (1, 900), key=mx.random.key(0))
    calibrator.run(text[:, :600].reshape(2, 300).tolist())
    calibrator.save(path, {})
    chosen = []
    for spec in ("int4:sink=4:pages=128", f"{path}:pages=128"):
        plans = hooks.compress(model, spec)
        assert [p.rotary for p in plans] == [Rotary(64)] * 2
        assert plans[0].bytes_per_token() == 2 * (5 * 128 / 8 + pages.bytes_per_token(64))
        caches = make_prompt_cache(model)
        mx.eval(model(text[:, :-1], cache=caches))
        out = model(text[:, -1:], cache=caches)
        assert mx.isfinite(out).all().item() and caches[0].sketches.sketched == [14]
        chosen.append(np.array(caches[1].sketches.channels))
        assert "decode read" in str(report(model))
    # Pairs from the prompt and pairs from other text are mostly the same ones, even of a random model.
    assert all(len(set(a) & set(b)) >= 2 for a, b in zip(*(c[0].tolist() for c in chosen)))
    with pytest.raises(UserError, match="can't be simulated"):
        enter("int4:pages=128", model, simulate=True)


def test_layers_that_are_read_whole_say_why():
    from .architectures import build

    model = build("deepseek_v3")
    plans = hooks.compress(model, "int4:pages=128")
    assert {p.whole for p in plans} == {"latents are keys and values at once"} and not any(p.spec.pages for p in plans)
    assert "no pages: latents" in str(report(model))
    plans = hooks.compress(build("gemma3_text"), "int4:pages=128:window=compress")
    assert {p.whole for p in plans} == {"", "a window is short"}
    plans = [p for p in hooks.compress(build("afm7"), "int4:pages=128") if p.compressed]
    assert plans and {p.whole for p in plans} == {"other layers attend to its tokens, too"}


def test_the_planner_counts_sketches():
    from opentq.hosts.plan import LayerPlan
    from opentq.memory.plan import held

    for spec in ("tq5/tq3:nc:sink=4:pages=512", "int4:pages=128"):
        given = replace(KVSpec.parse(spec), channels=((0, 1, 2, 32, 33, 34),) * 2)
        cache = OpenTQCache(given)
        k, v = vectors(SHAPE, 2000)
        fill(cache, k, v, [700, 1])
        plan = LayerPlan(0, "KVCache", given, kv_heads=2, key_dim=64, value_dim=64)
        assert held(plan, 2000, step=700) == pytest.approx(cache.nbytes, rel=0.02)
        bare = replace(plan, spec=replace(given, pages=0))
        assert 0.02 < 1 - held(bare, 2000, step=700) / cache.nbytes < 0.065


@pytest.mark.parametrize(("dim", "limit"), [(64, 0.06), (128, 0.035)])
def test_sketches_are_a_small_part_of_what_is_held(dim, limit):
    spec = KVSpec.parse("tq5/tq3:nc:center:sink=4:pages=128")
    cache = OpenTQCache(replace(spec, channels=(tuple(range(kept(dim))),) * 2))
    fill(cache, *vectors(replace(SHAPE, key_dim=dim, value_dim=dim), 2000), [1500, 500])
    packed = sum(a[:, :, : -(-1984 // layout.block)].nbytes for a, layout in stored(cache))
    own = cache.sketches.buffer.arrays[0][:, :, : cache.sketches.sketched[0]].nbytes
    assert cache.sketches.sketched == [31] and own <= limit * (packed + own)


def stored(cache: OpenTQCache) -> list:
    """Packed arrays with their layouts."""
    sides = (cache.packed_k, cache.k_layout), (cache.packed_v, cache.v_layout)
    return [(a, layout) for buffer, layout in sides for a in buffer.arrays]


def test_generate_says_what_it_read(folder):
    from typer.testing import CliRunner

    from opentq.cli.main import app

    options = ["--kv", "int4:pages=128", "--max-tokens", "4", "--prompt", "x" * 900]
    done = CliRunner().invoke(app, ["generate", "--model", str(folder), *options], catch_exceptions=False)
    assert re.search(r"· read 128 of 8\d\d packed tokens a step$", done.output.strip())


@pytest.mark.parametrize("order", [1, -1])
def test_a_recipes_channels_stay_with_sequences_that_join_or_come_back(order, tmp_path):
    chosen = tuple(range(9, 9 + count_of_channels(64)))
    spec = replace(KVSpec.parse("int4:pages=128"), channels=(chosen,) * SHAPE.kv_heads)
    used, fresh = OpenTQCache(spec), OpenTQCache(spec)
    fill(used, *vectors(SHAPE, 200), [200])
    disk.save(tmp_path / "c", [used, fresh], [])
    used, fresh = disk.load(tmp_path / "c", into=[OpenTQCache(spec), OpenTQCache(spec)]).caches
    assert used.spec.channels == fresh.spec.channels == spec.channels
    bare = OpenTQCache.from_state(used.state)  # as mlx-lm loads it: the channels are the sequence's alone
    batch = OpenTQCache.merge([bare, fresh][::order])
    batch.update_and_fetch(*vectors(replace(SHAPE, batch=2), 70))
    assert batch.sketches.ready == [True, True]
    assert batch.sketches.channels.tolist() == [[list(chosen)] * SHAPE.kv_heads] * 2
