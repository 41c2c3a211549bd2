"""What codebook codecs share: the length of a vector, the nearest entry of a codebook, and the way back."""

from __future__ import annotations

import functools

import mlx.core as mx

from ..contracts.codec import FP16_MAX
from . import codebooks


def rms(y: mx.array) -> mx.array:
    """Root mean square over channels, `[..., 1]`: the length over sqrt(D), which never overflows fp16."""
    return mx.sqrt(mx.square(y).mean(-1, keepdims=True))


def lengths(y: mx.array, runs: int = 1) -> mx.array:
    """`rms` of each of equal runs of rotated vectors `[..., D]`, float32 `[..., runs]`.

    Pack kernels are given them, because a mean depends on the order of its sum.
    """
    split = y.reshape(*y.shape[:-1], runs, -1)  # first, so that all that follows is one operation where MLX fuses
    return rms(mx.clip(split.astype(mx.float32), -FP16_MAX, FP16_MAX)).squeeze(-1)


def nearest(t: mx.array, book: codebooks.Centroids) -> mx.array:
    """Index of the nearest entry of an ascending codebook of 2^b entries, uint32: b steps of binary search."""
    cuts = _constant(codebooks.boundaries(book))
    index = mx.zeros(t.shape, mx.uint32)
    step = len(book) // 2
    while step:
        index = index + mx.where(t > cuts[index + (step - 1)], step, 0).astype(mx.uint32)
        step //= 2
    return index


def lookup(codes: mx.array, book: codebooks.Centroids) -> mx.array:
    """Codebook values float32 of the shape of `codes`."""
    return _constant(book)[codes]


@functools.lru_cache(maxsize=64)
def _constant(values: tuple[float, ...]) -> mx.array:
    return mx.array(values, dtype=mx.float32)
