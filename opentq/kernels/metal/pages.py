"""Which pages a decode step reads: by sketches (sketches.metal, pick.metal), and weights by keys (weigh.metal)."""

from __future__ import annotations

import functools

import mlx.core as mx

from ...contracts.attention import Alike, AttnArgs, lens_array
from ...contracts.ints import int_array
from ...contracts.layout import FLUSH
from ..sketches import shape_of
from . import launch as metal
from .decode import Call, books, floats, nothing, packed_arrays, side
from .launch import Side

MAX_CHANNELS, MAX_DIM = 32, 512
"""Channels of two tokens, and of the mean, that a lane keeps in registers."""
PICKING = 8
"""Simdgroups that pick the pages of a KV head."""


def weigh(args: AttnArgs) -> mx.array | None:
    """Weights of the pages of `args.pages`, or of all (`attention.pages.weigh`); None for codecs, head dims and windows
    that the kernel does not know."""
    k = side(args.k)
    if k is None or args.window or not args.max_packed:
        return None
    count, rows = args.listed or -(-args.max_packed // FLUSH), args.k.arrays[0].shape[2]
    call = _weigh(k, args.alike, args.kv_heads, rows, count, metal.tuning(), metal.cores())
    tables = books(args.k.codec, args.k.head_dim, args.v.codec, args.v.head_dim)
    pages = nothing(mx.int32) if args.pages is None else args.pages
    return call([args.projected, *packed_arrays(args.k), lens_array(args.lens), *call.numbers, tables, pages])[0]


@functools.lru_cache(maxsize=256)
def _weigh(k: Side, alike: Alike, heads: int, capacity: int, count: int, tune: metal.Tuning, cores: int) -> Call:
    (batch, q_heads, length, _), dtype, _, _, listed, scale, softcap, _ = alike
    rows = q_heads // heads * length
    tile, row_tiles = _tiles(rows, metal.lane_rows(k, k))
    template = [
        *(("T", dtype), ("KF", int(k.format)), ("KG", k.group), ("KF2", int(k.second)), ("KE", k.width)),
        *(("R", tile), ("NT", tune.teams), ("CAP", bool(softcap)), ("LISTED", bool(listed))),
    ]
    given = {
        "grid": _grid(batch * heads, row_tiles, count, tune, cores),
        "threadgroup": (32 * tune.teams, 1, 1),
        "output_shapes": [(batch, heads, rows, count)],
        "output_dtypes": [mx.float32],
    }
    return Call("weigh", template, given, (int_array((rows, heads, capacity, count)), floats((scale, softcap))))


def choose(sketches: mx.array, rows: mx.array, packed: tuple[int, ...], count: int) -> mx.array | None:
    """The `count` pages of most weight, int32 `[B, Hkv, count]` (`attention.pages.Selector.choose`), in two launches;
    None for sizes that the kernels do not know.

    Args:
        sketches: uint8 `[B, Hkv, pages, C * 34 + D + 2]`.
        rows: scaled queries, float32 `[B, Hkv, R, C + D]`.
        packed: packed tokens of every sequence.
    """
    channels, dim = shape_of(sketches.shape[3], rows.shape[3])
    if channels > MAX_CHANNELS or dim > MAX_DIM or dim % 2:
        return None
    shape = *rows.shape[:3], max(packed) // FLUSH
    call = _by_sketches(shape, channels, dim, sketches.shape[2], metal.tuning(), metal.cores())
    return top(call([sketches, rows, *call.numbers])[0], packed, count)


@functools.lru_cache(maxsize=256)
def _by_sketches(shape: tuple[int, ...], channels: int, dim: int, held: int, tune: metal.Tuning, cores: int) -> Call:
    batch, heads, rows, pages = shape
    tile, row_tiles = _tiles(rows, 16 if 64 * (channels + dim) <= metal.THREADGROUP_BYTES else 8)
    given = {
        "grid": _grid(batch * heads, row_tiles, pages, tune, cores),
        "threadgroup": (32 * tune.teams, 1, 1),
        "output_shapes": [shape],
        "output_dtypes": [mx.float32],
    }
    template = [("C", channels), ("D", dim), ("R", tile), ("NT", tune.teams)]
    return Call("sketches", template, given, (int_array((rows, held, pages)),))


def top(weights: mx.array, packed: tuple[int, ...], count: int) -> mx.array:
    """`attention.pages.top` in one launch: weights float32 `[B, Hkv, R, pages]` -> int32 `[B, Hkv, count]`."""
    call = _top(weights.shape, count)
    return call([weights, int_array(packed), *call.numbers])[0]


@functools.lru_cache(maxsize=256)
def _top(shape: tuple[int, ...], count: int) -> Call:
    batch, heads, rows, pages = shape
    given = {
        "grid": (32 * PICKING, batch * heads, 1),
        "threadgroup": (32 * PICKING, 1, 1),
        "output_shapes": [(batch, heads, count), (batch * heads, pages)],
        "output_dtypes": [mx.int32, mx.float32],
    }
    return Call("pick", [("NS", PICKING)], given, (int_array((rows, heads, pages, count)),))


def _tiles(rows: int, most: int) -> tuple[int, int]:
    """Query rows of a threadgroup, a power of two up to `most`, and how many such tiles there are."""
    tile = next(r for r in (1, 2, 4, 8, 16) if r >= min(rows, most))
    return tile, -(-rows // tile)


def _grid(heads: int, row_tiles: int, pages: int, tune: metal.Tuning, cores: int) -> tuple[int, int, int]:
    """Threads that keep the device busy, `tune.teams` simdgroups a threadgroup, a page each at least."""
    splits = max(1, cores * tune.simdgroups // (heads * row_tiles * tune.teams))
    return 32 * tune.teams * row_tiles, min(splits, -(-pages // tune.teams)), heads
