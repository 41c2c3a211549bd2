"""Affine codec: every group of channels of one head vector becomes small integers with one scale and one zero.

`x = code * scale + zero`, asymmetric, per token, groups along the head dimension; scale and zero are fp16 and are
rounded before the codes are chosen, so that the codes are the best for the numbers that are really stored. Optionally
the vector is rotated first (`rotation.py`), which is the default of every integer spec and worth about one bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..contracts.codec import FP16_MAX, Codec, Integers, Packed, finite
from . import packing, rotation

BITS = (2, 3, 4, 8)
GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class Affine(Codec):
    """Integers of `bits` bits with an fp16 scale and zero per `group` channels (the last group may be shorter).

    Packed: `codes` uint32 `[B, H, T, W]` (`packing.py`) and `scales` float16 `[B, H, T, 2G]`, interleaved
    `(scale, zero)` pairs for `G = ceil(D / group)` groups.
    """

    bits: int = 4
    group: int = 32
    rotated: bool = True

    multiple = 16

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"affine codec: {self.bits} bits is not available; choose one of {BITS}")
        if self.group not in GROUPS:
            raise ValueError(f"affine codec: group {self.group} is not available; choose one of {GROUPS}")

    def __str__(self) -> str:
        return f"int{self.bits}:g{self.group}" + ("" if self.rotated else ":norot")

    def groups(self, head_dim: int) -> int:
        return -(-head_dim // self.group)

    def bits_per_value(self, head_dim: int) -> float:
        """Bits per stored value, scales, zeros and padding included."""
        return (32 * packing.words(head_dim, self.bits) + 32 * self.groups(head_dim)) / head_dim

    @property
    def basis(self) -> str:
        return "hadamard" if self.rotated else "none"

    def format(self, head_dim: int) -> Integers | None:
        return Integers(self.bits, self.group)

    def rotate(self, x: mx.array) -> mx.array:
        return rotation.rotate(x) if self.rotated else x

    def unrotate(self, y: mx.array) -> mx.array:
        return rotation.unrotate(y) if self.rotated else y

    def encode(self, y: mx.array) -> Packed:
        """Rotated vectors `[B, H, T, D]` of any float dtype -> `(codes, scales)`."""
        dim = y.shape[-1]
        self.check(dim)
        top = float(2**self.bits - 1)
        grouped = self._split(mx.clip(y.astype(mx.float32), -FP16_MAX, FP16_MAX), edge=True)
        low, high = grouped.min(-1, keepdims=True), grouped.max(-1, keepdims=True)
        scale = ((high - low) / top).astype(mx.float16)
        constant = scale == 0
        zero = mx.where(constant, (low + high) / 2, low).astype(mx.float16)
        step = mx.where(constant, 1.0, scale.astype(mx.float32))
        codes = mx.clip(mx.round((grouped - zero.astype(mx.float32)) / step), 0, top)
        codes = mx.where(constant, 0.0, codes).reshape(*y.shape[:-1], -1)[..., :dim]
        scales = mx.concatenate([scale, zero], axis=-1).reshape(*y.shape[:-1], -1)
        return packing.pack(codes, self.bits), scales

    def decode(self, packed: Packed, dtype: mx.Dtype, head_dim: int) -> mx.array:
        """`(codes, scales)` -> rotated vectors `[B, H, T, D]`."""
        codes, scales = packed
        if self.bits != 3 and head_dim % self.group == 0:
            scale, zero = (scales[..., i::2].astype(mx.float32) for i in (0, 1))
            return finite(mx.dequantize(codes, scale, zero, group_size=self.group, bits=self.bits), dtype)
        values = self._split(packing.unpack(codes, self.bits, head_dim).astype(mx.float32), edge=False)
        pairs = scales.astype(mx.float32).reshape(*scales.shape[:-1], -1, 2)
        values = values * pairs[..., :1] + pairs[..., 1:]
        return finite(values.reshape(*codes.shape[:-1], -1)[..., :head_dim], dtype)

    def _split(self, x: mx.array, edge: bool) -> mx.array:
        """`[..., D]` -> `[..., G, group]`; a short last group repeats its last value, which changes no range."""
        group = min(self.group, x.shape[-1])
        pad = -x.shape[-1] % group
        if pad:
            x = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pad)], mode="edge" if edge else "constant")
        return x.reshape(*x.shape[:-1], -1, group)
