"""mlx-vlm's own server and prefix cache with a compressed model, and the peak of an image and a long prompt."""

from __future__ import annotations

import mlx.core as mx
import pytest

pytest.importorskip("mlx_vlm")

import mlx_vlm
from mlx_vlm.apc import APCManager, DiskBlockStore
from mlx_vlm.prompt_utils import apply_chat_template
from mlx_vlm.server import generation
from PIL import Image

import opentq
from opentq.hosts import hooks
from opentq.hosts.generation import fp16_bytes
from opentq.hosts.mlx_vlm.caches import VLMCache

from . import vlm_tiny

TEXT = "The keeper of the lighthouse wrote down the hour of every ship that passed. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(vlm_tiny.folder(tmp_path_factory.mktemp("vlm") / "tiny"))


def load(folder, kv):
    model, processor = mlx_vlm.load(folder)
    if kv:
        opentq.compress(model, kv)
    return model, processor, model.config


def served(folder, kv, monkeypatch, apc=None):
    """What mlx-vlm's server answers to two questions about one image, the first of them twice; and its model."""
    monkeypatch.setattr(generation, "load_model_resources", lambda path, adapter: load(path, kv))
    server = generation.ResponseGenerator(folder, apc_manager=apc)
    try:
        model, processor, config = server.wait_until_ready(60)
        answers = []
        for text in (TEXT * 8, TEXT * 8, TEXT * 8 + "What is it?"):
            prompt = apply_chat_template(processor, config, text, num_images=1)
            image = Image.new("RGB", (112, 84), (200, 30, 40))
            _, stream = server.generate(prompt, [image], args=generation.GenerationArguments(max_tokens=8))
            answers.append([t.token for t in stream])
        return answers, model
    finally:
        server.stop_and_join()


def test_their_server_answers_as_it_does_on_its_own_caches(folder, monkeypatch):
    want, _ = served(folder, None, monkeypatch)
    got, model = served(folder, "f16", monkeypatch)
    assert got == want and all(len(tokens) >= 8 for tokens in got)
    assert all(row.calls > 1 for row in opentq.report(model).rows)


def test_their_prefix_cache_holds_packed_bytes(folder, monkeypatch):
    apc = APCManager()
    want, _ = served(folder, "int4", monkeypatch)
    got, _ = served(folder, "int4", monkeypatch, apc)
    assert apc.stats_snapshot()["exact_hits"] > 0, apc.stats_snapshot()
    kept = [c for entry in apc._exact_cache.values() for c in entry.prompt_cache]
    assert kept and all(type(c) is VLMCache and c.n_packed for c in kept)
    assert got == want


def test_their_prefix_files_hold_packed_bytes(folder, tmp_path):
    """Written by a thread of theirs, and read by another manager."""
    model, *_ = load(folder, "int4")
    language, tokens = model.language_model, [(7 * i) % 90 + 4 for i in range(150)]
    caches = mlx_vlm.models.cache.make_prompt_cache(language)
    language(mx.array([tokens]), cache=caches)
    first = APCManager(num_blocks=8, block_size=16, disk=DiskBlockStore(tmp_path, namespace="tiny"))
    assert first.store_exact_cache(tokens, caches)
    first.close()
    second = APCManager(num_blocks=8, block_size=16, disk=DiskBlockStore(tmp_path, namespace="tiny"))
    restored, count = second.lookup_exact_cache([*tokens, 5])
    second.close()
    assert count == 150 and all(type(c) is VLMCache and c.n_packed == 128 for c in restored)
    ours, theirs = (language(mx.array([[5]]), cache=c).logits for c in (caches, restored))
    assert mx.array_equal(ours, theirs)


@pytest.mark.slow
def test_an_image_and_8k_tokens_take_at_most_two_fifths_of_their_own_share(folder):
    """What a long prompt adds to the peak of a short one; its own cache is float32 on a CPU, and counted in fp16."""
    image, growth, spec = Image.new("RGB", (448, 448), (200, 30, 40)), {}, "tq5/tq3:nc"
    for kv in (None, spec):
        model, processor, config = load(folder, kv)
        peaks = []
        for repeats in (10, 300):
            prompt = apply_chat_template(processor, config, TEXT * repeats, num_images=1)
            caches = mlx_vlm.models.cache.make_prompt_cache(model.language_model)
            options = {"max_tokens": 4, "prompt_cache": caches, "prefill_step_size": 128}
            mx.clear_cache()
            mx.reset_peak_memory()
            tokens = [s.prompt_tokens for s in mlx_vlm.stream_generate(model, processor, prompt, image, **options)][-1]
            peaks.append(mx.get_peak_memory())
        growth[kv] = peaks[1] - peaks[0]
        if kv:
            half, held = fp16_bytes(model, tokens), sum(c.nbytes for c in caches)
        hooks.uninstall(model)
    print(f"\n{tokens} tokens, {half:,} bytes in fp16; {spec} holds {held:,}; the peaks grew by {growth}")
    assert tokens > 8192
    assert held <= 0.4 * half and growth[spec] <= 0.4 * (growth[None] - half)
