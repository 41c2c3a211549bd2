"""What was compiled on this machine and is kept: used again only when it is whole.

Loading a library that was cut short kills the process (SIGBUS), so a file has its SHA-256 beside it. What does not
match was damaged by a full disk, a crash or a hand: it is removed, a line says so, and the caller compiles again.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import time
from pathlib import Path

log = logging.getLogger("opentq")


def whole(path: Path) -> bool:
    """Whether `path` is there and as it was when it was sealed; anything else in its place is removed."""
    if not os.path.lexists(path):
        return False
    with contextlib.suppress(OSError):
        if path.is_file() and _beside(path).read_text().strip() == _digest(path):
            return True
    log.warning("opentq: %s in %s is damaged; compiling it again", path.name, path.parent)
    remove(path)
    return False


def seal(temporary: Path, path: Path) -> None:
    """Give a finished file its name; whoever sees it sees its digest, too."""
    note = temporary.with_name(temporary.name + ".sha256")
    note.write_text(_digest(temporary) + "\n")
    os.replace(note, _beside(path))
    os.replace(temporary, path)


def sweep(folder: Path, seconds: float) -> None:
    """Remove what compilers were killed over and left behind `seconds` ago."""
    for left in folder.glob(".build-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > seconds:
                remove(left)


def remove(path: Path) -> None:
    """Remove whatever has this name, a folder included, and its digest."""
    _beside(path).unlink(missing_ok=True)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
