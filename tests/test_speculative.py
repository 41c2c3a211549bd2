"""Speculative decoding: bundles of queries and tokens taken back, with the model, the draft, or both compressed."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models.cache import make_prompt_cache

from opentq.caches.single import OpenTQCache
from opentq.hosts.hooks import compress, installed, uninstall

from .conftest import random_llama

PROMPT = mx.array([(7 * i + i * i) % 97 + 1 for i in range(120)])
COUNT = 40


def plain(model) -> list[int]:
    return [int(t) for t, _ in generate_step(PROMPT, model, max_tokens=COUNT, prefill_step_size=512)]


def speculative(model, draft, proposals: int) -> tuple[list[int], int, list]:
    """Tokens, how many of them the draft model proposed, and the caches afterwards."""
    caches = make_prompt_cache(model) + make_prompt_cache(draft)
    steps = speculative_generate_step(
        PROMPT, model, draft, num_draft_tokens=proposals, max_tokens=COUNT, prompt_cache=caches
    )
    tokens, drafted = [], 0
    for token, _, from_draft in steps:
        tokens.append(int(token))
        drafted += from_draft
    return tokens, drafted, caches


@pytest.mark.parametrize("proposals", [1, 3, 15])
@pytest.mark.parametrize("spec", ["f16", "int8:recent=16"])
@pytest.mark.parametrize("twin", [True, False])
def test_tokens_equal_plain_decoding(twin, spec, proposals):
    """A draft that is always right (bundles are kept) and one that never is (all are taken back)."""
    model, draft = random_llama(), random_llama(seed=0 if twin else 1)
    native = speculative(model, draft, proposals)[2]
    compress(model, spec)
    compress(draft, spec)
    tokens, drafted, caches = speculative(model, draft, proposals)
    assert tokens == plain(model)
    assert drafted >= COUNT // 2 - 1 if twin else drafted <= 5
    assert {type(c) for c in caches} == {OpenTQCache}
    assert [c.offset for c in caches] == [c.offset for c in native], "everything rejected is out, and nothing else"


@pytest.mark.parametrize("which", ["model", "draft"])
def test_either_may_be_compressed(which):
    model, draft = random_llama(), random_llama(seed=1)
    want = plain(model)
    compress({"model": model, "draft": draft}[which], "f16")
    tokens, _, caches = speculative(model, draft, 3)
    assert tokens == want
    kinds = [type(c).__name__ for c in caches]
    assert kinds == (
        ["OpenTQCache"] * 2 + ["KVCache"] * 2 if which == "model" else ["KVCache"] * 2 + ["OpenTQCache"] * 2
    )


def test_every_bundle_goes_through_the_compressed_cache():
    model, draft = random_llama(), random_llama(seed=1)
    compress(model, "int4")
    before = installed(model).stats[0, 0].calls
    speculative(model, draft, 4)
    assert installed(model).stats[0, 0].calls - before > COUNT // 2
    uninstall(model)
