"""The rules every cache is held to, for the single cache: chunking, trimming, saving, copying, bytes, masks, shapes."""

from __future__ import annotations

import copy

import mlx.core as mx
import pytest
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

from opentq.attention import dispatch, reference
from opentq.caches.single import OpenTQCache
from opentq.hosts import shim
from opentq.hosts.mlx_lm.host import HOST
from opentq.spec.kv import KVSpec

from .matrix import DIMS, NOT_SERVED, SHAPES, SPECS, Shape
from .oracle import args_of, fill, held_arrays, judge, kernels_serve, queries, same_state, vectors

SMALL = Shape()


def filled(spec: str, tokens: int, chunks: list[int], shape: Shape = SMALL, seed: int = 0):
    cache = OpenTQCache(spec)
    handles = fill(cache, *vectors(shape, tokens, seed), chunks)
    return cache, handles


@pytest.mark.parametrize("spec", SPECS)
def test_any_chunking_gives_the_same_cache(spec):
    whole, _ = filled(spec, 300, [300])
    for chunks in ([1], [7], [64], [1, 63, 65, 2, 169], [299, 1]):
        assert same_state(whole, filled(spec, 300, chunks)[0]), chunks


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dropped", [1, 3, 40, 64, 100, 297, 300])
def test_trim_and_regrow_is_fresh(spec, dropped):
    k, v = vectors(SMALL, 300)
    cache, _ = filled(spec, 300, [300])
    assert cache.trim(dropped) == dropped and cache.offset == 300 - dropped
    fill(cache, k[:, :, 300 - dropped :], v[:, :, 300 - dropped :], [17])
    assert same_state(cache, filled(spec, 300, [300])[0])


def test_trim_more_than_there_is_empties_the_cache():
    cache, _ = filled("int4:sink=4", 100, [100])
    assert cache.trim(1000) == 100 and cache.offset == 0
    assert cache.trim(1) == 0


@pytest.mark.parametrize("spec", SPECS)
def test_attention_after_a_trim_inside_a_block(spec, kernels):
    k, v = vectors(SMALL, 320)
    cache, _ = filled(spec, 300, [300])
    cache.trim(77)
    handles = cache.update_and_fetch(k[:, :, 300:305], v[:, :, 300:305])
    judge(args_of(handles, queries(SMALL, 5, dtype=mx.float16), causal=True))


@pytest.mark.parametrize("spec", SPECS)
def test_save_load_continue_is_continue(spec, tmp_path):
    shim.install(HOST)
    k, v = vectors(SMALL, 400)
    cache, _ = filled(spec, 210, [210])
    save_prompt_cache(str(tmp_path / "c.safetensors"), [cache], {"note": "x"})
    (loaded,), metadata = load_prompt_cache(str(tmp_path / "c.safetensors"), return_metadata=True)
    assert metadata == {"note": "x"} and type(loaded) is OpenTQCache and same_state(cache, loaded)
    for c in (cache, loaded):
        fill(c, k[:, :, 210:], v[:, :, 210:], [31])
    assert same_state(cache, loaded)
    assert same_state(cache, filled(spec, 400, [400])[0])


def test_an_empty_cache_saves_loads_and_measures(tmp_path):
    shim.install(HOST)
    cache = OpenTQCache("k8v4:sink=2")
    assert (cache.empty(), cache.nbytes, cache.size(), cache.offset) == (True, 0, 0, 0)
    assert bool(cache), "a falsy cache loses its mask in mlx-lm"
    save_prompt_cache(str(tmp_path / "c.safetensors"), [cache])
    (loaded,) = load_prompt_cache(str(tmp_path / "c.safetensors"))
    assert loaded.empty() and loaded.spec == cache.spec


@pytest.mark.parametrize("spec", ["int4", "f16", "int3:g64:sink=5:recent=33"])
def test_a_deep_copy_is_isolated(spec):
    k, v = vectors(SMALL, 400)
    cache, _ = filled(spec, 200, [200])
    twin = copy.deepcopy(cache)
    fill(cache, k[:, :, 200:], v[:, :, 200:], [50])
    assert same_state(twin, filled(spec, 200, [200])[0])
    fill(twin, k[:, :, 200:], v[:, :, 200:], [3])
    assert same_state(twin, cache)


