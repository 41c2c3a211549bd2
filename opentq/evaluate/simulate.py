"""A cache that errs like a compressed one and is fast everywhere: tokens are encoded, decoded again and kept in fp16.

Attention then runs over fp16 columns, for which every back end has a fast path, and sees the very numbers that the
codec would decode (rounded once to fp16, far below the codec's own error). It saves nothing, so it is for evaluation
only: it lets a codec be judged on a machine that has no fused kernel for it. Bytes are those of the real cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..attention import dispatch
from ..caches.extent import Limits, limits
from ..caches.single import OpenTQCache, mean_key, shifted
from ..caches.step import Handle, Step
from ..codecs import Affine
from ..contracts.attention import Lengths, PackedKV
from ..contracts.codec import Codec
from ..contracts.layout import FLUSH
from ..spec.kv import KVSpec

BARE = Affine(8)
"""A codec that every back end has a kernel for."""


@dataclass(frozen=True)
class Unpacked(Affine):
    """The basis of `inner`, for calls without packed tokens: to kernels these would be `BARE`'s."""

    bits: int = 8
    inner: Codec = BARE

    def __str__(self) -> str:
        return f"none/{self.inner}"

    @property
    def basis(self) -> str:
        return self.inner.basis

    def rotate(self, x: mx.array) -> mx.array:
        return self.inner.rotate(x)

    def unrotate(self, y: mx.array) -> mx.array:
        return self.inner.unrotate(y)


class SimulatedCache(OpenTQCache):
    """`OpenTQCache` for B equal sequences; tokens change when the real cache would pack them. None is forgotten.

    Args:
        spec: any spec.
        window: 0, or how many tokens a query sees.
        eager: new tokens are coded before their own step sees them, as mlx-lm's quantised cache does it.
    """

    defers = False

    def __init__(self, spec: KVSpec | str = "int4", window: int = 0, eager: bool = False):
        super().__init__(spec, window=window)
        self.eager = eager

    def _limits(self) -> Limits:
        return limits(self.spec.sink, self.spec.recent)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Handle, Handle]:
        """Append `[B, H, L, D]` keys and values; the handles attend to fp16 columns only."""
        if self.eager:  # these codecs have no rotation
            keys = coded(self.k_codec, keys.astype(mx.float16)).astype(keys.dtype)
            values = coded(self.v_codec, values.astype(mx.float16)).astype(values.dtype)
        return super().update_and_fetch(keys, values)

    def _lengths(self, batch: int) -> tuple[Lengths, ...]:
        return ((0, 0, 0),) * batch

    def _absorb(self, dense_k: mx.array, dense_v: mx.array, count: int) -> bool:
        """Keep all columns; those that the real cache would pack are coded."""
        packed = self.extent.packed
        self.extent, move = self.extent.append(count, self.limits)
        if move.flush and not self.eager:
            start = self.extent.sink + packed
            stop = start + move.flush
            if self.spec.center and self.center is None:
                self.center = mean_key(dense_k[:, :, start : start + FLUSH])
                dense_k = shifted(dense_k, self.center)
            dense_k, dense_v = _recode(self.k_codec, dense_k, start, stop), _recode(self.v_codec, dense_v, start, stop)
        self.dense_k, self.dense_v = dense_k, dense_v
        return False

    def _choose_layouts(self) -> None:
        super()._choose_layouts()
        self.k_layout, self.v_layout = dispatch.layouts(BARE, BARE, self.dims)
        self._bare = tuple(
            PackedKV(Unpacked(inner=codec), layout, (), dim)
            for codec, layout, dim in zip((self.k_codec, self.v_codec), (self.k_layout, self.v_layout), self.dims)
        )

    def _step(self, *args: Any) -> Step:
        step = super()._step(*args)
        step.k, step.v = self._bare
        return step

    @property
    def state(self):
        """What has to be evaluated after a step."""
        return [self.dense_k, self.dense_v]

    @state.setter
    def state(self, value) -> None:
        raise ValueError("a simulated cache can't be loaded: it is for evaluation only")

    @property
    def nbytes(self) -> int:
        """Bytes that the real cache would hold for these tokens, without the slack of its buffers."""
        if self.dense_k is None:
            return 0
        batch, heads = self.dense_k.shape[:2]
        packed = self.extent.packed
        bits = 0.0
        for codec, dim in zip((self.k_codec, self.v_codec), self.dims):
            bits += dim * (packed * codec.bits_per_value(dim) + (self.extent.held - packed) * 16)
        return int(batch * heads * bits / 8)


def coded(codec: Codec, y: mx.array) -> mx.array:
    """Rotated fp16 vectors as they come back from `codec`, in fp16."""
    return codec.decode(codec.encode(y), mx.float16, y.shape[-1])


def _recode(codec: Codec, y: mx.array, start: int, stop: int) -> mx.array:
    return mx.concatenate([y[:, :, :start], coded(codec, y[:, :, start:stop]), y[:, :, stop:]], axis=2)
