"""The storage layout of the CUDA kernels: canonical bits, permuted so that a lane's words are its mma fragments.

`record.cuh` says how records are cut and `formats.cuh` where every bit lies and why. Here are both directions in plain
MLX operations, which run on any machine (a cache saved on an NVIDIA GPU opens anywhere), and `encode`, which uses the
pack kernel where there is one. The permutation costs no byte: a record of 32 tokens takes exactly the words of 32
canonical tokens (but for polar codes: 4 bits per channel where 3.875 are canonical).
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field

import mlx.core as mx

from ...codecs import packing
from ...codecs.polar import BLOCK as POLAR_BLOCK
from ...contracts.codec import Angles, Codebook, Codebooks, Codec, Integers, Packed, packable
from ...contracts.layout import CANONICAL, Layout
from .lane_words import from_lane_words, planes, to_lane_words

BLOCK = 64
RECORD = 32

BOOK, SIGNS = 0, -1
"""The group of runs whose codes index the codebook of a sphere, or are the signs of a sketch: one scale, no zero."""
BOOK_BITS = (1, 2, 3, 4, 5)
MAX_CHANNELS = 512
"""Of a vector, and of a token's codes."""


@dataclass(frozen=True)
class Run:
    """`dim` codes per token. `group`: channels that share a scale and a zero, or `BOOK` or `SIGNS`; `book`: what the
    codes of these two mean, which is no part of how they lie.
    """

    bits: int
    group: int
    dim: int
    book: Codebook | None = field(default=None, compare=False)

    @classmethod
    def of(cls, book: Codebook) -> Run:
        return cls(book.bits, SIGNS if book.sketch else BOOK, book.dim, book)

    @classmethod
    def named(cls, name: str, head_dim: int) -> Run:
        """The inverse of `str`."""
        bits, kind, number = int(name[0]), name[1], int(name[2:])
        return cls(bits, number, head_dim) if kind == "g" else cls(bits, SIGNS if kind == "s" else BOOK, number)

    def __str__(self) -> str:
        if self.zeroed:
            return f"{self.bits}g{self.group}"
        return f"{self.bits}{'d' if self.direct else 's' if self.group == SIGNS else 't'}{self.dim}"

    @property
    def direct(self) -> bool:
        """Whether codes are stored as they are and looked up as biased bytes (formats.cuh)."""
        return self.group == BOOK and self.bits in (2, 3)

    @property
    def zeroed(self) -> bool:
        return self.group > 0

    def ranked(self, codes: mx.array) -> mx.array:
        """Codes <-> sign and rank of the magnitude, its own inverse; affine and direct codes are left alone."""
        if self.zeroed or self.direct:
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

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.side, self.head_dim, self.runs))

    @functools.cached_property
    def name(self) -> str:
        return f"mma64-{self.side}-{'+'.join(map(str, self.runs))}-d{self.head_dim}"

    @functools.cached_property
    def zeroed(self) -> bool:
        """Whether groups have a zero beside their scale."""
        return self.runs[0].zeroed

    @functools.cached_property
    def biased(self) -> bool:
        """Whether kernels take a bias back from their sums."""
        return any(run.direct for run in self.runs)

    @functools.cached_property
    def sketched(self) -> bool:
        """Whether codes are signs of projections, which multiply a projected query."""
        return self.runs[-1].group == SIGNS

    @functools.cached_property
    def channels(self) -> int:
        """Of what the codes of a token decode to."""
        return sum(run.dim for run in self.runs)

    @functools.cached_property
    def query(self) -> int:
        """Channels of a query: those for dense keys first, and those for the codes last, which may be the same."""
        return self.channels + self.head_dim if self.sketched and len(self.runs) == 1 else self.channels

    @functools.cached_property
    def groups(self) -> int:
        """Scales of a token."""
        return -(-self.head_dim // self.runs[0].group) if self.zeroed else len(self.runs)

    @functools.cached_property
    def numbers(self) -> int:
        """fp16 numbers per group."""
        return 2 if self.zeroed else 1

    @functools.cached_property
    def code_words(self) -> int:
        """Words of the codes of 32 tokens."""
        return RECORD * sum(packing.words(run.dim, run.bits) for run in self.runs)

    @functools.cached_property
    def record_words(self) -> int:
        """Words of 32 tokens."""
        return self.code_words + RECORD // 2 * self.groups * self.numbers

    def store(self, packed: Packed) -> tuple[mx.array, ...]:
        *codes, scales = packed
        batch, heads, tokens, _ = scales.shape
        lead = (batch, heads, tokens // RECORD)
        parts = self._store_codes(codes, lead)
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
        codes = self._load_codes(record[..., : self.code_words])
        numbers = mx.contiguous(record[..., self.code_words :]).view(mx.float16).reshape(*lead, self.numbers, -1)
        if self.side == "v":
            numbers = numbers.reshape(*lead, self.numbers, self.groups, 4, 2, 2, 2)
            numbers = numbers.transpose(0, 1, 2, 6, 7, 5, 8, 4, 3)
        else:
            numbers = numbers.reshape(*lead, self.numbers, RECORD, self.groups).transpose(0, 1, 2, 4, 5, 3)
        return *codes, numbers.reshape(batch, heads, count * BLOCK, self.groups * self.numbers)

    def encode(self, codec: Codec, y: mx.array) -> tuple[mx.array, ...]:
        """`store(codec.encode(y))`: bit for bit, in one launch where there is a kernel."""
        from . import launch as cuda

        form = codec.format(self.head_dim)
        return (cuda.pack(self, form, y),) if packable(form) and cuda.available() else self.store(codec.encode(y))

    def _store_codes(self, codes: list[mx.array], lead: tuple[int, ...]) -> list[mx.array]:
        """Canonical arrays `[B, H, T, ..]` but the scales -> the words `[*lead, ..]` of `lead` records, in parts."""
        parts = []
        for run, words in zip(self.runs, codes):
            values = run.ranked(packing.unpack(words, run.bits, run.dim))
            fields = values.reshape(*lead, *self._split_shape(run.dim)).transpose(0, 1, 2, *self._order())
            fields = fields.reshape(*lead, run.dim // 2, 32, 2)  # register of the record, lane, half
            parts += [to_lane_words(fields, plane) for plane in planes(run.bits, run.zeroed)]
        return parts

    def _load_codes(self, words: mx.array) -> list[mx.array]:
        """The inverse of `_store_codes`, parts joined."""
        lead, codes, at = words.shape[:-1], [], 0
        for run in self.runs:
            fields = mx.array(0, mx.uint32)
            for plane in planes(run.bits, run.zeroed):
                size = 32 * -(-run.dim // 2 // plane.registers)
                fields = fields | from_lane_words(words[..., at : at + size], plane, run.dim // 2)
                at += size
            order, shape = self._order(), self._split_shape(run.dim)
            fields = fields.reshape(*lead, *(shape[i - 3] for i in order))
            back = sorted(range(len(order)), key=lambda i: order[i])
            values = fields.transpose(0, 1, 2, *(i + 3 for i in back))
            values = values.reshape(*lead[:2], lead[2] * RECORD, run.dim)
            codes.append(packing.pack(run.ranked(values), run.bits))
        return codes

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


@dataclass(frozen=True)
class PolarLayout(MmaLayout):
    """One side of what `codecs.polar` makes: a block of 16 channels is a tile, its radius the scale of a group.

    Of a block and token: 32 bits of level 1, 16 of levels 2 to 4 (level 4 twice), and 16 of the radius.
    """

    runs: tuple[Run, ...] = ()

    @property
    def name(self) -> str:
        return f"mma64-{self.side}-polar-d{self.head_dim}"

    @property
    def zeroed(self) -> bool:
        return False

    @property
    def sketched(self) -> bool:
        return False

    @property
    def channels(self) -> int:
        return self.head_dim

    @property
    def groups(self) -> int:
        return self.head_dim // POLAR_BLOCK

    @property
    def code_words(self) -> int:
        return RECORD * 3 * self.groups // 2

    def _store_codes(self, codes: list[mx.array], lead: tuple[int, ...]) -> list[mx.array]:
        first, rest = codes
        rest = mx.pad(rest, [(0, 0)] * 3 + [(0, -rest.shape[-1] % 4)])
        angles = packing.unpack(rest.view(mx.uint32), 2, 7 * self.groups).reshape(*lead, RECORD, -1)
        levels = mx.split(angles, [4 * self.groups, 6 * self.groups], axis=-1)
        blocks = mx.concatenate([level.reshape(*lead, RECORD, self.groups, -1) for level in levels], axis=-1)
        blocks = mx.concatenate([blocks, blocks[..., 6:]], axis=-1)
        halves = (blocks << _angle_shifts()).sum(axis=-1).astype(mx.uint16).swapaxes(-1, -2)
        words = first.reshape(*lead, RECORD, self.groups).swapaxes(-1, -2)
        return [words.reshape(*lead, -1), mx.contiguous(halves.reshape(*lead, -1)).view(mx.uint32)]

    def _load_codes(self, words: mx.array) -> list[mx.array]:
        lead, cut = words.shape[:-1], RECORD * self.groups
        shape = (*lead[:2], lead[2] * RECORD, self.groups)
        first = words[..., :cut].reshape(*lead, self.groups, RECORD).swapaxes(-1, -2).reshape(shape)
        halves = mx.contiguous(words[..., cut:]).view(mx.uint16).reshape(*lead, self.groups, RECORD)
        halves = halves.swapaxes(-1, -2).reshape(shape).astype(mx.uint32)
        levels = mx.split((halves[..., None] >> _angle_shifts()[:7]) & 3, [4, 6], axis=-1)
        angles = mx.concatenate([level.reshape(*shape[:3], -1) for level in levels], axis=-1)
        rest = packing.pack(angles, 2).view(mx.uint8)
        return [first, rest[..., : -(-7 * self.groups // 4)]]


def _angle_shifts() -> mx.array:
    """Of the angles of levels 2 (four), 3 (two) and 4 (one, twice)."""
    return mx.array([0, 6, 8, 14, 2, 10, 4, 12], dtype=mx.uint32)


def layouts(k_codec: Codec, v_codec: Codec, dims: tuple[int, int]) -> tuple[Layout, Layout]:
    """The layouts in which the CUDA kernels read these codecs, canonical where they can't."""
    k, v = layout_for("k", k_codec, dims[0]), layout_for("v", v_codec, dims[1])
    return (k, v) if k and v else (CANONICAL, CANONICAL)


def layout_for(side: str, codec: Codec, dim: int) -> MmaLayout | None:
    """One side's layout, or None where no kernel serves the codec or the head dim."""
    form = codec.format(dim)
    if dim % 16 or dim > MAX_CHANNELS:
        return None
    if isinstance(form, Integers):
        return MmaLayout(side, dim, (Run(form.bits, form.group, dim),))
    if isinstance(form, Angles):
        return PolarLayout(side, dim)
    if not isinstance(form, Codebooks):
        return None
    layout = MmaLayout(side, dim, tuple(Run.of(book) for book in form.books))
    # 64 magnitudes (6 bits) do not fit the registers, and half a tile is no tile.
    fits = all(run.bits in BOOK_BITS and run.dim % 16 == 0 for run in layout.runs)
    return layout if fits and layout.channels <= MAX_CHANNELS and not (side == "v" and layout.sketched) else None


def layout_named(name: str) -> MmaLayout | None:
    """The layout that calls itself `name`, or None when it is none of these."""
    found = re.fullmatch(r"mma64-([kv])-(polar|(?:\d[gtds]\d+\+?)+)-d(\d+)", name)
    if not found:
        return None
    dim = int(found[3])
    if found[2] == "polar":
        return PolarLayout(found[1], dim)
    layout = MmaLayout(found[1], dim, tuple(Run.named(run, dim) for run in found[2].split("+")))
    return layout if layout.name == name else None  # 3t128 and its like were other bits under that name
