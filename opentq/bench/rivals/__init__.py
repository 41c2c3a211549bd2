"""Other engines on the same problem. One that is not installed is an error that says how to install it, never a gap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from ...errors import UserError

if TYPE_CHECKING:
    from ..kernel import Arm, Problem

MODULES = {"mlx": "mlx_sdpa", "mlx-lm": "mlx_lm_quantized", "llama.cpp": "llama_cpp", "ort": "ort"}


@dataclass(frozen=True)
class Entry:
    """An engine with one KV format; `make(problem, threads)` fills its cache. `variant` names a kernel."""

    engine: str
    kv: str
    make: Callable[[Problem, int], Arm]
    variant: str = ""


def find(name: str) -> Callable[[int], list[Entry]]:
    """The function `head dim -> entries` of a rival. Raises UserError for an unknown or missing one."""
    if name not in MODULES:
        raise UserError(f"--against {name!r} is not known: use {', '.join(MODULES)}")
    module = import_module(f".{MODULES[name]}", __name__)
    if hasattr(module, "require"):  # what does not come with this package
        module.require()
    return module.entries
