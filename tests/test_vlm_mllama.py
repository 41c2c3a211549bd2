"""mllama shows its images to every token (cross attention): alone, as mlx-vlm does it; in a batch it is refused."""

from __future__ import annotations

import mlx.core as mx
import pytest

pytest.importorskip("mlx_vlm")

from mlx_vlm.generate.ar import generate_step
from mlx_vlm.models import mllama

import opentq
from opentq.hosts import hooks
from opentq.hosts.mlx_vlm.text import TextModel
from opentq.hosts.mlx_vlm.vision import ImagePrompt, VisionError

TILES, IMAGE, LENGTH = 2, 90, 40


@pytest.fixture(scope="module")
def model():
    text = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "cross_attention_layers": [1, 3]}
    vision = {"image_size": 28, "patch_size": 14, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "max_num_tiles": TILES, "num_global_layers": 1, "vision_output_dim": 64}
    vision |= {"intermediate_layers_indices": [1]}
    config = mllama.ModelConfig(mllama.TextConfig(**text), mllama.VisionConfig(**vision), "mllama")
    mx.random.seed(2)
    made = mllama.Model(config)
    for layer in made.language_model.layers[1::2]:  # weights that are zero would hide the image
        layer.cross_attn_attn_gate = layer.cross_attn_mlp_gate = mx.ones(1)
    mx.eval(made.parameters())
    yield made
    hooks.uninstall(made)


def inputs(seed=0):
    """What a processor makes of text, an image of one tile of two, and text."""
    mx.random.seed(seed)
    tokens = [(7 * i) % 80 + 1 for i in range(LENGTH)]
    tokens[5] = IMAGE
    seen = (mx.arange(LENGTH) >= 5)[None, :, None, None] & (mx.arange(TILES) == 0)
    return tokens, {
        "input_ids": mx.array([tokens]),
        "attention_mask": mx.ones((1, LENGTH), mx.int32),
        "pixel_values": mx.random.normal((1, 1, TILES, 3, 28, 28)),
        "aspect_ratio_ids": mx.array([[1]]),
        "aspect_ratio_mask": mx.array([[[1, 0]]]),
        "cross_attention_mask": seen.astype(mx.float32),
    }


def theirs(model, seed=0):
    _, given = inputs(seed)
    ids, pixels, mask = (given.pop(name) for name in ("input_ids", "pixel_values", "attention_mask"))
    return [int(t) for t, _ in generate_step(ids, model, pixels, mask, max_tokens=6, temperature=0, **given)]


def ours(model, step, again=False):
    """Greedy tokens behind a prompt read in steps; `again`: by another prompt that finds all of it read."""
    tokens, given = inputs()
    prompt, text = ImagePrompt(tokens, 6, ((5, b"image"),), given), TextModel(model, model.config)
    caches = text.make_cache()
    speaker, read = prompt.begin(text, caches, step)
    assert read == LENGTH - 1 and not prompt.inputs
    if again:
        second = ImagePrompt(tokens, 6, ((5, b"image"),), inputs()[1])
        second.examine(model, alone=True)
        speaker = second.speaker(text)
    out = [tokens[-1]]
    for _ in range(6):
        out.append(speaker(mx.array([out[-1:]]), cache=caches)[0, -1].argmax().item())
    return out[1:]


def test_the_answer_is_that_of_mlx_vlm(model):
    hooks.uninstall(model)
    want = theirs(model)
    assert want != theirs(model, 1), "the image matters"
    opentq.compress(model, "f16")
    assert theirs(model) == want
    for step, again in ((512, False), (8, False), (512, True)):
        assert ours(model, step, again) == want
    assert all(row.calls for row in opentq.report(model).rows if row.plan.compressed)


def test_a_batch_of_answers_refuses_it_in_a_line(model):
    tokens, given = inputs()
    with pytest.raises(VisionError, match=r"to every token .* opentq chat") as error:
        ImagePrompt(tokens, 6, (), given).examine(model)
    assert "\n" not in str(error.value)
