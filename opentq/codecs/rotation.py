"""Orthonormal rotations of head vectors, the cheapest way to make a plain integer grid fit keys and values.

A rotation spreads the energy of outlier channels over all channels, so that a group's range follows its typical value
and not its worst. Attention is invariant under it: `<Rq, Rk> = <q, k>`, and the output of rotated values is rotated
back once. Powers of two use the fast Walsh-Hadamard transform; other sizes one dense matrix, a Hadamard matrix where
one is known (80, 96, 112, 192, ...) and else the Kronecker product of a DCT and a Hadamard matrix, whose entries are
at most sqrt(2/D). No randomness: a file written on one machine means the same on another.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import mlx.core as mx

from ..contracts.codec import Codec
from . import sketch

ROTATIONS = {"hadamard": "", "haar": ":haar", "none": ":norot"}
"""The kinds, and how a codec's name says them."""


def rotate(x: mx.array) -> mx.array:
    """`[..., D]` -> `R x`, in x's dtype (float32 inside)."""
    launched = _launched(x)
    return plain(x) if launched is None else launched


def plain(x: mx.array) -> mx.array:
    """`rotate` in MLX's own operations."""
    dim = x.shape[-1]
    y = x.astype(mx.float32)
    y = mx.hadamard_transform(y) if is_power_of_two(dim) else y @ matrix(dim).T
    return y.astype(x.dtype)


def unrotate(y: mx.array) -> mx.array:
    """`[..., D]` -> `R^T y`, in y's dtype: the inverse of `rotate`."""
    dim = y.shape[-1]
    launched = _launched(y)
    if launched is not None:
        return launched
    x = y.astype(mx.float32)
    # A Sylvester-Hadamard matrix is symmetric, so it is its own inverse.
    x = mx.hadamard_transform(x) if is_power_of_two(dim) else x @ matrix(dim)
    return x.astype(y.dtype)


Fused = Callable[[mx.array], "mx.array | None"]

_fused: list[Fused] = []


def register(rotation: Fused) -> None:
    """Ask `rotation` first from now on: a back end's transform in one launch, which is its own inverse, or None for
    vectors that it does not serve.
    """
    _fused.append(rotation)


def _launched(x: mx.array) -> mx.array | None:
    return next((y for y in (fused(x) for fused in _fused if x.size) if y is not None), None)


class Rotated(Codec):
    """A codec whose basis is named by its `rotation`: "hadamard", "haar" (uniformly random) or "none"."""

    rotation: str

    @property
    def basis(self) -> str:
        return "own" if self.rotation == "haar" else self.rotation

    def rotate(self, x: mx.array) -> mx.array:
        return apply(x, self.rotation)

    def unrotate(self, y: mx.array) -> mx.array:
        return undo(y, self.rotation)


def apply(x: mx.array, kind: str) -> mx.array:
    """`[..., D]` -> `R x` in x's dtype, R named by `kind`, one of `ROTATIONS`."""
    if kind == "hadamard":
        return rotate(x)
    return x if kind == "none" else (x.astype(mx.float32) @ sketch.haar(x.shape[-1]).T).astype(x.dtype)


def undo(y: mx.array, kind: str) -> mx.array:
    """`[..., D]` -> `R^T y`: the inverse of `apply`."""
    if kind == "hadamard":
        return unrotate(y)
    return y if kind == "none" else (y.astype(mx.float32) @ sketch.haar(y.shape[-1])).astype(y.dtype)


@functools.cache
def matrix(dim: int) -> mx.array:
    """The rotation as a dense float32 `[dim, dim]` matrix R, with `rotate(x) = R x`."""
    power = dim & -dim  # the largest power of two that divides dim
    odd = dim // power
    with mx.stream(mx.cpu):
        if odd == 1 or (odd in (3, 5, 7) and power >= 4):
            # MLX knows Hadamard matrices of order 12, 20 and 28 times a power of two.
            dense = mx.hadamard_transform(mx.eye(dim)).T
        else:
            small = _dct(odd)
            big = mx.hadamard_transform(mx.eye(power)) if power > 1 else mx.ones((1, 1))
            dense = (small[:, None, :, None] * big[None, :, None, :]).reshape(dim, dim)
        dense = mx.contiguous(dense)
        mx.eval(dense)
    return dense


def _dct(n: int) -> mx.array:
    """The orthonormal DCT-II matrix of order n."""
    k, i = mx.arange(n)[:, None], mx.arange(n)[None]
    rows = mx.cos(math.pi / n * (i + 0.5) * k) * math.sqrt(2 / n)
    return mx.where(k == 0, math.sqrt(1 / n), rows)


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0
