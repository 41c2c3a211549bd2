"""The codec contract: how one head vector becomes bits. A codec is a frozen dataclass of pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import mlx.core as mx

Packed = tuple[mx.array, ...]
"""The arrays of one codec, each `[B, H, T, ...]`: the token axis is always axis 2."""

FP16_MAX = 65504.0


def finite(y: mx.array, dtype: mx.Dtype) -> mx.array:
    """`y` as `dtype`, clipped where float16 would overflow: decoded vectors may be longer than the original ones."""
    return (mx.clip(y, -FP16_MAX, FP16_MAX) if dtype == mx.float16 else y).astype(dtype)


@dataclass(frozen=True)
class Book:
    """What a kernel looks up for a run of `dim` codes of `bits` bits that share a scale: `entries[code] * step`.

    Entries are signed bytes, ascending and odd (`entries[-1 - c] == -entries[c]`).
    """

    bits: int
    dim: int
    entries: tuple[int, ...]
    step: float

    @property
    def values(self) -> tuple[float, ...]:
        """What the codes stand for, in units of the scale."""
        return tuple(entry * self.step for entry in self.entries)


@runtime_checkable
class Codec(Protocol):
    """How one head vector becomes bits.

    A codec works in its own basis: `rotate` takes vectors into it, `unrotate` back, and both are orthonormal. `encode`
    and `decode` see rotated vectors only, so that attention can stay in the basis from the query to the output.
    """

    def __hash__(self) -> int:
        """Codecs are frozen dataclasses, by which kernels keep what they prepare."""

    def check(self, head_dim: int) -> None:
        """Raise ValueError with a remedy when this codec can't serve `head_dim`."""

    def bits_per_value(self, head_dim: int) -> float:
        """Bits per stored value, all metadata and padding included."""

    def rotate(self, x: mx.array) -> mx.array:
        """`[..., D]` -> the codec's basis, same dtype."""

    def unrotate(self, y: mx.array) -> mx.array:
        """The inverse of `rotate`."""

    def encode(self, y: mx.array) -> Packed:
        """Rotated vectors `[B, H, T, D]` -> packed arrays."""

    def decode(self, packed: Packed, dtype: mx.Dtype, head_dim: int) -> mx.array:
        """Packed arrays -> rotated vectors `[B, H, T, D]`."""


@runtime_checkable
class Coded(Codec, Protocol):
    """A codec whose vectors are runs of codebook entries with a scale each, so that kernels use codes as they lie.

    The inner product with a query is `sum_i scale_i <p_i, entries_i[codes_i]>`, where `p`, the projected query, is cut
    like the books. Packed arrays: the codes of every run, then the scales of all runs, float16 `[B, H, T, runs]`.
    """

    def books(self, head_dim: int) -> tuple[Book, ...]:
        """One book, or two of the same `dim`; together as long as a projected query."""

    def project(self, q: mx.array) -> mx.array:
        """Rotated queries `[..., D]` -> `[..., sum of dims]`, same dtype: themselves, unless codes are of a sketch."""
