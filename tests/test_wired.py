"""`--wire`: what is wired, by which rule, and that it ends; on Macs made of fakes."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from typer.testing import CliRunner

from opentq.cli import doctor
from opentq.cli.main import app
from opentq.errors import UserError
from opentq.hosts.hooks import HookError
from opentq.hosts.mlx_lm import wired as host_wired
from opentq.hosts.mlx_lm.wired import host
from opentq.memory import device, wiring
from opentq.memory.device import GIB, Device

TINY = str(Path(__file__).parents[1] / "models" / "tiny-llama")
WEIGHTS = 1 << 20
"""Fewer bytes than any model's weights."""
BIG, SMALL = device.assumed(64 * GIB), Device("mac", "a small Mac", 2 * GIB, GIB)
"""A Mac on which the tiny model needs no wired memory, and one on which it does (the margin is half a GiB)."""


@pytest.fixture
def limits(monkeypatch):
    """Every limit that was set, on a small Mac whose limit was 7."""
    history = [7]

    def set_wired_limit(value: int) -> int:
        history.append(value)
        return history[-2]

    monkeypatch.setattr(mx, "set_wired_limit", set_wired_limit)
    monkeypatch.setattr(device, "here", lambda: SMALL)
    # So that mlx-lm, too, takes this for a Mac and would wire everything.
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": SMALL.usable})
    return history


def run(*args: str, text: str | None = None):
    return CliRunner().invoke(app, list(args), input=text)


# ---- the rule


@pytest.mark.parametrize(
    "needed, wire, machine, limit",
    [
        (10 * GIB, "auto", BIG, None),  # 48 GiB are recommended, and this leaves most of them
        (30 * GIB, "auto", BIG, 30 * GIB + device.MARGIN),
        (100 * GIB, "auto", BIG, 48 * GIB),  # never more than recommended
        (100 * GIB, "off", BIG, None),
        (0, 20 * GIB, BIG, 20 * GIB),
        (100 * GIB, "auto", Device("cpu", "", GIB, GIB), None),
    ],
)
def test_what_is_wired(needed, wire, machine, limit):
    found, line = wiring.limit(needed, wire, machine)
    assert found == limit
    assert bool(line) == (machine.kind == "mac")
    assert limit is None or f"{limit / GIB:.1f} GiB" in line


def test_sizes_that_cannot_be():
    with pytest.raises(UserError, match=r"above the 48.0 GiB .* sudo sysctl iogpu.wired_limit_mb=51200"):
        wiring.limit(0, 50 * GIB, BIG)
    with pytest.raises(UserError, match="only Macs have a wired limit"):
        wiring.limit(0, GIB, Device("cpu", "a CPU", GIB, GIB))
    for text in ("none", "-1", "12 parsecs"):
        with pytest.raises(UserError, match="use auto, off, or a size"):
            wiring.parse_wire(text)
    assert [wiring.parse_wire(t) for t in ("auto", "OFF", "24GB")] == ["auto", "off", 24 * GIB]


# ---- commands


@pytest.mark.parametrize(
    "args, text", [(["generate", "--model", TINY, "-m", "2", "hi"], None), (["chat", TINY], "/exit")]
)
def test_the_limit_is_set_said_and_restored(limits, args, text):
    done = run(*args, text=text)
    assert done.exit_code == 0, done.output
    assert len(limits) == 3 and limits[0] == limits[2] == 7
    assert WEIGHTS + device.MARGIN < limits[1] < SMALL.usable
    assert done.stderr.count("opentq: wired limit 0.5 GiB") == 1


@pytest.mark.parametrize("args", [["generate", "--model", TINY, "-m", "2", "hi"], ["chat", TINY]])
def test_off_never_touches_it(limits, args):
    """Nor does mlx-lm, which otherwise wires all that is recommended while it generates."""
    done = run(*args, "--wire", "off", text="hi\n/exit\n" if args[0] == "chat" else None)
    assert done.exit_code == 0, done.output
    assert limits == [7] and "wired limit left alone" in done.stderr


def test_without_us_mlx_lm_wires_everything(limits):
    with host.wired_limit(object()):
        assert limits[-1] == SMALL.usable
    with host_wired.hands_off(), host.wired_limit(object()):
        assert limits[-1] == 7
    assert host.maybe_set_recommended_wired_limit() is not None


def test_a_size_is_taken_at_its_word(limits):
    done = run("generate", "--model", TINY, "-m", "1", "--wire", "900MB", "hi")
    assert done.exit_code == 0 and limits == [7, 900 << 20, 7], done.output


def test_longer_contexts_and_drafts_wire_more(limits):
    def limit(prompt: str, *more: str) -> int:
        done = run("generate", "--model", TINY, "--kv", "int4", "-m", "1", *more, prompt)
        assert done.exit_code == 0, done.output
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
    assert run("generate", "--model", TINY, "hi").exit_code != 0
    assert len(limits) == 3 and limits[2] == 7


def test_an_unknown_mlx_lm_is_named(monkeypatch):
    monkeypatch.delattr(host, host_wired.NAME)
    with pytest.raises(HookError, match=r"mlx-lm 0.* wires memory in a way"), host_wired.hands_off():
        pass


def test_doctor_explains(monkeypatch):
    monkeypatch.setattr(device, "here", lambda: BIG)
    monkeypatch.setattr(device, "raised_limit", lambda: 58368)
    (check,) = doctor._wired()
    assert "48.0 of 64 GiB" in check.detail and "58368 MB" in check.detail and "--wire off" in check.detail
    monkeypatch.undo()
    assert doctor._wired() == [] and device.raised_limit() == 0
