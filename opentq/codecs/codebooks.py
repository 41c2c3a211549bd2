"""Optimal scalar codebooks for the numbers that a random rotation makes, computed once per shape and cached.

After a random rotation every coordinate of a unit vector of dimension d has the same known density, so one Lloyd-Max
codebook serves all of them and nothing is learned from data. The density is tabulated on a fine grid, and Lloyd's two
conditions (a boundary is the midpoint of its centroids, a centroid is the mean of its cell) are iterated from
the Panter-Dite quantiles. No randomness: the same numbers everywhere, in a few milliseconds.
"""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np

from ..contracts.codec import Codebook

Centroids = tuple[float, ...]
"""Of a codebook, ascending; boundaries are their midpoints."""

MAX_BITS = 6
GRID = 1 << 14


@functools.cache
def sphere(bits: int, dim: int) -> Centroids:
    """Codebook for `sqrt(d) * u_j`, u uniform on the unit sphere of R^d (TurboQuant, arXiv 2504.19874, Algorithm 1).

    The density is `f(t) ~ (1 - t^2/d)^((d-3)/2)`, which is close to N(0, 1). Every centroid is a whole multiple of one
    step (`integers`), so that a kernel's table is bytes and its products are exact.
    """
    entries, step = integers(bits, dim)
    return tuple(entry * step for entry in entries)


@functools.cache
def integers(bits: int, dim: int) -> tuple[tuple[int, ...], float]:
    """`sphere(bits, dim)` as signed bytes and their step: the outermost centroids are -127 and 127 steps.

    Rounding to bytes adds 0.4 % to the distortion of 4 bits, 2 % to that of 5 and 8 % to that of 6.
    """
    exact = _sphere(bits, dim)
    step = exact[-1] / 127
    upper = [round(value / step) for value in exact[len(exact) // 2 :]]
    return (*(-entry for entry in reversed(upper)), *upper), step


def sphere_book(bits: int, dim: int) -> Codebook:
    """`sphere(bits, dim)` as kernels look it up."""
    return Codebook(bits, dim, *integers(bits, dim))


def sign_book(dim: int) -> Codebook:
    """The signs of a sketch: -1 or 1."""
    return Codebook(1, dim, (-127, 127), 1 / 127, sketch=True)


def _sphere(bits: int, dim: int) -> Centroids:
    """The optimal codebook in full precision."""
    _check(bits)
    if dim < 4:
        raise ValueError(f"codebook: dimension {dim} is too small, a rotation needs at least 4 channels")
    edge = min(math.sqrt(dim), 9.0)
    book = _lloyd_max(*_table(lambda t: (1 - t * t / dim) ** ((dim - 3) / 2), -edge, edge), bits)
    # The density is even, so the codebook is odd; this removes the last rounding of the iteration.
    return tuple((a - b) / 2 for a, b in zip(book, reversed(book)))


@functools.cache
def angle(bits: int, level: int) -> Centroids:
    """Codebook for the angles of level `level` of the polar transform (PolarQuant, arXiv 2502.02617, Lemma 2).

    Level 1 is uniform on [0, 2 pi); level l >= 2 has density `~ sin(2 psi)^(2^(l-1) - 1)` on [0, pi/2].
    """
    _check(bits)
    if level == 1:
        count = 1 << bits
        return tuple((i + 0.5) * 2 * math.pi / count for i in range(count))
    power = 2 ** (level - 1) - 1
    return _lloyd_max(*_table(lambda t: np.sin(2 * t) ** power, 0.0, math.pi / 2), bits)


def boundaries(book: Centroids) -> Centroids:
    """The `len(book) - 1` midpoints: a value above boundary k is nearer to centroid k + 1."""
    return tuple((a + b) / 2 for a, b in itertools.pairwise(book))


def _check(bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"codebook: {bits} bits is not available; choose 1 to {MAX_BITS}")


def _table(density, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Cell centres of a grid on [low, high] and their probabilities."""
    edges = np.linspace(low, high, GRID + 1)
    t = (edges[1:] + edges[:-1]) / 2
    mass = density(t)
    return t, mass / mass.sum()


def _lloyd_max(t: np.ndarray, mass: np.ndarray, bits: int) -> Centroids:
    """Lloyd's iteration on a tabulated density until no centroid moves by more than 1e-7."""
    step = t[1] - t[0]
    edges = np.append(t - step / 2, t[-1] + step / 2)
    below = np.append(0.0, np.cumsum(mass))  # P(T < edge) and E[T; T < edge]
    moment = np.append(0.0, np.cumsum(mass * t))
    compand = np.append(0.0, np.cumsum(mass ** (1 / 3)))
    count = 1 << bits
    book = np.interp((np.arange(count) + 0.5) / count, compand / compand[-1], edges)
    for _ in range(10_000):
        cuts = np.concatenate([edges[:1], (book[1:] + book[:-1]) / 2, edges[-1:]])
        new = np.diff(np.interp(cuts, edges, moment)) / np.diff(np.interp(cuts, edges, below))
        moved = np.abs(new - book).max()
        book = new
        if moved < 1e-7:
            break
    return tuple(float(c) for c in book)
