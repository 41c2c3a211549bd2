"""Guessed tokens: the text is that of plain steps, for fewer steps where it repeats what was there."""

from __future__ import annotations

import random

import pytest

from opentq.server.lookup import LONGEST, PATIENCE, PLACES, REST, Lookup

from .server_support import serving, wait_for
from .tiny_model import write


def test_what_followed_before_is_guessed():
    lookup = Lookup([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2])
    assert lookup.guess(3, 16) == [4, 5, 6, 7] and lookup.guess(3, 2) == [4, 5] and lookup.guess(9, 16) == []
    lookup.outcome(4, 4)
    assert lookup.length == 8
    for _ in range(5):
        lookup.outcome(8, 8)
    assert lookup.length == LONGEST
    for _ in range(PATIENCE):
        assert lookup.wanted
        lookup.outcome(8, 0)
    assert not lookup.wanted and lookup.length == 2
    for token in range(REST):
        lookup.add(100 + token)
    assert lookup.wanted


def test_the_place_most_like_the_newest_tokens_is_taken():
    lookup = Lookup([9, 8, 1, 2, 3, 4, 5, 1, 2, 3, 6, 9, 8, 1, 2])
    assert lookup.guess(3, 2) == [4, 5], "after 9 and 8, though 6 followed later"
    assert Lookup([7, 1, 2, 3, 4, 8, 1, 2, 3, 6, 9, 1, 2]).guess(3, 1) == [6], "the latest of equals"
    far = [n for place in range(PLACES) for n in (100 + place, 1, 2, 3, 200 + place)]
    assert Lookup([5, 1, 2, 3, 4, *far, 5, 1, 2]).guess(3, 1) == [200 + PLACES - 1], "only the latest few are looked at"


@pytest.mark.parametrize(
    ("kind", "kv"), [("llama", "int4"), ("llama", None), ("llama", "int8:recent=70"), ("gemma3_text", "int4")]
)
def test_text_is_that_of_plain_steps(tmp_path, kind, kv):
    """Greedy and sampled, over many packings; the random model soon repeats itself when its choice is small."""
    rng = random.Random(1)
    with serving(write(tmp_path / "model", kind), kv=kv) as server:
        engine = server.service.engine
        prompt = [rng.randrange(60, 64) for _ in range(300)]
        few = {str(i): 30 for i in range(60, 64)}
        ways = [
            {"max_tokens": 140},
            {"max_tokens": 140, "temperature": 0.7, "seed": 3},
            {"max_tokens": 100, "stop": "a"},
        ]
        texts, right = [], []
        for engine.lookup in (True, False):
            for way in ways:
                before = engine.guessed_right
                answer = server.post("/v1/completions", prompt=prompt, logit_bias=few, **way).json()
                texts.append((answer["choices"][0], answer["usage"]["completion_tokens"]))
                right.append(engine.guessed_right - before)
                wait_for(lambda: server.quiet() and not engine.unread)
        assert texts[:3] == texts[3:]
        assert engine.guessed >= engine.guessed_right == sum(right[:3]) and right[3:] == [0, 0, 0]
        if kind == "llama":
            assert sum(right) > 50
        metrics = server.client.get("/metrics").text
        assert f"opentq_guessed_right_tokens {float(engine.guessed_right)}" in metrics


def test_nobody_is_guessed_for_beside_others_or_in_a_form(server):
    engine = server.service.engine
    before = engine.guessed
    prompt = [65, 66, 67] * 50
    body = {"prompt": prompt, "max_tokens": 20, "logit_bias": {"65": 50}}
    server.post("/v1/completions", **body, frequency_penalty=0.1)
    server.post("/v1/completions", **body, logprobs=1)
    server.post("/v1/completions", **body, n=2)
    assert engine.guessed == before
    server.post("/v1/completions", **body)
    assert engine.guessed > before
