"""Small unsigned integers to 32-bit words and back, along the last axis.

Widths 1, 2, 4 and 8 are little-endian fields: value `d` sits in word `d*bits//32` at bit `(d*bits)%32`, the order that
`mx.quantize` uses. Widths 3, 5 and 6 are stored as two planes, first the low two (of 3) or four bits of all values,
then the high bits, because a plane unpacks with the same shifts and masks everywhere and a field would straddle words.
"""

from __future__ import annotations

import mlx.core as mx

WIDTHS = (1, 2, 3, 4, 5, 6, 8)

PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2)}
"""Widths of the low and the high plane."""


def words(count: int, bits: int) -> int:
    """32-bit words that `count` values of `bits` bits take (each plane is padded to whole words)."""
    if bits in PLANES:
        return sum(words(count, plane) for plane in PLANES[bits])
    return -(-count * bits // 32)


def pack(values: mx.array, bits: int) -> mx.array:
    """Unsigned integers `[..., D]` below `2**bits` -> uint32 `[..., words(D, bits)]`."""
    if bits not in WIDTHS:
        raise ValueError(f"cannot pack {bits}-bit values: allowed widths are {', '.join(map(str, WIDTHS))}")
    values = values.astype(mx.uint32)
    if bits in PLANES:
        low, high = PLANES[bits]
        return mx.concatenate([pack(values & ((1 << low) - 1), low), pack(values >> low, high)], axis=-1)
    per_word = 32 // bits
    *lead, count = values.shape
    pad = words(count, bits) * per_word - count
    if pad:
        values = mx.pad(values, [(0, 0)] * len(lead) + [(0, pad)])
    fields = values.reshape(*lead, -1, per_word) << _shifts(bits)
    return fields.sum(axis=-1).astype(mx.uint32)


def unpack(packed: mx.array, bits: int, count: int) -> mx.array:
    """uint32 `[..., words(count, bits)]` -> uint32 values `[..., count]`; the inverse of `pack`."""
    if bits in PLANES:
        low, high = PLANES[bits]
        cut = words(count, low)
        return unpack(packed[..., :cut], low, count) | (unpack(packed[..., cut:], high, count) << low)
    fields = (packed[..., None] >> _shifts(bits)) & ((1 << bits) - 1)
    *lead, n_words, per_word = fields.shape
    return fields.reshape(*lead, n_words * per_word)[..., :count]


def _shifts(bits: int) -> mx.array:
    return mx.arange(0, 32, bits, dtype=mx.uint32)
