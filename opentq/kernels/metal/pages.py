"""Which pages a decode step reads: their weights by packed keys, in one launch of weigh.metal."""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx

from ...contracts.attention import Alike, AttnArgs, lens_array
from ...contracts.ints import int_array
from ...contracts.layout import FLUSH
from . import launch as metal
from .decode import Call, books, floats, nothing, packed_arrays, side
from .launch import Side


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
    q = mx.contiguous(args.projected)
    return call([q, *packed_arrays(args.k), lens_array(args.lens), *call.numbers, tables, pages])[0]


@functools.lru_cache(maxsize=256)
def _weigh(k: Side, alike: Alike, heads: int, capacity: int, count: int, tune: metal.Tuning, cores: int) -> Call:
    (batch, q_heads, length, _), dtype, _, _, listed, scale, softcap, _ = alike
    rows, most = q_heads // heads * length, metal.lane_rows(k, k)
    tile = next(r for r in (1, 2, 4, 8, 16) if r >= min(rows, most))
    row_tiles, teams = -(-rows // tile), tune.teams
    splits = max(1, cores * tune.simdgroups // (batch * heads * row_tiles * teams))
    template: list[tuple[str, Any]] = [
        ("T", dtype),
        ("KF", int(k.format)),
        ("KG", k.group),
        ("KF2", int(k.second)),
        ("KE", k.width),
    ]
    template += [("R", tile), ("NT", teams), ("CAP", bool(softcap)), ("LISTED", bool(listed))]
    given = {
        "grid": (32 * teams * row_tiles, min(splits, -(-count // teams)), batch * heads),
        "threadgroup": (32 * teams, 1, 1),
        "output_shapes": [(batch, heads, rows, count)],
        "output_dtypes": [mx.float32],
    }
    return Call("weigh", template, given, (int_array((rows, heads, capacity, count)), floats((scale, softcap))))
