"""Attention on Apple GPUs, on compressed bytes: decode in two kernels (splits, merge), prefill in one."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ...codecs import codebooks
from ...codecs.packing import words
from ...codecs.rounding import lengths
from ...contracts.attention import AttnArgs
from ...contracts.backend import Backend, Pair, StepFn
from ...contracts.check import Check
from ...contracts.codec import Codebook, Codebooks, Codec, Integers
from ...contracts.ints import int_array
from ...contracts.layout import Canonical, Layout
from .. import repeat
from . import launch as metal
from .decode import MAX_DIM, Call, Launch, append, codec_side, nothing, side
from .launch import Format
from .pages import choose, top, weigh

__all__ = ["BACKEND", "append", "attend", "codec_side", "extend", "layouts", "pack", "pack_book", "side", "step"]


def attend(args: AttnArgs) -> mx.array | None:
    """`[B, Hq, L, Dv]` in q's dtype, or None: an explicit mask, a codec or a head dim that the kernels do not know; or
    pages, where simdgroup matrices serve."""
    if args.mask is not None:
        return None
    tune = metal.tuning()
    launch = args.once(("attend", tune, args.alike), lambda: _launch(args, False, tune))
    return None if launch is None else launch.attend(args)


def step(args: AttnArgs, fresh: Pair, center: mx.array | None) -> StepFn | None:
    """Decode steps (`contracts.backend.Backend.step`): one launch appends and rotates, two attend and rotate back."""
    launch = _launch(args, True, metal.tuning())
    return None if launch is None else launch.step


def _launch(args: AttnArgs, stepping: bool, tune: metal.Tuning) -> Launch | None:
    if args.mask is not None or args.q.shape[2] == 0:
        return None
    k, v = side(args.k), side(args.v)
    if k is None or v is None or v.sketch:
        return None
    codecs = args.k.codec, args.v.codec
    if stepping and not appends(codecs, (k.dim, v.dim)):
        return None
    launch = Launch(args, k, v, rotated(codecs) if stepping else None, tune)
    return None if args.pages is not None and not launch.geometry.lanes else launch


def extend(codecs: Pair, dense: Pair, fresh: Pair) -> Pair | None:
    """fp16 columns `[B, H, Td + L, D]`: new keys and values, rotated, behind the old ones, in one launch; or None."""
    if not appends(codecs, (dense[0].shape[3], dense[1].shape[3])):
        return None
    _, k, v = append(nothing(mx.float16, dense[0].shape[3]), rotated(codecs), dense, fresh, None)
    return k, v


@functools.lru_cache(maxsize=64)
def appends(codecs: Pair, dims: tuple[int, int]) -> bool:
    """Whether the append kernel knows the bases of keys and values."""
    for codec, dim in zip(codecs, dims):
        if dim % 32 or dim > MAX_DIM or codec.basis not in ("none", "hadamard"):
            return False
        if codec.basis == "hadamard" and dim & (dim - 1):
            return False
    return True


def rotated(codecs: Pair) -> tuple[bool, bool]:
    """Of keys and of values, whether the append kernel rotates them."""
    return codecs[0].basis == "hadamard", codecs[1].basis == "hadamard"


def layouts(k_codec: Codec, v_codec: Codec, dims: tuple[int, int]) -> tuple[Layout, Layout]:
    """The canonical format for keys and values: what the kernels read. Blocks are packed by the pack kernel."""
    return PACKED, PACKED


class _Packed(Canonical):
    """One row per token, written by a pack kernel where there is one."""

    def encode(self, codec: Codec, y: mx.array) -> tuple[mx.array, ...]:
        form = codec.format(y.shape[-1]) if y.size else None
        if isinstance(form, Integers):
            return pack(form, y)
        return pack_book(form, y) if isinstance(form, Codebooks) and form.fit else codec.encode(y)


PACKED = _Packed()


def pack(form: Integers, y: mx.array) -> tuple[mx.array, mx.array]:
    """Rotated vectors `[B, H, T, D]` -> packed arrays of this format, in one kernel."""
    call = _pack(form, y.shape)
    codes, scales = call([mx.contiguous(y), *call.numbers])
    return codes, scales


@functools.lru_cache(maxsize=64)
def _pack(form: Integers, shape: tuple[int, ...]) -> Call:
    *lead, dim = shape
    group = min(form.group, dim)
    template = ("FORMAT", int(Format.integers(form.bits))), ("GROUP", group), ("D", dim)
    return _packs("pack", template, lead, (words(dim, form.bits), 2 * -(-dim // group)))


def pack_book(form: Codebooks, y: mx.array) -> tuple[mx.array, ...]:
    """Rotated vectors `[B, H, T, D]` -> packed arrays of this format, in one kernel behind the lengths."""
    y, call = mx.contiguous(y), _pack_book(form, y.shape)
    codes, scales = call([y, lengths(y, len(form.books)), *_cuts(form.books), *call.numbers])
    if len(form.books) == 1:
        return codes, scales
    return *mx.split(codes, [words(form.books[0].dim, form.books[0].bits)], axis=-1), scales


@functools.lru_cache(maxsize=64)
def _pack_book(form: Codebooks, shape: tuple[int, ...]) -> Call:
    bits, dim = [book.bits for book in form.books], form.books[0].dim
    template = (
        ("FORMAT", int(Format.book(bits[0]))),
        ("FORMAT2", int(Format.book(bits[1]) if bits[1:] else Format.NONE)),
        ("N", dim),
        ("NORM", form.fit == "norm"),
    )
    return _packs("pack_book", template, shape[:-1], (sum(words(dim, b) for b in bits), len(bits)))


def _packs(name: str, template: Sequence[tuple[str, Any]], lead: Sequence[int], sizes: tuple[int, int]) -> Call:
    """A call that packs vectors of shape `[*lead, D]` into so many words and scales each."""
    tokens = math.prod(lead)
    given = {
        "grid": (-(-tokens // 4) * 128, 1, 1),
        "threadgroup": (128, 1, 1),
        "output_shapes": [(*lead, size) for size in sizes],
        "output_dtypes": [mx.uint32, mx.float16],
    }
    return Call(name, template, given, (int_array((tokens,)),))


@functools.lru_cache(maxsize=64)
def _cuts(books: tuple[Codebook, ...]) -> tuple[mx.array, mx.array]:
    """Of each book 63 boundaries, ascending, and its step, float32 `[64]`; and its entries, float32 `[64]`."""
    cuts: list[float] = []
    entries: list[float] = []
    for book in books:
        boundaries = codebooks.boundaries(book.values)
        cuts += (*boundaries, *[0.0] * (63 - len(boundaries)), book.step)
        entries += (*map(float, book.entries), *[0.0] * (64 - len(book.entries)))
    return mx.array(cuts, dtype=mx.float32), mx.array(entries, dtype=mx.float32)


def checks() -> list[Check]:
    """What `opentq doctor` says about the kernels."""
    return [Check("kernels", "ok", "Metal, compiled on first use"), repeat.check()]


BACKEND = Backend(
    *("metal", mx.metal.is_available, attend, layouts),
    extend=extend,
    step=step,
    choose=choose,
    checks=checks,
    sums=True,
    weigh=weigh,
    top=top,
)
