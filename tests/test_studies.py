"""What the studies stand on: one simulated pass is as many decode steps of caches, and codecs err as they should."""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from opentq.attention.pages import CANDIDATES
from opentq.contracts.rotary import Rotary
from opentq.evaluate import metrics
from opentq.evaluate.contenders import NATIVE, enter
from opentq.evaluate.forward import forced, prefill
from opentq.hosts import hooks
from opentq.spec.kv import KVSpec

from .conftest import random_llama

sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "studies"))
import rules
import runs


def test_one_pass_stands_for_as_many_steps():
    """KL to the model's own cache of a rule in one pass, and of caches with the same rule token by token."""
    model = random_llama()
    model.set_dtype(mx.float32)
    for layer in model.model.layers:  # so that attention has something to find
        layer.self_attn.q_proj.weight *= 12
    tokens = mx.random.randint(0, 256, (1, 740), key=mx.random.key(1))
    text, rows = tokens[:, :720], tokens[:, 720:]
    hooks.prepare(model, KVSpec.parse("f16"))
    held = [rules.Sparse() for _ in model.layers]
    prefill(model, text, held, 256)

    def whole(caches) -> mx.array:
        return metrics.log_probs(model(rows, cache=caches))

    exact = whole([c.fork() for c in held])
    chosen = [c.own_channels(Rotary(64), 6) for c in held]
    named = [rules.sketch(few, 4, 64, largest=True) for few in chosen]
    own = whole([c.fork(rule, budget=128, times=CANDIDATES) for c, rule in zip(held, named)])
    alone = whole([c.fork(rule, budget=128) for c, rule in zip(held, named)])
    best = whole([c.fork(rules.ORACLE, budget=128) for c in held])
    caches = enter("f16:sink=4:pages=128", model).caches()
    prefill(model, text, caches, 256)
    steps = mx.concatenate([metrics.log_probs(y) for _, y in forced(model, rows, caches, 1)], axis=1)
    assert rules.packed(720) == 704 and all(c.n_packed == rules.packed(740) for c in caches)
    distance = [float(metrics.kl(exact, x).mean()) for x in (own, steps, best, alone)]
    assert distance[0] > 1e-4 and distance[1] == pytest.approx(distance[0], rel=0.1)
    assert distance[2] < 1.1 * distance[0] < distance[3]
    native = enter(NATIVE, model).caches()
    prefill(model, text, native, 256)
    assert mx.allclose(whole(native), exact, atol=1e-4).item()


def test_runs_err_less_where_they_have_more_bits():
    rng = np.random.default_rng(0)
    wide = np.exp(-np.arange(64) / 12)
    samples = (rng.standard_normal((2, 500, 64)) * wide).astype(np.float32)
    x = mx.array(samples)[None]
    to = np.broadcast_to(np.eye(64), (2, 64, 64))
    errors = []
    for menu in ((2, 2, 2, 2), (4, 2, 1, 1), (6, 5, 4, 3), (3, 2, 0, 0)):
        codec = runs.Runs.make("test", menu, to, samples)
        back = codec.decode(codec.encode(x), mx.float32, 64)
        errors.append(float(mx.square(back - x).sum() / mx.square(x).sum()))
        used = sum(bits > 0 for bits in menu)
        assert codec.bits_per_value(64) == (16 * sum(menu) + 16 + 4 * used) / 64
    assert errors[1] < 0.4 * errors[0] and errors[2] < 0.005 and errors[3] < errors[0]
    turned = np.linalg.qr(rng.standard_normal((2, 64, 64)))[0]
    codec = runs.Runs.make("test", (6, 6, 6, 6), turned, samples)
    assert mx.allclose(codec.decode(codec.encode(x), mx.float32, 64), x, atol=0.2).item()


@pytest.mark.parametrize("codec", [runs.Balanced("k", 4.75, 16, True), runs.Balanced("v", 2.75, 4, False)])
def test_rivals_come_back_near(codec):
    x = mx.random.normal((1, 2, 128, 64), key=mx.random.key(0))
    error = float(mx.square(codec.decode(codec.encode(x), mx.float32, 64) - x).mean())
    assert error < (0.02 if codec.keys else 0.25)
