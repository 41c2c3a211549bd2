"""Attention to chosen tokens of a packed cache, judged by masked attention over all of them."""

from __future__ import annotations

import mlx.core as mx
import pytest

from opentq.caches.batch import BatchOpenTQCache
from opentq.caches.latent import OpenTQLatentCache
from opentq.caches.single import OpenTQCache


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    """Tokens lie in rows, as in the caches of models that choose tokens."""
    monkeypatch.setenv("OPENTQ_KERNELS", "tiled")


def filled(cache, tokens: int, heads: int = 2, dim: int = 64, lanes: int = 1):
    mx.random.seed(tokens)
    x = [mx.random.normal((lanes, heads, tokens, dim)) for _ in range(2)]
    keys, _ = cache.update_and_fetch(x[0][:, :, : tokens - 1], x[1][:, :, : tokens - 1])
    keys, _ = cache.update_and_fetch(x[0][:, :, tokens - 1 :], x[1][:, :, tokens - 1 :])
    return keys.step


def masked(step, q, positions, total: int, sinks=None):
    seen = mx.zeros((q.shape[0], 1, 1, total), mx.bool_)
    seen = mx.put_along_axis(seen, positions[:, None, None], mx.array(True), axis=-1)
    return step.attend(q, scale=0.1, mask=seen, sinks=sinks)


@pytest.mark.parametrize("spec", ["f16", "int4", "int4:sink=4", "tq5/tq3:nc", "k8v4:recent=128"])
def test_chosen_rows_are_what_a_mask_would_let_through(spec):
    step = filled(OpenTQCache(spec), 300)
    q = mx.random.normal((1, 8, 1, 64))
    positions = mx.array([[0, 3, 5, 64, 100, 191, 192, 255, 256, 290, 299]])
    got = step.attend_rows(q, positions, scale=0.1)
    assert mx.abs(got - masked(step, q, positions, 300)).max().item() < 2e-3
    sinks = mx.random.normal((8,))
    got = step.attend_rows(q, positions, scale=0.1, sinks=sinks)
    assert mx.abs(got - masked(step, q, positions, 300, sinks)).max().item() < 2e-3


def test_places_that_are_no_tokens_are_not_seen():
    step = filled(OpenTQCache("int4"), 200)
    q = mx.random.normal((1, 8, 1, 64))
    one = step.attend_rows(q, mx.array([[7, 150]]), scale=0.1)
    assert mx.array_equal(one, step.attend_rows(q, mx.array([[7, 150, -1, -20]]), scale=0.1))


def test_lanes_of_different_lengths_choose_their_own():
    singles = [OpenTQCache("int4"), OpenTQCache("int4")]
    steps = [filled(c, n) for c, n in zip(singles, (100, 230))]
    batch = BatchOpenTQCache.merge(singles)
    q, x = mx.random.normal((2, 8, 1, 64)), mx.random.normal((2, 2, 1, 64))
    keys, _ = batch.update_and_fetch(x, x)
    positions = mx.array([[0, 70, 100], [3, 130, 230]])
    together = keys.step.attend_rows(q, positions, scale=0.1)
    for lane, single in enumerate(singles):
        keys, _ = single.update_and_fetch(x[lane : lane + 1], x[lane : lane + 1])
        alone = keys.step.attend_rows(q[lane : lane + 1], positions[lane : lane + 1], scale=0.1)
        assert mx.abs(together[lane] - alone[0]).max().item() < 1e-5
    assert len(steps) == 2


def test_only_the_chosen_latents_are_decoded():
    """The scratch follows the number of chosen rows, not the context."""
    cache = OpenTQLatentCache("int4")
    latent, rotary = mx.random.normal((1, 1, 16384, 512)), mx.random.normal((1, 1, 16384, 64))
    cache.update_and_fetch(latent, rotary)
    keys, _ = cache.update_and_fetch(latent[:, :, :1], rotary[:, :, :1])
    mx.eval(cache.state[8:10])
    del latent, rotary
    q, positions = mx.random.normal((1, 16, 1, 576)), mx.arange(0, 16384, 64)[None]
    mx.eval(q, positions)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(keys.step.attend_rows(q, positions, scale=0.1))
    assert mx.get_peak_memory() - before < 256 * 576 * 4 * 16, "256 rows, a few times over, and not 16,384"
