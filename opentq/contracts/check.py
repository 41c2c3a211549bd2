"""A line of `opentq doctor`: what a machine, a package or a back end's kernels are found to be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One finding: `ok`, `slow` (works, could be faster) or `wrong`; `remedy` says what to do."""

    name: str
    state: str
    detail: str
    remedy: str = ""
