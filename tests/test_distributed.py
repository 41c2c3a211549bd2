"""Several machines: a model cut by heads or by layers over two ranks gives the tokens of one process, caches packed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "distributed_run.py"
LAUNCH = Path(sys.executable).parent / "mlx.launch"


def run(mode: str, folder: Path, *launcher: str) -> list[dict]:
    """What every rank found, by rank."""
    command = [*launcher, sys.executable, str(SCRIPT), mode, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    ranks = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    assert ranks, done.stderr
    return ranks


@pytest.mark.parametrize("mode", ["tensor", "pipeline"])
def test_two_ranks_give_the_tokens_of_one_process(mode, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (alone,) = run(mode, tmp_path / "one")
    ranks = run(mode, tmp_path / "two", str(LAUNCH), "-n", "2", "--backend", "ring")
    assert len(ranks) == 2
    for rank in ranks:
        assert rank["tokens"] == alone["tokens"]
        assert rank["scores"] == pytest.approx(alone["scores"], abs=1e-3)
        assert rank["kv_heads"] == alone["kv_heads"] // (2 if mode == "tensor" else 1), "own heads, or all of them"
        assert rank["packed"] == [128] * (4 if mode == "tensor" else 2), "all layers, or its own ones, and packed"
        assert min(rank["calls"]) > 12
