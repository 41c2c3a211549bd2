"""A turn of a conversation costs its new tokens: the last answer is remembered as well, and the text is that of a fresh
reading."""

from __future__ import annotations

import random

import pytest

from .server_support import Slow, serving, wait_for
from .tiny_model import write

LETTERS = "abcdefgh"


class Conversation:
    """Bare prompts of token ids, and answers whose ids their text tells."""

    def __init__(self, server, seed=1):
        self.server = server
        ids = server.service.engine.tokenizer.encode(LETTERS, add_special_tokens=False)
        self.id_of = dict(zip(LETTERS, ids))
        self.bias = {str(i): 60 for i in ids}
        self.rng = random.Random(seed)
        self.tokens = []

    def turn(self, new, answer, wait=True):
        """Add `new` tokens and get an answer; returns (tokens remembered, text, the prompt)."""
        self.tokens += self.rng.choices(list(self.id_of.values()), k=new)
        prompt = list(self.tokens)
        cached, text = self.ask(prompt, answer)
        self.tokens += [self.id_of[c] for c in text]
        if wait:
            wait_for(lambda: self.server.quiet() and not self.server.service.engine.unread)
        return cached, text, prompt

    def ask(self, prompt, answer):
        body = {"prompt": prompt, "max_tokens": answer, "logit_bias": self.bias}
        data = self.server.post("/v1/completions", **body).json()
        return data["usage"]["prompt_tokens_details"]["cached_tokens"], data["choices"][0]["text"]


@pytest.mark.parametrize(
    ("kind", "kv"),
    [("llama", "int4"), ("llama", None), ("gemma3_text", "int4"), ("llama", "int4:recent=70")],
)
def test_the_next_turn_reads_its_own_tokens(tmp_path, kind, kv):
    with serving(write(tmp_path / "model", kind), kv=kv) as server:
        talk, turns = Conversation(server), []
        engine, before = server.service.engine, 0
        for new in (300, 40, 90):
            cached, text, prompt = talk.turn(new, 100)
            assert len(text) == 100
            if before:
                assert cached >= before // 64 * 64
            turns.append((prompt, text))
            before = len(talk.tokens)
        assert engine.tokens_read <= len(talk.tokens) + 64 * 2 * len(turns)
        for prompt, text in turns:
            engine.store.shrink(0)
            assert talk.ask(prompt, 100) == (0, text)
            wait_for(lambda: not engine.unread)


def test_answers_are_read_while_they_are_written(server):
    """An agent answers at once: no idle time is needed, only less than a block is missing."""
    talk = Conversation(server, seed=2)
    talk.turn(200, 600, wait=False)
    said = len(talk.tokens)
    cached, _, _ = talk.turn(10, 10, wait=False)
    assert cached >= said - 2 * 64


def test_branches_and_short_prompts(server):
    """A retry of the last message, a prompt that is shorter than a block, and a store with no room."""
    engine = server.service.engine
    wait_for(lambda: not engine.unread)
    engine.store.shrink(0)
    talk = Conversation(server, seed=3)
    cached, text, prompt = talk.turn(30, 200)
    assert cached == 0 and talk.ask([*talk.tokens, 70], 5)[0] == 192
    other = Conversation(server, seed=4)
    other.tokens = prompt + [talk.id_of[c] for c in text[:100]]
    assert other.turn(50, 100)[0] == 128
    assert talk.ask([*talk.tokens, 70], 5)[0] == 192
    wait_for(lambda: not engine.unread)
    engine.store.shrink(0)
    with Slow(engine, 0.01):
        engine.store.max_bytes = 0
        assert len(Conversation(server, seed=5).turn(100, 200)[1]) == 200
        engine.store.max_bytes = 1 << 30


def test_checkpoints_before_the_end_serve_another_session(tmp_path):
    with serving(write(tmp_path / "model", "gemma3_text")) as server:
        talk = Conversation(server)
        _, _, prompt = talk.turn(1500, 5)
        cached, _ = talk.ask([*prompt[:1400], *prompt[:90]], 5)  # the first that parts there
        assert cached >= 1400 - 4 * 100 - 64
        assert server.service.engine.store.nbytes <= server.service.engine.store.room
