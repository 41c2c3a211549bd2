"""Results as an append-only JSONL file: a line says what was measured, on what, with which versions and command.

A run that was stopped goes on where it was: results whose settings are already in the file are not computed again.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import UserError

if TYPE_CHECKING:
    from .corpus import Corpus

Record = dict[str, Any]


class Records:
    """The records of one file (or of memory, without a path); two with the same `settings` are the same result."""

    def __init__(self, path: Path | None = None):
        self.path = path
        self.all: list[Record] = []
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a"):
                pass
            lines = path.read_text().splitlines()
        except OSError as error:
            raise UserError(f"can't use the records file {str(path)!r}: {error.strerror}") from error
        for number, line in enumerate(lines, 1):
            try:
                self.all.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number} is not a JSON record ({error}); repair or remove it") from error

    def find(self, settings: Record) -> Record | None:
        """The record with these settings, or None."""
        return next((r for r in self.all if r.get("settings") == settings), None)

    def add(self, settings: Record, result: Record) -> Record:
        """Append one result with the environment it was made in."""
        record = {"settings": settings, **result, **environment(), "time": _now()}
        self.all.append(record)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        return record


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


@functools.cache
def _environment() -> Record:
    import mlx.core as mx

    device = mx.default_device()
    name = mx.device_info().get("device_name") or platform.processor() or platform.machine()
    versions = {"opentq": __version__, **{n: importlib.metadata.version(n) for n in ("mlx", "mlx-lm")}}
    return {"device": f"{device.type.name}: {name}", "python": platform.python_version(), "versions": versions}


def environment() -> Record:
    """Device, versions and the command line."""
    program = Path(sys.argv[0])
    name = f"python {os.path.relpath(program)}" if program.suffix == ".py" else program.name or "python"
    command = " ".join([name, *sys.argv[1:]])
    kernels = os.environ.get("OPENTQ_KERNELS", "")
    return {**_environment(), "command": command, "kernels": kernels or "default"}


def about(kind: str, model: Record, corpus: Corpus, **more: Any) -> Record:
    """What identifies a result of `kind`: the model, the text that it read, and the task's own settings."""
    return {"kind": kind, "model": model, "text": {"name": corpus.name, "digest": corpus.digest}, **more}


def model_name(path: str) -> Record:
    """What identifies a model: its folder's name and a digest of its configuration and weight sizes."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return {"name": path}
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as weights:
            digest.update(weights.read(1 << 20))
        digest.update(str(file.stat().st_size).encode())
    return {"name": folder.resolve().name, "digest": digest.hexdigest()[:12]}
