"""Fused attention on NVIDIA GPUs: packed keys and values are read once, where they lie.

Decode and short blocks (and everything the second way can't take) go through `decode.cu`: one launch, whatever
the head dims, widths, windows, sinks and lengths. A prompt chunk of many rows is bound by arithmetic, and there the
vendor's fp16 kernel is the best there is: a quarter of the KV heads of this one layer is laid out in fp16, attended,
and dropped, with one quarter in work and the next one asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import mlx.core as mx

from ...contracts.attention import Alike, AttnArgs, Lengths, lens_array
from ...contracts.backend import Backend, Pair, StepFn, Stepped
from ...contracts.check import Check
from ...contracts.codec import Codec, Halves
from .. import repeat
from . import launch as cuda
from . import pages
from .geometry import Fused, Geometry
from .layout import RECORD, MmaLayout, layout_named, layouts

AT_ONCE = 160 << 20
"""Bytes of unpacked keys and values up to which a layer's heads are attended together: some 39,000 tokens of 8 heads of
128 channels, half of what two quarters of 128K take."""

SERVED = (mx.float16, mx.bfloat16)

PREFILL_ROWS = 64
"""Query tokens from which laying out fp16 pays."""


def attend(args: AttnArgs) -> mx.array | None:
    """`[B, Hq, L, Dv]` in q's dtype, or None: not a GPU, an array mask, a codec without a kernel, fp32 queries.

    Tensor cores multiply fp16; two fp16 parts per query are 22 bits, and the error rule asks for more of fp32.
    """
    if not cuda.available() or args.mask is not None or args.q.dtype not in SERVED:
        return None
    if not (isinstance(args.k.layout, MmaLayout) and isinstance(args.v.layout, MmaLayout)):
        return None
    if prefers_prefill(args) and args.pages is None:
        return prefill(args)
    return decode(args)


def extend(
    codecs: tuple[Codec, Codec], dense: tuple[mx.array, mx.array], fresh: tuple[mx.array, mx.array]
) -> tuple[mx.array, mx.array] | None:
    """Columns of keys and values with new vectors behind them, rotated as codecs do, or None: another rotation."""
    rotated = tuple(hadamard(codec, d.shape[-1]) for codec, d in zip(codecs, dense))
    if not cuda.available() or None in rotated or fresh[0].dtype != fresh[1].dtype:
        return None
    return cuda.extend(bool(rotated[0]), bool(rotated[1]), dense, fresh)


@functools.lru_cache(maxsize=64)
def hadamard(codec: Codec, dim: int) -> bool | None:
    """Whether `codec` applies the kernels' rotation to vectors of `dim` channels; None for any other rotation."""
    if codec.format(dim) == Halves():  # which no kernel here reads
        return None
    return {"none": False, "hadamard": True if cuda.rotates(dim) else None}.get(codec.basis)


def prefers_prefill(args: AttnArgs) -> bool:
    """Whether the vendor's kernel can attend the unpacked heads: long blocks, no window, no softcap, D up to 128."""
    return (
        args.q.shape[2] >= PREFILL_ROWS
        and not args.window
        and not args.softcap
        and max(args.k.head_dim, args.v.head_dim) <= 128
    )


def step(args: AttnArgs, fresh: Pair, center: mx.array | None) -> StepFn | None:
    """Whole decode steps in one launch each (`contracts.backend.Backend.step`): queries rotated, new tokens appended,
    attention, the output turned back.

    None for what `attend` does not serve in one launch, rotations that are no Hadamard transform, sketches, and more
    than eight tokens at once.
    """
    k, v, q = args.k, args.v, args.q
    turned = hadamard(k.codec, k.head_dim), hadamard(v.codec, v.head_dim)
    if not cuda.available() or q.dtype not in SERVED or None in turned or q.shape[2] > Fused.LENGTH:
        return None
    if not (isinstance(k.layout, MmaLayout) and isinstance(v.layout, MmaLayout)) or k.layout.sketched:
        return None
    if args.mask is not None or any(x.dtype != q.dtype for x in fresh):
        return None
    fused = Fused(True, bool(turned[0]), bool(turned[1]), args.pages is not None, args.softcap > 0)
    return Launch(args, fused, center is not None).step


