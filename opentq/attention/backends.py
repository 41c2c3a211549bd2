"""The fused kernels of this machine, if there are any: one back end per dialect, imported when it is asked for."""

from __future__ import annotations

import functools
import importlib

from ..codecs import rotation
from ..contracts.backend import Backend
from ..contracts.check import Check
from ..contracts.layout import CANONICAL, Layout
from ..kernels import build
from . import guard, verdicts

DIALECTS = ("cpu", "cuda", "metal")


def active() -> Backend | None:
    """The back end of the default device, or None where only the portable path runs."""
    dialect = build.active_dialect()
    found = backend(dialect) if dialect else None
    return found if found and found.available() else None


@functools.cache
def backend(dialect: str) -> Backend:
    """The back end of one dialect; its rotation serves from now on."""
    found: Backend = importlib.import_module(f"..kernels.{dialect}.attention", __package__).BACKEND
    if found.rotate is not Backend.rotate:
        rotation.register(guard.rotation(found))
    return found


def layout_named(name: str) -> Layout:
    """The layout that wrote a saved cache: every layout can be read on every machine. Raises ValueError."""
    if name == CANONICAL.name:
        return CANONICAL
    for dialect in DIALECTS:
        layout = backend(dialect).layout_named(name)
        if layout is not None:
            return layout
    raise ValueError(f"storage layout {name!r} is not known to this version of opentq")


def checks() -> list[Check]:
    """What `opentq doctor` says about kernels and matrix products."""
    dialect = build.active_dialect()
    if dialect is None:
        return [Check("kernels", "slow", "none for this device")]
    return [*backend(dialect).checks(), *verdicts.checks(dialect)]
