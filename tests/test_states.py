"""States with absent parts, through every way that a state can go, between any two back ends."""

from __future__ import annotations

import copy

import mlx.core as mx
import pytest
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

from opentq.caches import disk
from opentq.caches.batch import BatchOpenTQCache
from opentq.caches.latent import BatchOpenTQLatentCache, OpenTQLatentCache
from opentq.caches.single import OpenTQCache
from opentq.caches.states import BatchState, State
from opentq.hosts import shim
from opentq.hosts.mlx_lm.host import HOST

from .matrix import Shape
from .oracle import fill, same_state, vectors

SHAPE = Shape()
SPECS = ["int4", "tq2p/tq2", "tq3p/tq3:sink=4", "tq5/tq3:center:sink=4", "polar4:recent=70", "qjl2/int4"]
LATENT = ["int2/f16:norot", "tq5/int2:g64", "tq4p/tq4:sketch=gauss", "tq3/int4:nc", "qjl4/polar4:sketch=orth"]
LATENT += ["tq6/int8:ub"]
LENGTHS = [(), (0,), (0, 0), (3, 0), (0, 200), (200, 70, 0)]


def batch(spec: str, lengths: tuple[int, ...]) -> BatchOpenTQCache:
    """Sequences of these lengths, 0 for one that has begun and holds nothing."""
    if not lengths:
        return BatchOpenTQCache(spec, 0)
    singles = []
    for n in lengths:
        cache = OpenTQCache(spec)
        fill(cache, *vectors(SHAPE, max(n, 1)), [max(n, 1)])
        cache.trim(0 if n else 1)
        singles.append(cache)
    return BatchOpenTQCache.merge(singles)


def same(a: BatchOpenTQCache, b: BatchOpenTQCache) -> bool:
    assert (a.extents, str(a.spec), a.centered) == (b.extents, str(b.spec), b.centered)
    return all(same_state(a.extract(i), b.extract(i)) for i in range(len(a.extents)))


def through_file(cache, folder):
    save_prompt_cache(str(folder / "c.safetensors"), [cache])
    return load_prompt_cache(str(folder / "c.safetensors"))[0]


def through_disk(cache, folder):
    disk.save(folder / "c", [cache], [])
    fresh = type(cache).__new__(type(cache))
    fresh.__init__(cache.spec, *([0] if isinstance(cache, BatchOpenTQCache) else []))
    return disk.load(folder / "c", into=[fresh]).caches[0]


WAYS = {
    "state": lambda cache, folder: type(cache).from_state(cache.state),
    "copy": lambda cache, folder: copy.deepcopy(cache),
    "file": through_file,
    "disk": through_disk,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spec", SPECS)
def test_batches_with_empty_lanes_come_back(spec, way, tmp_path, monkeypatch):
    shim.install(HOST)
    for first, then in (("", "tiled"), ("tiled", "")):
        for lengths in LENGTHS:
            monkeypatch.setenv("OPENTQ_KERNELS", first)
            cache = batch(spec, lengths)
            monkeypatch.setenv("OPENTQ_KERNELS", then)
            back = WAYS[way](cache, tmp_path)
            assert same(cache, back), (lengths, first)
            if lengths:
                keys, values = vectors(Shape(batch=len(lengths)), 70)
                back.update_and_fetch(keys, values)
                assert back.extents == tuple(e.append(70, back.limits)[0] for e in cache.extents)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tokens", [0, 1, 200])
@pytest.mark.parametrize("spec", SPECS)
def test_singles_with_absent_parts_come_back(spec, tokens, way, tmp_path, monkeypatch):
    shim.install(HOST)
    cache = OpenTQCache(spec)
    if tokens:
        fill(cache, *vectors(SHAPE, tokens), [tokens])
    monkeypatch.setenv("OPENTQ_KERNELS", "tiled")
    back = WAYS[way](cache, tmp_path)
    assert back.empty() == (tokens == 0) and str(back.spec) == str(cache.spec)
    assert tokens == 0 or same_state(cache, back)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spec", LATENT)
def test_latent_caches_come_back(spec, way, tmp_path):
    """Their spec is derived from the user's, and what it prints is read again."""
    from opentq.spec.kv import KVSpec
    from opentq.spec.latent import latent_spec

    shim.install(HOST)
    made = latent_spec(KVSpec.parse(spec))
    latent, rotary = mx.random.normal((1, 1, 150, 128)), mx.random.normal((1, 1, 150, 32))
    single = OpenTQLatentCache(made)
    single.update_and_fetch(latent, rotary)
    back = WAYS[way](single, tmp_path)
    assert same_state(single, back) and back.spec == made
    many = BatchOpenTQLatentCache.merge([single, OpenTQLatentCache(made)])
    assert same(many, WAYS[way](many, tmp_path))


def test_states_have_names_and_old_ones_are_read():
    cache = OpenTQCache("int4")
    fill(cache, *vectors(SHAPE, 100), [100])
    state = cache.state
    assert isinstance(state, State) and (state.packed, state.spec) == (64, "int4")
    assert same_state(OpenTQCache.from_state(list(state)[:13]), cache), "before there were sketches"
    assert isinstance(batch("int4", (3,)).state, BatchState)
