"""Storage layouts: how packed tokens lie in memory. The canonical layout keeps one row per token, as the codec made it;
a back end may store blocks of tokens in the order its instructions want. Both directions are exact, so a cache moves
between machines, and the portable path can read any layout.
"""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx

from .codec import Codec, Packed
from .shared import Shared

FLUSH = 64
"""Tokens leave the fp16 tail in blocks of this many; every layout's block divides it."""


class Layout(Protocol):
    """One function each way between the canonical format and storage arrays `[B, H, T / block, ...]`."""

    @property
    def name(self) -> str: ...

    @property
    def block(self) -> int: ...

    def store(self, packed: Packed) -> tuple[mx.array, ...]:
        """Canonical arrays of T tokens, T a multiple of `block`, -> storage arrays of `T / block` rows."""

    def load(self, stored: tuple[mx.array, ...]) -> Packed:
        """Storage arrays of n rows -> canonical arrays of `n * block` tokens."""

    def encode(self, codec: Codec, y: mx.array) -> tuple[mx.array, ...]:
        """`store(codec.encode(y))`, in one pass where the back end can."""


class Canonical(Shared):
    """One row per token."""

    name = "canonical"
    block = 1

    def store(self, packed: Packed) -> tuple[mx.array, ...]:
        return packed

    def load(self, stored: tuple[mx.array, ...]) -> Packed:
        return stored

    def encode(self, codec: Codec, y: mx.array) -> tuple[mx.array, ...]:
        return codec.encode(y)


CANONICAL = Canonical()
