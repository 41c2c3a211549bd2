"""PolarQuant: rotate, then write blocks of 16 channels as one radius and 15 angles, and round the angles.

Neighbouring pairs become (length, angle), the lengths are paired again, four times over. After a random rotation the
angles of one level are independent with a known density that gets narrower level by level, so each level has a
fixed codebook and no scale: Han, Kacham, Karbasi, Mirrokni, Zandieh, arXiv 2502.02617. Bits 4, 2, 2, 2 for the four
levels and an fp16 radius make 3.875 bits per channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..contracts.codec import FP16_MAX, Angles, Packed, finite
from . import codebooks, packing
from .rotation import ROTATIONS, Rotated
from .rounding import lookup, nearest

BLOCK = 16
LEVELS = (4, 2, 2, 2)
"""Bits of the angles of level 1 (8 per block, full circle) to level 4 (1 per block; quarter circles from 2 on)."""


@dataclass(frozen=True)
class Polar(Rotated):
    """Angles of bits 4, 2, 2, 2 and one fp16 radius per 16 channels.

    Packed: `first` uint32 `[B, H, T, D/16]` (level 1, 4 bits, in order), `rest` uint8 `[B, H, T, ceil(7D/64)]` (2-bit
    codes of all level 2 angles, then of level 3, then of level 4, four to a byte, little end first), `radii` float16
    `[B, H, T, D/16]`, the length of a block divided by 4.
    """

    rotation: str = "hadamard"

    multiple = 16

    def __str__(self) -> str:
        return "polar4" + ROTATIONS[self.rotation]

    def bits_per_value(self, head_dim: int) -> float:
        return (4 * head_dim // 2 + 8 * _rest_bytes(head_dim) + 16 * head_dim // BLOCK) / head_dim

    def format(self, head_dim: int) -> Angles:
        return Angles()

    def encode(self, y: mx.array) -> Packed:
        """Rotated vectors `[B, H, T, D]` -> `(first, rest, radii)`."""
        dim = y.shape[-1]
        self.check(dim)
        radius = mx.clip(y.astype(mx.float32), -FP16_MAX, FP16_MAX)
        codes = []
        for level, bits in enumerate(LEVELS, 1):
            a, b = radius[..., ::2], radius[..., 1::2]
            angle = mx.arctan2(b, a)
            if level == 1:
                # Uniform bins: the code is the bin, and the last one closes the circle.
                count = 1 << bits
                turn = mx.floor(angle * (count / (2 * mx.pi))).astype(mx.int32)
                codes.append((turn % count).astype(mx.uint32))
            else:
                codes.append(nearest(angle, codebooks.angle(bits, level)))
            radius = mx.sqrt(a * a + b * b)
        rest = mx.view(packing.pack(mx.concatenate(codes[1:], axis=-1), 2), mx.uint8)
        # A block of 16 numbers below 65504 can be four times as long.
        return packing.pack(codes[0], 4), rest[..., : _rest_bytes(dim)], (radius / 4).astype(mx.float16)

    def decode(self, packed: Packed, dtype: mx.Dtype, head_dim: int) -> mx.array:
        """`(first, rest, radii)` -> rotated vectors `[B, H, T, D]`."""
        first, rest, radii = packed
        pad = -rest.shape[-1] % 4
        rest = mx.pad(rest, [(0, 0)] * (rest.ndim - 1) + [(0, pad)])
        upper = packing.unpack(mx.view(rest, mx.uint32), 2, 7 * head_dim // BLOCK)
        quarter, eighth = head_dim // 4, head_dim // 8
        codes = packing.unpack(first, 4, head_dim // 2), *mx.split(upper, [quarter, quarter + eighth], axis=-1)
        y = radii.astype(mx.float32) * 4
        for level in range(len(LEVELS), 0, -1):
            angle = lookup(codes[level - 1], codebooks.angle(LEVELS[level - 1], level))
            pair = mx.stack([y * mx.cos(angle), y * mx.sin(angle)], axis=-1)
            y = pair.reshape(*y.shape[:-1], -1)
        return finite(y, dtype)


def _rest_bytes(head_dim: int) -> int:
    """Bytes of the 2-bit codes of levels 2 to 4: seven per block of 16."""
    return -(-7 * head_dim // BLOCK * 2 // 8)
