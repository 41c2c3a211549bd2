"""What this machine knows of its kernels: verdicts of the judge, kept in the folder of compiled kernels.

A file is named by all that a verdict depends on, so that a new kernel, MLX, device or system is judged anew.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import logging
import platform
from pathlib import Path

from .. import kernels, machine, records
from ..contracts.backend import Finding
from ..errors import UserError
from ..kernels import build
from ..kernels.metal import launch as metal

log = logging.getLogger("opentq")

_known: dict[str, dict[str, str]] = {}


def kept(name: str) -> dict[str, str]:
    """Verdicts on a back end on this machine: what a kernel does -> "" or what is wrong."""
    if name not in _known:
        path = file(name)
        rows = records.read([path]) if path.exists() else []
        _known[name] = {r["what"]: r["why"] for r in rows}
    return _known[name]


def keep(name: str, what: str, why: str) -> None:
    kept(name)[what] = why
    try:
        records.append(file(name), [{"what": what, "why": why}])
    except UserError as error:  # then the next process judges again
        log.info("verdicts on kernels can't be kept: %s", error)


def file(name: str) -> Path:
    """Where verdicts on a back end's kernels are kept."""
    return build.cache_folder() / f"verdicts-{name}-{identity(name)}.jsonl"


@functools.cache
def identity(name: str) -> str:
    """What a verdict depends on: kernels' text, launch code and tuning, MLX, device and system."""
    digest = hashlib.sha256()
    folder = Path(kernels.__file__).parent / name
    for source in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc"):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    if name == "metal":
        digest.update(repr(metal.tuning()).encode())
    for part in (importlib.metadata.version("mlx"), *machine.device(), platform.platform()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def findings(name: str) -> list[Finding]:
    """What `opentq doctor` says of verdicts: how many variants were right here, and each that was set aside."""
    path = file(name)
    rows = {r["what"]: r["why"] for r in (records.read([path]) if path.exists() else [])}
    found = [Finding("judged kernels", "ok", f"{sum(not why for why in rows.values())} variants right on this machine")]
    remedy = f"report it with opentq doctor --bench; delete {path} to have it judged again"
    wrong = [(what, why) for what, why in rows.items() if why]
    return found + [Finding("set aside", "slow", f"{what} {why}", remedy) for what, why in wrong]