KEPT = 64
"""Calls that launches of one kind remember: layers share them, and later steps have other lengths."""


class Call(NamedTuple):
    """One launch without what is a layer's own: blocks, outputs, scalars, and inputs that layers share."""

    grid: tuple[int, int, int]
    outputs: list[tuple[tuple[int, ...], mx.Dtype]]
    scalars: cuda.Scalars
    lens: mx.array
    tickets: Iterator[mx.array]


class Launches:
    """Decode launches of one kind, which layers share.

    Args:
        k, v: layouts.
        fused: what only some launches do.
        alike: of the calls (`AttnArgs.alike`).
        kv_heads: KV heads.
        blocks: of packed keys and values, allocated.
        centered: whether a center comes with the call.
    """

    def __init__(
        self,
        k: MmaLayout,
        v: MmaLayout,
        fused: Fused,
        alike: Alike,
        kv_heads: int,
        blocks: tuple[int, int],
        centered: bool,
    ):
        shape, dtype, causal, window, listed, scale, softcap, _ = alike
        self.batch, self.heads, self.length, _ = shape
        self.kv_heads, self.dtype, self.window, self.listed = kv_heads, dtype, window, listed
        self.rows = self.heads // kv_heads * self.length
        self.geometry = Geometry.choose(k, v, cuda.CTYPES[dtype], self.rows, fused)
        self.scalars = blocks, (self.heads, kv_heads, self.length, window, int(causal))
        self.floats = cuda.single(scale), cuda.single(softcap), int(centered), listed
        self.known: dict[tuple[int, tuple[Lengths, ...]], tuple[Call, repeat.Call]] = {}

    @functools.cached_property
    def kernel(self) -> cuda.Kernel:
        return cuda.compiled(self.geometry.source())

    def made(self, held: int, lens: tuple[Lengths, ...]) -> tuple[Call, repeat.Call]:
        """The call over `held` dense columns and packed tokens, and what makes it of its inputs."""
        if len(self.known) >= KEPT:
            self.known.clear()
        call = self.call(held, lens)
        made = self.known[held, lens] = call, self.kernel.repeated(call.outputs, call.scalars, call.grid)
        return made

    def call(self, held: int, lens: tuple[Lengths, ...], splits: int = 0) -> Call:
        """Of so many blocks per row tile; 0: of as many as are best."""
        geometry, longest = self.geometry, max(packed for packed, _, _ in lens)
        columns = held + (self.length if geometry.fused.append else 0)
        if not splits:
            tiles = self.batch * self.kv_heads * -(-self.rows // geometry.row_tile)
            tokens = min(longest, self.window + self.length) if self.window else longest
            tokens = min(tokens, 2 * RECORD * self.listed) if self.listed else tokens
            splits = geometry.splits(tiles, -(-tokens // RECORD), -(-columns // 16), cuda.multiprocessors())
        grid = geometry.grid(self.batch, self.kv_heads, self.rows, splits)
        # Where all sequences have the same lengths they travel with the call, so that nobody waits for memory.
        ragged = any(one != lens[0] for one in lens)
        array = lens_array(lens) if ragged else cuda.no_lens()
        numbers = (-1, 0, 0) if ragged else lens[0]
        scalars = (*self.scalars[0], columns, *self.scalars[1], *numbers, *self.floats)
        return Call(grid, self.outputs(grid, columns), scalars, array, cuda.tickets(grid[1] * grid[2]))

    def outputs(self, grid: tuple[int, int, int], columns: int) -> list[tuple[tuple[int, ...], mx.Dtype]]:
        """Shapes and dtypes of the output, of the scratch for partial results, and of appended columns."""
        key_dim, value_dim = self.geometry.k.head_dim, self.geometry.v.head_dim
        splits, rows = grid[0], grid[1] * grid[2]
        scratch = (rows, splits, self.geometry.row_tile, value_dim + 2) if splits > 1 else (1,)
        out: list[tuple[tuple[int, ...], mx.Dtype]] = [
            ((self.batch, self.heads, self.length, value_dim), self.dtype),
            (scratch, mx.float32),
        ]
        if self.geometry.fused.append:
            out += [((self.batch, self.kv_heads, columns, dim), mx.float16) for dim in (key_dim, value_dim)]
        return out


_launches = functools.lru_cache(maxsize=256)(Launches)


class Launch:
    """Decode launches over packed arrays that do not change: what is the same in every step of a layer is made once."""

    def __init__(self, args: AttnArgs, fused: Fused, centered: bool = False):
        k, v = args.k, args.v
        assert isinstance(k.layout, MmaLayout) and isinstance(v.layout, MmaLayout)
        self.packed = [kv.arrays[0] if kv.arrays else cuda.no_records() for kv in (k, v)]
        self.no_halves, self.no_sinks = cuda.no_halves(), cuda.no_sinks()
        blocks = self.packed[0].shape[2], self.packed[1].shape[2]
        self.launches: Launches = _launches(k.layout, v.layout, fused, args.alike, args.kv_heads, blocks, centered)

    def attend(self, args: AttnArgs) -> mx.array:
        """Attention alone."""
        return self(args, query(args), ())[0]

    def step(self, args: AttnArgs, fresh: Pair, center: mx.array | None) -> Stepped:
        """The output, and the columns of keys and of values with the new tokens behind them."""
        out, _, dense_k, dense_v = self(args, args.q, (*fresh, self.no_halves if center is None else center))
        return out, dense_k, dense_v

    def __call__(self, args: AttnArgs, q: mx.array, more: tuple[mx.array, ...]) -> list[mx.array]:
        held, launches = args.dense_k.shape[2], self.launches
        call, launched = launches.known.get((held, args.lens)) or launches.made(held, args.lens)
        return launched(self.inputs(args, call, q, more))

    def inputs(self, args: AttnArgs, call: Call, q: mx.array, more: tuple[mx.array, ...]) -> list[mx.array]:
        """The kernel's, in its order; `more`: keys and values to append, and what is taken off keys."""
        dense_k, dense_v, sinks = args.dense_k, args.dense_v, args.sinks
        if not dense_k.size:
            dense_k = dense_v = self.no_halves
        sinks = self.no_sinks if sinks is None else sinks.astype(mx.float32)
        pages = () if args.pages is None else (args.pages,)
        return [q, *self.packed, dense_k, dense_v, call.lens, sinks, next(call.tickets), *more, *pages]


def decode(args: AttnArgs) -> mx.array:
    """Attention alone, in one launch of `decode.cu`."""
    fused = Fused(listed=args.pages is not None, capped=args.softcap > 0)
    return args.once(("decode", args.alike), lambda: Launch(args, fused)).attend(args)


def query(args: AttnArgs) -> mx.array:
    """`[B, Hq, L, layout.query]`: channels for dense keys first, those for the codes last, where they differ."""
    assert isinstance(args.k.layout, MmaLayout)
    if not args.k.layout.sketched:
        return args.q
    return args.q @ _projection(args.k.codec, args.k.layout, args.q.dtype)


@functools.lru_cache(maxsize=16)
def _projection(codec: Codec, layout: MmaLayout, dtype: mx.Dtype) -> mx.array:
    """`[Dk, layout.query]`: the identity, and the projection; `codec.project` as one product in q's dtype."""
    identity = mx.eye(layout.head_dim)
    projected = codec.project(identity)
    if projected.shape[-1] < layout.query:
        projected = mx.concatenate([identity, projected], axis=-1)
    projected = projected.astype(dtype)
    mx.eval(projected)
    return projected


def prefill(args: AttnArgs) -> mx.array:
    """Some KV heads of one sequence at a time: unpacked to q's dtype, attended by `mx.fast`, dropped.

    Before anything is packed, the dense columns are all there is and are attended as they lie.
    """
    done = []
    for b, (packed, sink, tail_start) in enumerate(args.lens):
        tokens = packed + sink + args.dense_k.shape[2] - tail_start
        assert isinstance(args.k.layout, MmaLayout)
        size = args.kv_heads * tokens * (args.k.layout.query + args.v.head_dim) * 2
        step = args.kv_heads if size <= AT_ONCE else max(1, args.kv_heads // 4)
        parts = []
        for first in range(0, args.kv_heads, step):
            parts.append(_attend_heads(args, b, range(first, min(first + step, args.kv_heads))))
            if step < args.kv_heads:
                # Two steps' heads exist at a time, and the GPU always has one to work on.
                mx.async_eval(parts[-1])
                mx.eval(parts[-2:-1])
        done.append(parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1))
    return done[0] if len(done) == 1 else mx.concatenate(done, axis=0)


def _attend_heads(args: AttnArgs, b: int, heads: range) -> mx.array:
    """KV heads `heads` of sequence b: `[1, len(heads) * gqa, L, Dv]`."""
    dtype = args.q.dtype
    rows = slice(heads.start * args.gqa, heads.stop * args.gqa)
    packed, sink, tail_start = args.lens[b]
    if not packed and sink == tail_start:
        sides = [x[b : b + 1, heads.start : heads.stop].astype(dtype) for x in (args.dense_k, args.dense_v)]
        return _sdpa(args, b, rows, sides)
    stored = []
    for kv, dense in ((args.k, args.dense_k), (args.v, args.dense_v)):
        assert isinstance(kv.layout, MmaLayout)
        stored.append((kv.layout, kv.arrays[0] if kv.arrays else cuda.no_records(), dense))
    if stored[0][0].sketched:
        sides = [_unsketched(args, b, heads), *cuda.unpack(stored[1:], args.lens[b], b, heads, dtype)]
    else:
        sides = cuda.unpack(stored, args.lens[b], b, heads, dtype)
    return _sdpa(args, b, rows, sides)


def _sdpa(args: AttnArgs, b: int, rows: slice, sides: list[mx.array]) -> mx.array:
    return mx.fast.scaled_dot_product_attention(
        args.q[b : b + 1, rows],
        *sides,
        scale=args.scale,
        mask="causal" if args.causal else None,
        sinks=None if args.sinks is None else args.sinks[rows].astype(args.q.dtype),
    )


def _unsketched(args: AttnArgs, b: int, heads: range) -> mx.array:
    """Keys of codes in a basis of their own, back in q's: `[1, heads, tokens, Dk]`.

    With projected queries A q, a score is `<A q, codes> = <q, A^T codes>`: one matrix product for all tokens.
    """
    assert isinstance(args.k.layout, MmaLayout)
    packed, sink, tail_start = args.lens[b]
    dense = args.dense_k[b : b + 1, heads.start : heads.stop]
    parts = [dense[:, :, :sink], dense[:, :, tail_start:]]
    if packed:
        keys = (args.k.layout, args.k.arrays[0], args.dense_k)
        (codes,) = cuda.unpack([keys], (packed, 0, 0), b, heads, mx.float16)
        projection = _projection(args.k.codec, args.k.layout, mx.float16)[:, -args.k.layout.channels :]
        parts.insert(1, codes @ projection.T)
    return mx.concatenate(parts, axis=2).astype(args.q.dtype)


def checks() -> list[Check]:
    """What `opentq doctor` says about the kernels."""
    return [Check("kernels", "ok", f"CUDA for {cuda.architecture()}, compiled on first use"), repeat.check()]


BACKEND = Backend(
    "cuda",
    cuda.available,
    attend,
    layouts,
    layout_named,
    extend,
    step,
    cuda.rotate,
    pages.choose,
    checks,
    sums=True,
    choosing=pages.CHOOSING,
    weigh=pages.weigh,
    top=pages.top,
)
