"""A cache that errs like a compressed one and is fast everywhere: tokens are encoded, decoded again and kept in fp16.

Attention then runs over fp16 columns, for which every back end has a fast path, and sees the very numbers that the
codec would decode (rounded once to fp16, far below the codec's own error). It saves nothing, so it is for evaluation
only: it lets a codec be judged on a machine that has no fused kernel for it. Bytes are those of the real cache.
"""

from __future__ import annotations

import mlx.core as mx

from ..attention import dispatch
from ..caches.extent import Limits
from ..caches.single import OpenTQCache, dense
from ..caches.step import Handle
from ..codecs import Affine, Codec
from ..spec import KVSpec


class SimulatedCache(OpenTQCache):
    """`OpenTQCache` for B equal sequences; tokens change when the real cache would pack them. None is forgotten.

    Args:
        spec: any spec.
        window: 0, or how many tokens a query sees.
        eager: new tokens are coded before their own step sees them, as mlx-lm's quantised cache does it.
        center: the mean of the first 64 keys is taken off every key. Softmax does not see it (the same number is added
            to all logits of a query), but the codec does: what all keys have in common costs no bits any more.
    """

    def __init__(self, spec: KVSpec | str = "int4", window: int = 0, eager: bool = False, center: bool = False):
        super().__init__(spec, window=window)
        self.eager = eager
        self.center = center
        self.mean: mx.array | None = None

    @property
    def limits(self) -> Limits:
        return Limits(self.spec.sink, self.spec.recent)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Handle, Handle]:
        """Append `[B, H, L, D]` keys and values; the handles attend to fp16 columns only."""
        if self.dense_k is None:
            self._start(keys, values)
        assert self.dense_k is not None and self.dense_v is not None
        new_k, new_v = dense(self.k_codec, keys), dense(self.v_codec, values)
        if self.center:
            self.mean = new_k[:, :, :64].mean(axis=2, keepdims=True) if self.mean is None else self.mean
            new_k = new_k - self.mean
        if self.eager:
            new_k, new_v = coded(self.k_codec, new_k), coded(self.v_codec, new_v)
        dense_k = mx.concatenate([self.dense_k, new_k], axis=2)
        dense_v = mx.concatenate([self.dense_v, new_v], axis=2)
        step = self._step(dense_k, dense_v, (), (), ((0, 0, 0),) * keys.shape[0])
        packed = self.extent.packed
        self.extent, move = self.extent.append(keys.shape[2], self.limits)
        if move.flush and not self.eager:
            start = self.extent.sink + packed
            dense_k = _recode(self.k_codec, dense_k, start, start + move.flush)
            dense_v = _recode(self.v_codec, dense_v, start, start + move.flush)
        self.dense_k, self.dense_v = dense_k, dense_v
        shape = (*keys.shape[:2], self.extent.held)
        return Handle(step, (*shape, self.dims[0]), keys.dtype), Handle(step, (*shape, self.dims[1]), values.dtype)

    def _choose_layouts(self) -> None:
        super()._choose_layouts()
        # Fused kernels serve calls in their own layout; with no packed tokens the codec in it does not matter.
        self.k_layout, self.v_layout = dispatch.layouts(Affine(8), Affine(8), self.dims)

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
