"""Models that only mlx-vlm knows, as text models: generate, chat and the server run them like any other."""

from __future__ import annotations

import mlx.core as mx
import pytest

pytest.importorskip("mlx_vlm")

from mlx_lm.generate import BatchGenerator, generate_step

import opentq
from opentq.hosts import hooks
from opentq.hosts.mlx_vlm import load as vlm_load
from opentq.hosts.mlx_vlm.text import TextModel

from . import vlm_tiny
from .server_support import serving, wait_for

PROMPTS = [[(7 * i + n) % 90 + 4 for i in range(n)] for n in (5, 40, 150)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Qwen2-VL's text is known to mlx-lm, too; here it counts as a model that is not."""
    patch = pytest.MonkeyPatch()
    patch.setattr(vlm_load, "only_here", lambda path: "only-vlm" in str(path))
    yield str(vlm_tiny.folder(tmp_path_factory.mktemp("vlm") / "only-vlm"))
    patch.undo()


@pytest.mark.parametrize("spec", ["f16", "int4"])
def test_ragged_prompts_of_mlx_lms_generator_answer_as_alone(folder, spec):
    model, _ = opentq.load(folder, kv=spec)
    assert type(model) is TextModel and all(plan.compressed for plan in hooks.installed(model).plans)
    alone = [[int(t) for t, _ in generate_step(mx.array(p), model, max_tokens=4)] for p in PROMPTS]
    generator = BatchGenerator(model)
    uids = generator.insert([list(p) for p in PROMPTS], max_tokens=[4] * 3)
    together: dict[int, list[int]] = {u: [] for u in uids}
    while any(len(t) < 4 for t in together.values()):
        for response in generator.next()[1]:
            together[response.uid].append(response.token)
    assert [together[u] for u in uids] == alone


def test_the_server_answers_with_it(folder):
    from openai import OpenAI

    with serving(folder, names=("tiny",)) as running:
        client = OpenAI(base_url=f"{running.url}/v1", api_key="none")
        question = [{"role": "user", "content": "What is the hour of the ship? " * 12}]
        first, second = (
            client.chat.completions.create(model="tiny", messages=question, max_tokens=5, temperature=0)
            for _ in range(2)
        )
        assert first.choices[0].message.content == second.choices[0].message.content
        assert second.usage.prompt_tokens_details.cached_tokens > 0
        wait_for(running.quiet)
