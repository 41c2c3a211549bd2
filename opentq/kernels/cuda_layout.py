"""The storage layout of the CUDA kernels: canonical bits, permuted so that a lane's words are its mma fragments.

`record.cuh` says how records are cut and `formats.cuh` where every bit lies and why. Here are both directions in plain
MLX operations, which run on any machine (a cache saved on an NVIDIA GPU opens anywhere), and `encode`, which uses the
pack kernel where there is one. The permutation costs no byte: a record of 32 tokens takes exactly the words of 32
canonical tokens.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import mlx.core as mx

from ..codecs import packing
from ..codecs.affine import Affine
from ..codecs.base import Codec, Coded, Packed
from ..codecs.codebooks import Book
from ..codecs.turbo import Fractional, Turbo

BLOCK = 64
RECORD = 32

BOOK, SIGNS = 0, -1
"""The group of runs whose codes index the codebook of a sphere, or are the signs of a sketch: one scale, no zero."""
BOOK_BITS = (1, 2, 3, 4, 5)
MAX_CHANNELS = 512
"""Of a vector, and of a token's codes."""


@dataclass(frozen=True)
class Run:
    """`dim` codes per token. `group`: channels that share a scale and a zero, or `BOOK` or `SIGNS`."""

    bits: int
    group: int
    dim: int

    @classmethod
    def of(cls, book: Book) -> Run:
        return cls(book.bits, SIGNS if book == Book.of_signs(book.dim) else BOOK, book.dim)

    @classmethod
    def named(cls, name: str, head_dim: int) -> Run:
        """The inverse of `str`."""
        bits, kind, number = int(name[0]), name[1], int(name[2:])
        return cls(bits, number, head_dim) if kind == "g" else cls(bits, {"t": BOOK, "s": SIGNS}[kind], number)

    def __str__(self) -> str:
        kind = {BOOK: f"t{self.dim}", SIGNS: f"s{self.dim}"}.get(self.group, f"g{self.group}")
        return f"{self.bits}{kind}"

    @property
    def zeroed(self) -> bool:
        return self.group > 0

    @property
    def book(self) -> Book:
        """What codes mean, where they are of a codebook."""
        return Book.of_signs(self.dim) if self.group == SIGNS else Book.of_sphere(self.bits, self.dim)

    def ranked(self, codes: mx.array) -> mx.array:
        """Codebook codes <-> sign and rank of the magnitude, its own inverse; affine codes are left alone."""
        if self.zeroed:
            return codes
        sign = 1 << (self.bits - 1)
        return mx.where(codes < sign, codes ^ (sign - 1), codes)


