"""Tensors of a GGUF file as mlx-lm's weights: quantised ones stay so where MLX has the same arithmetic.

Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and the K-quants Q4_K and Q5_K are a scale and an offset per 32 values, which is MLX's
affine form in groups of 32: codes are kept bit for bit, scales and offsets rounded to fp16 where the file holds them as
products (Q4_K, Q5_K). All others are decoded by the `gguf` package. Layouts: ggml-common.h of llama.cpp.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np

from .header import GGUFError, Header, Tensor, library

GROUP = 32
KEPT = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8, "Q4_K": 4, "Q5_K": 5}
"""Types that stay quantised, with their bits."""
PLAIN = {"F32": np.float32, "F16": np.float16}


def type_name(tensor: Tensor) -> str:
    """`Q4_0` and the like."""
    return library().constants.GGMLQuantizationType(tensor.type).name


def bits(tensor: Tensor) -> int:
    """Bits of the codes of a tensor that stays quantised; 0 when it will be floats."""
    return KEPT.get(type_name(tensor), 0) if tensor.shape[-1] % GROUP == 0 and len(tensor.shape) > 1 else 0


def loaded_bytes(header: Header, float_bytes: int) -> int:
    """Bytes that the weights take once loaded with floats of `float_bytes`."""
    total = 0
    for tensor in header.tensors.values():
        count, width = math.prod(tensor.shape), bits(tensor)
        total += count * width // 8 + 2 * float_bytes * count // GROUP if width else count * float_bytes
    return total


def read(tensor: Tensor) -> dict[str, mx.array]:
    """`weight`, and for a tensor that stays quantised `scales` and `biases`, as MLX's quantised layers name them."""
    raw = np.memmap(tensor.file, np.uint8, "r", tensor.start, (tensor.size,))
    kind = type_name(tensor)
    if bits(tensor):
        codes, scales, biases = _BLOCKS[kind](mx.array(raw))
        rows = tensor.shape[:-1]
        found = {
            "weight": _pack(codes.reshape(*tensor.shape), KEPT[kind]),
            "scales": scales.reshape(*rows, -1),
            "biases": biases.reshape(*rows, -1),
        }
    elif kind in PLAIN:
        found = {"weight": mx.array(raw.view(PLAIN[kind]).reshape(tensor.shape))}
    elif kind == "BF16":
        found = {"weight": mx.array(raw.view(np.uint16).reshape(tensor.shape)).view(mx.bfloat16)}
    else:
        gguf = library()
        try:
            decoded = gguf.quants.dequantize(raw, gguf.constants.GGMLQuantizationType(tensor.type))
        except NotImplementedError as error:
            raise GGUFError(f"{tensor.file.name}: tensors of type {kind} can't be decoded; take another one") from error
        found = {"weight": mx.array(decoded.reshape(tensor.shape).astype(np.float16))}
    mx.eval(found)
    return found


def _pack(codes: mx.array, width: int) -> mx.array:
    """Codes `[..., D]` below `2**width` -> uint32 `[..., D * width / 32]`, little-endian, as `mx.quantize` packs."""
    if 32 % width == 0:
        shifts = mx.arange(0, 32, width, dtype=mx.uint32)
        return (codes.astype(mx.uint32).reshape(*codes.shape[:-1], -1, 32 // width) << shifts).sum(-1).astype(mx.uint32)
    # 32 codes make `width` words; a code may straddle two.
    wide = codes.astype(mx.uint64).reshape(*codes.shape[:-1], -1, 32)
    words = []
    for word in range(width):
        total = mx.zeros(wide.shape[:-1], mx.uint64)
        for i in range(32):
            shift = i * width - 32 * word
            if -width < shift < 32:
                total = total + (wide[..., i] << shift if shift >= 0 else wide[..., i] >> -shift)
        words.append(total & 0xFFFFFFFF)
    return mx.stack(words, axis=-1).astype(mx.uint32).reshape(*codes.shape[:-1], -1)


Blocks = tuple[mx.array, mx.array, mx.array]
"""Codes `[groups, 32]`, scales and offsets `[groups]`: a value is `code * scale + offset`."""


def _half(raw: mx.array, start: int) -> mx.array:
    """The fp16 number at byte `start` of each block of `raw [blocks, bytes]`."""
    return mx.contiguous(raw[:, start : start + 2]).view(mx.float16)[:, 0]


def _nibbles(raw: mx.array) -> mx.array:
    """Bytes `[..., n]` -> `[..., 2 n]`: all low halves, then all high ones."""
    return mx.concatenate([raw & 15, raw >> 4], axis=-1)


def _fifth(raw: mx.array) -> mx.array:
    """Four bytes `[blocks, 4]` -> the bits of 32 codes, as 16 or 0."""
    places = mx.arange(8, dtype=mx.uint8)
    return (((raw[..., None] >> places) & 1) << 4).reshape(-1, 32)


def _q4_0(raw: mx.array) -> Blocks:
    raw = raw.reshape(-1, 18)
    scale = _half(raw, 0)
    return _nibbles(raw[:, 2:]), scale, scale * -8


def _q4_1(raw: mx.array) -> Blocks:
    raw = raw.reshape(-1, 20)
    return _nibbles(raw[:, 4:]), _half(raw, 0), _half(raw, 2)


def _q5_0(raw: mx.array) -> Blocks:
    raw = raw.reshape(-1, 22)
    scale = _half(raw, 0)
    return _nibbles(raw[:, 6:]) | _fifth(raw[:, 2:6]), scale, scale * -16


def _q5_1(raw: mx.array) -> Blocks:
    raw = raw.reshape(-1, 24)
    return _nibbles(raw[:, 8:]) | _fifth(raw[:, 4:8]), _half(raw, 0), _half(raw, 2)


def _q8_0(raw: mx.array) -> Blocks:
    raw = raw.reshape(-1, 34)
    scale = _half(raw, 0)
    return raw[:, 2:] ^ 128, scale, scale * -128  # two's complement plus 128


def _k_scales(raw: mx.array) -> tuple[mx.array, mx.array]:
    """Scales and offsets of the eight groups of each super-block, `[groups]`: six bits each, times an fp16 number."""
    packed = raw[:, 4:16]
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    steps = mx.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=-1)
    lows = mx.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=-1)

    def times(start: int, small: mx.array) -> mx.array:
        product = _half(raw, start).astype(mx.float32)[:, None] * small.astype(mx.float32)
        return product.astype(mx.float16).reshape(-1)

    return times(0, steps), -times(2, lows)


def _q4_k(raw: mx.array) -> Blocks:
    raw = raw.reshape(-1, 144)
    scales, offsets = _k_scales(raw)
    return _nibbles(raw[:, 16:].reshape(-1, 4, 32)).reshape(-1, 32), scales, offsets


def _q5_k(raw: mx.array) -> Blocks:
    raw = raw.reshape(-1, 176)
    scales, offsets = _k_scales(raw)
    low = _nibbles(raw[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    groups = mx.arange(8, dtype=mx.uint8)[:, None]
    high = ((raw[:, None, 16:48] >> groups) & 1) << 4
    return (low | high).reshape(-1, 32), scales, offsets


_BLOCKS: dict[str, Any] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
}
