"""The storage layout of the CUDA kernels: canonical bits, permuted so that a lane's words are its mma fragments.

`affine_block.cuh` says where every bit lies and why. Here are both directions in plain MLX operations, which run on any
machine (a cache saved on an NVIDIA GPU opens anywhere), and `encode`, which uses the pack kernel where there is a GPU.
The permutation costs no byte: a record of 32 tokens takes exactly the words of 32 canonical tokens.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import mlx.core as mx

from ..codecs import packing
from ..codecs.affine import Affine
from ..codecs.base import Codec, Packed

BLOCK = 64
RECORD = 32


@dataclass(frozen=True)
class MmaLayout:
    """Affine codes of one side ("k" or "v"); stored as one uint32 array `[B, H, T/64, words]`, 64 tokens per row."""

    side: str
    bits: int
    group: int
    head_dim: int

    block = BLOCK

    @property
    def name(self) -> str:
        return f"mma64-{self.side}{self.bits}-g{self.group}-d{self.head_dim}"

    @property
    def groups(self) -> int:
        return -(-self.head_dim // self.group)

    @property
    def record_words(self) -> int:
        """Words of 32 tokens."""
        return RECORD * (packing.words(self.head_dim, self.bits) + self.groups)

    def store(self, packed: Packed) -> tuple[mx.array, ...]:
        codes, scales = packed
        batch, heads, tokens, _ = codes.shape
        lead = (batch, heads, tokens // RECORD)
        values = packing.unpack(codes, self.bits, self.head_dim)
        fields = values.reshape(*lead, *self._split_shape()).transpose(0, 1, 2, *self._order())
        fields = fields.reshape(*lead, self.head_dim // 8, 32, 4, 2)  # tile of the record, lane, register, half
        if self.bits == 3:
            parts = [_to_lane_words(fields & 3, 2), _to_lane_words(fields >> 2, 1)]
        else:
            parts = [_to_lane_words(fields, self.bits)]
        numbers = scales.reshape(*lead, RECORD, self.groups, 2)
        for i in (0, 1):
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
        tiles = self.head_dim // 8
        low = self.head_dim * min(self.bits, 2 if self.bits == 3 else 8)  # words of the first plane
        if self.bits == 3:
            high = RECORD * packing.words(self.head_dim, 3) - low
            fields = _from_lane_words(record[..., :low], 2, tiles)
            fields = fields | (_from_lane_words(record[..., low : low + high], 1, tiles) << 2)
            at = low + high
        else:
            fields = _from_lane_words(record[..., :low], self.bits, tiles)
            at = low
        order = self._order()
        shape = self._split_shape()
        fields = fields.reshape(*lead, *(shape[i - 3] for i in order))
        back = sorted(range(len(order)), key=lambda i: order[i])
        values = fields.transpose(0, 1, 2, *(i + 3 for i in back))
        tokens = count * BLOCK
        codes = packing.pack(values.reshape(batch, heads, tokens, self.head_dim), self.bits)
        numbers = mx.contiguous(record[..., at:]).view(mx.float16).reshape(*lead, 2, -1)
        if self.side == "v":
            numbers = numbers.reshape(*lead, 2, self.groups, 4, 2, 2, 2).transpose(0, 1, 2, 6, 7, 5, 8, 4, 3)
        else:
            numbers = numbers.reshape(*lead, 2, RECORD, self.groups).transpose(0, 1, 2, 4, 5, 3)
        return codes, numbers.reshape(batch, heads, tokens, 2 * self.groups)

    def encode(self, codec: Codec, y: mx.array) -> tuple[mx.array, ...]:
        """`store(codec.encode(y))`: bit for bit, in one launch where the GPU is the device."""
        from . import cuda

        if cuda.available() and isinstance(codec, Affine):
            return (cuda.pack(self, y),)
        return self.store(codec.encode(y))

    def _split_shape(self) -> tuple[int, ...]:
        """How (token of the record, dim) split into strip, fragment coordinates and tile."""
        tiles = self.head_dim // 16
        if self.side == "k":  # strip, key/8, g, tile, dim/8, t, half
            return (2, 2, 8, tiles, 2, 4, 2)
        return (2, 2, 4, 2, tiles, 2, 8)  # strip, key/8, t, half, tile, dim/8, g

    def _order(self) -> tuple[int, ...]:
        """Axes of `_split_shape` (after three leading ones) in the order strip, tile, g, t, register (2 axes), half."""
        if self.side == "k":
            return (3, 6, 5, 8, 7, 4, 9)
        return (3, 7, 9, 5, 4, 8, 6)


def layouts(k_codec: Codec, v_codec: Codec, dims: tuple[int, int]) -> tuple[MmaLayout, MmaLayout] | None:
    """The layouts in which the CUDA kernels read these codecs, or None where they can't."""
    if not (isinstance(k_codec, Affine) and isinstance(v_codec, Affine)):
        return None
    if any(dim % 16 or dim > 512 for dim in dims):
        return None
    return (
        MmaLayout("k", k_codec.bits, k_codec.group, dims[0]),
        MmaLayout("v", v_codec.bits, v_codec.group, dims[1]),
    )


