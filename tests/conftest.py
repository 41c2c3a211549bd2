"""Shared fixtures: which kernels serve, and small random models."""

from __future__ import annotations

import os
import sys

import mlx.core as mx
import pytest

from opentq.attention import dispatch, guard

from .msl.tally import pytest_terminal_summary  # noqa: F401


@pytest.fixture(autouse=True, scope="session")
def unguarded():
    """Tests judge kernels themselves; `test_guard.py` judges the judge."""
    guard.judging = False


@pytest.fixture(autouse=True, scope="module")
def nothing_left_behind():
    """A file leaves MLX's memory limit and opentq's settings as it found them: the next file's results hang on them."""

    def settings() -> tuple[int, dict[str, str]]:
        limit = mx.set_memory_limit(1 << 40)
        mx.set_memory_limit(limit)
        return limit, {k: v for k, v in os.environ.items() if k.startswith("OPENTQ_")}

    before = settings()
    yield
    assert settings() == before


@pytest.fixture(params=["tiled", "native"])
def kernels(request, monkeypatch):
    """Run a test once with the portable path alone and once with this machine's fused kernels alone."""
    monkeypatch.setenv("OPENTQ_KERNELS", request.param)
    if request.param == "native" and not dispatch.native_candidates():
        pytest.skip("no fused kernels on this machine: no C++ compiler, no GPU")
    return request.param


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A small random model with a byte-level tokenizer and a chat template, in a folder."""
    from .tiny_model import write

    return write(tmp_path_factory.mktemp("tiny-chat"))


@pytest.fixture(scope="module")
def server(folder):
    """`opentq serve` on that model, in a thread."""
    from .server_support import serving, wait_for

    with serving(folder, names=("tiny",), keep_alive=0.1) as running:
        yield running
        wait_for(running.quiet)


@pytest.fixture(scope="module")
def agent(folder):
    """A server with room for what coding assistants send."""
    from .server_support import serving

    with serving(folder, names=("tiny",), max_context=20_000, any_model=True, prefill_step=256) as running:
        yield running


@pytest.fixture
def all_extras(monkeypatch):
    """Commands look for their extra first; what comes after is tested with those that are not in `dev`, too."""
    from opentq.evaluate import harness

    monkeypatch.setattr(harness, "need", lambda: None)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `opentq ARGS` in this process: (exit code, stdout, stderr)."""

    def call(*args: str) -> tuple[int, str, str]:
        from opentq.cli import main as cli

        monkeypatch.setattr(sys, "argv", ["opentq", *args])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def tiny_llama():
    """A random 2-layer Llama with grouped queries: fast, and it exercises the whole seam."""
    return random_llama()


def random_llama(layers: int = 2, seed: int = 0):
    from mlx_lm.models import llama

    mx.random.seed(seed)
    args = llama.ModelArgs(
        model_type="llama",
        hidden_size=128,
        num_hidden_layers=layers,
        intermediate_size=128,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        rms_norm_eps=1e-5,
        vocab_size=256,
    )
    model = llama.Model(args)
    mx.eval(model.parameters())
    return model
