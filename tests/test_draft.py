"""A draft model on the server: the text is that of plain steps, whether its guesses are right or wrong."""

from __future__ import annotations

import random

import mlx.core as mx
import pytest

from opentq.errors import UserError
from opentq.server import draft as drafts
from opentq.server.launch import make_service
from opentq.server.options import ServeOptions

from .server_support import NO_END, serving, wait_for
from .tiny_model import write


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drafts")
    return write(folder / "model"), write(folder / "other", seed=5, layers=1)


WAYS = [{}, {"temperature": 0.8, "seed": 3}]


def answers(server, prompts, max_tokens=60):
    out = []
    for prompt in prompts:
        for way in WAYS:
            body = {"prompt": prompt, "max_tokens": max_tokens, "logit_bias": NO_END, **way}
            answer = server.post("/v1/completions", **body).json()
            out.append((answer["choices"][0], answer["usage"]["completion_tokens"]))
            wait_for(lambda: server.quiet() and not server.service.engine.unread)
    return out


@pytest.mark.parametrize("twin", [True, False])
def test_text_is_that_of_plain_steps(folders, twin, monkeypatch):
    """Prompts that go on from one another, part, and are longer than what is read for one guess."""
    monkeypatch.setattr(drafts, "CHUNK", 100)
    model, other = folders
    rng = random.Random(1)
    first = rng.choices(range(60, 90), k=250)
    prompts = [first, [*first[:120], *rng.choices(range(60, 90), k=50)], [70, 71]]
    with serving(model, lookup=False, draft=str(model if twin else other), drafts=4) as server:
        engine = server.service.engine
        found = answers(server, prompts)
        assert engine.guessed > 100
        # A draft knows nothing of biases and draws, so that a twin is wrong in these answers, too.
        assert engine.guessed_right > 100 if twin else engine.guessed_right < engine.guessed / 5
        assert f"opentq_guessed_right_tokens {float(engine.guessed_right)}" in server.client.get("/metrics").text
        engine.draft = None
        assert answers(server, prompts) == found


def test_what_it_has_read_is_not_read_again(folders):
    from opentq.hosts.mlx_lm.load import load

    model, _ = load(str(folders[0]), kv="int4")
    draft = drafts.Draft(model, 4, 4096)
    read, inner = [], draft._read
    draft._read = lambda tokens: read.append(len(tokens)) or inner(tokens)
    tokens = random.Random(2).choices(range(60, 90), k=300)
    guesses = draft.guess(tokens, 61, 16)
    assert len(guesses) == 4 and draft.guess(tokens, 61, 2) == guesses[:2] and draft.guess(tokens, 61, 0) == []
    tokens += [61, *guesses[:2]]
    draft.guess(tokens, 62, 16)
    assert read == [301, 1, 2], "the last of the right ones was not read yet"
    again = [*tokens[:200], 75, 76]
    assert draft.guess(again, 61, 16) == drafts.Draft(model, 4, 4096).guess(again, 61, 16)
    assert read[-1] == 3 and draft._held[:203] == [*again, 61]
    assert all(c.size() == len(draft._held) for c in draft._caches)
    assert drafts.Draft(model, 4, 200).guess(tokens, 61, 16) == [], "beyond what it was made for"


def test_it_is_counted_in_the_memory(folders, monkeypatch):
    monkeypatch.setattr("opentq.server.pricing.measure_reading", lambda *_: 0)  # no two runs measure the same
    options = {"memory": 4 << 30, "prefill_step": 64, "max_context": 4000}
    _, alone = make_service(ServeOptions(str(folders[0]), **options))
    _, both = make_service(ServeOptions(str(folders[0]), draft=str(folders[1]), **options))
    assert both.weights > alone.weights
    assert alone.budget - both.budget > both.weights - alone.weights + 4000 * 2 * 64


def test_another_vocabulary_and_windows_are_refused(folders, tmp_path):
    import json
    import shutil

    other = tmp_path / "words"
    shutil.copytree(folders[0], other)
    text = json.loads((other / "tokenizer.json").read_text())
    text["model"]["vocab"]["zz"] = text["model"]["vocab"].pop("z")
    (other / "tokenizer.json").write_text(json.dumps(text))
    for draft, words in ((other, "vocabulary"), (write(tmp_path / "gemma", "gemma3_text"), "RotatingKVCache")):
        with pytest.raises(UserError, match=words):
            make_service(ServeOptions(str(folders[0]), memory=4 << 30, prefill_step=64, draft=str(draft)))
    mx.clear_cache()
