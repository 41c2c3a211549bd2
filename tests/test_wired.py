"""`generate` and `chat` wire what they need while they run, on a Mac made of fakes, and put the limit back."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from typer.testing import CliRunner

from opentq.cli.main import app
from opentq.memory import device
from opentq.memory.device import GIB

TINY = str(Path(__file__).parents[1] / "models" / "tiny-llama")
WEIGHTS = 1 << 20
"""Fewer bytes than any model's weights."""


@pytest.fixture
def limits(monkeypatch):
    """Every limit that was set, on a 64 GB Mac whose limit was 7."""
    history = [7]

    def set_wired_limit(value: int) -> int:
        history.append(value)
        return history[-2]

    monkeypatch.setattr(mx, "set_wired_limit", set_wired_limit)
    monkeypatch.setattr(device, "here", lambda: device.assumed(64 * GIB))
    return history


@pytest.mark.parametrize(
    "args, text", [(["generate", "--model", TINY, "-m", "2", "hi"], None), (["chat", TINY], "/exit\n")]
)
def test_the_limit_is_raised_and_restored(limits, args, text):
    done = CliRunner().invoke(app, args, input=text)
    assert done.exit_code == 0, done.output
    assert len(limits) == 3 and limits[0] == limits[2] == 7
    assert WEIGHTS + device.MARGIN < limits[1] < 2 * GIB


def test_longer_contexts_and_drafts_wire_more(limits):
    def limit(prompt: str, *more: str) -> int:
        CliRunner().invoke(app, ["generate", "--model", TINY, "--kv", "int4", "-m", "1", *more, prompt])
        return limits[-2]

    short = limit("hi")
    assert short < limit("hello " * 200)
    assert limit("hi", "--draft-model", TINY) > short + WEIGHTS
    assert len(limits) == 7


def test_the_limit_comes_back_after_an_error(limits, monkeypatch):
    from opentq.hosts.mlx_lm import generate as generation

    def fails(*args, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(generation, "stream_generate", fails)
    assert CliRunner().invoke(app, ["generate", "--model", TINY, "hi"]).exit_code != 0
    assert len(limits) == 3 and limits[2] == 7
