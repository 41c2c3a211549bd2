"""The compressed KV cache of one layer: tokens are encoded once, appended once, and attended where they lie.

In logical order a cache is `[sink | packed | tail]`. Sink (the first tokens, optional) and tail (the newest) are fp16
in one small `dense` array; the middle is packed. New tokens join the tail, and whole blocks of 64 leave it for the packed
buffer in the same step. The attention of that step still sees its own tokens in fp16, and the older ones packed.
Nothing here decodes more than the block it is working on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx
from mlx_lm.models.cache import _BaseCache, create_attention_mask

from ..attention import dispatch
from ..attention.args import AttnArgs, PackedKV
from ..codecs import Codec, Packed, Raw
from ..codecs.base import FP16_MAX
from ..kernels.layout import CANONICAL, FLUSH, Layout
from ..spec import KVSpec
from .buffer import Buffer, own


@dataclass
class LayerStats:
    """What really happened in one layer: shared by all caches of the layer, never copied with them."""

    calls: int = 0
    served_by: str = ""
    shape: tuple[int, int, int] | None = None  # (KV heads, key dim, value dim)

    def __deepcopy__(self, memo: dict) -> LayerStats:
        return self


class Handle:
    """What `update_and_fetch` gives the model in place of an array: a snapshot that can only be attended.

    It looks like the `[B, H, T, D]` array that it stands for (`shape`, `dtype`, `ndim`); `step` is shared by the key
    and the value handle of one update.
    """

    __slots__ = ("dtype", "shape", "step")

    def __init__(self, step: Step, shape: tuple[int, ...], dtype: mx.Dtype):
        self.step = step
        self.shape = shape
        self.dtype = dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)


@dataclass(frozen=True)
class Step:
    """The cache as one forward step sees it: packed prefix and `[sink | tail | new]` in fp16."""

    k: PackedKV
    v: PackedKV
    dense_k: mx.array
    dense_v: mx.array
    lens: tuple[tuple[int, int, int], ...]
    stats: LayerStats = field(compare=False)

    def attend(self, q, *, scale: float, mask=None, sinks=None, softcap: float = 0.0, window: int = 0) -> mx.array:
        """Attention of `q [B, Hq, L, Dk]` (as the model made it, not rotated): `[B, Hq, L, Dv]` in q's dtype."""
        if isinstance(mask, str) and mask != "causal":
            raise ValueError(f"attention mask {mask!r} is not known: use None, 'causal' or an array")
        args = AttnArgs(
            q=self.k.codec.rotate(q),
            k=self.k,
            v=self.v,
            dense_k=self.dense_k,
            dense_v=self.dense_v,
            lens=self.lens,
            scale=float(scale),
            causal=isinstance(mask, str),
            window=window,
            mask=None if isinstance(mask, str) else mask,
            sinks=sinks,
            softcap=softcap,
        )
        out, name = dispatch.attend(args)
        self.stats.calls += 1
        self.stats.served_by = name
        return self.v.codec.unrotate(out)


