"""Fused attention on NVIDIA GPUs: packed keys and values are read once, where they lie.

Decode and short blocks (and everything the second way can't take) go through `decode.cu`: one launch, whatever
the head dims, widths, windows, sinks and lengths. A prompt chunk of many rows is bound by arithmetic, and there the
vendor's fp16 kernel is the best there is: a quarter of the KV heads of this one layer is laid out in fp16, attended,
and dropped, with one quarter in work and the next one asked for.
"""

from __future__ import annotations

import functools

import mlx.core as mx

from ...contracts.attention import AttnArgs
from ...contracts.backend import Backend, Finding
from ...contracts.codec import Codec, Halves
from . import launch as cuda
from . import pages
from .geometry import Fused, Geometry
from .layout import RECORD, MmaLayout, layout_named, layouts

AT_ONCE = 64 << 20
"""Bytes of unpacked keys and values up to which a layer's heads are attended together."""

SERVED = (mx.float16, mx.bfloat16)

PREFILL_ROWS = 64
"""Query tokens from which laying out fp16 pays."""


def attend(args: AttnArgs) -> mx.array | None:
    """`[B, Hq, L, Dv]` in q's dtype, or None: not a GPU, an array mask, a codec without a kernel, fp32 queries.

    Tensor cores multiply fp16; two fp16 parts per query are 22 bits, and the error rule asks for more of fp32.
    """
    if not cuda.available() or args.mask is not None or args.pages is not None or args.q.dtype not in SERVED:
        return None
    if not (isinstance(args.k.layout, MmaLayout) and isinstance(args.v.layout, MmaLayout)):
        return None
    if prefers_prefill(args):
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


Pair = tuple[mx.array, mx.array]


def step(args: AttnArgs, fresh: Pair, center: mx.array | None = None) -> tuple[mx.array, mx.array, mx.array] | None:
    """A whole decode step in one launch: queries rotated, new tokens appended, attention, the output turned back.

    Args:
        args: the call, but queries are as the model made them, and dense columns are those before this step.
        fresh: keys and values `[B, Hkv, L, D]` of this step in q's dtype, as the model made them.
        center: `[B, Hkv, 1, Dk]` float16, rotated: what is taken off new keys.

    Returns:
        The output `[B, Hq, L, Dv]` as the model wants it, and all columns of keys and of values. None for what `attend`
        does not serve in one launch, rotations that are no Hadamard transform, sketches, and more than eight tokens at
        once.
    """
    k, v = args.k, args.v
    if not cuda.available() or args.mask is not None or args.pages is not None or args.q.dtype not in SERVED:
        return None
    if not (isinstance(k.layout, MmaLayout) and isinstance(v.layout, MmaLayout)) or k.layout.sketched:
        return None
    rotate_k, rotate_v = hadamard(k.codec, k.head_dim), hadamard(v.codec, v.head_dim)
    if rotate_k is None or rotate_v is None or args.q.shape[2] > Fused.LENGTH:
        return None
    if any(x.dtype != args.q.dtype for x in fresh):
        return None
    out, dense_k, dense_v = decode_step(args, Fused(True, rotate_k, rotate_v), fresh, center)
    return out, dense_k, dense_v


@functools.lru_cache(maxsize=256)
def _plan(k: MmaLayout, v: MmaLayout, dtype: mx.Dtype, rows: int, fused: Fused) -> tuple[Geometry, cuda.Kernel]:
    geometry = Geometry.choose(k, v, cuda.CTYPES[dtype], rows, fused)
    return geometry, cuda.compiled(geometry.source())


def decode(args: AttnArgs) -> mx.array:
    """Attention alone, in one launch of `decode.cu`."""
    return decode_step(args, Fused())[0]


