"""Remembered prefixes on disk: they survive a restart, and a `kill -9` in the middle of a write.

Each prefix is one file of `caches/disk.py` (canonical bytes, checksum, atomic rename), named by the hash of its tokens.
Models, specs and chunk sizes have folders of their own. Writing waits until nobody is being served, because it is the
engine's thread that does it; what is still unwritten when the server stops is written then. Files that are damaged,
gone or can't be written cost time and nothing else.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..caches import disk
from ..files import appearing
from ..records import make_folder
from .pace import fits_blocks
from .prefix import block_names, exact_trim

log = logging.getLogger("opentq.serve")

NOTE = "pieces"
"""The file that says in which chunks a folder's prefixes were read. Its name is older than the word."""
DAMAGE = (OSError, ValueError, TypeError, KeyError, IndexError, RuntimeError)
"""What reading a damaged file may raise. Prefix files only save time: none of it reaches a request."""
OPTION = "--prompt-cache-dir"


@dataclass(frozen=True)
class Identity:
    """What a prefix on disk belongs to."""

    model: str
    revision: str
    spec: str

    def folder(self, root: Path) -> Path:
        """The folder of this model and spec. Raises UserError when it can't be made."""
        name = hashlib.sha256(f"{self.revision} {self.spec}".encode()).hexdigest()[:16]
        return make_folder(root.expanduser() / name, OPTION, 0o700)


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
        self._said: set[str] = set()
        self._sweep()
        for path in self._sorted():
            self._read(path)

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
        """The caches of a prefix that `find` found, or None when its file is gone or damaged (it is removed)."""
        file = next(f for f in self._by_name[names[-1]] if f.trimmable or len(f.names) == len(names))
        identity = self.identity
        try:
            caches = disk.load(
                self._path(file), into=self.fresh(), revision=identity.revision, spec=identity.spec
            ).caches
            for c in caches if len(file.names) > len(names) else ():
                c.trim((len(file.names) - len(names)) * self.block)
        except DAMAGE as error:
            log.warning("a remembered prefix is dropped, its prompt is read again: %s", error)
            self._remove(file)
            return None
        self.files[file.names[-1]] = self.files.pop(file.names[-1])
        with self._unless_disk_fails("the use of a prefix could not be noted"):
            os.utime(self._path(file))
        return caches

    def save(self, names: Sequence[str], tokens: Sequence[int], caches: list[Any]) -> None:
        """Keep a prefix when there is time. The caches must not be changed afterwards."""
        if self.find(names) == len(names):
            return
        key = tuple(names)
        trimmable = exact_trim(caches)
        self._pending = [p for p in self._pending if p[0] != (key[: len(p[0])] if trimmable else key)]
        self._pending.append((key, tuple(tokens), caches))
        while sum(c.nbytes for _, _, waiting in self._pending for c in waiting) > self.max_pending:
            self._pending.pop(0)

    @property
    def waiting(self) -> bool:
        return bool(self._pending)

    def write_one(self) -> None:
        """Write the oldest prefix that waits."""
        names, tokens, caches = self._pending.pop(0)
        identity = self.identity
        path = self.folder / f"{names[-1]}.safetensors"
        with self._unless_disk_fails("a prefix could not be written"):
            disk.save(path, caches, tokens, model=identity.model, revision=identity.revision, spec=identity.spec)
            file = PrefixFile(names, path.stat().st_size, exact_trim(caches))
            self._add(file)
            for shorter in [f for f in self.files.values() if file.trimmable and names[: len(f.names)] == f.names]:
                if len(shorter.names) < len(names):
                    self._remove(shorter)
            while self.nbytes > self.max_bytes:
                self._remove(next(iter(self.files.values())))

    @contextmanager
    def _unless_disk_fails(self, words: str) -> Iterator[None]:
        """What the disk does not let us do is left undone, and said once: requests don't depend on it."""
        try:
            yield
        except (OSError, disk.CacheFileError) as error:
            level = logging.DEBUG if words in self._said else logging.WARNING
            self._said.add(words)
            log.log(level, "%s: %s", words, error)

    def _path(self, file: PrefixFile) -> Path:
        return self.folder / f"{file.names[-1]}.safetensors"

    def _sorted(self) -> list[Path]:
        """The files of prefixes, least recently used first."""
        found = []
        for path in self.folder.glob("*.safetensors"):
            with self._unless_disk_fails("a file among the prefixes could not be looked at"):
                if not path.name.startswith("."):
                    found.append((path.stat().st_mtime, path))
        return [path for _, path in sorted(found)]

    def _sweep(self) -> None:
        """Remove what processes that are no more left half written, and the indices that earlier versions wrote."""
        for path in self.folder.glob("*.json"):
            if re.fullmatch("[0-9a-f]+", path.stem):
                _unlink(path)
        for path in self.folder.glob(".*.tmp*"):
            if not _alive(path.name.partition(".tmp")[0].rpartition(".")[2]):
                _unlink(path)

    def _read(self, path: Path) -> None:
        """Add the prefix in a file, by what its head says."""
        try:
            manifest, _ = disk.read_manifest(path, check=False)
            names = block_names(manifest.tokens, self.block)
            if manifest.revision != self.identity.revision or manifest.spec != self.identity.spec:
                raise ValueError("it is of another model")
            if not names or names[-1] != path.stem or len(names) * self.block != len(manifest.tokens):
                raise ValueError("its name is not that of its tokens")
        except DAMAGE as error:
            log.warning("the prefix %s is dropped: %s", path.name, error)
            _unlink(path)
            return
        with self._unless_disk_fails("a prefix could not be looked at"):
            self._add(PrefixFile(tuple(names), path.stat().st_size, exact_trim(self.fresh())))

    def _add(self, file: PrefixFile) -> None:
        if file.names[-1] in self.files:
            self._forget(self.files[file.names[-1]])
        self.files[file.names[-1]] = file
        for name in file.names:
            self._by_name.setdefault(name, []).append(file)

    def _remove(self, file: PrefixFile) -> None:
        self._forget(file)
        with self._unless_disk_fails("a prefix could not be removed"):
            self._path(file).unlink(missing_ok=True)

    def _forget(self, file: PrefixFile) -> None:
        del self.files[file.names[-1]]
        for name in file.names:
            self._by_name[name].remove(file)
            if not self._by_name[name]:
                del self._by_name[name]


def kept_chunk(folder: Path, chosen: Callable[[], int], wanted: int | None) -> int:
    """The chunk size that this folder's prefixes were read with; asked for or measured when there is none yet.

    A measured size may come out differently after a restart, and prefixes read in other chunks are other prefixes.
    """
    note = folder / NOTE
    if wanted is None:
        try:
            kept = int(note.read_bytes()[:20])
            if fits_blocks(kept):
                return kept
        except (OSError, ValueError) as error:
            if not isinstance(error, FileNotFoundError):
                log.warning("the note %s is not readable and is written anew", note)
    step = wanted or chosen()
    try:
        with appearing(note) as temporary:
            temporary.write_text(str(step))
    except OSError as error:
        log.warning("the size of chunks could not be noted in %s: %s", note, error.strerror)
    return step


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s could not be removed: %s", path.name, error.strerror)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
