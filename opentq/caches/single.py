"""The compressed KV cache of one layer: tokens are encoded once, appended once, and attended where they lie.

In logical order a cache is `[sink | packed | tail]`. Sink (the first tokens, optional) and tail (the newest) are fp16
in one small `dense` array; the middle is packed. New tokens join the tail, and whole blocks of 64 leave it for the
packed buffer in the same step. The attention of that step still sees its own tokens in fp16, and the older ones packed.
Nothing here decodes more than the block it is working on.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..attention import backends, dispatch
from ..codecs import Codec, Packed, Raw
from ..contracts.attention import Lengths, PackedKV
from ..contracts.backend import Backend
from ..contracts.codec import FP16_MAX
from ..contracts.layout import CANONICAL, FLUSH, Layout
from ..contracts.rotary import NO_ROTARY
from ..errors import UserError
from ..spec.kv import KVSpec
from . import alive
from .buffer import Buffer, own
from .extent import Extent, Limits, limits, quietly
from .mask import CausalMask, causal_mask
from .sketches import Sketches
from .states import BatchState, State
from .step import Handle, LayerStats, Step

if TYPE_CHECKING:
    from .batch import BatchOpenTQCache


class OpenTQCache:
    """mlx-lm's cache protocol over packed keys and values. One per layer; B sequences of equal length.

    Args:
        spec: what to keep and how.
        stats: the layer's counters, shared with the report.
        window: 0, or how many tokens a query sees, itself included: older ones are forgotten block by block.
    """

    defers = True
    """Whether a decode step's new tokens may wait for the launch that attends them (`Step.fresh`)."""

    Batch: type[BatchOpenTQCache]
    """What several of them become; each kind of batch enters itself here (`caches/batch.py`)."""

    seam: alive.Seam | None = None
    """What the host that made this cache attends with."""

    def __init__(self, spec: KVSpec | str = "int4", stats: LayerStats | None = None, window: int = 0):
        self.spec = KVSpec.parse(spec)
        self.stats = stats or LayerStats()
        self.window = window
        self.lends = False
        self.latent = 0  # channels of a latent that is key and value at once (latent.py)
        self.rotary = NO_ROTARY
        self._reset()

    def _reset(self) -> None:
        self.k_codec, self.v_codec = self._codecs()
        self.k_layout: Layout = CANONICAL
        self.v_layout: Layout = CANONICAL
        self.packed_k, self.packed_v = Buffer(1), Buffer(1)
        self.extent = Extent()
        self.limits = self._limits()
        self._dense_k: mx.array | None = None
        self._dense_v: mx.array | None = None
        self.backend: Backend | None = None
        self._waiting: Step | None = None  # whose fresh tokens are still to join the columns
        self._kept: tuple[Any, Any, PackedKV, PackedKV] | None = None
        self.dims = (0, 0)
        self.center: mx.array | None = None  # [B, H, 1, Dk], rotated: what has been taken off all keys
        self.sketches: Sketches | None = None
        self._lent: tuple[Handle, Handle] | None = None

    def _codecs(self) -> tuple[Codec, Codec]:
        return self.spec.codecs()

    def _stored_like(self, other: OpenTQCache) -> None:
        """Hold tokens of the shape and form in which another cache of the layer holds them."""
        self.latent, self.dims, self.backend = other.latent, other.dims, other.backend
        self.k_codec, self.v_codec = other.k_codec, other.v_codec
        self.k_layout, self.v_layout = other.k_layout, other.v_layout

    def _made_like(self, other: OpenTQCache) -> None:
        """Be what the host made the other cache to be."""
        self.lends, self.rotary, self.seam = other.lends, other.rotary, other.seam

    def _limits(self) -> Limits:
        """What is asked of `extent`."""
        return limits(self.spec.sink, self.spec.recent, self.window)

    @property
    def n_packed(self) -> int:
        """Packed tokens."""
        return self.extent.packed

    @property
    def dense_k(self) -> mx.array | None:
        """fp16 columns `[sink | tail]` of keys, `[B, H, Td, Dk]`; None before the first token."""
        self._append_fresh()
        return self._dense_k

    @dense_k.setter
    def dense_k(self, columns: mx.array | None) -> None:
        self._dense_k = columns

    @property
    def dense_v(self) -> mx.array | None:
        """The same of values."""
        self._append_fresh()
        return self._dense_v

    @dense_v.setter
    def dense_v(self, columns: mx.array | None) -> None:
        self._dense_v = columns

    # ---- writing

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Handle, Handle]:
        """Append `[B, H, L, Dk]` and `[B, H, L, Dv]`; returns the handles that attention takes."""
        alive.check(self.seam)
        if self._dense_k is None:
            self._start(keys, values)
        if self._waiting is not None:
            self._waiting.append_fresh()
        assert self._dense_k is not None and self._dense_v is not None
        batch, heads, count, key_dim = keys.shape
        if self.sketches is not None:
            self.sketches.meet(keys, self._real(batch, count))
        self._lent = None
        lens = self._lengths(batch)
        backend = self.backend
        deferring = backend is not None and backend.step is not None and self.defers
        fusing = deferring and count <= dispatch.STEP
        if fusing and self._grow_quietly(count):
            step = self._step(self._dense_k, self._dense_v, self.packed_k.arrays, self.packed_v.arrays, lens)
            step.fresh, step.cache, self._waiting = (keys, values), self, step
        else:
            held, center = (self._dense_k, self._dense_v), self.center
            fusing = fusing and self._real(batch, count) == [count] * batch
            dense_k, dense_v = self.extended(*held, keys, values)
            before = self.packed_k.arrays, self.packed_v.arrays
            moved = self._absorb(dense_k, dense_v, count)
            # Tokens are written behind the ones that this step sees, so it can share the new arrays, unless rows moved;
            # holding the old ones would make every write a copy.
            packed_k, packed_v = before if moved else (self.packed_k.arrays, self.packed_v.arrays)
            if fusing and not moved and self.center is center:  # one launch appends once more and attends
                step = self._step(*held, packed_k, packed_v, lens)
                step.fresh, step.cache = (keys, values), self
            else:
                step = self._step(dense_k, dense_v, packed_k, packed_v, lens)
            if moved:
                self._kept = None  # the old rows are the step's alone
            del before, packed_k, packed_v
            if count >= FLUSH and deferring:  # a GPU reads the prompt up to here while the host builds what follows
                mx.async_eval(*self._arrays())
        if self.sketches is not None:
            stored = PackedKV(self.k_codec, self.k_layout, self.packed_k.arrays, self.dims[0])
            self.sketches.follow(stored, self._packed(batch))
        size = self.size()
        handles = (
            Handle(step, (batch, heads, size, key_dim), keys.dtype),
            Handle(step, (batch, heads, size, self.dims[1]), values.dtype),
        )
        if self.lends:
            self._lent = handles
        return handles

    def extended(
        self, dense_k: mx.array, dense_v: mx.array, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """fp16 columns with new tokens behind them, rotated and centred."""
        if self.backend is not None:
            codecs = self.k_codec, self.v_codec
            done = self.backend.extend(codecs, (dense_k, dense_v), (keys, values))
            if done is not None and self.center is not None:
                news = shifted(done[0][:, :, dense_k.shape[2] :], self.center)
                return mx.concatenate([dense_k, news], axis=2), done[1]
            if done is not None:
                return done
        new_k, new_v = shifted(dense(self.k_codec, keys), self.center), dense(self.v_codec, values)
        return mx.concatenate([dense_k, new_k], axis=2), mx.concatenate([dense_v, new_v], axis=2)

    def adopt(self, step: Step, dense_k: mx.array, dense_v: mx.array) -> None:
        """The columns with the tokens of `step` behind them, unless others have come since."""
        if self._waiting is step:
            self._dense_k, self._dense_v, self._waiting = dense_k, dense_v, None

    def _append_fresh(self) -> None:
        if self._waiting is not None:
            self._waiting.append_fresh()

    def __getstate__(self) -> dict[str, Any]:
        self._append_fresh()
        return {**self.__dict__, "_kept": None}

    def _grow_quietly(self, count: int) -> bool:
        """Take `count` tokens into the tail where that is all there is to do; else change nothing."""
        grown = quietly(self.extent, count, self.limits)
        if grown is not None:
            self.extent = grown
        return grown is not None

    def _step(self, dense_k, dense_v, packed_k, packed_v, lens) -> Step:
        kept = self._kept
        if kept is None or kept[0] is not packed_k or kept[1] is not packed_v:
            k = PackedKV(self.k_codec, self.k_layout, packed_k, self.dims[0])
            v = PackedKV(self.v_codec, self.v_layout, packed_v, self.dims[1])
            self._kept = kept = packed_k, packed_v, k, v
        return Step(
            kept[2], kept[3], dense_k, dense_v, lens, self.window, self.stats, self.spec.center, self.sketches
        )  # fmt: skip

    def keys_and_values(self) -> tuple[Handle, Handle]:
        """The handles of the last update again, for models whose later layers attend to this layer's tokens.

        Only a cache that `lends` remembers them: they hold the fp16 tokens of that step until the next one.
        """
        if self._lent is None:
            raise ValueError("this cache has nothing to lend: it was not updated in this step, or does not lend")
        return self._lent

    def _start(self, keys: mx.array, values: mx.array) -> None:
        batch, heads, _, k_dim = keys.shape
        v_dim = values.shape[3]
        if self.spec.center and self.latent:
            raise UserError(f"--kv {self.spec}: this model's keys are its values too and can't be centred; drop center")
        self.k_codec.check(k_dim)
        self.v_codec.check(v_dim)
        self.dense_k = mx.zeros((batch, heads, 0, k_dim), mx.float16)
        self.dense_v = mx.zeros((batch, heads, 0, v_dim), mx.float16)
        if self.spec.pages and self.sketches is None:
            self.sketches = Sketches(self.spec.pages, self.rotary, self.spec.channels, batch)
        self._choose_layouts()

    def _choose_layouts(self) -> None:
        assert self.dense_k is not None and self.dense_v is not None
        self.dims = (self.dense_k.shape[3], self.dense_v.shape[3])
        self.stats.shape = (self.dense_k.shape[1], *self.dims)
        self.backend = dispatch.serving()
        self.k_layout, self.v_layout = dispatch.layouts(self.k_codec, self.v_codec, self.dims)
        self.packed_k, self.packed_v = Buffer(self.k_layout.block), Buffer(self.v_layout.block)

    def _lengths(self, batch: int) -> tuple[Lengths, ...]:
        return _lens(self.extent.packed, self.extent.sink, batch)

    def _packed(self, batch: int) -> list[int]:
        """Packed tokens of every sequence."""
        return [self.extent.packed] * batch

    def _real(self, batch: int, length: int) -> list[int]:
        """How many of `length` new tokens belong to every sequence."""
        return [length] * batch

    def _absorb(self, dense_k: mx.array, dense_v: mx.array, count: int) -> bool:
        """Take `[sink | tail | new]`, flush whole blocks, keep the rest; returns whether packed rows moved."""
        packed = self.extent.packed
        self.extent, move = self.extent.append(count, self.limits)
        if not (move.forget or move.skip or move.flush):
            self.dense_k, self.dense_v = dense_k, dense_v
            return False
        sink = self.extent.sink
        start = sink + move.skip
        stop = start + move.flush
        if self.spec.center and self.center is None and move.flush:
            self.center = mean_key(dense_k[:, :, start : start + FLUSH])
            dense_k = shifted(dense_k, self.center)
        for buffer, codec, layout, y in self._sides(dense_k, dense_v):
            if move.forget:
                buffer.forget(move.forget, packed)
            if move.flush:
                buffer.append(codec, layout, packed - move.forget, y[:, :, start:stop])
        self.dense_k, self.dense_v = (
            mx.concatenate([d[:, :, :sink], d[:, :, stop:]], axis=2) if sink else own(d[:, :, stop:])
            for d in (dense_k, dense_v)
        )
        return bool(move.forget)

    def _sides(self, dense_k: mx.array, dense_v: mx.array) -> tuple[tuple[Buffer, Codec, Layout, mx.array], ...]:
        """Keys and values, which are stored alike."""
        return (self.packed_k, self.k_codec, self.k_layout, dense_k), (
            self.packed_v,
            self.v_codec,
            self.v_layout,
            dense_v,
        )

    # ---- mlx-lm's protocol

    @property
    def offset(self):
        """Tokens seen: the position of the next one."""
        return self.extent.offset

    @property
    def to_quantized(self) -> None:
        """mlx-lm looks for this only where its own `kv_bits` is given. Raises UserError, before any token is read."""
        raise UserError(
            "kv_bits is mlx-lm's own compression and can't be used on top of opentq's: leave it out, or give "
            f"opentq.compress the bits in place of {str(self.spec)!r}"
        )

    def size(self) -> int:
        """Tokens held."""
        return self.extent.held

    def empty(self) -> bool:
        return self.dense_k is None

    @property
    def nbytes(self) -> int:
        """Bytes held: packed buffers with their slack, and the fp16 columns."""
        return sum(a.nbytes for a in self._arrays())

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None):
        """None, "causal" (with a window where the model asks for one), or an array where it insists on one."""
        if return_array:
            window = window_size or self.window
            return causal_mask(N, self.extent.held, window) if N > 1 or window else None
        if window_size and window_size != self.window:
            return CausalMask(window_size)
        return "causal" if N > 1 else None

    def is_trimmable(self) -> bool:
        """Whether any number of tokens can be dropped: not once a window has forgotten some."""
        return self.extent.base == 0

    def trim(self, n: int) -> int:
        """Drop the newest n tokens, exactly, wherever they lie; returns how many were dropped."""
        before, self._lent = self.extent, None
        self.extent = before.trim(n)
        if self.dense_k is not None and self.dense_v is not None:
            keep = self.extent.sink + self.extent.tail
            self.dense_k, self.dense_v = self.dense_k[:, :, :keep], self.dense_v[:, :, :keep]
            if not keep and not self.extent.packed:
                self.center = None
            if self.sketches is not None:
                self.sketches.trim(self._packed(self.dense_k.shape[0]))
        return before.held - self.extent.held

    @classmethod
    def merge(cls, caches: Sequence[OpenTQCache]) -> BatchOpenTQCache:
        """One batch of several caches of one sequence each, empty ones included."""
        return cls.Batch.merge(caches)

    @property
    def state(self):
        """Arrays and scalars that mlx-lm evaluates and saves: packed rows in use, dense columns, lengths, the spec."""
        extent = self.extent
        rows = self.packed_k.rows_of(extent.packed), self.packed_v.rows_of(extent.packed)
        return State(
            str(self.spec),
            f"{self.k_layout.name} {self.v_layout.name}",
            self.window,
            int(self.lends),
            self.latent,
            extent.base,
            extent.sink,
            extent.packed,
            list(self.packed_k.truncated(rows[0])) if extent.packed else None,
            list(self.packed_v.truncated(rows[1])) if extent.packed else None,
            self.dense_k,
            self.dense_v,
            self.center,
            None if self.sketches is None else self.sketches.state,
            self._beside(),
        )

    @state.setter
    def state(self, value) -> None:
        state = State(*value)
        if not hasattr(self, "spec"):  # from_state makes the object without __init__
            self.__init__(state.spec)  # type: ignore[misc]
        self._restore(state)
        if state.dense_k is not None:
            self.extent = Extent(state.base, state.sink, state.packed, state.dense_k.shape[2] - state.sink)

    def _restore(self, state: State | BatchState) -> None:
        """What both kinds of state hold, packed rows in this machine's layouts."""
        if str(self.spec) != state.spec:  # else it may know a recipe's channels, too
            self.spec = KVSpec.parse(state.spec)
        self.window = state.window
        self.lends, self.latent = bool(state.lends), state.latent
        self._reset()
        self._restore_beside(state.beside)
        if state.dense_k is None:
            return
        self.dense_k, self.dense_v, self.center = state.dense_k, state.dense_v, state.center
        if state.sketches is not None:
            self.sketches = Sketches.from_state(state.sketches, self.spec.channels)
        self._choose_layouts()
        names = state.layouts.split()
        if state.packed_k:
            self.packed_k.write(0, relay(tuple(state.packed_k), names[0], self.k_layout))
        if state.packed_v:
            self.packed_v.write(0, relay(tuple(state.packed_v), names[1], self.v_layout))

    def _beside(self) -> list[Any] | None:
        """What a host's kind of cache holds besides, as arrays and numbers."""
        return None

    def _restore_beside(self, beside: list[Any] | None) -> None:
        """Take back what `_beside` gave."""

    @classmethod
    def from_state(cls, state) -> OpenTQCache:
        cache = cls.__new__(cls)
        cache.state = state
        return cache

    def _arrays(self) -> list[mx.array]:
        """Everything that is held."""
        held = [*self.packed_k.arrays, *self.packed_v.arrays, self.dense_k, self.dense_v, self.center]
        return [a for a in held if a is not None] + (self.sketches.arrays if self.sketches else [])

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
        tokens = self.extent.packed
        return self.packed_k.canonical(self.k_layout, tokens), self.packed_v.canonical(self.v_layout, tokens)


