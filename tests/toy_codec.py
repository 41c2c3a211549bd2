"""A codec as small as one can be: what a new one must say so that the planner, caches and all kernels serve it."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from opentq.codecs import REGISTRY, Method, packing
from opentq.codecs.rotation import Rotated
from opentq.codecs.rounding import lookup, nearest
from opentq.contracts.codec import Codebook, Codebooks, Packed

BITS, ENTRIES = 3, (-127, -90, -54, -18, 18, 54, 90, 127)
LEVELS = tuple(entry / 127 for entry in ENTRIES)


@dataclass(frozen=True)
class Toy(Rotated):
    """Eight even levels between minus and plus the largest channel. Packed: `codes`, `scales [B, H, T, 1]`."""

    rotation: str = "hadamard"

    def format(self, head_dim: int) -> Codebooks:
        return Codebooks((Codebook(BITS, head_dim, ENTRIES, 1 / 127),))

    def bits_per_value(self, head_dim: int) -> float:
        return (32 * packing.words(head_dim, BITS) + 16) / head_dim

    def encode(self, y: mx.array) -> Packed:
        scale = mx.abs(y.astype(mx.float32)).max(-1, keepdims=True).astype(mx.float16)
        codes = nearest(y / mx.where(scale == 0, 1.0, scale.astype(mx.float32)), LEVELS)
        return packing.pack(codes, BITS), scale

    def decode(self, packed: Packed, dtype: mx.Dtype, head_dim: int) -> mx.array:
        codes, scales = packed
        return (scales.astype(mx.float32) * lookup(packing.unpack(codes, BITS, head_dim), LEVELS)).astype(dtype)


def register(monkeypatch) -> None:
    """`toy` is a name in specs from now on, until the test ends: the one line of the registry."""
    monkeypatch.setitem(REGISTRY, "toy", Method(lambda options: Toy(options.rotation), ("rot", "haar")))
