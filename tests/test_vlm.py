"""mlx-vlm as a host: images and text on packed keys and values, and both hosts in one process."""

from __future__ import annotations

import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import pytest

pytest.importorskip("mlx_vlm")

import mlx_vlm
from mlx_vlm.generate.ar import generate_step
from mlx_vlm.prompt_utils import apply_chat_template
from mlx_vlm.utils import prepare_inputs
from PIL import Image

import opentq
from opentq.errors import UserError
from opentq.hosts import hooks, shim
from opentq.hosts.host import HookError, host_of
from opentq.hosts.mlx_vlm import private
from opentq.hosts.mlx_vlm.caches import BatchVLMCache, VLMCache

from . import vlm_tiny

LONG = "The keeper of the lighthouse wrote down the hour of every ship that passed. " * 12


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return mlx_vlm.load(str(vlm_tiny.folder(tmp_path_factory.mktemp("vlm") / "tiny")))


@pytest.fixture
def vlm(loaded):
    yield loaded
    hooks.uninstall(loaded[0])


def picture(colour: tuple[int, int, int] = (200, 30, 40), size: tuple[int, int] = (112, 84)) -> Image.Image:
    return Image.new("RGB", size, colour)


def inputs(model, processor, text: str, images=()):
    prompt = apply_chat_template(processor, model.config, text, num_images=len(images))
    return prepare_inputs(processor, images=list(images) or None, prompts=prompt)


def tokens(model, processor, text: str, images=(), count: int = 6, **options):
    given = inputs(model, processor, text, images)
    model.language_model._position_ids = model.language_model._rope_deltas = None
    rest = {k: v for k, v in given.items() if k not in ("input_ids", "pixel_values", "attention_mask")}
    steps = generate_step(
        given["input_ids"],
        model,
        given.get("pixel_values"),
        given["attention_mask"],
        max_tokens=count,
        **rest,
        **options,
    )
    return [int(token) for token, _ in steps]


@pytest.mark.parametrize("images", [(), (picture(),), (picture(), picture((0, 90, 200), (56, 140)))])
@pytest.mark.parametrize("chunk", [16, 2048])
def test_images_and_text_are_what_they_are_on_its_own_caches(vlm, images, chunk):
    model, processor = vlm
    want = tokens(model, processor, LONG, images, prefill_step_size=chunk)
    opentq.compress(model, "f16")
    assert tokens(model, processor, LONG, images, prefill_step_size=chunk) == want
    opentq.compress(model, "int4")
    before = [row.calls for row in opentq.report(model).rows]
    tokens(model, processor, LONG, images)
    assert all(row.calls > calls for row, calls in zip(opentq.report(model).rows, before))


def test_an_image_changes_the_answer_and_so_do_its_places(vlm):
    model, processor = vlm
    opentq.compress(model, "int4")
    told = {tuple(tokens(model, processor, "What is this?", images)) for images in ((), (picture(),), (picture(),) * 2)}
    assert len(told) == 3


def test_generate_and_stream_use_packed_caches(vlm):
    model, processor = vlm
    prompt = apply_chat_template(processor, model.config, LONG, num_images=1)
    plain = mlx_vlm.generate(model, processor, prompt, image=[picture()], max_tokens=5)
    opentq.compress(model, "f16")
    assert mlx_vlm.generate(model, processor, prompt, image=[picture()], max_tokens=5).text == plain.text
    pieces = mlx_vlm.stream_generate(model, processor, prompt, image=[picture()], max_tokens=5)
    assert "".join(piece.text for piece in pieces) == plain.text


def test_a_batch_padded_on_the_left_answers_as_its_rows_do(vlm):
    """Rows of the batch are padded while prompts are read in pieces, and leave it one by one."""
    model, _ = vlm
    opentq.compress(model, "f16")
    language = model.language_model
    rows = [[(5 * i + n) % 90 + 4 for i in range(n)] for n in (3, 70, 150)]

    def run(prompts, pads):
        caches = [c.to_batch(pads) for c in language.make_cache()]
        width = max(map(len, prompts))
        ids = mx.array([[0] * (width - len(p)) + p for p in prompts])
        language._position_ids = language._rope_deltas = None
        out = []
        for start in range(0, width, 64):
            positions = mx.maximum(mx.arange(start, min(start + 64, width))[None] - mx.array(pads)[:, None], 0)
            positions = mx.broadcast_to(positions[None], (3, *positions.shape))
            out = language(ids[:, start : start + 64], cache=caches, position_ids=positions).logits[:, -1]
        return out, caches

    together, caches = run(rows, [147, 80, 0])
    assert type(caches[0]) is BatchVLMCache and caches[0].offset.tolist() == [3, 70, 150]
    for i, row in enumerate(rows):
        alone, _ = run([row], [0])
        assert mx.abs(together[i] - alone[0]).max().item() < 2e-3
    middle = caches[0].extract(1)
    assert type(middle) is VLMCache and middle.size() == 70
    caches[0].filter(mx.array([2, 0]))
    assert caches[0].offset.tolist() == [150, 3] and caches[0].left_padding.tolist() == [0, 147]


