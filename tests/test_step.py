"""Decode steps whose new tokens wait for the launch that attends them: the same cache and output as without."""

from __future__ import annotations

import copy
from dataclasses import replace

import mlx.core as mx
import pytest

from opentq.attention import backends, dispatch, tiled
from opentq.caches.single import OpenTQCache, dense, shifted
from opentq.contracts.backend import Backend
from opentq.contracts.layout import CANONICAL

from .matrix import Shape
from .oracle import fill, queries, same_state, vectors

SHAPE = Shape()
served: list[int] = []


def step(args, fresh, center):
    """What a fused launch does, in plain operations: rotate, append, attend, rotate back."""
    k, v = args.k.codec, args.v.codec
    dense_k = mx.concatenate([args.dense_k, shifted(dense(k, fresh[0]), center)], axis=2)
    dense_v = mx.concatenate([args.dense_v, dense(v, fresh[1])], axis=2)
    out = tiled.attend(replace(args, q=k.rotate(args.q), dense_k=dense_k, dense_v=dense_v))
    served.append(args.q.shape[2])
    return v.unrotate(out), dense_k, dense_v


FUSED = Backend("fused", lambda: True, tiled.attend, lambda k, v, dims: (CANONICAL, CANONICAL), step=lambda *_: step)


@pytest.fixture
def fused(monkeypatch):
    """A back end that makes a decode step in one launch."""
    served.clear()
    monkeypatch.setattr(backends, "active", lambda: FUSED)


def run(cache: OpenTQCache, start: int, steps: int, length: int = 1, batch: int = 1):
    """Outputs of decode steps that begin with token `start`."""
    shape = replace(SHAPE, batch=batch)
    k, v = vectors(shape, start + steps * length)
    outs = []
    for at in range(start, start + steps * length, length):
        keys, _ = cache.update_and_fetch(k[:, :, at : at + length], v[:, :, at : at + length])
        mask = "causal" if length > 1 else None
        outs.append(keys.step.attend(queries(shape, length, at, mx.float16), scale=0.125, mask=mask))
    return mx.concatenate(outs, axis=2)


def made(spec: str, tokens: int, batch: int):
    caches = []
    for lane in range(batch):
        cache = OpenTQCache(spec)
        fill(cache, *vectors(SHAPE, tokens + 9 * lane, lane), [tokens + 9 * lane])
        caches.append(cache)
    return OpenTQCache.merge(caches) if batch > 1 else caches[0]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("spec", ["int4", "tq5/tq3:nc:center:sink=4", "int8:recent=70"])
def test_the_launch_gives_what_two_steps_give(spec, length, batch, fused, monkeypatch):
    fast = made(spec, 100, batch)
    got = run(fast, 100, 90, length, batch)
    assert len(served) == 90, "steps in which blocks move, too"
    monkeypatch.setattr(backends, "active", lambda: replace(FUSED, step=None))
    slow = made(spec, 100, batch)
    assert mx.array_equal(got, run(slow, 100, 90, length, batch)).item()
    for i in range(batch):
        pair = (fast.extract(i), slow.extract(i)) if batch > 1 else (fast, slow)
        assert same_state(*pair)


def test_tokens_that_nobody_attends_are_kept(fused):
    """A model may update a cache and look elsewhere; a saved, copied or trimmed cache has all its tokens."""
    k, v = vectors(SHAPE, 105)
    expected = OpenTQCache("int4")
    fill(expected, k, v, [100, 1, 1, 1, 1, 1])
    cache = OpenTQCache("int4")
    fill(cache, k[:, :, :100], v[:, :, :100], [100])
    for at in range(100, 105):
        handles = cache.update_and_fetch(k[:, :, at : at + 1], v[:, :, at : at + 1])
    assert same_state(copy.deepcopy(cache), expected) and not served
    assert same_state(OpenTQCache.from_state(cache.state), expected)
    first = handles[0].step.attend(queries(SHAPE, 1), scale=0.125)
    assert cache.trim(2) == 2 and cache.dense_k.shape[2] == 39
    assert mx.allclose(first, handles[0].step.attend(queries(SHAPE, 1), scale=0.125), atol=1e-6).item()


def test_layers_that_share_a_step_attend_the_same_tokens(fused):
    cache = made("int4", 100, 1)
    cache.lends = True
    k, v = vectors(SHAPE, 101)
    handles = cache.update_and_fetch(k[:, :, 100:], v[:, :, 100:])
    outs = [h[0].step.attend(queries(SHAPE, 1), scale=0.125) for h in (handles, cache.keys_and_values())]
    assert mx.allclose(*outs, atol=1e-6).item() and served == [1], "the second finds the tokens in their columns"


