"""The CPU's storage of PolarQuant tokens: the canonical arrays of a token one behind the other, `[B, H, T, bytes]`, so
that the kernel reads one stream (polar.h has the order, and the products that decode it).
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ...codecs import codebooks, polar
from ...contracts.codec import Angles, Codec, Packed
from ...contracts.shared import Shared
from . import library as cpu


@dataclass(frozen=True)
class CpuPolar(Shared):
    """Tokens of `dim` channels as bytes: angles of level 1, the other angles, radii."""

    dim: int

    block = 1

    @property
    def name(self) -> str:
        return f"cpu-polar-d{self.dim}"

    @classmethod
    def named(cls, name: str) -> CpuPolar | None:
        """The layout of that name, or None when it isn't one of these."""
        found = re.fullmatch(r"cpu-polar-d(\d+)", name)
        return cls(int(found[1])) if found else None

    def store(self, packed: Packed) -> tuple[mx.array, ...]:
        """`(first, rest, radii)` -> `[B, H, T, bytes]`."""
        return (mx.concatenate([mx.view(mx.contiguous(a), mx.uint8) for a in packed], axis=-1),)

    def load(self, stored: tuple[mx.array, ...]) -> Packed:
        """The inverse of `store`, bit for bit."""
        blocks = self.dim // polar.BLOCK
        first, rest, radii = mx.split(stored[0], [4 * blocks, stored[0].shape[3] - 2 * blocks], axis=-1)
        return mx.view(mx.contiguous(first), mx.uint32), rest, mx.view(mx.contiguous(radii), mx.float16)

    def encode(self, codec: Codec, y: mx.array) -> tuple[mx.array, ...]:
        """`store(codec.encode(y))`."""
        if codec.format(y.shape[3]) != Angles() or y.shape[3] != self.dim:
            raise ValueError(f"layout {self.name} can't hold what codec {codec} makes of {y.shape[3]} channels")
        return self.store(codec.encode(y))

    def view(self, where: tuple[int | None, int, int, int]) -> cpu.Packed:
        """What attention reads: address, strides in bytes of batch, head and token, and the tables of angles."""
        data, batch, head, token = where
        tables = _tables().ctypes.data
        return cpu.Packed(data, batch, head, 64 * token, 0, self.dim, self.dim, cpu.POLAR, tables)


@functools.cache
def _tables() -> np.ndarray:
    """The three tables of polar.h, float32 `[64 + 4 + 256, 4]`. A stored radius is a quarter of the block's length."""
    pairs, quarters, halves, blocks = (
        [(math.cos(a), math.sin(a)) for a in codebooks.angle(bits, level)] for level, bits in enumerate(polar.LEVELS, 1)
    )
    upper = [
        [4 * length * part for length, half in zip(block, (one, other)) for part in half]
        for other in halves
        for one in halves
        for block in blocks
    ]
    middle = [(c, c, s, s) for c, s in quarters]
    lower = [(*one, *other) for other in pairs for one in pairs]
    return np.array([*upper, *middle, *lower], np.float32)
