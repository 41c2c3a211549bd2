"""The storage layout of the CUDA kernels: canonical bits, permuted so that a lane's words are its mma fragments.

`record.cuh` says how records are cut and `formats.cuh` where every bit lies and why. Here are both directions in plain
MLX operations, which run on any machine (a cache saved on an NVIDIA GPU opens anywhere), and `encode`, which uses the
pack kernel where there is one. The permutation costs no byte: a record of 32 tokens takes exactly the words of 32
canonical tokens.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import mlx.core as mx

from ..codecs import packing
from ..codecs.affine import Affine
from ..codecs.base import Codec, Packed
from ..codecs.turbo import Turbo

BLOCK = 64
RECORD = 32


BOOK = 0
"""The group of layouts whose codes index a codebook: one scale per vector, no zero."""
BOOK_BITS = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class MmaLayout:
    """Codes of one side ("k" or "v"); stored as one uint32 array `[B, H, T/64, words]`, 64 tokens per row.

    Attributes:
        group: channels per scale and zero, or `BOOK`.
    """

    side: str
    bits: int
    group: int
    head_dim: int

    block = BLOCK

    @property
    def name(self) -> str:
        kind = f"g{self.group}" if self.zeroed else "book"
        return f"mma64-{self.side}{self.bits}-{kind}-d{self.head_dim}"

    @property
    def zeroed(self) -> bool:
        """Whether groups have a zero beside their scale."""
        return self.group != BOOK

    @property
    def groups(self) -> int:
        return -(-self.head_dim // (self.group or self.head_dim))

    @property
    def numbers(self) -> int:
        """fp16 numbers per group."""
        return 2 if self.zeroed else 1

    @property
    def record_words(self) -> int:
        """Words of 32 tokens."""
        return RECORD * packing.words(self.head_dim, self.bits) + RECORD // 2 * self.groups * self.numbers

    def store(self, packed: Packed) -> tuple[mx.array, ...]:
        codes, scales = packed
        batch, heads, tokens, _ = codes.shape
        lead = (batch, heads, tokens // RECORD)
        values = self._ranked(packing.unpack(codes, self.bits, self.head_dim))
        fields = values.reshape(*lead, *self._split_shape()).transpose(0, 1, 2, *self._order())
        fields = fields.reshape(*lead, self.head_dim // 2, 32, 2)  # register of the record, lane, half
        parts = [_to_lane_words(fields, plane) for plane in _planes(self.bits, self.zeroed)]
        numbers = scales.reshape(*lead, RECORD, self.groups, self.numbers)
        for i in range(self.numbers):
            plane = numbers[..., i]
            if self.side == "v":
                plane = plane.reshape(*lead, 2, 2, 4, 2, self.groups).transpose(0, 1, 2, 7, 5, 3, 4, 6)
            parts.append(mx.contiguous(plane.reshape(*lead, -1)).view(mx.uint32))
        record = mx.concatenate(parts, axis=-1)
        return (record.reshape(batch, heads, tokens // BLOCK, -1),)

    def load(self, stored: tuple[mx.array, ...]) -> Packed:
        (blocks,) = stored
        batch, heads, count, _ = blocks.shape
        lead = (batch, heads, 2 * count)
        record = blocks.reshape(*lead, self.record_words)
        fields, at = mx.array(0, mx.uint32), 0
        for plane in _planes(self.bits, self.zeroed):
            words = 32 * -(-self.head_dim // 2 // plane.registers)
            fields = fields | _from_lane_words(record[..., at : at + words], plane, self.head_dim // 2)
            at += words
        order = self._order()
        shape = self._split_shape()
        fields = fields.reshape(*lead, *(shape[i - 3] for i in order))
        back = sorted(range(len(order)), key=lambda i: order[i])
        values = fields.transpose(0, 1, 2, *(i + 3 for i in back))
        tokens = count * BLOCK
        codes = packing.pack(self._ranked(values.reshape(batch, heads, tokens, self.head_dim)), self.bits)
        numbers = mx.contiguous(record[..., at:]).view(mx.float16).reshape(*lead, self.numbers, -1)
        if self.side == "v":
            numbers = numbers.reshape(*lead, self.numbers, self.groups, 4, 2, 2, 2)
            numbers = numbers.transpose(0, 1, 2, 6, 7, 5, 8, 4, 3)
        else:
            numbers = numbers.reshape(*lead, self.numbers, RECORD, self.groups).transpose(0, 1, 2, 4, 5, 3)
        return codes, numbers.reshape(batch, heads, tokens, self.groups * self.numbers)

    def encode(self, codec: Codec, y: mx.array) -> tuple[mx.array, ...]:
        """`store(codec.encode(y))`: bit for bit, in one launch where the GPU is the device."""
        from . import cuda

        if cuda.available() and isinstance(codec, Affine):
            return (cuda.pack(self, y),)
        return self.store(codec.encode(y))

    def _ranked(self, codes: mx.array) -> mx.array:
        """Codebook codes <-> sign and rank of the magnitude, its own inverse; affine codes are left alone."""
        if self.zeroed:
            return codes
        sign = 1 << (self.bits - 1)
        return mx.where(codes < sign, codes ^ (sign - 1), codes)

    def _split_shape(self) -> tuple[int, ...]:
        """How (token of the record, dim) split into strip, fragment coordinates and tile."""
        tiles = self.head_dim // 16
        if self.side == "k":  # strip, key/8, g, tile, dim/8, t, half
            return (2, 2, 8, tiles, 2, 4, 2)
        return (2, 2, 4, 2, tiles, 2, 8)  # strip, key/8, t, half, tile, dim/8, g

    def _order(self) -> tuple[int, ...]:
        """Axes of `_split_shape` (after three leading ones) in the order strip, tile, register (2 axes), g, t, half."""
        if self.side == "k":
            return (3, 6, 7, 4, 5, 8, 9)
        return (3, 7, 4, 8, 9, 5, 6)


def layouts(k_codec: Codec, v_codec: Codec, dims: tuple[int, int]) -> tuple[MmaLayout, MmaLayout] | None:
    """The layouts in which the CUDA kernels read these codecs, or None where they can't."""
    k, v = layout_for("k", k_codec, dims[0]), layout_for("v", v_codec, dims[1])
    return (k, v) if k and v else None


