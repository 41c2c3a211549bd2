"""What a decode step costs the host, beside mlx-lm's own cache: never half as much again as on record."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from opentq import records

ROOT = Path(__file__).parents[1]
MORE = 1.5
"""How much more than on record a ratio may be: a median of neighbours' ratios, so a busy machine moves it little."""


@pytest.fixture(scope="module")
def gauge():
    spec = importlib.util.spec_from_file_location("host_time", ROOT / "dev" / "host_time.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("batch", [1, 8])
def test_host_time_is_as_on_record(gauge, batch):
    last = {(r["path"], r["arm"], r["batch"]): r["ratio"] for r in records.read([gauge.RESULTS])}
    for row in gauge.measure(batch, layers=6, steps=12):
        known = last[row["path"], row["arm"], batch]
        assert row["ratio"] <= MORE * known, f"{row} takes {row['ratio'] / known:.2f} times the host time on record"


def test_a_profile_names_functions(gauge):
    table = gauge.profile("metal", "int4", 1, steps=8, layers=4)
    assert table.startswith("| file | function |")
