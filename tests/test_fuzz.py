"""Three hundred random lives of caches; `dev/fuzz.py` runs more of them, and lives one again."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opentq.attention import dispatch
from opentq.caches.batch import BatchOpenTQCache

from .fuzz import trial
from .fuzz.case import Case, draw

COMMAND = [sys.executable, str(Path(__file__).parents[1] / "dev" / "fuzz.py")]


@pytest.mark.parametrize("first", [0, 50])
@pytest.mark.parametrize("mode", ["", "native", "tiled"])
def test_random_lives(mode, first, monkeypatch):
    monkeypatch.setenv("OPENTQ_KERNELS", mode)  # given back after the lives, which change it
    if mode == "native" and not dispatch.native_candidates():
        pytest.skip("no fused kernels on this machine: no C++ compiler, no GPU")
    trial.served.clear()
    for seed in range(first, first + 50):
        report = trial.run(seed, mode)
        assert report is None, f"seed {seed}: {report}"
    assert sum(trial.served.values()) > 100
    assert ("tiled" in trial.served) == (mode != "native") and (len(trial.served) > 1) == (not mode)


def test_a_fault_is_found_and_cut_down(monkeypatch):
    """A batch that keeps the right sequences in the wrong order."""
    monkeypatch.setenv("OPENTQ_KERNELS", "tiled")
    case = next(c for c in map(draw, range(1000)) if not (c.window or c.latent))
    step = {"times": 1, "seed": 1}
    ops = ["append", [150], 0, step], ["merge", [64, 2]], ["decode", 1, 1, step], ["filter", [2, 0]], ["trim", 1]
    case = Case.read(Case(**{**vars(case), "spec": "int4:recent=33", "ops": ops}).text())
    assert trial.examine(case, "tiled") is None
    right = BatchOpenTQCache.filter
    monkeypatch.setattr(BatchOpenTQCache, "filter", lambda self, keep: right(self, list(keep)[::-1]))
    report = trial.examine(case, "tiled")
    assert report is not None and report.startswith("Wrong: Extent(")
    least = Case.read(report.splitlines()[-1])
    assert [op[0] for op in least.ops][-2:] == ["merge", "filter"] and len(least.ops) <= 3
    assert (least.spec, least.dims, least.gqa, least.dtype) == ("int4", (64, 64), 1, "float32")
    assert trial.examine(least, "tiled", small=True) is not None


def test_the_command_says_what_it_did_and_ends_on_a_signal():
    done = subprocess.run([*COMMAND, "--cases", "2", "--jobs", "1"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("2 passed, 0 failed of 2 cases from seed 0"), done
    with subprocess.Popen([*COMMAND, "--cases", "9999", "--jobs", "1"], stdout=subprocess.PIPE, text=True) as long:
        time.sleep(1)
        long.send_signal(signal.SIGTERM)
        began = time.monotonic()
        said, _ = long.communicate(timeout=60)
    assert long.returncode == 128 + signal.SIGTERM and said.rstrip().endswith("stopped")
    assert time.monotonic() - began < 20