def test_what_the_launch_does_not_serve_is_made_in_parts(fused, monkeypatch):
    monkeypatch.setattr(backends, "active", lambda: replace(FUSED, step=lambda *_: None))
    cache, plain = made("int4", 100, 1), made("int4", 100, 1)
    got = run(cache, 100, 5)
    monkeypatch.setattr(backends, "active", lambda: None)
    assert mx.allclose(got, run(plain, 100, 5), atol=1e-6).item() and same_state(cache, plain)
    assert dispatch.candidates()[-1][0] == "tiled"


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("tokens", [60, 150])
@pytest.mark.parametrize("spec", ["int4", "tq5/tq3:nc:center:sink=4", "k8v4:norot", "f16/int4"])
def test_a_step_of_the_cpu_leaves_the_bits_that_single_operations_leave(monkeypatch, spec, tokens, length, waits):
    """Columns bit for bit, also of tokens beyond fp16's range; outputs within rounding. In MLX's graph and outside.

    From 60 tokens on the steps pack the first block, whose launch is kept for those behind it.
    """
    from opentq.kernels import extension
    from opentq.kernels.cpu import attention as cpu
    from opentq.kernels.cpu import step as cpu_step

    if not cpu.BACKEND.available():
        pytest.skip("no C++ compiler")
    if waits:
        monkeypatch.setattr(extension, "module", lambda name: None)
    elif extension.module("graph") is None:
        pytest.skip("MLX's graph can't be extended here")
    calls = []
    launch = cpu_step.Launch.__call__
    monkeypatch.setattr(cpu_step.Launch, "__call__", lambda self, *a: (calls.append(1), launch(self, *a))[1])
    end = tokens + 12 * length
    k, v = vectors(SHAPE, end)
    k[..., -1, 0] = 1e6
    q = queries(SHAPE, length, dtype=mx.float32)

    def run(backend):
        monkeypatch.setattr(backends, "active", lambda: backend)
        cache = OpenTQCache(spec)
        fill(cache, k[:, :, :tokens], v[:, :, :tokens], [tokens // 2, tokens // 2])
        outs = []
        for start in range(tokens, end, length):
            piece = slice(start, start + length)
            handles = cache.update_and_fetch(k[:, :, piece], v[:, :, piece])
            outs.append(handles[0].step.attend(q, scale=0.125, mask="causal" if length > 1 else None))
        return cache, mx.concatenate(outs, axis=2)

    (fused, out), (plain, expected) = run(cpu.BACKEND), run(replace(cpu.BACKEND, step=None))
    first = "center" in spec and tokens == 60  # the step that finds the mean of the keys
    assert len(calls) == 12 - first and same_state(fused, plain)
    assert mx.allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_a_step_that_waits_to_be_computed_keeps_what_it_reads(monkeypatch):
    from opentq.kernels import extension
    from opentq.kernels.cpu import attention as cpu

    if not cpu.BACKEND.available() or extension.module("graph") is None:
        pytest.skip("MLX's graph can't be extended here")
    monkeypatch.setattr(backends, "active", lambda: cpu.BACKEND)
    outs, (k, v), q = [], vectors(SHAPE, 152), queries(SHAPE, 1, dtype=mx.float32)
    for waits in (False, True):
        cache = made("tq5/tq3:nc", 150, 1)
        for at in (150, 151):  # the first of its kind is computed at once
            handle, _ = cache.update_and_fetch(k[:, :, at : at + 1], v[:, :, at : at + 1])
            out = handle.step.attend(q, scale=0.125)
        assert cache.stats.served_by == "cpu" and isinstance(cache, OpenTQCache)
        if waits:
            del handle
            del cache
            mx.eval([mx.full((1 << 16,), n) for n in range(64)])  # in the place of what was let go
        mx.eval(out)
        outs.append(out)
    assert mx.array_equal(*outs).item()


def test_what_a_step_of_the_cpu_leaves_to_others():
    from opentq.kernels.cpu import step as cpu_step
    from opentq.spec.kv import KVSpec

    def turned(spec, dim):
        return cpu_step.turned(KVSpec.parse(spec).codecs()[0], dim)

    assert turned("int4", 80) is None and turned("int4", 64) is True and turned("int4:norot", 80) is False
