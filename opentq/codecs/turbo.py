"""TurboQuant: rotate, divide by the length, and round every coordinate to one codebook that is optimal for the sphere.

After a random rotation the coordinates of any vector look like those of a random point on a sphere, so a codebook
computed once (`codebooks.py`) serves all tokens, heads, layers and models, and one fp16 number per vector is all the
metadata. `Turbo` is the paper's Algorithm 1, `Prod` its Algorithm 2 (one bit less, and a 1-bit sketch of what is left
over, which makes inner products unbiased), `Fractional` its half-bit variants: Zandieh, Daliri, Hadian, Mirrokni,
arXiv 2504.19874. The rotation is Hadamard unless asked otherwise; the paper's is Haar.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..contracts.codec import FP16_MAX, Codebooks, Codec, Packed, finite
from . import codebooks, packing, rotation, sketch
from .rotation import ROTATIONS, Rotated
from .rounding import lookup, nearest, rms

BITS = (1, 2, 3, 4, 5, 6)
FITS = {"length": "", "norm": ":nc", "unbiased": ":ub"}
"""Which scale is stored, and how a codec's name says it."""


@dataclass(frozen=True)
class Turbo(Rotated):
    """`bits` bits per channel and one fp16 scale: `y_d = scale * codebook[code_d]`.

    Packed: `codes` uint32 `[B, H, T, W]` (`packing.py`), `scales` float16 `[B, H, T, 1]`. The codebook is
    `codebooks.sphere(bits, D)`, whose entries have a mean square of about 1.

    Attributes:
        bits: 1 to 6; the paper stops at 4, but keys can use more.
        rotation: "hadamard", "haar" or "none".
        fit: which scale is stored. "length" is the paper's, |y|/sqrt(D); "norm" gives the decoded vector the length of
            the original ("nc" in other implementations); "unbiased" the right inner product with the original.
    """

    bits: int = 4
    rotation: str = "hadamard"
    fit: str = "length"

    multiple = 16

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"turbo codec: {self.bits} bits is not available; choose one of {BITS}")
        if self.rotation not in ROTATIONS:
            raise ValueError(f"turbo codec: rotation {self.rotation!r} is not known; choose one of {tuple(ROTATIONS)}")
        if self.fit not in FITS:
            raise ValueError(f"turbo codec: fit {self.fit!r} is not known; choose one of {tuple(FITS)}")

    def __str__(self) -> str:
        return f"tq{self.bits}{ROTATIONS[self.rotation]}{FITS[self.fit]}"

    def bits_per_value(self, head_dim: int) -> float:
        return (32 * packing.words(head_dim, self.bits) + 16) / head_dim

    def encode(self, y: mx.array) -> Packed:
        """Rotated vectors `[B, H, T, D]` of any float dtype -> `(codes, scales)`."""
        self.check(y.shape[-1])
        codes, scale, _ = self.quantise(y)
        return packing.pack(codes, self.bits), scale

    def quantise(self, y: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Codes uint32 `[..., D]`, scale float16 `[..., 1]` and the decoded vectors, float32."""
        y = mx.clip(y.astype(mx.float32), -FP16_MAX, FP16_MAX)
        scale = rms(y).astype(mx.float16)
        # Rounded before it divides, so that the codes are the best for the number that is stored.
        divisor = mx.where(scale == 0, 1.0, scale.astype(mx.float32))
        codes = nearest(y / divisor, codebooks.sphere(self.bits, y.shape[-1]))
        points = lookup(codes, codebooks.sphere(self.bits, y.shape[-1]))
        if self.fit == "norm":
            # Squares of whole numbers add up exactly in any order, so that kernels make the same bits.
            entries, step = codebooks.integers(self.bits, y.shape[-1])
            squares = lookup(codes, tuple(float(e * e) for e in entries)).sum(-1, keepdims=True)
            scale = mx.minimum(rms(y) / (mx.sqrt(squares / y.shape[-1]) * step), FP16_MAX).astype(mx.float16)
        elif self.fit == "unbiased":
            # A codebook value has the sign of its coordinate, so the product is 0 only for y = 0.
            product = (y / divisor * points).mean(-1, keepdims=True)
            exact = rms(y / divisor) ** 2 / mx.where(product == 0, 1.0, product) * divisor
            scale = mx.minimum(mx.where(scale == 0, 0.0, exact), FP16_MAX).astype(mx.float16)
        return codes, scale, scale.astype(mx.float32) * points

    def decode(self, packed: Packed, dtype: mx.Dtype, head_dim: int) -> mx.array:
        """`(codes, scales)` -> rotated vectors `[B, H, T, D]`."""
        codes, scales = packed
        points = lookup(packing.unpack(codes, self.bits, head_dim), codebooks.sphere(self.bits, head_dim))
        return finite(scales.astype(mx.float32) * points, dtype)

    def format(self, head_dim: int) -> Codebooks:
        return Codebooks((codebooks.sphere_book(self.bits, head_dim),), kernel_fit(self.fit))


@dataclass(frozen=True)
class Prod(Rotated):
    """`bits - 1` bits of `Turbo` and the signs of a random projection of the residual: unbiased, for keys only.

    `<q, k>` is estimated by `<Rq, c> + |r| * coefficient * <S Rq, sign(S r)>`, r the residual; decoding gives the one
    vector whose inner product with Rq is that estimate, so attention needs no special case.

    Packed: `codes` uint32 `[B, H, T, W]` of `bits - 1` bits, `signs` uint32 `[B, H, T, D/32]` (bit 1 is positive),
    `scales` float16 `[B, H, T, 2]`: |y|/sqrt(D) and |r|/sqrt(D).

    Attributes:
        bits: 2 to 4, the sign included.
        orthogonal: rows of S orthogonal instead of the paper's independent Gaussian ones; as unbiased, less noise.
    """

    bits: int = 3
    orthogonal: bool = False
    rotation: str = "hadamard"

    multiple = 16

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4):
            raise ValueError(f"turbo prod codec: {self.bits} bits is not available; choose 2, 3 or 4")

    def __str__(self) -> str:
        return f"tq{self.bits}p{ROTATIONS[self.rotation]}" + (":orth" if self.orthogonal else ":gauss")

    @property
    def base(self) -> Turbo:
        return Turbo(self.bits - 1, self.rotation)

    def bits_per_value(self, head_dim: int) -> float:
        return (32 * packing.words(head_dim, self.bits - 1) + 32 * packing.words(head_dim, 1) + 32) / head_dim

    def encode(self, y: mx.array) -> Packed:
        """Rotated vectors `[B, H, T, D]` -> `(codes, signs, scales)`."""
        self.check(y.shape[-1])
        y = mx.clip(y.astype(mx.float32), -FP16_MAX, FP16_MAX)
        codes, scale, decoded = self.base.quantise(y)
        residual = y - decoded
        signs = residual @ self._matrix(y.shape[-1]).T >= 0
        scales = mx.concatenate([scale, rms(residual).astype(mx.float16)], axis=-1)
        return packing.pack(codes, self.bits - 1), packing.pack(signs, 1), scales

    def decode(self, packed: Packed, dtype: mx.Dtype, head_dim: int) -> mx.array:
        """`(codes, signs, scales)` -> the estimate in the rotated basis, `[B, H, T, D]`."""
        codes, signs, scales = packed
        base = self.base.decode((codes, scales[..., :1]), mx.float32, head_dim)
        left = sketch.expand(packing.unpack(signs, 1, head_dim), self._matrix(head_dim), self.orthogonal)
        return finite(base + scales[..., 1:].astype(mx.float32) * left, dtype)

    def format(self, head_dim: int) -> Codebooks:
        return Codebooks((codebooks.sphere_book(self.bits - 1, head_dim), codebooks.sign_book(head_dim)))

    def project(self, q: mx.array) -> mx.array:
        """Rotated queries `[..., D]` -> `[..., 2 D]`: themselves, and their sketch."""
        return mx.concatenate([q, sketch.project(q, self._matrix(q.shape[-1]), self.orthogonal)], axis=-1)

    def _matrix(self, dim: int) -> mx.array:
        return sketch.matrix(dim, dim, self.orthogonal)


@dataclass(frozen=True)
class Fractional(Codec):
    """Half of the channels at `bits + 1/2` bits and half at `bits - 1/2`, each half rotated and scaled by itself.

    The paper splits outlier channels from the others before the rotation and runs two instances. Its 2.5 bits are 32
    channels of 128 at 3 bits and 96 at 2, which makes 2.25; here the halves are equal, so that 2.5 is 2.5. The better
    half are the channels that rotary embedding turns slowest (the upper quarter of each half of the vector), where
    keys of trained models have their large and lasting components; nothing has to be known about the model.

    Packed: `high` uint32 codes, `low` uint32 codes, `scales` float16 `[B, H, T, 2]`.
    """

    bits: float = 2.5
    rotation: str = "hadamard"
    fit: str = "length"

    multiple = 16

    def __post_init__(self) -> None:
        if self.bits not in (1.5, 2.5, 3.5):
            raise ValueError(f"turbo codec: {self.bits} bits is not available; choose 1.5, 2.5 or 3.5")

    def __str__(self) -> str:
        return f"tq{self.bits}{ROTATIONS[self.rotation]}{FITS[self.fit]}"

    @property
    def parts(self) -> tuple[Turbo, Turbo]:
        low = int(self.bits)
        return Turbo(low + 1, self.rotation, self.fit), Turbo(low, self.rotation, self.fit)

    def bits_per_value(self, head_dim: int) -> float:
        return sum(part.bits_per_value(head_dim // 2) for part in self.parts) / 2

    def rotate(self, x: mx.array) -> mx.array:
        """The slow channels first, then the others, each half rotated."""
        quarter = x.shape[-1] // 4
        fast_a, slow_a, fast_b, slow_b = mx.split(x, [quarter, 2 * quarter, 3 * quarter], axis=-1)
        halves = mx.concatenate([slow_a, slow_b], axis=-1), mx.concatenate([fast_a, fast_b], axis=-1)
        return mx.concatenate([rotation.apply(half, self.rotation) for half in halves], axis=-1)

    def unrotate(self, y: mx.array) -> mx.array:
        slow, fast = (rotation.undo(half, self.rotation) for half in mx.split(y, 2, axis=-1))
        quarters = [q for pair in zip(mx.split(fast, 2, axis=-1), mx.split(slow, 2, axis=-1)) for q in pair]
        return mx.concatenate(quarters, axis=-1)

    def encode(self, y: mx.array) -> Packed:
        """Rotated vectors `[B, H, T, D]` -> `(high codes, low codes, scales)`."""
        self.check(y.shape[-1])
        high, low = (part.quantise(half) for part, half in zip(self.parts, mx.split(y, 2, axis=-1)))
        codes = (packing.pack(h[0], part.bits) for part, h in zip(self.parts, (high, low)))
        return *codes, mx.concatenate([high[1], low[1]], axis=-1)

    def decode(self, packed: Packed, dtype: mx.Dtype, head_dim: int) -> mx.array:
        """`(high codes, low codes, scales)` -> rotated vectors `[B, H, T, D]`."""
        *codes, scales = packed
        pairs = zip(self.parts, codes, mx.split(scales, 2, axis=-1))
        return mx.concatenate([p.decode((c, s), dtype, head_dim // 2) for p, c, s in pairs], axis=-1)

    def format(self, head_dim: int) -> Codebooks:
        books = tuple(codebooks.sphere_book(part.bits, head_dim // 2) for part in self.parts)
        return Codebooks(books, kernel_fit(self.fit))


def kernel_fit(fit: str) -> str:
    """The fit where pack kernels know it, else ""."""
    return "" if fit == "unbiased" else fit
