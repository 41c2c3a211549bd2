"""Outlier channels kept in fp16: the few largest channels of each vector are stored as they are, the rest by any codec.

One channel that is fifty times larger than the others decides the scale of all of them. The largest `count` channels of
every vector are taken out before the rotation and stored as (channel, fp16 value); what is left has an ordinary
range. They are chosen per token, so nothing has to be calibrated or carried along: a token's bytes say all.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..contracts.codec import FP16_MAX, Codec, Packed, WithOutliers, finite


@dataclass(frozen=True)
class Outliers(Codec):
    """`inner` with the `count` largest channels in fp16.

    Packed: the arrays of `inner`, then `channels` uint8 (uint16 above 256 channels) and `values` float16, both
    `[B, H, T, count]`.
    """

    inner: Codec
    count: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.count <= 8:
            raise ValueError(f"outlier channels: {self.count} is not available; choose 1 to 8")

    def __str__(self) -> str:
        return f"{self.inner}:out={self.count}"

    def check(self, head_dim: int) -> None:
        """Raise ValueError when the inner codec can't serve `head_dim`."""
        self.inner.check(head_dim)

    def bits_per_value(self, head_dim: int) -> float:
        return self.inner.bits_per_value(head_dim) + self.count * (16 + 8 * _index_type(head_dim).size) / head_dim

    @property
    def basis(self) -> str:
        return self.inner.basis

    def format(self, head_dim: int) -> WithOutliers | None:
        inner = self.inner.format(head_dim)
        return None if inner is None or isinstance(inner, WithOutliers) else WithOutliers(inner, self.count)

    def project(self, q: mx.array) -> mx.array:
        return self.inner.project(q)

    def rotate(self, x: mx.array) -> mx.array:
        return self.inner.rotate(x)

    def unrotate(self, y: mx.array) -> mx.array:
        return self.inner.unrotate(y)

    def encode(self, y: mx.array) -> Packed:
        """Rotated vectors `[B, H, T, D]` -> inner arrays, channels, values."""
        dim = y.shape[-1]
        x = self.inner.unrotate(y.astype(mx.float32))
        channels = mx.argpartition(-mx.abs(x), self.count - 1, axis=-1)[..., : self.count]
        values = mx.clip(mx.take_along_axis(x, channels, axis=-1), -FP16_MAX, FP16_MAX).astype(mx.float16)
        rest = mx.put_along_axis(x, channels, mx.zeros(channels.shape), axis=-1)
        return *self.inner.encode(self.inner.rotate(rest)), channels.astype(_index_type(dim)), values

    def decode(self, packed: Packed, dtype: mx.Dtype, head_dim: int) -> mx.array:
        """Packed arrays -> rotated vectors `[B, H, T, D]`."""
        *inner, channels, values = packed
        rest = self.inner.decode(tuple(inner), mx.float32, head_dim)
        outliers = mx.put_along_axis(
            mx.zeros(rest.shape), channels.astype(mx.uint32), values.astype(mx.float32), axis=-1
        )
        return finite(rest + self.inner.rotate(outliers), dtype)


def _index_type(head_dim: int) -> mx.Dtype:
    return mx.uint8 if head_dim <= 256 else mx.uint16