@functools.lru_cache(maxsize=64)
def _lens(packed: int, sink: int, batch: int) -> tuple[Lengths, ...]:
    return ((packed, sink, sink),) * batch


def dense(codec: Codec, x: mx.array) -> mx.array:
    """Vectors of any float dtype as they wait in fp16: rotated, clipped to the finite range."""
    y = codec.rotate(x if isinstance(codec, Raw) else x.astype(mx.float32))
    if y.dtype != mx.float16:
        y = mx.clip(y, -FP16_MAX, FP16_MAX).astype(mx.float16)
    return y


def mean_key(y: mx.array) -> mx.array:
    """Mean over tokens of fp16 columns `[B, H, T, D]`: fp16 `[B, H, 1, D]`."""
    return y.astype(mx.float32).mean(axis=2, keepdims=True).astype(mx.float16)


def shifted(y: mx.array, center: mx.array | None) -> mx.array:
    """fp16 columns with `center` taken off, clipped to the finite range.

    All logits of a query change by the same number, -<q, center>, which softmax does not see. The mean of a few dozen
    keys holds what all keys share, such as the bias of a key projection, and it no longer widens the codec's range.
    """
    if center is None:
        return y
    return (_shift_at_once if mx.default_device() == mx.gpu else _shift)(y, center)


def _shift(y: mx.array, center: mx.array) -> mx.array:
    return mx.clip(y.astype(mx.float32) - center.astype(mx.float32), -FP16_MAX, FP16_MAX).astype(mx.float16)


_shift_at_once = mx.compile(_shift)
"""In one launch. On a CPU MLX would call a compiler for it."""


def relay(stored: tuple[mx.array, ...], name: str, layout: Layout) -> tuple[mx.array, ...]:
    """Storage arrays written by the layout called `name`, in this machine's `layout`."""
    if name == layout.name:
        return stored
    packed = backends.layout_named(name).load(stored)
    tokens = packed[0].shape[2]
    pad = -tokens % layout.block
    if pad:
        packed = tuple(mx.pad(a, [(0, 0), (0, 0), (0, pad)] + [(0, 0)] * (a.ndim - 3)) for a in packed)
    return layout.store(packed)