def test_an_old_step_still_sees_its_own_tokens():
    """Layers that share K/V attend with a handle again later; appending must not change what it sees."""
    k, v = vectors(SMALL, 200)
    cache = OpenTQCache("int4")
    handles = fill(cache, k[:, :, :100], v[:, :, :100], [100])
    q = queries(SMALL, 1)
    before = handles[0].step.attend(q, scale=0.125)
    mx.eval(before)
    fill(cache, k[:, :, 100:], v[:, :, 100:], [40])
    assert mx.array_equal(before, handles[0].step.attend(q, scale=0.125)).item()


# ---- bytes


@pytest.mark.parametrize("spec", SPECS)
def test_bytes_reported_are_bytes_held(spec):
    shape = Shape(kv_heads=4, q_heads=4, key_dim=128, value_dim=128)
    k, v = vectors(shape, 2000)
    warm = OpenTQCache(spec)  # tables that all caches share are made on first use
    fill(warm, k[:, :, :64], v[:, :, :64], [64])
    mx.eval(k, v, warm.state)
    del warm
    before = mx.get_active_memory()
    cache = OpenTQCache(spec)
    fill(cache, k, v, [333])
    mx.eval(cache.state)
    mx.clear_cache()
    held = mx.get_active_memory() - before
    assert cache.nbytes == sum(a.nbytes for a in held_arrays(cache).values())
    assert cache.nbytes <= held * 1.01
    assert held <= cache.nbytes * 1.1, f"{held} bytes are active, {cache.nbytes} are reported"


@pytest.mark.parametrize("spec", ["int8", "int4", "int3", "int2", "k8v4", "int4:g64"])
def test_packed_tokens_take_the_bits_that_the_spec_says(spec):
    cache, _ = filled(spec, 640, [640])
    values = 2 * SMALL.kv_heads * SMALL.key_dim * 640
    packed = sum(a.nbytes for part in cache.canonical() for a in part)
    assert packed * 8 / values == pytest.approx(cache.spec.bits_per_value(SMALL.key_dim))


def test_appending_never_copies_the_buffer():
    """Between growth steps a flush is written in place: no transient as large as the buffer."""
    shape = Shape(kv_heads=8, q_heads=8, key_dim=128, value_dim=128)
    cache = OpenTQCache("int4")
    k, v = vectors(shape, 8192)
    fill(cache, k, v, [2048])
    mx.eval(cache.state)
    k, v = vectors(shape, 64)
    mx.eval(k, v)
    base, peak = mx.get_active_memory(), 0
    for _ in range(3):
        capacity = cache.packed_k.rows
        mx.reset_peak_memory()
        cache.update_and_fetch(k, v)
        mx.eval(cache.state)
        if cache.packed_k.rows == capacity:
            peak = max(peak, mx.get_peak_memory() - base)
    assert 0 < peak < cache.nbytes / 4


# ---- attention


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", ["int4", "k8v4:g64", "int3", "int2:norot"])
def test_decode_shapes(shape, spec, kernels):
    _, handles = filled(spec, 203, [200, 1, 2], shape)
    for length in (1, 2):
        judge(args_of(handles, queries(shape, length, dtype=mx.float16), causal=length > 1))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=["f32", "f16", "bf16"])
def test_prefill_over_a_compressed_prefix(spec, dtype, kernels):
    _, handles = filled(spec, 230, [150, 80])
    fp16_class = kernels == "native" and dtype == mx.float32
    judge(args_of(handles, queries(SMALL, 80, dtype=dtype), causal=True), dtype=mx.float16 if fp16_class else None)


@pytest.mark.parametrize("spec", ["int4", "int4:sink=4:recent=20", "f16"])
@pytest.mark.parametrize("length", [1, 9, 40])
def test_mask_forms(spec, length, kernels):
    total = 200
    _, handles = filled(spec, total, [total - length, length])
    q = queries(SMALL, length, dtype=mx.float16)
    causal = mx.tril(mx.ones((length, total), dtype=mx.bool_), total - length)
    judge(args_of(handles, q))
    judge(args_of(handles, q, causal=True))
    if kernels == "tiled":
        judge(args_of(handles, q, mask=causal))
        judge(args_of(handles, q, mask=mx.where(causal, 0.0, -mx.inf)))
        judge(args_of(handles, q, mask=mx.random.normal((length, total))))


@pytest.mark.parametrize("spec", ["int4", "int8:sink=4:recent=20"])
@pytest.mark.parametrize("length", [1, 5, 40])
@pytest.mark.parametrize("window", [1, 13, 64, 150])
def test_window(spec, length, window, kernels):
    _, handles = filled(spec, 200, [200 - length, length])
    judge(args_of(handles, queries(SMALL, length, dtype=mx.float16), causal=True, window=window))


