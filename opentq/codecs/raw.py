"""Raw codec: the vector as float16, no compression. It is what `f16` means, and the yardstick of every other codec."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..contracts.codec import FP16_MAX, Codec, Halves, Packed


@dataclass(frozen=True)
class Raw(Codec):
    """float16 values `[B, H, T, D]`; magnitudes above 65504 are clipped so that no infinity is ever stored."""

    def __str__(self) -> str:
        return "f16"

    def bits_per_value(self, head_dim: int) -> float:
        return 16.0

    @property
    def basis(self) -> str:
        return "none"

    def format(self, head_dim: int) -> Halves:
        return Halves()

    def encode(self, y: mx.array) -> Packed:
        return (mx.clip(y, -FP16_MAX, FP16_MAX).astype(mx.float16),)

    def decode(self, packed: Packed, dtype: mx.Dtype, head_dim: int) -> mx.array:
        return packed[0].astype(dtype)
