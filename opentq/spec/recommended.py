"""Which spec to use for a model when the user names none: `recommended.toml`, with the numbers that justify it."""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .kv import KVSpec
from .recipe import Recipe
from .text import AUTO, Asked, Spec

TABLE = Path(__file__).with_name("recommended.toml")
PROBE_DIM = 128
"""Head dim at which the sizes of two specs are compared."""


@dataclass(frozen=True)
class Recommendation:
    """One line of the table.

    Attributes:
        family: its name there; "default" for model types that no line names.
        spec: the spec.
        why: one sentence.
        measured: what the numbers were measured on.
        biased: its key projections have a bias, which low-bit keys don't survive uncentred.
    """

    family: str
    spec: KVSpec
    why: str
    measured: str
    biased: bool = False

    @property
    def models(self) -> str:
        return "models without a line of their own" if self.family == "default" else f"{self.family} models"

    def __str__(self) -> str:
        return f"KV spec {self.spec}, recommended for {self.models}: {self.why}"


def recommend(model: Any) -> Recommendation:
    """The recommendation for a loaded model or a `model_type` of config.json, or the default for unknown ones."""
    kind = model if isinstance(model, str) else getattr(model, "model_type", "")
    table = _table()
    for family, line in table.items():
        if kind in line.get("types", []):
            return _recommendation(family, line)
    return _recommendation("default", table["default"])


def advice(model: Any, asked: Asked) -> str | None:
    """One line for the user: what was taken where no spec was asked for; a warning where it was too small a one."""
    if asked is None:
        return None
    return str(recommend(model)) if asked == AUTO else warn(model, asked)


def warn(model: Any, spec: Spec) -> str | None:
    """One sentence when `spec` keeps less of keys or of values than what is recommended, else None.

    Fewer bits of keys are no fault where those of both together are as many. Recipes are not judged: they were measured
    on their model.
    """
    if isinstance(spec, Recipe):
        return None
    best = recommend(model)
    bits = [[codec.bits_per_value(PROBE_DIM) for codec in s.codecs()] for s in (spec, best.spec)]
    smaller = sum(bits[0]) < sum(bits[1])
    below = [
        side for side, own, other in zip(("keys", "values"), *bits) if own < other and (smaller or side == "values")
    ]
    if below:
        fault = f"keeps fewer bits of {' and '.join(below)} than {best.spec}"
    elif best.biased and not spec.center and bits[0][0] <= bits[1][0]:
        fault = f"does not centre keys as {best.spec} does"
    else:
        return None
    return (
        f"--kv {spec} {fault}, which is recommended for {best.models}; measure what it costs with "
        f"`opentq eval fidelity --kv {spec},{best.spec}`"
    )


def _recommendation(family: str, line: dict) -> Recommendation:
    return Recommendation(family, KVSpec.parse(line["spec"]), line["why"], line["measured"], line.get("biased", False))


@functools.cache
def _table() -> dict[str, dict]:
    return tomllib.loads(TABLE.read_text())
