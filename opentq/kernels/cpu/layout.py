"""The CPU's storage layouts. Codes lie in blocks of 64 tokens in the order that byte dot products read them (described
bit by bit in blocks.h), one uint8 array `[B, H, T / 64, bytes]` for every run of codes, holding codes, scales and zeros
without padding. Codes are affine or those of codebooks.

The compiled kernels move whole buffers; blocks.py reads them where there is no compiler.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ...codecs import codebooks, packing
from ...codecs.rounding import lengths
from ...contracts.codec import Angles, Codebook, Codebooks, Codec, Format, Integers, Packed, WithOutliers
from ...contracts.shared import Shared
from . import library as cpu
from .blocks import TOKENS, load_numpy
from .outliers import CpuOutliers
from .polar import CpuPolar

Place = tuple[int | None, int, int, int]
"""Address, and strides in bytes of batch, head and block."""


@dataclass(frozen=True)
class CpuBlocks(Shared):
    """One run of codes, `dim` to a token, 64 tokens a block. `kind` is "k" or "v".

    `group` channels share a scale and a zero; 0 stands for a codebook, one scale a token.
    """

    kind: str
    bits: int
    group: int
    dim: int

    block = TOKENS

    @property
    def name(self) -> str:
        codes = f"b{self.bits}-g{self.group}" if self.group else f"t{self.bits}"
        return f"cpu64-{self.kind}-{codes}-d{self.dim}"

    @classmethod
    def named(cls, name: str) -> CpuBlocks | None:
        """The layout of that name, or None when it isn't one of these."""
        found = re.fullmatch(r"cpu64-([kv])-(?:b([2348])-g(32|64|128)|t([1-6]))-d(\d+)", name)
        if not found:
            return None
        kind, bits, group, book_bits, dim = found.groups()
        return cls(kind, int(bits or book_bits), int(group or 0), int(dim))

    @property
    def runs(self) -> tuple[CpuBlocks, ...]:
        return (self,)

    @property
    def params(self) -> int:
        """fp16 numbers of one token: scale and zero of every group, or the scale."""
        return 2 * -(-self.dim // self.group) if self.group else 1

    @property
    def code_bytes(self) -> int:
        return 8 * self.bits * self.dim

    @property
    def block_bytes(self) -> int:
        """Bytes of 64 tokens: the canonical number, without padding."""
        return self.code_bytes + 128 * self.params

    @property
    def words(self) -> int:
        """Canonical uint32 words of one token's codes."""
        return packing.words(self.dim, self.bits)

    def store(self, packed: Packed) -> tuple[mx.array, ...]:
        """`(codes [B,H,T,W], scales [B,H,T,params])` -> `[B,H,T/64,bytes]`; T must be a multiple of 64.

        Raises build.BuildError without a compiler: such machines store tokens as codecs made them.
        """
        codes, scales = (mx.contiguous(a) for a in packed)
        batch, heads, tokens, words = codes.shape
        if words != self.words or scales.shape[3] != self.params:
            raise ValueError(f"layout {self.name} can't hold {words} words and {scales.shape[3]} scales a token")
        blocks = _whole_blocks(self.name, tokens)
        mx.eval(codes, scales)
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
        """`store(codec.encode(y))` for `y [B,H,T,D]`, in one pass where codes are rounded coordinates; the same bits (a
        zero may differ in sign).
        """
        form = _checked(self, codec, y)
        packed = self.pack(y, *((form.books[0], form.fit) if isinstance(form, Codebooks) else ()))
        return self.store(codec.encode(y)) if packed is None else packed

    def pack(self, y: mx.array, book: Codebook | None = None, fit: str = "norm") -> tuple[mx.array, ...] | None:
        """The blocks of rotated vectors, by `book` and its fit or as integers; None where no kernel makes them."""
        blocks = _whole_blocks(self.name, y.shape[2])
        if not fit or y.dtype not in cpu.DTYPES or not cpu.available():
            return None
        sizes = lengths(y) if book else mx.zeros(0)
        mx.eval(y, sizes)
        x = cpu.rows_view(y)
        out = np.empty((*y.shape[:2], blocks, self.block_bytes), np.uint8)
        strides = [s // x.itemsize for s in x.strides[:3]]
        grid = cpu.Grid(*y.shape[:2], blocks, *strides, cpu.DTYPES[y.dtype], cpu.threads())
        given = cpu.view(sizes)
        form = self._format(book, fit == "norm")
        cpu.call("opentq_pack", form, grid, x.ctypes.data, given.ctypes.data, out.ctypes.data)
        return (mx.array(out),)

    def _format(self, book: Codebook | None = None, norm: bool = False) -> cpu.Format:
        """What the packing kernels read; its codebook, too, where they are to make codes."""
        values = self.kind == "v"
        if self.group:
            return cpu.Format(self.bits, self.group, self.dim, values, cpu.AFFINE)
        form = cpu.Format(self.bits, self.dim, self.dim, values, cpu.BOOK, norm)
        if book:
            form.book, form.step, form.cuts = _entries(book).ctypes.data, book.step, _cuts(book).ctypes.data
        return form

    def view(self, where: Place, book: Codebook | None) -> cpu.Packed:
        """What attention reads: where blocks lie, and the codebook."""
        if book is None:
            return cpu.Packed(*where, self.bits, self.group, self.dim, cpu.AFFINE)
        # Sums of more than 128 products of keys would leave 32 bits; those of values run over 64 tokens.
        group = min(128, self.dim) if self.kind == "k" else self.dim
        return cpu.Packed(*where, self.bits, group, self.dim, cpu.BOOK, _entries(book).ctypes.data, book.step)


@dataclass(frozen=True)
class CpuRuns(Shared):
    """Two runs of codebook codes of the same dim, an array of blocks for each."""

    runs: tuple[CpuBlocks, CpuBlocks]

    block = TOKENS

    @property
    def name(self) -> str:
        return "+".join(run.name for run in self.runs)

    @property
    def kind(self) -> str:
        return self.runs[0].kind

    def store(self, packed: Packed) -> tuple[mx.array, ...]:
        """`(codes, codes, scales [B,H,T,2])` -> two arrays `[B,H,T/64,bytes]`; T must be a multiple of 64."""
        *codes, scales = packed
        return tuple(run.store((c, scales[..., i : i + 1]))[0] for i, (run, c) in enumerate(zip(self.runs, codes)))

    def load(self, stored: tuple[mx.array, ...]) -> Packed:
        """The inverse of `store`, bit for bit."""
        codes, scales = zip(*(run.load((blocks,)) for run, blocks in zip(self.runs, stored)))
        return *codes, mx.concatenate(list(scales), axis=-1)

    def encode(self, codec: Codec, y: mx.array) -> tuple[mx.array, ...]:
        """`store(codec.encode(y))`, in one pass a run where runs are halves of the vector; the same bits."""
        form = _checked(self, codec, y)
        assert isinstance(form, Codebooks)
        parts = zip(self.runs, form.books, mx.split(y, len(self.runs), axis=-1) if form.fit else ())
        packed = [run.pack(part, book, form.fit) for run, book, part in parts]
        return tuple(p[0] for p in packed if p) if packed and all(packed) else self.store(codec.encode(y))


CpuLayout = CpuBlocks | CpuRuns | CpuPolar | CpuOutliers


def layout_for(kind: str, codec: Codec, head_dim: int) -> CpuLayout | None:
    """The layout for what `codec` makes, as keys "k" or values "v"; None when the kernels can't hold it."""
    return _layout_for(kind, codec.format(head_dim), head_dim)


def _layout_for(kind: str, form: Format | None, head_dim: int) -> CpuLayout | None:
    if isinstance(form, WithOutliers):
        inner = _layout_for(kind, form.inner, head_dim)
        return None if inner is None or isinstance(inner, CpuOutliers) else CpuOutliers(inner, form.count)
    if isinstance(form, Integers):
        return None if head_dim % 16 else CpuBlocks(kind, form.bits, form.group, head_dim)
    if isinstance(form, Angles):
        return None if head_dim % 16 else CpuPolar(head_dim)
    if not isinstance(form, Codebooks) or (form.sketched and kind == "v"):
        return None
    if any(book.dim % 16 for book in form.books):
        return None
    runs = tuple(CpuBlocks(kind, book.bits, 0, book.dim) for book in form.books)
    return CpuRuns((runs[0], runs[1])) if len(runs) == 2 else runs[0]


def layout_named(name: str) -> CpuLayout | None:
    """The layout of that name, or None when it isn't one of these."""
    if outliers := CpuOutliers.parts(name):
        inner = layout_named(outliers[0])
        return None if inner is None or isinstance(inner, CpuOutliers) else CpuOutliers(inner, outliers[1])
    runs = tuple(CpuBlocks.named(part) for part in name.split("+"))
    if len(runs) == 2 and runs[0] and runs[1]:
        return CpuRuns((runs[0], runs[1]))
    return CpuPolar.named(name) or (runs[0] if len(runs) == 1 else None)


@functools.cache
def _entries(book: Codebook) -> np.ndarray:
    """A codebook as the kernels read it: 64 unsigned bytes, entry + 128, again and again."""
    return np.resize(np.array(book.entries) + 128, 64).astype(np.uint8)


@functools.cache
def _cuts(book: Codebook) -> np.ndarray:
    """Boundaries between the entries."""
    return np.array(codebooks.boundaries(book.values), np.float32)


def _checked(layout: CpuBlocks | CpuRuns, codec: Codec, y: mx.array) -> Format | None:
    """The format of what `codec` makes of `y`; raises ValueError unless the layout holds it."""
    form = codec.format(y.shape[3])
    if _layout_for(layout.kind, form, y.shape[3]) != layout:
        raise ValueError(f"layout {layout.name} can't hold what codec {codec} makes of {y.shape[3]} channels")
    return form


def _whole_blocks(name: str, tokens: int) -> int:
    if tokens % TOKENS:
        raise ValueError(f"layout {name} holds blocks of {TOKENS} tokens; {tokens} tokens leave a part of one")
    return tokens // TOKENS
