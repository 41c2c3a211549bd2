"""Codecs of the calibration study, simulated: what they would decode, at their true bits; no kernel knows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from opentq.codecs import codebooks, rotation
from opentq.codecs.rounding import lookup, nearest, rms
from opentq.contracts.codec import Codec, Packed, finite
from opentq.spec.kv import KVSpec

RATIO_BITS, RATIO_STEP = 4, 0.25
"""How the scale of a run is kept: in steps of a quarter octave around what is usual for the run."""


@dataclass(frozen=True, eq=False)
class Simulated(Codec):
    """A codec whose packed form is the decoded one."""

    name: str
    bits: float

    def __str__(self) -> str:
        return self.name

    @property
    def basis(self) -> str:
        return "none"

    def bits_per_value(self, head_dim: int) -> float:
        return self.bits

    def coded(self, y: mx.array) -> mx.array:
        """Float32 vectors `[B, H, T, D]` as they come back."""
        raise NotImplementedError

    def encode(self, y: mx.array) -> Packed:
        return (self.coded(y.astype(mx.float32)),)

    def decode(self, packed: Packed, dtype: mx.Dtype, head_dim: int) -> mx.array:
        return finite(packed[0], dtype)


@dataclass(frozen=True, eq=False)
class Runs(Simulated):
    """Runs of D / len(menu) channels in a basis of their own, `menu[i]` bits each, Hadamard within a run.

    A run's scale is coded relative to the vector's, which is kept in fp16 and gives the decoded runs the length of the
    original ones.

    Attributes:
        to, back: `[H, D, D]`, into the basis and out of it, the Hadamard matrices within.
        usual: log2 of a run's scale to the vector's, `[H, runs]`.
    """

    to: mx.array
    back: mx.array
    usual: mx.array
    menu: tuple[int, ...]

    @classmethod
    def make(cls, name: str, menu: tuple[int, ...], to: np.ndarray, samples: np.ndarray) -> Runs:
        """From a basis `[H, D, D]` (rows are directions, the most important first) and vectors `[H, N, D]`."""
        heads, dim = to.shape[:2]
        part = dim // len(menu)
        mix = np.kron(np.eye(len(menu)), np.array(rotation.matrix(part)))
        to = mix @ to
        z = (samples @ to.swapaxes(1, 2)).reshape(heads, -1, len(menu), part)
        used = np.array(menu) > 0
        scale = np.sqrt(np.square(z).mean(-1))
        usual = np.log2((scale + 1e-9) / (np.sqrt(np.square(z[:, :, used]).mean((2, 3)))[..., None] + 1e-9))
        bits = (sum(menu) * part + 16 + RATIO_BITS * sum(used)) / dim
        arrays = (mx.array(a.astype(np.float32)) for a in (to, np.linalg.inv(to), np.median(usual, axis=1)))
        return cls(name, bits, *arrays, menu)

    def coded(self, y: mx.array) -> mx.array:
        part = y.shape[-1] // len(self.menu)
        z = (y @ self.to.swapaxes(-1, -2)).reshape(*y.shape[:-1], len(self.menu), part)
        used = [i for i, bits in enumerate(self.menu) if bits]
        whole = rms(z[..., used, :].reshape(*y.shape[:-1], -1))  # [B, H, T, 1]
        half = 2 ** (RATIO_BITS - 1)
        out = []
        for i, bits in enumerate(self.menu):
            if not bits:
                out.append(mx.zeros_like(z[..., i, :]))
                continue
            usual = self.usual[:, i, None, None]
            ratio = mx.log2(rms(z[..., i, :]) / mx.maximum(whole, 1e-9) + 1e-9) - usual
            ratio = mx.clip(mx.round(ratio / RATIO_STEP), -half, half - 1) * RATIO_STEP + usual
            scale = mx.exp(ratio * float(np.log(2))) * whole
            book = codebooks.sphere(bits, part)
            points = lookup(nearest(z[..., i, :] / mx.maximum(scale, 1e-9), book), book)
            out.append(points * scale)
        made = mx.stack(out, axis=-2)
        size = rms(made[..., used, :].reshape(*y.shape[:-1], -1))
        length = (whole / mx.maximum(size, 1e-9))[..., None]
        return (made * length).reshape(y.shape) @ self.back.swapaxes(-1, -2)


def halves(count: int) -> float:
    """Bits per value of `count` fp16 numbers to a vector of 64 channels."""
    return count * 16 / 64


@dataclass(frozen=True, eq=False)
class Clipped(Simulated):
    """OSCAR (arXiv 2605.17757) as described: an eigenbasis, Hadamard, and integers of a clipped range.

    A vector has a scale and a zero; `to` is orthonormal `[H, D, D]`.
    """

    to: mx.array
    levels: int
    clip: float = 0.02

    def coded(self, y: mx.array) -> mx.array:
        z = rotation.rotate(y @ self.to.swapaxes(-1, -2))
        cut = round(self.clip * y.shape[-1] / 2)
        ordered = mx.sort(z, axis=-1)
        low, high = ordered[..., cut : cut + 1], ordered[..., -1 - cut : y.shape[-1] - cut]
        step = mx.maximum((high - low) / (self.levels - 1), 1e-9)
        z = mx.clip(mx.round((z - low) / step), 0, self.levels - 1) * step + low
        return rotation.unrotate(z) @ self.to


@dataclass(frozen=True, eq=False)
class Balanced(Simulated):
    """KVarN (arXiv 2606.03458) as described: Hadamard; in every block of 64 tokens rows and columns divided by turns by
    their deviation, 16 times; integers with scale and zero per channel (`keys`) or per token.
    """

    levels: int
    keys: bool

    def coded(self, y: mx.array) -> mx.array:
        z = rotation.rotate(y)
        block = z.reshape(*y.shape[:2], -1, 64, y.shape[-1])
        rows, columns = mx.ones((*block.shape[:-1], 1)), mx.ones((*block.shape[:-2], 1, block.shape[-1]))
        for _ in range(16):
            rows = rows * mx.maximum(mx.std(block / (rows * columns), axis=-1, keepdims=True), 1e-6)
            columns = columns * mx.maximum(mx.std(block / (rows * columns), axis=-2, keepdims=True), 1e-6)
        even, axis = block / (rows * columns), -2 if self.keys else -1
        low, high = even.min(axis, keepdims=True), even.max(axis, keepdims=True)
        step = mx.maximum((high - low) / (self.levels - 1), 1e-9)
        even = mx.round((even - low) / step) * step + low
        return rotation.unrotate((even * rows * columns).reshape(y.shape))


@dataclass(frozen=True)
class Pair(KVSpec):
    """A spec of two given codecs; simulation only."""

    both: Any = None

    def codecs(self) -> tuple[Codec, Codec]:
        return self.both

    def __str__(self) -> str:
        return f"{self.both[0]} / {self.both[1]}"
