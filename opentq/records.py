"""Results as append-only JSONL files: a line says what was measured, on what, with which versions, when and how.

Every store (`eval`, `bench`, `lab`, `tune`) writes and reads its records here. A process that is killed while it writes
leaves at most one line without an end: reading skips it, and the next record takes its place.
"""

from __future__ import annotations

import datetime
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from . import machine
from .errors import UserError

Record = dict[str, Any]

PACKAGES = ("opentq", "mlx", "mlx-lm", "numpy", "llama-cpp-python", "onnxruntime")
SAMPLE = 1 << 16
WEIGHTS = ("*.safetensors", "*.npz", "*.gguf")


class Records:
    """The records of one file (or of memory, without a path); two with the same `settings` are the same result.

    Raises UserError when the file can't be read and written, or is damaged.
    """

    def __init__(self, path: Path | None = None):
        self.path = path
        self.all: list[Record] = []
        if path is not None:
            check(path)
            self.all = read([path])

    def find(self, settings: Record) -> Record | None:
        """The record with these settings, or None."""
        return next((r for r in self.all if r.get("settings") == settings), None)

    def add(self, settings: Record, result: Record) -> Record:
        """Append one result with the environment it was made in."""
        made = {"settings": settings, **result, **environment()}
        self.all.append(made)
        if self.path is not None:
            append(self.path, [made])
        return made


def record(kind: str, **fields: Any) -> Record:
    """One result as it is stored: `kind`, the figures, and the environment."""
    return {"kind": kind, **fields, **environment()}


# ---- the file


def check(path: Path) -> None:
    """Make sure, before any work, that records can be kept in `path`; creates it. Raises UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _regular(path)
        with path.open("a"):
            pass
    except OSError as error:
        raise UserError(f"can't use the records file {str(path)!r}: {error.strerror}") from error


def make_folder(path: Path, option: str, mode: int = 0o777) -> Path:
    """`path`, made if need be, before any work. Raises UserError, naming the `option`, when it can't be."""
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option}: {str(path)!r} can't be made: {error.strerror}") from error
    return path


def append(path: Path, records: Sequence[Record]) -> None:
    """Add records to a JSONL file, all of them or none, after whatever line a killed process left without an end.

    Several processes may append to one file. Raises UserError when it can't be written.
    """
    text = "".join(json.dumps(r) + "\n" for r in records).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _regular(path)
        with path.open("a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            _end_last_line(file)
            size = file.seek(0, os.SEEK_END)
            try:
                while text:
                    text = text[file.write(text) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        raise UserError(f"can't write records to {str(path)!r}: {error.strerror}") from error


def _end_last_line(file: BinaryIO) -> None:
    """Remove a last line that was cut off; end one that is whole."""
    size = file.seek(0, os.SEEK_END)
    start, tail = size, b""
    while start and b"\n" not in tail:
        step = min(SAMPLE, start)
        start -= step
        file.seek(start)
        tail = file.read(step) + tail
    tail = tail.rpartition(b"\n")[2]
    if not tail:
        return
    if _parsed(tail) is None:
        file.truncate(size - len(tail))
    else:
        file.write(b"\n")


def read(paths: Sequence[Path]) -> list[Record]:
    """All records of JSONL files, in order; a last line that was cut off is left out.

    Raises UserError when a file is missing or no regular file, or when any other line is damaged.
    """
    found = []
    for path in paths:
        try:
            _regular(path)
            whole, _, tail = path.read_bytes().rpartition(b"\n")
        except OSError as error:
            raise UserError(f"can't read the records file {str(path)!r}: {error.strerror}") from error
        for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
            parsed = _parsed(line)
            if parsed is None:
                raise UserError(f"{path}, line {number} is damaged: it is not a JSON record; repair or remove it")
            found.append(parsed)
        if last := _parsed(tail):
            found.append(last)
    return found


def _parsed(line: bytes) -> Record | None:
    try:
        value = json.loads(line)
    except ValueError:  # also of bytes that are not UTF-8
        return None
    return value if isinstance(value, dict) else None


def _regular(path: Path) -> None:
    """Raise UserError for what is there and no regular file: a device or a pipe may have no end."""
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise UserError(f"can't use the records file {str(path)!r}: it is not a regular file")


# ---- what made it


@functools.cache
def _machine() -> Record:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    kind, name = machine.device()
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return {"device": name, "backend": kind, "system": system, "versions": versions, "commit": _commit()}


def environment() -> Record:
    """What every record says about where it comes from: device, versions, command, date, commit."""
    program = Path(sys.argv[0])
    script = program.suffix == ".py" and program.name != "__main__.py"
    name = ["python", os.path.relpath(program)] if script else ["opentq"]
    return {
        **_machine(),
        "threads": machine.threads(),
        "command": shlex.join([*name, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "kernels": os.environ.get("OPENTQ_KERNELS", ""),
    }


def _commit() -> str:
    """The commit of the source tree that runs, with `+` when it is changed; GITHUB_SHA or "" where there is no git."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return os.environ.get("GITHUB_SHA", "")[:12]

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--", "opentq") else "")


def fingerprint(folder: Path | str) -> str:
    """A hash of a model that changes with its configuration or weights, without reading all of them.

    It covers config.json, and of every weight file the name, the size and 64 KB at its start, middle and end.
    """
    digest = hashlib.sha256()
    folder = Path(folder)
    config = folder / "config.json"
    if config.exists():
        digest.update(config.read_bytes())
    files = [folder] if folder.is_file() else sorted(f for pattern in WEIGHTS for f in folder.glob(pattern))
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            for start in (0, max(0, size // 2), max(0, size - SAMPLE)):
                stream.seek(start)
                digest.update(stream.read(SAMPLE))
    return digest.hexdigest()


def model_name(path: str, folder: Path | None = None) -> Record:
    """What identifies a model in a record: its name and fingerprint. `folder` is where a repository's files are."""
    local = Path(path).expanduser()
    name = local.resolve().name if local.exists() else path
    return {"name": name, "digest": fingerprint(folder or local)[:12]}
