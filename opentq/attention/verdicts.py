"""What this machine knows of its kernels: verdicts of the judge, kept in the folder of compiled kernels.

A file is named by its device and by all else that a verdict depends on, so that a new kernel, MLX or system is judged
anew; what updates leave behind is removed.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import logging
import platform
from pathlib import Path

from .. import kernels, machine, records
from ..contracts.check import Check
from ..errors import UserError
from ..kernels import build
from ..kernels.metal import launch as metal

log = logging.getLogger("opentq")

LEFT = 3
"""Files of other kernels, MLX versions or systems that stay beside the one in use: several environments share them."""

_known: dict[str, dict[str, str]] = {}


def kept(name: str) -> dict[str, str]:
    """Verdicts on a back end on this machine: what a kernel does -> "" or what is wrong."""
    if name not in _known:
        _known[name] = _read(file(name))
    return _known[name]


def keep(name: str, what: str, why: str) -> None:
    kept(name)[what] = why
    path = file(name)
    try:
        if not path.exists():
            _sweep(path)
        records.append(path, [{"what": what, "why": why}])
    except (OSError, UserError) as error:  # then the next process judges again
        log.info("verdicts on kernels can't be kept: %s", error)


def file(name: str) -> Path:
    """Where verdicts on a back end's kernels are kept."""
    device = hashlib.sha256("\0".join(machine.device()).encode()).hexdigest()[:8]
    return build.cache_folder() / f"verdicts-{name}-{device}-{identity(name)}.jsonl"


def _read(path: Path) -> dict[str, str]:
    try:
        return {r["what"]: r["why"] for r in (records.read([path]) if path.exists() else [])}
    except UserError as error:  # damaged: judged again, from nothing
        log.info("%s", error)
        path.unlink(missing_ok=True)
        return {}


def _sweep(path: Path) -> None:
    """Remove verdicts on this device that an update has left behind, all but the newest `LEFT` files."""
    pattern = path.name.rpartition("-")[0] + "-*.jsonl"
    old = sorted(path.parent.glob(pattern), key=lambda p: p.stat().st_mtime, reverse=True)
    for stale in old[LEFT:]:
        stale.unlink(missing_ok=True)


@functools.cache
def identity(name: str) -> str:
    """What a verdict on a device depends on: kernels' text, launch code and tuning, MLX and system."""
    digest = hashlib.sha256()
    folder = Path(kernels.__file__).parent / name
    for source in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc"):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    if name == "metal":
        digest.update(repr(metal.tuning()).encode())
    for part in (importlib.metadata.version("mlx"), platform.platform()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def checks(name: str) -> list[Check]:
    """What `opentq doctor` says of verdicts: how many variants were right here, and each that was set aside."""
    path = file(name)
    rows = _read(path)
    found = [Check("judged kernels", "ok", f"{sum(not why for why in rows.values())} variants right on this machine")]
    remedy = f"report it with opentq doctor --bench; delete {path} to have it judged again"
    wrong = [(what, why) for what, why in rows.items() if why]
    return found + [Check("set aside", "slow", f"{what} {why}", remedy) for what, why in wrong]
