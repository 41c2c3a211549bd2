"""The codec contract: how one head vector becomes bits. A codec is a frozen dataclass of pure functions.

Kernels know no codec by name. A codec says of itself what they need: its `basis` and, for a head dim, the `format` of
its packed arrays. Where the format is one of those below, the fused kernels of every back end serve it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

Packed = tuple[mx.array, ...]
"""The arrays of one codec, each `[B, H, T, ...]`: the token axis is always axis 2."""

FP16_MAX = 65504.0


def finite(y: mx.array, dtype: mx.Dtype) -> mx.array:
    """`y` as `dtype`, clipped where float16 would overflow: decoded vectors may be longer than the original ones."""
    return (mx.clip(y, -FP16_MAX, FP16_MAX) if dtype == mx.float16 else y).astype(dtype)


@dataclass(frozen=True)
class Codebook:
    """What a kernel looks up for a run of `dim` codes of `bits` bits that share a scale: `entries[code] * step`.

    Entries are signed bytes, ascending and odd (`entries[-1 - c] == -entries[c]`). Codes of a `sketch` multiply a
    projected query (`Codec.project`) in place of the query itself.
    """

    bits: int
    dim: int
    entries: tuple[int, ...]
    step: float
    sketch: bool = False

    @property
    def values(self) -> tuple[float, ...]:
        """What the codes stand for, in units of the scale."""
        return tuple(entry * self.step for entry in self.entries)


@dataclass(frozen=True)
class Integers:
    """Integers with a scale and a zero per `group` channels: packed `(codes, scales [B, H, T, 2 G])`."""

    bits: int
    group: int


@dataclass(frozen=True)
class Codebooks:
    """One run of codebook entries, or two of the same length, with a scale each.

    The inner product with a query is `sum_i scale_i <p_i, entries_i[codes_i]>`, where `p`, the projected query, is cut
    like the books. Packed: the codes of every run, then the scales of all runs, float16 `[B, H, T, runs]`.

    Attributes:
        books: one book per run; together as long as a projected query.
        fit: "length" or "norm" (`codecs.turbo.Turbo.fit`) where codes are the coordinates of equal parts of the vector,
            each rounded to the nearest entry, so that kernels can make them; "" where only `encode` can.
    """

    books: tuple[Codebook, ...]
    fit: str = ""

    @property
    def sketched(self) -> bool:
        """Whether codes are of a sketch, which makes scores but no values."""
        return any(book.sketch for book in self.books)


@dataclass(frozen=True)
class Angles:
    """Blocks of 16 channels as one radius and 15 angles (`codecs.polar`)."""


@dataclass(frozen=True)
class Halves:
    """float16 values as they are."""


@dataclass(frozen=True)
class WithOutliers:
    """`inner`, then the `count` largest channels of every vector: `channels` and fp16 `values` `[B, H, T, count]`."""

    inner: Integers | Codebooks | Angles | Halves
    count: int


Format = Integers | Codebooks | Angles | Halves | WithOutliers


def packable(form: Format | None) -> bool:
    """Whether pack kernels make such arrays: not sketches, whose signs come from a matrix product."""
    return isinstance(form, Integers) or (isinstance(form, Codebooks) and bool(form.fit))


class Codec(ABC):
    """How one head vector becomes bits.

    A codec works in its own basis: `rotate` takes vectors into it, `unrotate` back, and both are orthonormal. `encode`
    and `decode` see rotated vectors only, so that attention can stay in the basis from the query to the output.
    Codecs derive from this class, which holds what most of them share, and are hashable: kernels keep by
    codec what they prepare.
    """

    @property
    def basis(self) -> str:
        """What `rotate` does: "none", "hadamard" (`codecs.rotation`), or "own" for anything else."""
        return "own"

    def format(self, head_dim: int) -> Format | None:
        """What packed arrays of vectors of `head_dim` channels are, or None for what no kernel knows."""
        return None

    multiple: ClassVar[int] = 1
    """What divides every head dim that the codec serves."""

    def check(self, head_dim: int) -> None:
        """Raise ValueError with a remedy when this codec can't serve `head_dim`."""
        if head_dim % self.multiple:
            raise ValueError(
                f"{self} can't serve head_dim {head_dim}, which is no multiple of {self.multiple}; use --kv f16 for "
                "this model"
            )

    @abstractmethod
    def bits_per_value(self, head_dim: int) -> float:
        """Bits per stored value, all metadata and padding included."""

    def rotate(self, x: mx.array) -> mx.array:
        """`[..., D]` -> the codec's basis, same dtype."""
        return x

    def unrotate(self, y: mx.array) -> mx.array:
        """The inverse of `rotate`."""
        return y

    @abstractmethod
    def encode(self, y: mx.array) -> Packed:
        """Rotated vectors `[B, H, T, D]` -> packed arrays."""

    @abstractmethod
    def decode(self, packed: Packed, dtype: mx.Dtype, head_dim: int) -> mx.array:
        """Packed arrays -> rotated vectors `[B, H, T, D]`."""

    def project(self, q: mx.array) -> mx.array:
        """Rotated queries `[..., D]` -> what multiplies codes, same dtype: themselves, unless codes are of a sketch."""
        return q
