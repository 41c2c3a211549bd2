"""Remembered prefixes on disk: they survive a restart, and a `kill -9` in the middle of a write.

Each prefix is one file of `caches/disk.py` (canonical bytes, checksum, atomic rename), named by the hash of its tokens,
and beside it a small index of its blocks' names, written last. Models, specs and chunk sizes have folders of their own.
Writing waits until nobody is being served, because it is the engine's thread that does it; what is still unwritten
when the server stops is written then.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..caches import disk
from ..errors import UserError
from .prefix import exact_trim

log = logging.getLogger("opentq.serve")


@dataclass(frozen=True)
class Identity:
    """What a prefix on disk belongs to."""

    model: str
    revision: str
    spec: str

    def folder(self, root: Path) -> Path:
        """The folder of this model and spec. Raises UserError when it can't be made."""
        name = hashlib.sha256(f"{self.revision} {self.spec}".encode()).hexdigest()[:16]
        path = root.expanduser() / name
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--prompt-cache-dir {str(root)!r} can't be used: {error.strerror}") from error
        return path


@dataclass(frozen=True)
class PrefixFile:
    """A prefix on disk: the names of its blocks, its bytes, and whether shorter prefixes can be cut from it."""

    names: tuple[str, ...]
    nbytes: int
    trimmable: bool


class PrefixFiles:
    """The prefixes of one model in one folder, least recently used first out."""

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        block: int,
        max_bytes: int,
        max_pending: int,
        fresh: Callable[[], list[Any]],
    ):
        self.folder = folder
        self.identity = identity
        self.block = block
        self.max_bytes = max_bytes
        self.max_pending = max_pending
        self.fresh = fresh
        self.files: dict[str, PrefixFile] = {}
        self._by_name: dict[str, list[PrefixFile]] = {}
        self._pending: list[tuple[tuple[str, ...], tuple[int, ...], list[Any]]] = []
        self._sweep()
        for index in sorted(folder.glob("*.json"), key=lambda p: p.stat().st_mtime):
            self._read_index(index)

    @property
    def nbytes(self) -> int:
        return sum(f.nbytes for f in self.files.values())

    def find(self, names: Sequence[str]) -> int:
        """How many blocks of a prompt can be given back."""
        for n in range(len(names), 0, -1):
            if any(f.trimmable or len(f.names) == n for f in self._by_name.get(names[n - 1], ())):
                return n
        return 0

    def load(self, names: Sequence[str]) -> list[Any] | None:
        """The caches of a prefix that `find` found, or None when its file turns out damaged (it is removed)."""
        file = next(f for f in self._by_name[names[-1]] if f.trimmable or len(f.names) == len(names))
        path = self._path(file)
        try:
            caches = disk.load(path, into=self.fresh(), revision=self.identity.revision, spec=self.identity.spec).caches
        except disk.CacheFileError as error:
            log.warning("a remembered prefix is dropped: %s", error)
            self._remove(file)
            return None
        self._touch(file)
        for c in caches if len(file.names) > len(names) else ():
            c.trim((len(file.names) - len(names)) * self.block)
        return caches

    def save(self, names: Sequence[str], tokens: Sequence[int], caches: list[Any]) -> None:
        """Keep a prefix when there is time. The caches must not be changed afterwards."""
        if self.find(names) == len(names):
            return
        key = tuple(names)
        self._pending = [p for p in self._pending if not (key[: len(p[0])] == p[0] and exact_trim(caches))]
        self._pending.append((key, tuple(tokens), caches))
        while sum(c.nbytes for _, _, waiting in self._pending for c in waiting) > self.max_pending:
            self._pending.pop(0)

    @property
    def waiting(self) -> bool:
        return bool(self._pending)

    def write_one(self) -> None:
        """Write the oldest prefix that waits."""
        names, tokens, caches = self._pending.pop(0)
        file = PrefixFile(names, sum(c.nbytes for c in caches), exact_trim(caches))
        identity = self.identity
        path = self._path(file)
        try:
            disk.save(path, caches, tokens, model=identity.model, revision=identity.revision, spec=identity.spec)
            file = PrefixFile(names, path.stat().st_size, file.trimmable)
            _write_whole(self._index(file), json.dumps(file.__dict__))
        except (OSError, disk.CacheFileError) as error:
            log.warning("a prefix could not be written: %s", error)
            return
        for shorter in [f for f in self.files.values() if file.trimmable and names[: len(f.names)] == f.names]:
            self._remove(shorter)
        self._add(file)
        while self.nbytes > self.max_bytes:
            self._remove(next(iter(self.files.values())))

    def _path(self, file: PrefixFile) -> Path:
        return self.folder / f"{file.names[-1]}.safetensors"

    def _index(self, file: PrefixFile) -> Path:
        return self.folder / f"{file.names[-1]}.json"

    def _read_index(self, path: Path) -> None:
        try:
            fields = json.loads(path.read_text())
            file = PrefixFile(tuple(fields["names"]), int(fields["nbytes"]), bool(fields["trimmable"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("the index %s is not readable (%s) and is left alone", path.name, type(error).__name__)
            return
        if file.names and self._path(file).exists():
            self._add(file)

    def _sweep(self) -> None:
        """Remove what processes that are no more left half written."""
        for path in self.folder.glob(".*.tmp*"):
            pid = path.name.partition(".tmp")[0].rpartition(".")[2]
            if pid.isdigit() and not _alive(int(pid)):
                path.unlink(missing_ok=True)

    def _add(self, file: PrefixFile) -> None:
        self.files[file.names[-1]] = file
        for name in file.names:
            self._by_name.setdefault(name, []).append(file)

    def _touch(self, file: PrefixFile) -> None:
        self.files[file.names[-1]] = self.files.pop(file.names[-1])
        os.utime(self._index(file))

    def _remove(self, file: PrefixFile) -> None:
        del self.files[file.names[-1]]
        for name in file.names:
            self._by_name[name].remove(file)
            if not self._by_name[name]:
                del self._by_name[name]
        self._index(file).unlink(missing_ok=True)
        self._path(file).unlink(missing_ok=True)


def kept_chunk(folder: Path, chosen: Callable[[], int], wanted: int | None) -> int:
    """The chunk size that this folder's prefixes were read with; asked for or measured when there is none yet.

    A measured size may come out differently after a restart, and prefixes read in other pieces are other prefixes.
    """
    note = folder / "pieces"
    if wanted is None and note.exists() and (text := note.read_text().strip()).isdigit():
        return int(text)
    step = wanted or chosen()
    _write_whole(note, str(step))
    return step


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
