"""Random matrices that are the same on every machine, and the estimate that one sign per projection gives.

For a row s of a random matrix and a unit vector u, `E[s * sign(<s, u>)] = E|s_1| u`: signs alone say where a vector
points. `E|s_1|` is sqrt(2/pi) for Gaussian rows; for rows of an orthogonal matrix, which lie on a sphere, it is larger
by about 1/(4 D), and the exact number is used so that the estimate has no bias.
"""

from __future__ import annotations

import functools
import math

import mlx.core as mx
import numpy as np

SEED = 20406
"""Seed of all sketches. RandomState's stream is frozen by numpy's compatibility policy (NEP 19)."""


@functools.cache
def matrix(rows: int, dim: int, orthogonal: bool) -> mx.array:
    """S, float32 `[rows, dim]`: i.i.d. N(0, 1), or blocks of `dim` orthogonal rows of length sqrt(dim)."""
    random = np.random.RandomState(SEED)
    if not orthogonal:
        return _fixed(random.standard_normal((rows, dim)))
    blocks = [_orthogonal(random, dim) for _ in range(-(-rows // dim))]
    return _fixed(np.concatenate(blocks)[:rows] * math.sqrt(dim))


@functools.cache
def haar(dim: int) -> mx.array:
    """A uniformly random orthogonal matrix, float32 `[dim, dim]`, independent of `matrix`."""
    return _fixed(_orthogonal(np.random.RandomState(SEED + 1), dim))


def expand(signs: mx.array, projection: mx.array, orthogonal: bool) -> mx.array:
    """Bits `[..., m]` of `sign(S r)` -> the unbiased estimate of `sqrt(D) * r / |r|`, float32 `[..., D]`."""
    return (signs.astype(mx.float32) * 2 - 1) @ projection * _coefficient(projection, orthogonal)


def project(q: mx.array, projection: mx.array, orthogonal: bool) -> mx.array:
    """`[..., D]` -> `[..., m]`, same dtype, whose inner product with signs as +-1 is q's with what `expand` makes."""
    return (q.astype(mx.float32) @ projection.T * _coefficient(projection, orthogonal)).astype(q.dtype)


def _coefficient(projection: mx.array, orthogonal: bool) -> float:
    rows, dim = projection.shape
    return math.sqrt(dim) / (rows * mean_absolute(dim, orthogonal))


def mean_absolute(dim: int, orthogonal: bool) -> float:
    """E|s_1| of a Gaussian row, or of a row on the sphere of radius sqrt(dim)."""
    if not orthogonal:
        return math.sqrt(2 / math.pi)
    return math.sqrt(dim / math.pi) * math.exp(math.lgamma(dim / 2) - math.lgamma((dim + 1) / 2))


def _orthogonal(random: np.random.RandomState, dim: int) -> np.ndarray:
    q, r = np.linalg.qr(random.standard_normal((dim, dim)))
    return q * np.sign(np.diag(r))  # the signs make the distribution uniform and the factorisation unique


def _fixed(array: np.ndarray) -> mx.array:
    result = mx.array(array.astype(np.float32))
    mx.eval(result)
    return result
