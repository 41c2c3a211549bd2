"""Attention and appends as calls of Metal kernels, whose numbers are made once.

What is the same for all layers of a step (templates, grids, shapes, small arrays of numbers) belongs to a `Geometry`,
which layers share; what is the same in all steps of a layer (its packed arrays) to a `Launch`, which is kept beside
them. A layer's step is then three look-ups and three calls.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ...codecs import codebooks
from ...codecs.polar import LEVELS
from ...contracts.attention import Alike, AttnArgs, Lengths, PackedKV, lens_array
from ...contracts.backend import Pair
from ...contracts.codec import Angles, Codebooks, Codec, Halves, Integers
from ...contracts.ints import int_array
from ...contracts.layout import FLUSH
from .. import repeat
from . import launch as metal
from .launch import Format, Side

MATRIX_ROWS = 8
"""Query rows per KV head up to which the matrix kernel gives every simdgroup tokens of its own."""
MAX_DIM = 512
KEPT = 64
"""Steps that a geometry remembers: layers share them, and later steps have other lengths."""


class Call:
    """One kernel call without its inputs: the kernel, keywords of MLX's object for it, and its arrays of numbers."""

    __slots__ = ("given", "kept", "kernel", "made", "numbers", "sinks")

    def __init__(
        self, name: str, template: Sequence[tuple[str, Any]], given: dict[str, Any], numbers: tuple[mx.array, ...]
    ) -> None:
        self.kernel, self.given, self.numbers = (name, tuple(template)), given, numbers
        self.sinks = metal.KERNELS[name].inputs[-1] == "sinks"
        self.kept: Any = None

    def __call__(self, inputs: list[mx.array]) -> list[mx.array]:
        if self.kept is not metal.kernels:
            self.made, self.kept = repeat.repeated(metal.kernel(*self.kernel), self.given), metal.kernels
        return self.made(inputs)


