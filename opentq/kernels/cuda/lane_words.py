"""Codes as fields of the words of a warp's lanes: `formats.cuh` in numbers, both ways, in plain MLX operations."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import mlx.core as mx


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
def planes(bits: int, zeroed: bool) -> tuple[WordPlane, ...]:
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
    # Codebooks; element e = 2 r + h. Two and three bits: the codes themselves.
    if bits in (2, 3):
        low = plane(8, (0, 2, lambda i, r, h: 4 * (2 * r + h) + 2 * i))
        high = plane(16, (2, 1, lambda i, r, h: 4 * (2 * r + h) + (2, 1, 0, 3)[i]))
        return (low,) if bits == 2 else (low, high)
    # Otherwise ranks and signs; byte e % 4 for its sign.
    signs = plane(16, (bits - 1, 1, lambda i, r, h: 8 * (2 * (r % 2) + h) + 7 - 2 * i - r // 2))
    if bits == 1:
        return (signs,)
    rank = (0, bits - 1, lambda i, r, h: 4 * (2 * r + h))
    if bits == 4:
        return (plane(4, rank, (3, 1, lambda i, r, h: 8 * (2 * (r % 2) + h) + 7 - 4 * (r // 2))),)
    return plane(4, rank), signs


def to_lane_words(codes: mx.array, plane: WordPlane) -> mx.array:
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


def from_lane_words(words: mx.array, plane: WordPlane, registers: int) -> mx.array:
    """The inverse of `to_lane_words`: this plane's share of the codes `[..., registers, 32, 2]`."""
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