def decode_step(
    args: AttnArgs, fused: Fused, fresh: Pair | None = None, center: mx.array | None = None
) -> list[mx.array]:
    """One launch of `decode.cu`: the output and, where it appends, the columns of keys and of values."""
    assert isinstance(args.k.layout, MmaLayout) and isinstance(args.v.layout, MmaLayout)
    batch, _, length, _ = args.q.shape
    rows = args.gqa * length
    geometry, kernel = _plan(args.k.layout, args.v.layout, args.q.dtype, rows, fused)
    tokens = args.max_packed
    if args.window:
        tokens = min(tokens, args.window + length)
    splits = geometry.splits(
        batch * args.kv_heads * -(-rows // geometry.row_tile),
        -(-tokens // RECORD),
        -(-columns(args, fused) // 16),
        cuda.multiprocessors(),
    )
    blocks = geometry.grid(batch, args.kv_heads, rows, splits)
    given = inputs(args, cuda.tickets(blocks[1] * blocks[2]), fresh, center)
    out, _, *dense = kernel(given, outputs(args, geometry, blocks), scalars(args, fused, center is not None), blocks)
    return [out, *dense]


def columns(args: AttnArgs, fused: Fused) -> int:
    """Dense columns that are attended."""
    return args.dense_k.shape[2] + args.q.shape[2] * fused.append


def inputs(
    args: AttnArgs,
    tickets: mx.array,
    fresh: Pair | None = None,
    center: mx.array | None = None,
) -> list[mx.array]:
    """The kernel's inputs in its order."""
    given = [
        query(args),
        args.k.arrays[0] if args.k.arrays else cuda.no_records(),
        args.v.arrays[0] if args.v.arrays else cuda.no_records(),
        args.dense_k if args.dense_k.size else cuda.no_halves(),
        args.dense_v if args.dense_v.size else cuda.no_halves(),
        args.lens_array() if ragged(args) else cuda.no_lens(),
        cuda.no_sinks() if args.sinks is None else args.sinks.astype(mx.float32),
        tickets,
    ]
    return [*given, *fresh, cuda.no_halves() if center is None else center] if fresh else given


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


def outputs(args: AttnArgs, geometry: Geometry, blocks: tuple[int, int, int]) -> list[tuple[tuple[int, ...], mx.Dtype]]:
    """Shapes and dtypes of the output, of the scratch for partial results, and of the columns of a launch that appends."""
    out = (*args.q.shape[:3], args.v.head_dim)
    scratch = (blocks[1] * blocks[2], blocks[0], geometry.row_tile, args.v.head_dim + 2) if blocks[0] > 1 else (1,)
    dense = []
    if geometry.fused.append:
        lead = (*args.dense_k.shape[:2], columns(args, geometry.fused))
        dense = [((*lead, side.head_dim), mx.float16) for side in (args.k, args.v)]
    return [(out, args.q.dtype), (scratch, mx.float32), *dense]


def scalars(args: AttnArgs, fused: Fused = Fused(), centered: bool = False) -> cuda.Scalars:
    """`geometry.CALL` of this call."""
    k_blocks, v_blocks = (kv.arrays[0].shape[2] if kv.arrays else 1 for kv in (args.k, args.v))
    shape = (k_blocks, v_blocks, columns(args, fused), args.q.shape[1], args.kv_heads, args.q.shape[2])
    lens = (-1, 0, 0) if ragged(args) else args.lens[0]
    floats = cuda.single(args.scale), cuda.single(args.softcap)
    return (*shape, args.window, int(args.causal), *lens, *floats, int(centered))


def ragged(args: AttnArgs) -> bool:
    """Whether sequences differ in length; otherwise their lengths go with the call, and nobody waits for memory."""
    return len(args.lens) > 1 and any(lens != args.lens[0] for lens in args.lens)


def prefill(args: AttnArgs) -> mx.array:
    """Some KV heads of one sequence at a time: unpacked to q's dtype, attended by `mx.fast`, dropped."""
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
    stored = []
    for kv, dense in ((args.k, args.dense_k), (args.v, args.dense_v)):
        assert isinstance(kv.layout, MmaLayout)
        stored.append((kv.layout, kv.arrays[0] if kv.arrays else cuda.no_records(), dense))
    if stored[0][0].sketched:
        sides = [_unsketched(args, b, heads), *cuda.unpack(stored[1:], args.lens[b], b, heads, dtype)]
    else:
        sides = cuda.unpack(stored, args.lens[b], b, heads, dtype)
    return mx.fast.scaled_dot_product_attention(
        args.q[b : b + 1, rows],
        *sides,
        scale=args.scale,
        mask="causal" if args.causal else None,
        sinks=None if args.sinks is None else args.sinks[rows].astype(dtype),
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


def findings() -> list[Finding]:
    """What `opentq doctor` says about the kernels."""
    return [Finding("kernels", "ok", f"CUDA for {cuda.architecture()}, compiled on first use")]


BACKEND = Backend(
    "cuda",
    cuda.available,
    attend,
    layouts,
    layout_named,
    extend,
    step,
    rotate=cuda.rotate,
    choose=pages.choose,
    findings=findings,
)