def layout_for(side: str, codec: Codec, dim: int) -> MmaLayout | None:
    """One side's layout, or None where no kernel serves the codec or the head dim."""
    if dim % 16 or dim > 512:
        return None
    if isinstance(codec, Affine):
        return MmaLayout(side, codec.bits, codec.group, dim)
    if isinstance(codec, Turbo) and codec.bits in BOOK_BITS:
        return MmaLayout(side, codec.bits, BOOK, dim)
    return None


def layout_named(name: str) -> MmaLayout | None:
    """The layout that calls itself `name`, or None when it is none of these."""
    parts = name.split("-")
    if parts[0] != "mma64" or len(parts) != 4:
        return None
    group = BOOK if parts[2] == "book" else int(parts[2][1:])
    return MmaLayout(parts[1][0], int(parts[1][1:]), group, int(parts[3][1:]))


@dataclass(frozen=True)
class Field:
    """Bits `[low, low + width)` of a code, and where they start in a word, by register of the word and half."""

    low: int
    width: int
    at: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class WordPlane:
    """Words that hold `registers` registers (pairs of codes) of a lane each, as `fields` say."""

    registers: int
    fields: tuple[Field, ...]


@functools.cache
def _planes(bits: int, zeroed: bool) -> tuple[WordPlane, ...]:
    """Where the bits of a code lie in its words: formats.cuh in numbers. Tile i of a word, register r of 4, half h."""

    def plane(registers: int, *fields) -> WordPlane:
        placed = (
            Field(low, width, tuple((at(i // 4, i % 4, 0), at(i // 4, i % 4, 1)) for i in range(registers)))
            for low, width, at in fields
        )
        return WordPlane(registers, tuple(placed))

    if zeroed:
        low = {
            8: plane(2, (0, 8, lambda i, r, h: 8 * r + 16 * h)),
            4: plane(4, (0, 4, lambda i, r, h: 4 * r + 16 * h)),
        }.get(bits, plane(8, (0, 2, lambda i, r, h: 8 * i + 2 * r + 16 * h)))
        high = plane(16, (2, 1, lambda i, r, h: 4 * i + r // 2 + 2 * (r % 2) + 16 * h))
        return (low, high) if bits == 3 else (low,)
    # Codebooks: ranks and signs; element e = 2 r + h, byte e % 4 for its sign.
    signs = plane(16, (bits - 1, 1, lambda i, r, h: 8 * (2 * (r % 2) + h) + 7 - 2 * i - r // 2))
    if bits == 1:
        return (signs,)
    if bits in (2, 4):
        top = 5 if bits == 2 else 7
        sign = (bits - 1, 1, lambda i, r, h: 8 * (2 * (r % 2) + h) + top + 2 * i - 4 * (r // 2))
        return (plane(16 // bits, (0, bits - 1, lambda i, r, h: 4 * (2 * r + h) + 2 * i), sign),)
    return plane(16 // (bits - 1), (0, bits - 1, lambda i, r, h: 4 * (2 * r + h) + 2 * i)), signs


def _to_lane_words(codes: mx.array, plane: WordPlane) -> mx.array:
    """Codes `[..., registers, 32, 2]` -> the words of one plane `[..., words]`."""
    lead, registers = codes.shape[:-3], codes.shape[-3]
    pad = -registers % plane.registers
    if pad:
        codes = mx.pad(codes, [(0, 0)] * len(lead) + [(0, pad), (0, 0), (0, 0)])
    codes = codes.reshape(*lead, -1, plane.registers, 32, 2)
    words = mx.array(0, mx.uint32)
    for field in plane.fields:
        bits = (codes >> field.low) & ((1 << field.width) - 1)
        words = words | (bits << _shifts(field)).sum(axis=(-3, -1)).astype(mx.uint32)  # [..., count, 32]
    count = words.shape[-2]
    quads = words[..., : count // 4 * 4, :].reshape(*lead, -1, 4, 32).swapaxes(-1, -2).reshape(*lead, -1)
    rest = words[..., count // 4 * 4 :, :].swapaxes(-1, -2).reshape(*lead, -1)
    return mx.concatenate([quads, rest], axis=-1)


def _from_lane_words(words: mx.array, plane: WordPlane, registers: int) -> mx.array:
    """The inverse of `_to_lane_words`: this plane's share of the codes `[..., registers, 32, 2]`."""
    lead, count = words.shape[:-1], words.shape[-1] // 32
    cut = count // 4 * 128
    quads = words[..., :cut].reshape(*lead, -1, 32, 4).swapaxes(-1, -2).reshape(*lead, -1, 32)
    rest = words[..., cut:].reshape(*lead, 32, -1).swapaxes(-1, -2)
    words = mx.concatenate([quads, rest], axis=-2)[..., None, :, None]
    codes = mx.array(0, mx.uint32)
    for field in plane.fields:
        bits = (words >> _shifts(field)) & ((1 << field.width) - 1)  # [..., count, registers, 32, 2]
        codes = codes | (bits << field.low)
    return codes.reshape(*lead, -1, 32, 2)[..., :registers, :, :]


def _shifts(field: Field) -> mx.array:
    """`[registers, 1, 2]`"""
    return mx.array(field.at, dtype=mx.uint32)[:, None]
