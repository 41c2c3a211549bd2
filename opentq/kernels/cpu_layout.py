"""The CPU's storage layout: blocks of 64 tokens in the order that byte dot products read them (described bit by bit in
blocks.h), one uint8 array `[B, H, T / 64, bytes]` holding codes, scales and zeros without padding. Codes are affine or
those of a codebook.

The compiled kernels move whole buffers. The numpy functions do the same, slower: they are the layout's definition in
ten lines each, read caches on machines without a compiler, and judge the kernels in the tests.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..codecs import codebooks, packing, turbo
from ..codecs.affine import Affine
from ..codecs.base import FP16_MAX, Codec, Packed
from . import cpu

TOKENS = 64


@dataclass(frozen=True)
class CpuBlocks:
    """Coded keys or values of one head dim, 64 tokens a block. `kind` is "k" or "v".

    `group` channels share a scale and a zero; 0 stands for the codebook of `codecs/turbo.py`, one scale a vector.
    """

    kind: str
    bits: int
    group: int
    head_dim: int

    block = TOKENS

    @property
    def name(self) -> str:
        codes = f"b{self.bits}-g{self.group}" if self.group else f"t{self.bits}"
        return f"cpu64-{self.kind}-{codes}-d{self.head_dim}"

    @classmethod
    def named(cls, name: str) -> CpuBlocks | None:
        """The layout of that name, or None when it isn't one of these."""
        found = re.fullmatch(r"cpu64-([kv])-(?:b([2348])-g(32|64|128)|t([1-6]))-d(\d+)", name)
        if not found:
            return None
        kind, bits, group, book_bits, dim = found.groups()
        return cls(kind, int(bits or book_bits), int(group or 0), int(dim))

    @classmethod
    def of(cls, kind: str, codec: Codec, head_dim: int) -> CpuBlocks | None:
        """The layout for what `codec` makes, or None when it can't be held."""
        if head_dim % 16 or not isinstance(codec, Affine | turbo.Turbo):
            return None
        return cls(kind, codec.bits, codec.group if isinstance(codec, Affine) else 0, head_dim)

    @property
    def params(self) -> int:
        """fp16 numbers of one token: scale and zero of every group, or the scale."""
        return 2 * -(-self.head_dim // self.group) if self.group else 1

    @property
    def code_bytes(self) -> int:
        return 8 * self.bits * self.head_dim

    @property
    def block_bytes(self) -> int:
        """Bytes of 64 tokens: the canonical number, without padding."""
        return self.code_bytes + 128 * self.params

    @property
    def words(self) -> int:
        """Canonical uint32 words of one token's codes."""
        return packing.words(self.head_dim, self.bits)

    def store(self, packed: Packed) -> tuple[mx.array, ...]:
        """`(codes [B,H,T,W], scales [B,H,T,params])` -> `[B,H,T/64,bytes]`; T must be a multiple of 64."""
        codes, scales = (mx.contiguous(a) for a in packed)
        batch, heads, tokens, words = codes.shape
        if words != self.words or scales.shape[3] != self.params:
            raise ValueError(f"layout {self.name} can't hold {words} words and {scales.shape[3]} scales a token")
        blocks = _whole_blocks(self.name, tokens)
        mx.eval(codes, scales)
        if not cpu.available():
            return (mx.array(store_numpy(self, np.array(codes), np.array(scales))),)
        out = np.empty((batch, heads, blocks, self.block_bytes), np.uint8)
        grid = cpu.Grid(batch, heads, blocks, threads=cpu.threads())
        views = cpu.view(codes), cpu.view(scales)
        cpu.call("opentq_store", self._format(), grid, views[0].ctypes.data, views[1].ctypes.data, out.ctypes.data)
        return (mx.array(out),)

    def load(self, stored: tuple[mx.array, ...]) -> Packed:
        """The inverse of `store`, bit for bit."""
        (blocks,) = stored
        mx.eval(blocks)
        view = cpu.rows_view(blocks)
        batch, heads, count, size = view.shape
        if size != self.block_bytes:
            raise ValueError(f"layout {self.name} has blocks of {self.block_bytes} bytes, not {size}")
        if not cpu.available():
            codes, scales = load_numpy(self, view)
        else:
            codes = np.empty((batch, heads, count * TOKENS, self.words), np.uint32)
            scales = np.empty((batch, heads, count * TOKENS, self.params), np.float16)
            grid = cpu.Grid(batch, heads, count, *view.strides[:3], threads=cpu.threads())
            where = view.ctypes.data, codes.ctypes.data, scales.ctypes.data
            cpu.call("opentq_load", self._format(), grid, *where)
        return mx.array(codes), mx.array(scales)

    def encode(self, codec: Codec, y: mx.array) -> tuple[mx.array, ...]:
        """`store(codec.encode(y))` in one pass over `y [B,H,T,D]`; the same bits (a zero may differ in sign)."""
        if CpuBlocks.of(self.kind, codec, self.head_dim) != self:
            raise ValueError(f"layout {self.name} can't hold what codec {codec} makes")
        if y.shape[3] != self.head_dim:
            raise ValueError(f"layout {self.name} can't hold vectors of {y.shape[3]} channels")
        blocks = _whole_blocks(self.name, y.shape[2])
        fit = codec.fit if isinstance(codec, turbo.Turbo) else ""
        if y.dtype not in cpu.DTYPES or fit == "unbiased" or not cpu.available():
            return self.store(codec.encode(y))
        lengths = turbo.rms(mx.clip(y.astype(mx.float32), -FP16_MAX, FP16_MAX)) if fit else mx.zeros(0)
        mx.eval(y, lengths)
        x = cpu.rows_view(y)
        out = np.empty((*y.shape[:2], blocks, self.block_bytes), np.uint8)
        strides = [s // x.itemsize for s in x.strides[:3]]
        grid = cpu.Grid(*y.shape[:2], blocks, *strides, cpu.DTYPES[y.dtype], cpu.threads())
        given = cpu.view(lengths)
        form = self._format(fit == "norm")
        cpu.call("opentq_pack", form, grid, x.ctypes.data, given.ctypes.data, out.ctypes.data)
        return (mx.array(out),)

    def _format(self, norm: bool = False) -> cpu.Format:
        if self.group:
            return cpu.Format(self.bits, self.group, self.head_dim, self.kind == "v", cpu.AFFINE)
        cuts, (entries, step) = _cuts(self.bits, self.head_dim), book(self.bits, self.head_dim)
        values, dim = self.kind == "v", self.head_dim
        return cpu.Format(self.bits, dim, dim, values, cpu.BOOK, norm, cuts.ctypes.data, entries.ctypes.data, step)

    def view(self, where: tuple[int | None, int, int, int]) -> cpu.Packed:
        """What the kernels read: address and strides in bytes of batch, head and block."""
        if self.group:
            return cpu.Packed(*where, self.bits, self.group, self.head_dim, cpu.AFFINE)
        entries, step = book(self.bits, self.head_dim)
        # Sums of more than 128 products of keys would leave 32 bits; those of values run over 64 tokens.
        group = min(128, self.head_dim) if self.kind == "k" else self.head_dim
        return cpu.Packed(*where, self.bits, group, self.head_dim, cpu.BOOK, entries.ctypes.data, step)

    def __deepcopy__(self, memo: dict) -> CpuBlocks:
        return self


@functools.cache
def book(bits: int, dim: int) -> tuple[np.ndarray, float]:
    """A codebook as the kernels read it: 64 unsigned bytes, entry + 128, again and again; and the step of an entry."""
    entries, step = codebooks.integers(bits, dim)
    return np.resize(np.array(entries) + 128, 64).astype(np.uint8), step


@functools.cache
def _cuts(bits: int, dim: int) -> np.ndarray:
    """Boundaries between a codebook's entries."""
    return np.array(codebooks.boundaries(codebooks.sphere(bits, dim)), np.float32)


def planes(bits: int) -> tuple[tuple[int, int], ...]:
    """(width, first bit) of the planes in which codes of `bits` bits are stored."""
    low, high = packing.PLANES.get(bits, (bits, 0))
    return ((low, 0), (high, low)) if high else ((low, 0),)


def _whole_blocks(name: str, tokens: int) -> int:
    if tokens % TOKENS:
        raise ValueError(f"layout {name} holds blocks of {TOKENS} tokens; {tokens} tokens leave a part of one")
    return tokens // TOKENS


def store_numpy(layout: CpuBlocks, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Canonical arrays -> blocks."""
    batch, heads, tokens, _ = codes.shape
    n, dim, bits = tokens // TOKENS, layout.head_dim, layout.bits
    values = _unpack(codes.astype("<u4").view(np.uint8), dim, bits).reshape(batch, heads, n, TOKENS, dim)
    fields = np.empty((batch, heads, n, dim // 16, 16, 64), np.uint8)
    tile_axes = values.reshape(batch, heads, n, TOKENS, dim // 16, 16)
    if layout.kind == "k":  # [field: channels/4, tokens/16][lane: token][channel]
        by = tile_axes.reshape(batch, heads, n, 4, 16, dim // 16, 4, 4).transpose(0, 1, 2, 5, 6, 3, 4, 7)
    else:  # [field: token % 16][lane: channel][token / 16]
        by = tile_axes.reshape(batch, heads, n, 4, 16, dim // 16, 16).transpose(0, 1, 2, 5, 4, 6, 3)
    fields[...] = by.reshape(fields.shape)
    tiles = [_merge(_bits(fields, *plane), plane[0]).reshape(*fields.shape[:4], -1) for plane in planes(bits)]
    body = np.concatenate(tiles, axis=-1).reshape(batch, heads, n, layout.code_bytes)
    by_token = scales.reshape(batch, heads, n, TOKENS, layout.params).swapaxes(3, 4)
    params = np.ascontiguousarray(by_token, "<f2").reshape(batch, heads, n, -1).view(np.uint8)
    return np.concatenate([body, params], axis=-1)


def load_numpy(layout: CpuBlocks, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blocks -> canonical arrays."""
    batch, heads, n, _ = blocks.shape
    dim, bits = layout.head_dim, layout.bits
    tiles = blocks[..., : layout.code_bytes].reshape(batch, heads, n, dim // 16, 128 * bits)
    fields = np.zeros((*tiles.shape[:4], 16, 64), np.uint8)
    for width, first in planes(bits):
        fields |= _split(tiles[..., 128 * first : 128 * (first + width)], width) << first
    if layout.kind == "k":
        by = fields.reshape(batch, heads, n, dim // 16, 4, 4, 16, 4).transpose(0, 1, 2, 5, 6, 3, 4, 7)
    else:
        by = fields.reshape(batch, heads, n, dim // 16, 16, 16, 4).transpose(0, 1, 2, 6, 4, 3, 5)
    values = by.reshape(batch, heads, n * TOKENS, dim)
    rows = []
    for width, first in planes(bits):
        plane = np.pad(_bits(values, width, first), [(0, 0)] * 3 + [(0, -dim % (32 // width))])
        rows.append(_merge_row(plane, width).view("<u4"))
    params = np.ascontiguousarray(blocks[..., layout.code_bytes :]).view("<f2")
    by_token = params.reshape(batch, heads, n, layout.params, TOKENS).swapaxes(3, 4)
    return np.concatenate(rows, axis=-1), by_token.reshape(batch, heads, n * TOKENS, layout.params)


def _bits(values: np.ndarray, width: int, first: int) -> np.ndarray:
    return values >> first & ((1 << width) - 1)


def _merge(fields: np.ndarray, width: int) -> np.ndarray:
    """`[..., 16, 64]` codes -> `[..., 16 * width / 8, 64]`: field i goes into slot i % per of vector i / per."""
    per = 8 // width
    slots = fields.reshape(*fields.shape[:-2], 16 // per, per, 64)
    shifts = (np.arange(per, dtype=np.uint8) * width)[:, None]
    return np.bitwise_or.reduce(slots << shifts, axis=-2)


def _split(tile: np.ndarray, width: int) -> np.ndarray:
    """The inverse of `_merge`, from `[..., bytes]` to `[..., 16, 64]`."""
    per = 8 // width
    vectors = tile.reshape(*tile.shape[:-1], 16 // per, 1, 64)
    shifts = (np.arange(per, dtype=np.uint8) * width)[:, None]
    return ((vectors >> shifts) & ((1 << width) - 1)).reshape(*tile.shape[:-1], 16, 64)


def _merge_row(values: np.ndarray, width: int) -> np.ndarray:
    """Little-endian fields along the last axis -> bytes."""
    per = 8 // width
    slots = values.reshape(*values.shape[:-1], -1, per)
    return np.bitwise_or.reduce(slots << (np.arange(per, dtype=np.uint8) * width), axis=-1)


def _unpack(row: np.ndarray, dim: int, bits: int) -> np.ndarray:
    """One token's canonical bytes `[..., 4 * words]` -> codes `[..., dim]`."""
    if bits in packing.PLANES:
        low, high = packing.PLANES[bits]
        cut = 4 * packing.words(dim, low)
        return _unpack(row[..., :cut], dim, low) | _unpack(row[..., cut:], dim, high) << low
    per = 8 // bits
    fields = (row[..., None] >> (np.arange(per, dtype=np.uint8) * bits)) & ((1 << bits) - 1)
    return fields.reshape(*row.shape[:-1], -1)[..., :dim].astype(np.uint8)
