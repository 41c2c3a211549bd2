"""The CPU's storage of vectors with outlier channels: the layout of the inner codec, and the outliers as they are
(`codecs/outliers.py`), canonical, as many tokens to a row as the inner layout has.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from ...contracts.codec import Codec, Packed, WithOutliers
from ...contracts.shared import Shared
from . import library as cpu

if TYPE_CHECKING:
    from .layout import CpuBlocks, CpuRuns
    from .polar import CpuPolar


@dataclass(frozen=True)
class CpuOutliers(Shared):
    """`inner` and `count` outliers a token: arrays `[B, H, T / block, block * count]` of channels and of values."""

    inner: CpuBlocks | CpuRuns | CpuPolar
    count: int

    @property
    def block(self) -> int:
        return self.inner.block

    @property
    def name(self) -> str:
        return f"{self.inner.name}+out{self.count}"

    @staticmethod
    def parts(name: str) -> tuple[str, int] | None:
        """The name of the inner layout and the count, or None when it isn't the name of one of these."""
        found = re.fullmatch(r"(.+)\+out([1-8])", name)
        return (found[1], int(found[2])) if found else None

    def store(self, packed: Packed) -> tuple[mx.array, ...]:
        """`(*inner arrays, channels, values [B, H, T, count])` -> storage; T must be a multiple of `block`."""
        *codes, channels, values = packed
        stored = self.inner.store(tuple(codes))
        shape = (*channels.shape[:2], channels.shape[2] // self.block, self.block * self.count)
        return *stored, channels.reshape(shape), values.reshape(shape)

    def load(self, stored: tuple[mx.array, ...]) -> Packed:
        """The inverse of `store`, bit for bit."""
        *codes, channels, values = stored
        shape = (*channels.shape[:2], channels.shape[2] * self.block, self.count)
        return *self.inner.load(tuple(codes)), channels.reshape(shape), values.reshape(shape)

    def encode(self, codec: Codec, y: mx.array) -> tuple[mx.array, ...]:
        """`store(codec.encode(y))`."""
        form = codec.format(y.shape[3])
        if not isinstance(form, WithOutliers) or form.count != self.count:
            raise ValueError(f"layout {self.name} can't hold what codec {codec} makes")
        return self.store(codec.encode(y))

    def view(self, channels: np.ndarray, values: np.ndarray) -> cpu.Outliers:
        """What attention reads."""
        size = 64 // self.block  # storage rows of a block of 64 tokens
        where = []
        for a in (channels, values):
            token = self.count * a.itemsize if self.block > 1 else a.strides[2]
            where.append(cpu.Strided(a.ctypes.data, a.strides[0], a.strides[1], size * a.strides[2], token))
        return cpu.Outliers(where[0], where[1], self.count, channels.itemsize)