@dataclass(frozen=True)
class MmaLayout:
    """One side ("k" or "v") of vectors of `head_dim` channels, their codes in one run or in two of the same length.

    Stored as one uint32 array `[B, H, T/64, words]`, 64 tokens per row.
    """

    side: str
    head_dim: int
    runs: tuple[Run, ...]

    block = BLOCK

    @property
    def name(self) -> str:
        return f"mma64-{self.side}-{'+'.join(map(str, self.runs))}-d{self.head_dim}"

    @property
    def zeroed(self) -> bool:
        """Whether groups have a zero beside their scale."""
        return self.runs[0].zeroed

    @property
    def sketched(self) -> bool:
        """Whether codes are signs of projections, which multiply a projected query."""
        return self.runs[-1].group == SIGNS

    @property
    def query(self) -> int:
        """Channels of a query: those for dense keys first, and those for the codes last, which may be the same."""
        channels = sum(run.dim for run in self.runs)
        return channels + self.head_dim if self.sketched and len(self.runs) == 1 else channels

    @property
    def groups(self) -> int:
        """Scales of a token."""
        return -(-self.head_dim // self.runs[0].group) if self.zeroed else len(self.runs)

    @property
    def numbers(self) -> int:
        """fp16 numbers per group."""
        return 2 if self.zeroed else 1

    @property
    def record_words(self) -> int:
        """Words of 32 tokens."""
        codes = sum(packing.words(run.dim, run.bits) for run in self.runs)
        return RECORD * codes + RECORD // 2 * self.groups * self.numbers

    def store(self, packed: Packed) -> tuple[mx.array, ...]:
        *codes, scales = packed
        batch, heads, tokens, _ = scales.shape
        lead = (batch, heads, tokens // RECORD)
        parts = [part for run, words in zip(self.runs, codes) for part in self._store_run(run, words, lead)]
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
        codes, at = [], 0
        for run in self.runs:
            words = RECORD * packing.words(run.dim, run.bits)
            codes.append(self._load_run(run, record[..., at : at + words]))
            at += words
        numbers = mx.contiguous(record[..., at:]).view(mx.float16).reshape(*lead, self.numbers, -1)
        if self.side == "v":
            numbers = numbers.reshape(*lead, self.numbers, self.groups, 4, 2, 2, 2)
            numbers = numbers.transpose(0, 1, 2, 6, 7, 5, 8, 4, 3)
        else:
            numbers = numbers.reshape(*lead, self.numbers, RECORD, self.groups).transpose(0, 1, 2, 4, 5, 3)
        return *codes, numbers.reshape(batch, heads, count * BLOCK, self.groups * self.numbers)

    def encode(self, codec: Codec, y: mx.array) -> tuple[mx.array, ...]:
        """`store(codec.encode(y))`: bit for bit, in one launch where there is a kernel."""
        from . import cuda

        return (cuda.pack(self, codec, y),) if cuda.available() and packs(codec) else self.store(codec.encode(y))

    def _store_run(self, run: Run, codes: mx.array, lead: tuple[int, ...]) -> list[mx.array]:
        """Canonical words `[B, H, T, W]` -> the planes of `lead` records, `[*lead, words]` each."""
        values = run.ranked(packing.unpack(codes, run.bits, run.dim))
        fields = values.reshape(*lead, *self._split_shape(run.dim)).transpose(0, 1, 2, *self._order())
        fields = fields.reshape(*lead, run.dim // 2, 32, 2)  # register of the record, lane, half
        return [_to_lane_words(fields, plane) for plane in _planes(run.bits, run.zeroed)]

    def _load_run(self, run: Run, words: mx.array) -> mx.array:
        """The inverse of `_store_run`, planes joined."""
        lead = words.shape[:-1]
        fields, at = mx.array(0, mx.uint32), 0
        for plane in _planes(run.bits, run.zeroed):
            size = 32 * -(-run.dim // 2 // plane.registers)
            fields = fields | _from_lane_words(words[..., at : at + size], plane, run.dim // 2)
            at += size
        order, shape = self._order(), self._split_shape(run.dim)
        fields = fields.reshape(*lead, *(shape[i - 3] for i in order))
        back = sorted(range(len(order)), key=lambda i: order[i])
        values = fields.transpose(0, 1, 2, *(i + 3 for i in back))
        return packing.pack(run.ranked(values.reshape(*lead[:2], lead[2] * RECORD, run.dim)), run.bits)

    def _split_shape(self, dim: int) -> tuple[int, ...]:
        """How (token of the record, channel) split into strip, fragment coordinates and tile."""
        tiles = dim // 16
        if self.side == "k":  # strip, key/8, g, tile, dim/8, t, half
            return (2, 2, 8, tiles, 2, 4, 2)
        return (2, 2, 4, 2, tiles, 2, 8)  # strip, key/8, t, half, tile, dim/8, g

    def _order(self) -> tuple[int, ...]:
        """Axes of `_split_shape` (after three leading ones) in the order strip, tile, register (2 axes), g, t, half."""
        if self.side == "k":
            return (3, 6, 7, 4, 5, 8, 9)
        return (3, 7, 4, 8, 9, 5, 6)


def packs(codec: Codec) -> bool:
    """Whether the pack kernel makes what `codec` makes: not sketches, whose signs come from a matrix product."""
    return isinstance(codec, Affine) or (isinstance(codec, Turbo | Fractional) and codec.fit != "unbiased")


def layouts(k_codec: Codec, v_codec: Codec, dims: tuple[int, int]) -> tuple[MmaLayout, MmaLayout] | None:
    """The layouts in which the CUDA kernels read these codecs, or None where they can't."""
    k, v = layout_for("k", k_codec, dims[0]), layout_for("v", v_codec, dims[1])
    return (k, v) if k and v else None


def layout_for(side: str, codec: Codec, dim: int) -> MmaLayout | None:
    """One side's layout, or None where no kernel serves the codec or the head dim."""
    if dim % 16 or dim > MAX_CHANNELS:
        return None
    if isinstance(codec, Affine):
        return MmaLayout(side, dim, (Run(codec.bits, codec.group, dim),))
    if not isinstance(codec, Coded):
        return None
    layout = MmaLayout(side, dim, tuple(Run.of(book) for book in codec.books(dim)))
    # 64 magnitudes (6 bits) do not fit the registers, and half a tile is no tile.
    fits = all(run.bits in BOOK_BITS and run.dim % 16 == 0 for run in layout.runs)
    small = sum(run.dim for run in layout.runs) <= MAX_CHANNELS
    return layout if fits and small and not (side == "v" and layout.sketched) else None


def layout_named(name: str) -> MmaLayout | None:
    """The layout that calls itself `name`, or None when it is none of these."""
    found = re.fullmatch(r"mma64-([kv])-((?:\d[gts]\d+\+?)+)-d(\d+)", name)
    if not found:
        return None
    dim = int(found[3])
    return MmaLayout(found[1], dim, tuple(Run.named(run, dim) for run in found[2].split("+")))


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
