"""What `opentq calibrate` found out about a model, as files: a recipe (TOML) and tensors (safetensors) beside it.

The recipe names the tensors, their checksum, and the fingerprint of the model; the tensors hold, for every calibrated
layer, moments of queries and keys after RoPE and what was chosen from them. A file that is missing, cut, changed or
not finite is refused when it is read, and another model when it is used.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError

NEEDED = 512
"""Tokens without which a calibration says too little."""

Channels = tuple[tuple[int, ...], ...]
"""For every KV head, the channels that were chosen."""


class CalibrationError(UserError):
    """A calibration can't be used; the message says why and what to do."""


@dataclass(frozen=True)
class Calibration:
    """What caches need of a calibration.

    Attributes:
        path: the recipe.
        model: the fingerprint of the model that it was made for.
        channels: per compressible layer, what was chosen for every KV head; None where keys can't be sketched.
    """

    path: str
    model: str
    channels: tuple[Channels | None, ...]

    def check(self, fingerprint: str) -> None:
        """Raise CalibrationError unless it was made for the model with this fingerprint."""
        if fingerprint != self.model:
            raise CalibrationError(
                f"recipe {self.path!r} was calibrated on another model (or other weights of it): "
                "run opentq calibrate for this one"
            )


def read(path: Path, table: dict[str, Any], layers: int) -> Calibration:
    """The calibration of a recipe's `[calibration]` table. Raises CalibrationError."""

    def refuse(what: str) -> CalibrationError:
        return CalibrationError(f"recipe {str(path)!r}: {what}; run opentq calibrate again")

    wrong = [n for n, kind in FIELDS.items() if not isinstance(table.get(n), kind)]
    if wrong:
        raise refuse(f"its calibration lacks {', '.join(wrong)}")
    if table["tokens"] < NEEDED:
        raise refuse(f"it was calibrated on {table['tokens']} tokens, and at least {NEEDED} are needed")
    file = path.with_name(table["tensors"])
    try:
        digest = sha256(file)
    except OSError as error:
        raise refuse(f"its tensors {str(file)!r} can't be read ({error.strerror})") from error
    if digest != table["sha256"]:
        raise refuse(f"its tensors {str(file)!r} are cut, changed or of another calibration")
    from safetensors.numpy import load_file

    tensors = load_file(file)
    bad = sorted(name for name, a in tensors.items() if not np.isfinite(a).all())
    if bad:
        raise refuse(f"its tensor {bad[0]} is not finite")
    found: list[Channels | None] = []
    for i in range(layers):
        chosen = tensors.get(f"{i}.channels")
        found.append(None if chosen is None else tuple(tuple(map(int, head)) for head in chosen))
    return Calibration(str(path), table["model"], tuple(found))


FIELDS = {"tensors": str, "sha256": str, "model": str, "tokens": int}


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