class Geometry:
    """Calls of one kind of attention, whatever its lengths.

    Args:
        k, v: packed keys and values.
        alike: of the calls (`AttnArgs.alike`).
        heads: KV heads.
        capacity: rows of the packed arrays.
        turned: whether the output leaves a Hadamard basis.
        tune, cores: of the device.
    """

    def __init__(
        self, k: Side, v: Side, alike: Alike, heads: int, capacity: int, turned: bool, tune: metal.Tuning, cores: int
    ) -> None:
        (batch, q_heads, self.length, _), dtype, causal, window, listed, scale, softcap, sinks = alike
        self.k, self.v, self.dtype, self.tune, self.cores = k, v, dtype, tune, cores
        self.sinks, self.turned, self.q_heads = sinks, turned, q_heads
        self.out = batch, q_heads, self.length, v.dim
        self.rows, self.tiles = q_heads // heads * self.length, batch * heads
        self.lanes = self.rows <= metal.lane_rows(k, v) and tune.variant == "lanes"
        self.listed = listed
        self.meta = (self.length, q_heads // heads, heads), (capacity, window, int(causal), listed)
        self.real = floats((scale, softcap))
        self.template = [
            *(("T", dtype), ("KF", int(k.format)), ("KG", k.group), ("VF", int(v.format)), ("VG", v.group)),
            *(("KF2", int(k.second)), ("VF2", int(v.second)), ("DK", k.dim), ("DV", v.dim)),
            *(("KE", k.width), ("QE", k.query), ("WIN", bool(window)), ("CAP", bool(softcap))),
        ]
        self.known: dict[tuple[int, tuple[Lengths, ...]], tuple[Call, Call | None, mx.array]] = {}
        self.appends: dict[tuple, Call] = {}  # by columns, whether keys are centred, and what is rotated
        self.new = False

    def calls(self, columns: int, lens: tuple[Lengths, ...]) -> tuple[Call, Call | None, mx.array]:
        """Attention over so many fp16 columns and packed tokens; what merges its splits, where there are several; and
        the lengths as kernels take them.
        """
        if len(self.known) >= KEPT:
            self.known.clear()
        longest = max(packed for packed, _, _ in lens)
        read = min(longest, FLUSH * self.listed) if self.listed else longest
        meta = int_array((*self.meta[0], columns, *self.meta[1]))
        make = self._in_lanes if self.lanes else self._in_matrices
        call, merge = make(columns + read, (meta, self.real))
        made = self.known[columns, lens] = call, merge, lens_array(lens)
        kinds = {c.kernel for c in (call, merge) if c}
        self.new = not kinds <= _pipelines
        _pipelines.update(kinds)
        return made

    def _in_lanes(self, tokens: int, numbers: tuple[mx.array, mx.array]) -> tuple[Call, Call | None]:
        """Partials `[rows, splits, Dv + 2]` float32, (max, sum) last, rows = B * Hq * L; where a threadgroup has all
        keys of its rows, the output `[B, Hq, L, Dv]` before them.
        """
        plan = metal.plan_decode(self.k, self.v, self.rows, self.tiles, tokens, self.tune, self.cores, self.listed > 0)
        splits, threads = plan.splits * plan.teams, 32 * plan.members * plan.teams
        template = [("R", plan.rows), ("KPL", plan.keys), ("DS", plan.members), ("NT", plan.teams)]
        template += [("SUB", plan.handover), ("LISTED", self.listed > 0)]
        given = self._given(splits, mx.float32, (threads, plan.splits, self.tiles), threads)
        if plan.splits > 1:
            return Call("decode_lanes", [*self.template, *template], given, numbers), self._merge(splits)
        given["output_shapes"].insert(0, self.out)
        given["output_dtypes"].insert(0, self.dtype)
        template += [("SINK", self.sinks), ("ROT", self.turned)]
        return Call("decode_whole", [*self.template, *template], given, numbers), None

    def _in_matrices(self, tokens: int, numbers: tuple[mx.array, mx.array]) -> tuple[Call, Call | None]:
        """The same, or where there is one split the output `[B, Hq, L, Dv]` itself."""
        own, wide = self.rows <= MATRIX_ROWS, self.dtype == mx.float32
        plan = metal.plan_matrix(self.k, self.v, self.rows, self.tiles, tokens, own, wide, self.tune, self.cores)
        splits, threads = plan.splits * (plan.simdgroups if own else 1), 32 * plan.simdgroups
        final = splits == 1
        kind = self.dtype if final else mx.float32
        template: list[tuple[str, Any]] = [("TT", mx.float32 if wide else mx.float16), ("OT", kind)]
        template += [("TK", plan.tile), ("NSG", plan.simdgroups), ("OWN", own), ("FINAL", final)]
        template += [("SINK", self.sinks)]
        grid = threads, plan.splits, self.tiles * plan.row_tiles
        given = self._given(splits, kind, grid, threads, final)
        call = Call("matrix", [*self.template, *template], given, numbers)
        return call, None if final else self._merge(splits)

    def _given(
        self, splits: int, kind: mx.Dtype, grid: tuple[int, int, int], threads: int, final: bool = False
    ) -> dict[str, Any]:
        rows = math.prod(self.out[:3])
        return {
            "grid": grid,
            "threadgroup": (threads, 1, 1),
            "output_shapes": [self.out if final else (rows, splits, self.v.dim + 2)],
            "output_dtypes": [kind],
        }

    def _merge(self, splits: int) -> Call:
        """Splits to the output `[B, Hq, L, Dv]`."""
        capacity = 1 << max(5, (splits - 1).bit_length())
        template = [("T", self.dtype), ("DV", self.v.dim), ("SPLITS", capacity)]
        template += [("SINK", self.sinks), ("ROT", self.turned)]
        given = {
            "grid": (math.prod(self.out[:3]) * 128, 1, 1),
            "threadgroup": (128, 1, 1),
            "output_shapes": [self.out],
            "output_dtypes": [self.dtype],
        }
        return Call("merge", template, given, (int_array((splits, self.length, self.q_heads)),))


_pipelines: set[tuple[str, metal.Template]] = set()
"""Kernels that this process has called."""

_geometry = functools.lru_cache(maxsize=256)(Geometry)


class Launch:
    """Calls over packed arrays that do not change: what is the same in every step is made once.

    `rotated`: of a decode step, whether it rotates keys and values; else queries are given rotated, columns whole.
    """

    def __init__(self, args: AttnArgs, k: Side, v: Side, rotated: tuple[bool, bool] | None, tune: metal.Tuning) -> None:
        self.rotated, self.codec = rotated, args.v.codec
        self.sketch = k.sketch
        rows = args.k.arrays[0].shape[2] if args.k.arrays else 0
        turned = bool(rotated and rotated[1])
        self.geometry: Geometry = _geometry(k, v, args.alike, args.kv_heads, rows, turned, tune, metal.cores())
        self.packed = [array for kv in (args.k, args.v) for array in packed_arrays(kv)]
        self.no_halves, self.no_sinks, self.no_pages = (nothing(t) for t in (mx.float16, mx.float32, mx.int32))
        self.books = books(args.k.codec, args.k.head_dim, args.v.codec, args.v.head_dim)

    def attend(self, args: AttnArgs) -> mx.array:
        """`[B, Hq, L, Dv]` in q's dtype."""
        # Contiguous as they are, unless a caller sliced them.
        q, k, v = (mx.contiguous(x) for x in (args.q, args.dense_k, args.dense_v))
        return self._attend(args, q, k, v, k.shape[2])

    def step(self, args: AttnArgs, fresh: Pair, center: mx.array | None) -> tuple[mx.array, mx.array, mx.array]:
        """The output, rotated back, and the columns with the new tokens behind them."""
        dense_k, dense_v, geometry = args.dense_k, args.dense_v, self.geometry
        columns, centred = dense_k.shape[2], center is not None
        call = geometry.appends.get((columns, centred, self.rotated)) or self._appends(args, fresh, centred)
        if not columns:
            dense_k = dense_v = self.no_halves
        inputs = [args.q, *fresh, dense_k, dense_v, center if centred else self.no_halves, *call.numbers]
        q, k, v = call(inputs)
        return self._attend(args, q, k, v, columns + geometry.length), k, v

    def _appends(self, args: AttnArgs, fresh: Pair, centred: bool) -> Call:
        assert self.rotated is not None
        shape, known = args.dense_k.shape, self.geometry.appends
        if len(known) >= KEPT:
            known.clear()
        made = append_call(args.q.shape, args.q.dtype, shape, args.v.head_dim, fresh[0].shape[2], self.rotated, centred)
        known[shape[2], centred, self.rotated] = made
        return made

    def _attend(self, args: AttnArgs, q: mx.array, dense_k: mx.array, dense_v: mx.array, columns: int) -> mx.array:
        geometry = self.geometry
        call, merge, lens = geometry.known.get((columns, args.lens)) or geometry.calls(columns, args.lens)
        if self.sketch:  # behind a query its sketch, where packed keys are the codes of one
            q = mx.concatenate([q, args.k.codec.project(q)[..., -self.sketch :]], axis=-1)
        sinks = self.no_sinks if args.sinks is None else args.sinks.astype(mx.float32)
        inputs = [q, *self.packed, dense_k, dense_v, lens, *call.numbers, self.books]
        if geometry.lanes:
            inputs.append(self.no_pages if args.pages is None else args.pages)
        if call.sinks:
            inputs.append(sinks)
        out = call(inputs)[0]
        if merge is not None:
            out = merge([out, sinks, *merge.numbers])[0]
        elif geometry.turned and not geometry.lanes:
            out = self.codec.unrotate(out)
        if geometry.new:  # waited for, so that a pipeline that can't be made fails here, where others can serve
            geometry.new = False
            mx.eval(out)
        return out


def append(
    q: mx.array, rotated: tuple[bool, bool], dense: Pair, fresh: Pair, center: mx.array | None
) -> tuple[mx.array, mx.array, mx.array]:
    """`q [..., Dk]` rotated, and the fp16 columns with `fresh` behind them, `center` taken off new keys."""
    dense_k, dense_v = dense
    shape, v_dim = dense_k.shape, dense_v.shape[3]
    call = append_call(q.shape, q.dtype, shape, v_dim, fresh[0].shape[2], rotated, center is not None)
    if not shape[2]:
        dense_k = dense_v = nothing(mx.float16)
    queries, k, v = call(
        [q, *fresh, dense_k, dense_v, nothing(mx.float16) if center is None else center, *call.numbers]
    )
    return queries, k, v


@functools.lru_cache(maxsize=KEPT)
def append_call(
    q: tuple[int, ...],
    dtype: mx.Dtype,
    dense: tuple[int, ...],
    v_dim: int,
    length: int,
    rotated: tuple[bool, bool],
    centred: bool,
) -> Call:
    batch, heads, columns, k_dim = dense
    rows, queries = batch * heads, math.prod(q) // k_dim
    tasks = 2 * rows * (columns + length) + queries
    template = [("T", dtype), ("DK", k_dim), ("DV", v_dim), *zip(("RK", "RV"), rotated), ("CENTER", centred)]
    given = {
        "grid": (-(-tasks // 4) * 128, 1, 1),
        "threadgroup": (128, 1, 1),
        "output_shapes": [q, *((batch, heads, columns + length, dim) for dim in (k_dim, v_dim))],
        "output_dtypes": [dtype, mx.float16, mx.float16],
    }
    return Call(
        "append", template, given, (int_array((length, columns, rows, queries)), floats((k_dim**-0.5, v_dim**-0.5)))
    )


def side(kv: PackedKV) -> Side | None:
    """What the kernels need to know of packed keys or values, or None where they do not serve."""
    if kv.layout.name != "canonical" or kv.head_dim % 16 or kv.head_dim > MAX_DIM:
        return None
    return codec_side(kv.codec, kv.head_dim)


@functools.lru_cache(maxsize=256)
def codec_side(codec: Codec, dim: int) -> Side | None:
    """The `Side` of keys or values of `dim` channels, or None."""
    form = codec.format(dim)
    if isinstance(form, Integers):
        return Side(Format.integers(form.bits), min(form.group, dim), dim)
    if isinstance(form, Halves):
        return Side(Format.HALF, dim, dim)
    if isinstance(form, Angles):
        return Side(Format.POLAR, dim, dim)
    if isinstance(form, Codebooks):
        formats, run = [Format.book(book.bits) for book in form.books], form.books[0].dim
        packed, sketch = run * len(form.books), sum(book.dim for book in form.books if book.sketch)
        if packed <= MAX_DIM and dim + sketch <= metal.MAX_QUERY:
            return Side(formats[0], run, dim, formats[1] if formats[1:] else Format.NONE, sketch, packed)
    return None


def packed_arrays(kv: PackedKV) -> Sequence[mx.array]:
    """Codes, those of a second run, and scales; a buffer of no rows has no memory, and the kernel reads none of it."""
    if not (kv.arrays and kv.arrays[0].size):
        return nothing(mx.uint32), nothing(mx.uint32), nothing(mx.float16)
    more = kv.arrays[1] if len(kv.arrays) == 3 else nothing(mx.uint32)
    return kv.arrays[0], more, kv.arrays[-1]  # of the raw codec, which has no scales, the values twice


@functools.lru_cache(maxsize=64)
def books(k_codec: Codec, k_dim: int, v_codec: Codec, v_dim: int) -> mx.array:
    """Two books of keys and two of values, float32 `[128]`: what 32 lanes hold of each, zeros where there is none."""
    entries: list[float] = []
    for form in (k_codec.format(k_dim), v_codec.format(v_dim)):
        tables: tuple[tuple[float, ...], ...] = ()
        if isinstance(form, Angles):
            tables = _circles()
        elif isinstance(form, Codebooks):  # of 64 entries the upper half
            tables = tuple(book.values[-metal.LANES :] for book in form.books)
        for table in (*tables, (0.0,), (0.0,))[:2]:
            entries += (table * metal.LANES)[: metal.LANES]
    return mx.array(entries, dtype=mx.float32)


@functools.cache
def _circles() -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The polar codec's angles: cosines and sines of level 1; cosines of levels 4 times 3, then of level 2."""
    angles = [codebooks.angle(bits, level) for level, bits in enumerate(LEVELS, 1)]
    one, two, three, four = [[math.cos(a) for a in level] for level in angles]
    return (*one, *map(math.sin, angles[0])), (*(a * b for a in four for b in three), *two)


@functools.lru_cache(maxsize=64)
def floats(values: tuple[float, ...]) -> mx.array:
    return mx.array(values, dtype=mx.float32)


@functools.cache
def nothing(dtype: mx.Dtype, size: int = 16) -> mx.array:
    return mx.zeros((size,), dtype=dtype)
