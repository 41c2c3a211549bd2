"""Which spec to use for a model when the user names none: `recommended.toml`, with the numbers that justify it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from .. import toml
from ..spec import KVSpec

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
    """

    family: str
    spec: KVSpec
    why: str
    measured: str

    def __str__(self) -> str:
        return f"KV spec {self.spec}, recommended for {self.family} models: {self.why}"


def recommend(model_type: str) -> Recommendation:
    """The recommendation for a `model_type` of config.json, or the default for unknown ones."""
    table = _table()
    for family, line in table.items():
        if model_type in line.get("types", []):
            return _recommendation(family, line)
    return _recommendation("default", table["default"])


def warn(model_type: str, spec: KVSpec) -> str | None:
    """One sentence when `spec` keeps fewer bits of keys or of values than what is recommended; else None."""
    best = recommend(model_type)
    sides = zip(("keys", "values"), spec.codecs(), best.spec.codecs())
    below = [side for side, own, other in sides if own.bits_per_value(PROBE_DIM) < other.bits_per_value(PROBE_DIM)]
    if not below:
        return None
    return (
        f"--kv {spec} keeps fewer bits of {' and '.join(below)} than {best.spec}, which is recommended for "
        f"{best.family} models; measure what it costs with `opentq eval fidelity --kv {spec},{best.spec}`"
    )


def _recommendation(family: str, line: dict) -> Recommendation:
    return Recommendation(family, KVSpec.parse(line["spec"]), line["why"], line["measured"])


@functools.cache
def _table() -> dict[str, dict]:
    return toml.loads(TABLE.read_text())
