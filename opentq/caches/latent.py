"""Latent attention (MLA): one small vector per token that is key and value at once, stored once.

DeepSeek's models and their relatives keep, for all heads together, a latent of a few hundred channels and a rotary
part. Attention in its absorbed form reads it as keys `[latent | rotary]` and as values `[latent]`, with one KV head and
all query heads sharing it. So the packed latent serves both sides, and only the rotary part is extra; each part has
its own rotation and scales, because their magnitudes have nothing to do with each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..codecs import Codec, Packed, Raw
from ..contracts.attention import Lengths, PackedKV
from .batch import BatchOpenTQCache
from .single import OpenTQCache
from .step import Handle, Step


@dataclass(frozen=True)
class LatentCodec(Codec):
    """`[latent | rotary]`, each part by `inner`: the packed arrays of the first are those of the second's left.

    A rotary part of few channels, which `inner` can't cut into groups, stays in fp16: it is the small part of a token.
    """

    inner: Codec
    latent: int

    def __str__(self) -> str:
        return f"latent{self.latent}/{self.inner}"

    def rotary(self, channels: int) -> Codec:
        """What serves a rotary part of so many channels, or of none."""
        if not channels:
            return Raw()
        try:
            self.inner.check(channels)
        except ValueError:
            return Raw()
        return self.inner

    def check(self, head_dim: int) -> None:
        """Raise ValueError when the latent can't be served."""
        self.inner.check(self.latent)

    def bits_per_value(self, head_dim: int) -> float:
        parts = ((self.inner, self.latent), (self.rotary(head_dim - self.latent), head_dim - self.latent))
        return sum(codec.bits_per_value(dim) * dim for codec, dim in parts) / head_dim

    def rotate(self, x: mx.array) -> mx.array:
        latent, rotary = self._split(x)
        turned = self.rotary(rotary.shape[-1]).rotate(rotary)
        return mx.concatenate([self.inner.rotate(latent), turned], axis=-1)

    def unrotate(self, y: mx.array) -> mx.array:
        latent, rotary = self._split(y)
        turned = self.rotary(rotary.shape[-1]).unrotate(rotary)
        return mx.concatenate([self.inner.unrotate(latent), turned], axis=-1)

    def encode(self, y: mx.array) -> Packed:
        """Rotated `[B, 1, T, latent + rotary]` -> the arrays of the latent, then those of the rotary part."""
        latent, rotary = self._split(y)
        return self.inner.encode(latent) + self.rotary(rotary.shape[-1]).encode(rotary)

    def decode(self, packed: Packed, dtype: mx.Dtype, head_dim: int) -> mx.array:
        """The inverse of `encode`."""
        channels = head_dim - self.latent
        codec = self.rotary(channels)
        count = self.count(len(packed), channels)
        latent = self.inner.decode(packed[:count], dtype, self.latent)
        return mx.concatenate([latent, codec.decode(packed[count:], dtype, channels)], axis=-1)

    def count(self, arrays: int, channels: int) -> int:
        """How many of a token's packed arrays are the latent's; `channels` of the rotary part."""
        return arrays // 2 if self.rotary(channels) == self.inner else arrays - 1

    def _split(self, x: mx.array) -> tuple[mx.array, mx.array]:
        return x[..., : self.latent], x[..., self.latent :]


class _Latent(OpenTQCache):
    """What the single and the batch cache of latents have in common: keys only, and values that are a part of them."""

    defers = False

    def update_and_fetch(self, latent: mx.array, rotary: mx.array) -> tuple[Handle, Handle]:
        """Append `[B, 1, L, latent]` and `[B, 1, L, rotary]`; attend to the handle with `[q_latent | q_rotary]`."""
        if self.latent != latent.shape[3]:
            self.latent = latent.shape[3]
            self.k_codec, self.v_codec = self._codecs()
        return super().update_and_fetch(mx.concatenate([latent, rotary], axis=-1), latent[..., :0])

    def _codecs(self) -> tuple[Codec, Codec]:
        return LatentCodec(self.spec.codecs()[0], self.latent), Raw()

    def _choose_layouts(self) -> None:
        super()._choose_layouts()
        self.stats.shape = (1, self.latent, self.dims[0] - self.latent)

    def _step(self, dense_k, dense_v, packed_k, packed_v, lens: tuple[Lengths, ...]) -> Step:
        assert isinstance(self.k_codec, LatentCodec)
        count = self.k_codec.count(len(packed_k), self.dims[0] - self.latent)
        return Step(
            PackedKV(self.k_codec, self.k_layout, packed_k, self.dims[0]),
            PackedKV(self.k_codec.inner, self.k_layout, packed_k[:count], self.latent),
            dense_k,
            dense_k[..., : self.latent],
            lens,
            self.window,
            self.stats,
        )


class OpenTQLatentCache(_Latent):
    """mlx-lm's cache protocol over packed latents. One per layer."""


class BatchOpenTQLatentCache(_Latent, BatchOpenTQCache):
    """The same for many sequences."""

    Single = OpenTQLatentCache
