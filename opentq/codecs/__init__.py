"""Codecs: how one head vector becomes bits. One file each; `REGISTRY` maps the names that specs use to them."""

from __future__ import annotations

from collections.abc import Callable

from .affine import BITS, GROUPS, Affine
from .base import Codec, Packed
from .raw import Raw

__all__ = ["GROUPS", "REGISTRY", "Affine", "Codec", "Packed", "Raw", "make"]

Factory = Callable[[int, bool], Codec]
"""(group, rotate) -> codec; a codec without groups ignores the first."""

REGISTRY: dict[str, Factory] = {
    "f16": lambda group, rotate: Raw(),
    **{f"int{b}": (lambda group, rotate, b=b: Affine(b, group, rotate)) for b in BITS},
}


def make(name: str, group: int = 32, rotate: bool = True) -> Codec:
    """The codec called `name`. Raises KeyError for unknown names (`spec.py` says it in words)."""
    return REGISTRY[name](group, rotate)