def test_its_prefix_cache_keeps_packed_bytes(vlm):
    from mlx_vlm.apc_adapters import clone_cache_entry, merge_cache_entries

    model, processor = vlm
    opentq.compress(model, "int4")
    caches = model.language_model.make_cache()
    tokens(model, processor, LONG, (picture(),), prompt_cache=caches)
    held = sum(c.nbytes for c in caches)
    targets: list = []
    copies = [clone_cache_entry(c, min_capacity_tokens=None, eval_targets=targets) for c in caches]
    assert all(type(c) is VLMCache and c.n_packed for c in copies)
    assert sum(c.nbytes for c in copies) <= held
    assert type(merge_cache_entries(copies[:1] * 2, [1, 1])) is BatchVLMCache


def test_a_bidirectional_mask_sees_packed_and_padded_tokens_alike():
    """Image blocks attend to themselves both ways: an array mask, over padding that is still to come."""
    mx.random.seed(3)
    x = mx.random.normal((2, 2, 24, 32))
    single, batch = VLMCache("f16"), VLMCache("f16").to_batch([0, 10])
    mask = mx.arange(24)[None] <= mx.arange(24)[:, None]
    mask = mask | ((mx.arange(24) >= 12) & (mx.arange(24) < 20))[None] & (mx.arange(24)[:, None] >= 12)
    padded = mx.stack([mask, mask & (mx.arange(24) >= 10)])[:, None]
    keys, _ = batch.update_and_fetch(x, x)
    together = keys.step.attend(x, scale=0.2, mask=padded)
    keys, _ = single.update_and_fetch(x[1:, :, 10:], x[1:, :, 10:])
    alone = keys.step.attend(x[1:, :, 10:], scale=0.2, mask=mask[10:, 10:])
    assert mx.abs(together[1:, :, 10:] - alone).max().item() < 1e-5
    assert not mx.isnan(together).any().item()


def test_both_hosts_in_one_process(vlm, tiny_llama):
    model, processor = vlm
    opentq.compress(tiny_llama, "int4")
    opentq.compress(model, "k8v4")
    assert host_of(model).name == "mlx-vlm" and host_of(tiny_llama).name == "mlx-lm"
    assert type(model.language_model.make_cache()[0]) is VLMCache
    assert opentq.report(model).spec == "k8v4" and opentq.report(tiny_llama).spec == "int4"
    tokens(model, processor, "What is this?", (picture(),))
    mx.eval(tiny_llama(mx.array([[1, 2]]), cache=tiny_llama.make_cache()))
    hosts = [host_of(m) for m in (model, tiny_llama)]
    assert all(shim.installed(host) for host in hosts)
    opentq.uninstall()
    assert not any(shim.installed(host) for host in hosts)
    assert not hasattr(private.caches, "VLMCache")
    opentq.uninstall(model)
    opentq.uninstall(tiny_llama)
    assert hooks.installed(model) is None
    assert type(private.caches.make_prompt_cache(model.language_model)[0]) is private.caches.KVCache


def test_it_is_not_imported_for_a_model_of_mlx_lm():
    code = (
        "import sys, opentq; from mlx_lm.models import llama; "
        "a = dict(model_type='llama', hidden_size=64, num_hidden_layers=1, intermediate_size=32, "
        "num_attention_heads=2, rms_norm_eps=1e-5, vocab_size=50); "
        "opentq.compress(llama.Model(llama.ModelArgs(**a)), 'int4'); "
        "sys.exit('mlx_vlm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_another_version_is_refused_with_both(vlm, monkeypatch):
    hooks.uninstall()
    monkeypatch.setattr(private.base, "scaled_dot_product_attention", lambda queries, keys, values: None)
    with pytest.raises(HookError, match=rf"mlx-vlm {private.version('mlx-vlm')} is not supported.*made for 0\.7\.10"):
        opentq.compress(vlm[0], "int4")


def test_a_model_without_a_language_model_is_one_line():
    kind = type("Detector", (nn.Module,), {"__module__": "mlx_vlm.models.yolo11.yolo11"})
    with pytest.raises(UserError, match="has no language model") as error:
        opentq.compress(kind(), "int4")
    assert "\n" not in str(error.value)