def layout_named(name: str) -> MmaLayout | None:
    """The layout that calls itself `name`, or None when it is none of these."""
    parts = name.split("-")
    if parts[0] != "mma64" or len(parts) != 4:
        return None
    return MmaLayout(parts[1][0], int(parts[1][1:]), int(parts[2][1:]), int(parts[3][1:]))


@functools.cache
def _field_shifts(bits: int) -> list[list[list[int]]]:
    """Bit position of `[tile of the word][register][half]`; for 8 bits of `[0][register of the word][half]`."""
    halves = (0, 16)
    if bits == 8:
        return [[[8 * r + h for h in halves] for r in (0, 1)]]
    if bits == 4:
        return [[[4 * r + h for h in halves] for r in range(4)]]
    if bits == 2:
        return [[[8 * i + 2 * r + h for h in halves] for r in range(4)] for i in (0, 1)]
    return [[[4 * i + r // 2 + 2 * (r % 2) + h for h in halves] for r in range(4)] for i in range(4)]


def _to_lane_words(fields: mx.array, bits: int) -> mx.array:
    """Fields `[..., tiles, 32, 4, 2]` of 1, 2, 4 or 8 bits -> one plane `[..., words]`."""
    lead, tiles = fields.shape[:-4], fields.shape[-4]
    shifts = mx.array(_field_shifts(bits), dtype=mx.uint32)
    per_word = shifts.shape[0]
    if bits == 8:  # two words per tile
        fields = fields.reshape(*lead, tiles, 32, 2, 2, 2).moveaxis(-3, -4)
        fields = fields.reshape(*lead, 2 * tiles, 1, 32, 2, 2)
    else:
        pad = -tiles % per_word
        if pad:
            fields = mx.pad(fields, [(0, 0)] * len(lead) + [(0, pad), (0, 0), (0, 0), (0, 0)])
        fields = fields.reshape(*lead, -1, per_word, 32, 4, 2)
    words = (fields << shifts[:, None]).sum(axis=(-4, -2, -1)).astype(mx.uint32)  # [..., count, 32]
    count = words.shape[-2]
    quads = words[..., : count // 4 * 4, :].reshape(*lead, -1, 4, 32).swapaxes(-1, -2).reshape(*lead, -1)
    rest = words[..., count // 4 * 4 :, :].swapaxes(-1, -2).reshape(*lead, -1)
    return mx.concatenate([quads, rest], axis=-1)


def _from_lane_words(plane: mx.array, bits: int, tiles: int) -> mx.array:
    """The inverse of `_to_lane_words`: uint32 fields `[..., tiles, 32, 4, 2]`."""
    lead, count = plane.shape[:-1], plane.shape[-1] // 32
    cut = count // 4 * 128
    quads = plane[..., :cut].reshape(*lead, -1, 32, 4).swapaxes(-1, -2).reshape(*lead, -1, 32)
    rest = plane[..., cut:].reshape(*lead, 32, -1).swapaxes(-1, -2)
    words = mx.concatenate([quads, rest], axis=-2)[..., None, :, None, None]
    shifts = mx.array(_field_shifts(bits), dtype=mx.uint32)
    fields = (words >> shifts[:, None]) & ((1 << bits) - 1)  # [..., count, per word, 32, registers, 2]
    if bits == 8:
        fields = fields.reshape(*lead, tiles, 2, 32, 2, 2).moveaxis(-4, -3)
        return fields.reshape(*lead, tiles, 32, 4, 2)
    return fields.reshape(*lead, -1, 32, 4, 2)[..., :tiles, :, :, :]
