"""Every architecture of mlx-vlm: compressed caches hold what native ones hold, and docs/models.md says what is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

mlx_vlm = pytest.importorskip("mlx_vlm")

from .vlm_architectures import LEFT_OUT, NAMES  # noqa: E402
from .vlm_models_page import halves, header, row, verdict  # noqa: E402

STALE = "docs/models.md is stale: run `python -m tests.vlm_models_page`"
FEW = ("gemma3n", "kimi_linear", "mllama", "phi4_siglip", "qwen2_vl")
"""Windows, shared keys and values, latents, recurrent states, cross attention, MLX called directly and M-RoPE."""


def check(name: str) -> None:
    found = verdict(name)
    assert found.fidelity < 1e-3, "with nothing quantised, the logits must be those of native fp16 caches"
    assert found.window is None or found.window < 1e-3, "a compressed window must see what mlx-vlm's window sees"
    assert all(calls >= 1 and calls == int(calls) for calls in found.calls), "a planned layer was not entered"
    assert found.batch in ("equal", "differs in mlx-vlm, too", "not in mlx-vlm", "-")
    assert found.resumed and found.trimmed is not False
    assert found.compressed or found.native, "a layer that is native has a reason"
    assert row(found) in halves()[1].splitlines(), STALE


@pytest.mark.parametrize("name", FEW)
def test_some_architectures(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if n not in FEW])
def test_architecture(name):
    check(name)


def test_the_page_has_every_architecture(capsys):
    page = halves()[1]
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")][2:]
    assert [cells[0].removeprefix("| ") for cells in rows] == NAMES, STALE
    words = Counter(cells[1] for cells in rows)
    with capsys.disabled():
        left = len(" ".join(LEFT_OUT.values()).split())
        print(f"\n{len(NAMES)} architectures of mlx-vlm: {dict(words)}; {left} modules left out")
    assert words["compressed"] + words["partly"] >= 0.9 * len(NAMES)
    assert page.startswith("\n".join(header(words)) + "\n"), STALE


def test_no_module_of_mlx_vlm_is_forgotten():
    folder = Path(mlx_vlm.models.__path__[0])
    packages = {p.parent.name for p in folder.glob("*/__init__.py")}
    assert packages == {*NAMES, *" ".join(LEFT_OUT.values()).split()}