@pytest.mark.parametrize("lengths", [(200,), (100, 200), (200, 70, 0)])
def test_a_step_sees_what_a_window_forgets_in_it(lengths, kernels):
    """The first rows of a long chunk look at tokens that are out of the last row's window."""
    caches = [OpenTQCache("int4", window=150) for _ in lengths]
    for cache, n in zip(caches, lengths):
        fill(cache, *vectors(SMALL, max(n, 1)), [max(n, 1)])
    cache = caches[0] if len(caches) == 1 else OpenTQCache.merge(caches)
    shape = Shape(batch=len(lengths))
    before = cache.update_and_fetch(*vectors(shape, 1))[0].step
    seen = [side.decode(0, 64, mx.float32) for side in (before.k, before.v)]
    step = cache.update_and_fetch(*vectors(shape, 300, seed=2))[0].step
    assert cache.nbytes == sum(a.nbytes for a in held_arrays(cache).values()), "old rows are the step's alone"
    assert step.lens[0][0] >= 64 and (cache.extents if len(caches) > 1 else [cache.extent])[0].base
    for side, old in zip((step.k, step.v), seen):
        assert mx.array_equal(side.decode(0, 64, mx.float32)[:1], old[:1]).item()


@pytest.mark.parametrize("length", [1, 5, 40])
def test_attention_sinks(length, kernels):
    _, handles = filled("int4", 200, [200 - length, length])
    q = queries(SMALL, length, dtype=mx.float16)
    judge(args_of(handles, q, causal=True, sinks=mx.array([0.5, -1.0, 3.0, 20.0])))


def test_the_table_says_what_kernels_leave_to_the_portable_path():
    """Layouts decide it, and they are the same on every machine; a call with an array as its mask is nobody's."""
    for backend, left in NOT_SERVED.items():
        pairs = [(spec, dim) for spec in SPECS for dim in DIMS]
        assert {p for p in pairs if not kernels_serve(backend, KVSpec.parse(p[0]).codecs(), (p[1], p[1]))} == left


def test_array_masks_are_left_to_the_portable_path(kernels, monkeypatch):
    _, handles = filled("int4", 100, [99, 1])
    args = args_of(handles, queries(SMALL, 1, dtype=mx.float16), mask=mx.ones((1, 100), mx.bool_))
    if kernels == "native":
        with pytest.raises(dispatch.NoAttention, match=r"mask \(1, 100\)"):
            dispatch.attend(args)
        monkeypatch.setenv("OPENTQ_KERNELS", "")
    assert dispatch.attend(args)[1] == "tiled"


def test_softcap(kernels):
    _, handles = filled("int4", 200, [199, 1])
    judge(args_of(handles, queries(SMALL, 1, dtype=mx.float16), softcap=5.0))


def test_a_row_that_sees_nothing_gives_zeros():
    _, handles = filled("int4", 100, [100])
    out = handles[0].step.attend(queries(SMALL, 1), scale=1.0, mask=mx.zeros((1, 100), dtype=mx.bool_))
    assert mx.array_equal(out, mx.zeros_like(out)).item()


def test_scores_beyond_fp16_do_not_overflow(kernels):
    """Qwen2.5 keys reach hundreds: scores leave the fp16 range."""
    shape = Shape(key_dim=128, value_dim=128)
    k, v = vectors(shape, 130)
    cache = OpenTQCache("int8")
    handles = fill(cache, k * 300, v, [129, 1])
    args = args_of(handles, queries(shape, 1, dtype=mx.float16) * 20)
    out, _ = dispatch.attend(args)  # naive fp16 attention gives NaN here, so it can't be the judge
    assert mx.allclose(out.astype(mx.float32), reference.attend(args), atol=5e-3, rtol=5e-3).item()


def test_the_scratch_of_the_tiled_path_is_bounded(monkeypatch):
    """Peak memory of a long prefill step does not grow with the context beyond the cache itself."""
    from opentq.attention import tiled

    monkeypatch.setenv("OPENTQ_KERNELS", "tiled")
    monkeypatch.setattr(tiled, "SCRATCH", 4 << 20)
    shape = Shape(q_heads=8, kv_heads=2)
    peaks = []
    for tokens in (8192, 24576):
        cache, handles = filled("int4", tokens, [tokens - 64, 64], shape)
        q = queries(shape, 64)
        mx.eval(cache.state, q)
        mx.clear_cache()
        base = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(handles[0].step.attend(q, scale=0.125, mask="causal"))
        peaks.append(mx.get_peak_memory() - base)
    assert peaks[1] < peaks[0] * 1.3 and peaks[1] < 12 << 20, peaks
