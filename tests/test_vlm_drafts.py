"""mlx-vlm's speculative decoding on packed caches: what was not accepted is taken back, in every sequence alone."""

from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import pytest

pytest.importorskip("mlx_vlm")

from mlx_vlm.generate.ar import BatchGenerator, generate_step
from mlx_vlm.models.base import InputEmbeddingsFeatures
from mlx_vlm.speculative.drafters.qwen3_dflash.config import DFlashConfig
from mlx_vlm.speculative.drafters.qwen3_dflash.dflash import DFlashDraftModel

import opentq
from opentq.hosts import hooks

from .vlm_architectures import build

COUNT, BLOCK = 40, 6


class Whole(nn.Module):
    """A whole model around a language model, for text."""

    def __init__(self, language):
        super().__init__()
        self.language_model = language
        self.config = language.config

    def get_input_embeddings(self, ids, pixels=None, mask=None, **options):
        return InputEmbeddingsFeatures(inputs_embeds=self.language_model.model.embed_tokens(ids))


class Oracle(DFlashDraftModel):
    """Knows what is to come, and errs at another place of every block."""

    def __init__(self, language, coming):
        settings = language.args if hasattr(language, "args") else language.config
        super().__init__(
            DFlashConfig(
                hidden_size=settings.hidden_size,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=32,
                vocab_size=settings.vocab_size,
                block_size=BLOCK,
                target_layer_ids=[1],
                num_target_layers=len(language.layers),
            )
        )
        self.coming, self.at, self.rounds = coming, [0] * len(coming), 0

    def draft_block(self, last, hidden, cache, size, sampler, token_dtype=mx.int32):
        rows = [last] if isinstance(last, int) else last.tolist()
        blocks, unseen = [], iter(range(len(self.coming)))
        for n, row in enumerate(rows):
            # Sequences that have ended are not here any more; the others keep their order.
            i = next(i for i in unseen if self.coming[i][self.at[i]] == row)
            known, at = self.coming[i], self.at[i]
            right = (self.rounds + 2 * n) % size
            block = [*known[at + 1 : at + 1 + right], *[1] * size][: size - 1]
            if right < size - 1:
                block[right] = (known[at + 1 + right] + 1) % 90 if at + 1 + right < len(known) else 1
            blocks.append(block)
            self.at[i] = min(at + min(right, size - 1) + 1, len(known) - 1)
        self.rounds += 1
        return mx.array(blocks, dtype=token_dtype)

    draft_block_greedy = draft_block


PROMPTS = [[(7 * i + n) % 90 + 4 for i in range(n)] for n in (9, 33, 70)]


@pytest.fixture(scope="module", params=["lfm2", "laguna", "qwen3_5"])
def whole(request):
    """Growing caches beside recurrent states, beside windows, and with M-RoPE."""
    model = Whole(build(request.param))
    yield model
    hooks.uninstall(model.language_model)


def alone(model, prompt, **options):
    return [t for t, _ in generate_step(mx.array([prompt]), model, None, None, max_tokens=COUNT, **options)]


@pytest.mark.parametrize("spec", ["f16", "int4"])
def test_drafts_that_were_not_accepted_leave_no_trace(whole, spec):
    opentq.compress(whole.language_model, spec)
    want = alone(whole, PROMPTS[2])
    oracle = Oracle(whole.language_model, [want])
    caches = whole.language_model.make_cache()
    options = {"draft_model": oracle, "draft_kind": "dflash", "draft_block_size": BLOCK, "prompt_cache": caches}
    assert alone(whole, PROMPTS[2], **options) == want
    assert COUNT / BLOCK < oracle.rounds < COUNT / 2, "some drafts were accepted, and some were not"
    assert {c.size() for c in caches if hasattr(c, "spec")} <= {len(PROMPTS[2]) + COUNT - n for n in (0, 1)}


def test_every_sequence_of_a_batch_takes_its_own_drafts_back():
    whole = Whole(build("lfm2"))
    opentq.compress(whole.language_model, "f16")
    want = [alone(whole, p) for p in PROMPTS]
    oracle = Oracle(whole.language_model, want)
    never = lambda token: False  # noqa: E731 (it has a method, too)
    never.add_eos_token_ids = lambda ids: None
    options = {"draft_model": oracle, "draft_kind": "dflash", "draft_block_size": BLOCK}
    processor = SimpleNamespace(stopping_criteria=never)
    generator = BatchGenerator(whole.language_model, processor, max_tokens=COUNT, **options)
    embedded = [{"inputs_embeds": whole.get_input_embeddings(mx.array([p])).inputs_embeds} for p in PROMPTS]
    uids = generator.insert(PROMPTS, max_tokens=COUNT, prompt_kwargs=embedded)
    got = {u: [] for u in uids}
    while generator.has_work:
        for response in generator.next()[1]:
            got[response.uid].append(response.token)
    assert [got[u] for u in uids] == want
