"""QJL: a key is kept as the signs of a random projection and its length; the query is projected but never quantised.

`<q, k>` is estimated by `sqrt(pi/2)/m |k| <S q, sign(S k)>`, which is unbiased because only one side is rounded
(Zandieh, Daliri, Han, arXiv 2406.03482, Definition 3.1). The rows of S are orthogonal in blocks of D, as in the
authors' code. It estimates inner products and nothing else, so it is a codec for keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..contracts.codec import FP16_MAX, Codebooks, Codec, Packed, finite
from . import codebooks, packing, sketch
from .rounding import rms


@dataclass(frozen=True)
class QJL(Codec):
    """`ratio` sign bits per channel and one fp16 length per key.

    Packed: `signs` uint32 `[B, H, T, ratio * D / 32]` (1 is positive), `scales` float16 `[B, H, T, 1]`, |k|/sqrt(D).

    Attributes:
        ratio: sketch bits per channel; the paper's 256 and 512 bits for 128 channels are 2 and 4.
        orthogonal: rows of S orthogonal in blocks of D (the authors' code), or independent Gaussian (the theorem).
    """

    ratio: int = 2
    orthogonal: bool = True

    multiple = 16

    def __post_init__(self) -> None:
        if not 1 <= self.ratio <= 16:
            raise ValueError(f"qjl codec: {self.ratio} sketch bits per channel is not available; choose 1 to 16")

    def __str__(self) -> str:
        return f"qjl{self.ratio}" + (":orth" if self.orthogonal else ":gauss")

    def bits_per_value(self, head_dim: int) -> float:
        return (32 * packing.words(self.ratio * head_dim, 1) + 16) / head_dim

    @property
    def basis(self) -> str:
        """The projection is random itself: no rotation."""
        return "none"

    def encode(self, y: mx.array) -> Packed:
        """Keys `[B, H, T, D]` -> `(signs, scales)`."""
        self.check(y.shape[-1])
        y = mx.clip(y.astype(mx.float32), -FP16_MAX, FP16_MAX)
        signs = y @ self._matrix(y.shape[-1]).T >= 0
        return packing.pack(signs, 1), rms(y).astype(mx.float16)

    def decode(self, packed: Packed, dtype: mx.Dtype, head_dim: int) -> mx.array:
        """`(signs, scales)` -> the vector whose inner product with any q is the estimate, `[B, H, T, D]`."""
        signs, scales = packed
        bits = packing.unpack(signs, 1, self.ratio * head_dim)
        estimate = sketch.expand(bits, self._matrix(head_dim), self.orthogonal)
        return finite(scales.astype(mx.float32) * estimate, dtype)

    def format(self, head_dim: int) -> Codebooks:
        return Codebooks((codebooks.sign_book(self.ratio * head_dim),))

    def project(self, q: mx.array) -> mx.array:
        """Queries `[..., D]` -> `[..., ratio * D]`."""
        return sketch.project(q, self._matrix(q.shape[-1]), self.orthogonal)

    def _matrix(self, dim: int) -> mx.array:
        return sketch.matrix(self.ratio * dim, dim, self.orthogonal)