class OpenTQCache(_BaseCache):
    """mlx-lm's cache protocol over packed keys and values. One per layer; B sequences of equal length."""

    def __init__(self, spec: KVSpec | str = "int4", stats: LayerStats | None = None):
        self.spec = KVSpec.parse(spec)
        self.stats = stats or LayerStats()
        self._reset()

    def _reset(self) -> None:
        self.k_codec, self.v_codec = self.spec.codecs()
        self.k_layout: Layout = CANONICAL
        self.v_layout: Layout = CANONICAL
        self.packed_k, self.packed_v = Buffer(1), Buffer(1)
        self.n_packed = 0
        self.n_sink = 0
        self.dense_k: mx.array | None = None
        self.dense_v: mx.array | None = None
        self.dims = (0, 0)

    # ---- writing

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Handle, Handle]:
        """Append `[B, H, L, Dk]` and `[B, H, L, Dv]`; returns the handles that attention takes."""
        if self.dense_k is None:
            self._start(keys, values)
        new_k, new_v = dense(self.k_codec, keys), dense(self.v_codec, values)
        dense_k = mx.concatenate([self.dense_k, new_k], axis=2)
        dense_v = mx.concatenate([self.dense_v, new_v], axis=2)
        before = (self.n_packed, self.n_sink, self.n_sink)
        self._absorb(dense_k, dense_v)
        step = Step(
            PackedKV(self.k_codec, self.k_layout, self.packed_k.arrays, self.dims[0]),
            PackedKV(self.v_codec, self.v_layout, self.packed_v.arrays, self.dims[1]),
            dense_k,
            dense_v,
            (before,) * keys.shape[0],
            self.stats,
        )
        batch, heads = keys.shape[:2]
        return tuple(Handle(step, (batch, heads, self.offset, d), keys.dtype) for d in self.dims)  # type: ignore[return-value]

    def _start(self, keys: mx.array, values: mx.array) -> None:
        batch, heads, _, k_dim = keys.shape
        v_dim = values.shape[3]
        self.k_codec.check(k_dim)
        self.v_codec.check(v_dim)
        self.dims = (k_dim, v_dim)
        self.stats.shape = (heads, k_dim, v_dim)
        self.dense_k = mx.zeros((batch, heads, 0, k_dim), mx.float16)
        self.dense_v = mx.zeros((batch, heads, 0, v_dim), mx.float16)
        self._choose_layouts()

    def _choose_layouts(self) -> None:
        self.k_layout, self.v_layout = dispatch.layouts(self.k_codec, self.v_codec, self.dims)
        self.packed_k, self.packed_v = Buffer(self.k_layout.block), Buffer(self.v_layout.block)

    def _absorb(self, dense_k: mx.array, dense_v: mx.array) -> None:
        """Take `[sink | tail | new]`: fill the sink, flush whole blocks, keep the rest as the new tail."""
        columns = dense_k.shape[2]
        if not self.n_packed:
            self.n_sink = min(self.spec.sink, columns)
        tail = columns - self.n_sink
        target = (self.n_packed + tail - self.spec.recent) // FLUSH * FLUSH
        flush = target - self.n_packed
        if flush <= 0:
            self.dense_k, self.dense_v = dense_k, dense_v
            return
        start, stop = self.n_sink, self.n_sink + flush
        self._append(self.packed_k, self.k_codec, self.k_layout, dense_k[:, :, start:stop])
        self._append(self.packed_v, self.v_codec, self.v_layout, dense_v[:, :, start:stop])
        self.n_packed = target
        self.dense_k, self.dense_v = (
            mx.concatenate([d[:, :, :start], d[:, :, stop:]], axis=2) if start else own(d[:, :, stop:])
            for d in (dense_k, dense_v)
        )

    def _append(self, buffer: Buffer, codec: Codec, layout: Layout, y: mx.array) -> None:
        """Encode rotated tokens `y` and write them after the `n_packed` that are there."""
        row, inside = divmod(self.n_packed, buffer.block)
        if not inside:
            return buffer.write(row, layout.encode(codec, y))
        # A trim left a block half full: reopen it in the canonical format, which is exact.
        opened = tuple(a[:, :, :inside] for a in layout.load(tuple(a[:, :, row : row + 1] for a in buffer.arrays)))
        joined = tuple(mx.concatenate(pair, axis=2) for pair in zip(opened, codec.encode(y)))
        return buffer.write(row, layout.store(joined))

    # ---- mlx-lm's protocol

    @property
    def offset(self) -> int:
        """Tokens held."""
        return self.n_packed + (0 if self.dense_k is None else self.dense_k.shape[2])

    def size(self) -> int:
        return self.offset

    def empty(self) -> bool:
        return self.dense_k is None

    @property
    def nbytes(self) -> int:
        """Bytes held: packed buffers with their slack, and the fp16 columns."""
        held = [self.dense_k, self.dense_v]
        return self.packed_k.nbytes + self.packed_v.nbytes + sum(a.nbytes for a in held if a is not None)

    def make_mask(self, *args, **kwargs):
        return create_attention_mask(*args, offset=self.offset, **kwargs)

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        """Drop the newest n tokens, exactly, wherever they lie; returns how many were dropped."""
        n = min(n, self.offset)
        if n <= 0 or self.dense_k is None or self.dense_v is None:
            return 0
        tail = self.dense_k.shape[2] - self.n_sink
        from_tail = min(n, tail)
        from_packed = min(n - from_tail, self.n_packed)
        from_sink = n - from_tail - from_packed
        self.n_packed -= from_packed
        self.n_sink -= from_sink
        keep = self.dense_k.shape[2] - from_tail - from_sink
        self.dense_k, self.dense_v = self.dense_k[:, :, :keep], self.dense_v[:, :, :keep]
        return n

    @property
    def state(self):
        """Arrays and scalars that mlx-lm evaluates and saves: packed rows in use, dense columns, lengths, the spec."""
        if self.dense_k is None:
            return [str(self.spec), "", 0, 0, [], [], None, None]
        rows = [-(-self.n_packed // b.block) for b in (self.packed_k, self.packed_v)]
        return [
            str(self.spec),
            f"{self.k_layout.name} {self.v_layout.name}",
            self.n_packed,
            self.n_sink,
            list(self.packed_k.truncated(rows[0])) if self.n_packed else [],
            list(self.packed_v.truncated(rows[1])) if self.n_packed else [],
            self.dense_k,
            self.dense_v,
        ]

    @state.setter
    def state(self, value) -> None:
        spec, layout_names, n_packed, n_sink, packed_k, packed_v, dense_k, dense_v = value
        if not hasattr(self, "spec"):  # from_state makes the object without __init__
            self.__init__(spec)  # type: ignore[misc]
        self.spec = KVSpec.parse(spec)
        self._reset()
        if dense_k is None:
            return
        self.dense_k, self.dense_v = dense_k, dense_v
        self.n_sink = n_sink
        self.dims = (dense_k.shape[3], dense_v.shape[3])
        self.stats.shape = (dense_k.shape[1], *self.dims)
        self._choose_layouts()
        if n_packed:
            names = layout_names.split()
            self.packed_k.write(0, _relay(tuple(packed_k), names[0], self.k_layout))
            self.packed_v.write(0, _relay(tuple(packed_v), names[1], self.v_layout))
        self.n_packed = n_packed

    @classmethod
    def from_state(cls, state) -> OpenTQCache:
        cache = cls.__new__(cls)
        cache.state = state
        return cache

    # Pipeline-parallel models tie a layer's cache to the network by `cache.keys = mx.depends(cache.keys, h)`.

    @property
    def keys(self):
        return None if self.dense_k is None else [self.dense_k, *self.packed_k.arrays]

    @keys.setter
    def keys(self, arrays) -> None:
        self.dense_k, *packed = arrays
        self.packed_k.arrays = tuple(packed)

    @property
    def values(self):
        return None if self.dense_v is None else [self.dense_v, *self.packed_v.arrays]

    @values.setter
    def values(self, arrays) -> None:
        self.dense_v, *packed = arrays
        self.packed_v.arrays = tuple(packed)

    # ---- the packed tokens in the canonical format, for disk, batches and tests

    def canonical(self) -> tuple[Packed, Packed]:
        """Packed keys and values in use as canonical arrays of `n_packed` tokens."""
        pair = []
        for buffer, layout in ((self.packed_k, self.k_layout), (self.packed_v, self.v_layout)):
            rows = -(-self.n_packed // buffer.block)
            arrays = layout.load(buffer.truncated(rows)) if rows else ()
            pair.append(tuple(a[:, :, : self.n_packed] for a in arrays))
        return pair[0], pair[1]


def dense(codec: Codec, x: mx.array) -> mx.array:
    """Vectors of any float dtype as they wait in fp16: rotated, clipped to the finite range."""
    y = codec.rotate(x if isinstance(codec, Raw) else x.astype(mx.float32))
    if y.dtype != mx.float16:
        y = mx.clip(y, -FP16_MAX, FP16_MAX).astype(mx.float16)
    return y


def _relay(stored: tuple[mx.array, ...], name: str, layout: Layout) -> tuple[mx.array, ...]:
    """Storage arrays written by the layout called `name`, in this machine's `layout`."""
    if name == layout.name:
        return stored
    packed = dispatch.layout_named(name).load(stored)
    tokens = packed[0].shape[2]
    pad = -tokens % layout.block
    if pad:
        packed = tuple(mx.pad(a, [(0, 0), (0, 0), (0, pad)] + [(0, 0)] * (a.ndim - 3)) for a in packed)
    return layout.store(packed)
