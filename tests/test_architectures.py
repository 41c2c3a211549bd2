"""Every architecture of mlx-lm: compressed caches hold what native ones hold, and docs/models.md says what is."""

from __future__ import annotations

from collections import Counter

import pytest

from .architectures import LEFT_OUT, NAMES
from .models_page import PAGE, header, row, verdict

STALE = "docs/models.md is stale: run `python -m tests.models_page`"


@pytest.mark.parametrize("name", NAMES)
def test_architecture(name):
    found = verdict(name)
    assert found.fidelity < 1e-3, "with nothing quantised, the logits must be those of native fp16 caches"
    assert found.window is None or found.window < 1e-3, "a compressed window must see what mlx-lm's window sees"
    assert all(calls >= 1 and calls == int(calls) for calls in found.calls), "a planned layer was not entered"
    assert found.batch in ("equal", "equal lengths only, as in mlx-lm", "not in mlx-lm", "-")
    assert found.resumed and found.trimmed is not False
    assert found.compressed or found.native, "a layer that is native has a reason"
    assert row(found) in PAGE.read_text().splitlines(), STALE


def test_the_page_has_every_architecture(capsys):
    own, *_ = PAGE.read_text().split("\n# Models of mlx-vlm\n")  # whose table test_vlm_architectures holds
    rows = [line.split(" | ") for line in own.splitlines() if line.startswith("| ")][2:]
    assert [cells[0].removeprefix("| ") for cells in rows] == NAMES, STALE
    words = Counter(cells[1] for cells in rows)
    with capsys.disabled():
        print(f"\n{len(NAMES)} architectures: {dict(words)}; {len(LEFT_OUT)} left out")
    assert words["compressed"] >= 85
    assert PAGE.read_text().startswith("\n".join(header(words)) + "\n"), STALE
