"""Many sequences in one compressed cache, without padding and without decoding anything.

Every sequence has a row of the batch to itself. Its packed tokens start at its first storage row, its sink tokens at
column 0 of the fp16 columns, and its tail ends at their right edge; lengths are host integers, one `Extent` per
sequence. mlx-lm pads prompts on the right while it processes them together: those columns lie in the future of every
real query, and they are dropped as soon as the step is over, so that no padding is ever stored. Each sequence is cut
into blocks where it would be cut alone, which is why a batch gives the tokens that single runs give.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import mlx.core as mx

from ..codecs import Packed
from ..contracts.attention import Lengths
from ..contracts.ints import int_array, int_list
from ..contracts.layout import FLUSH, Layout
from ..spec.kv import KVSpec
from .buffer import EVERY, Buffer, joined, own
from .extent import Extent, grow
from .mask import CausalMask, causal_mask
from .single import OpenTQCache, mean_key, relay, shifted
from .sketches import Sketches
from .states import BatchState
from .step import Handle, LayerStats

Columns = Sequence[Sequence[int]]
"""For every sequence, source columns: those of its sink and those of its tail, in order."""


class BatchOpenTQCache(OpenTQCache):
    """mlx-lm's batch cache protocol over packed keys and values: `count` sequences of any lengths."""

    Single: type[OpenTQCache] = OpenTQCache
    """What a sequence becomes when it is taken out."""

    def __init_subclass__(cls) -> None:
        cls.Single.Batch = cls

    def __init__(self, spec: KVSpec | str, count: int, stats: LayerStats | None = None, window: int = 0):
        self.extents: tuple[Extent, ...] = (Extent(),) * count
        self.centered = [False] * count
        self.todo: list[int] | None = None  # real tokens still to come while prompts are padded on the right
        super().__init__(spec, stats, window)

    # ---- lengths

    @property
    def offset(self) -> mx.array:
        """Position of every sequence's next token, int32 `[B]`, for RoPE."""
        return int_array(tuple(e.offset for e in self.extents))

    @property
    def left_padding(self) -> mx.array:
        """How much shorter than the longest every sequence is, int32 `[B]`."""
        longest = self.size()
        return int_array(tuple(longest - e.held for e in self.extents))

    def size(self) -> int:
        """Tokens that the longest sequence holds."""
        return _longest(self.extents)

    def is_trimmable(self) -> bool:
        return all(e.base == 0 for e in self.extents)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None):
        """None, "causal", or, where the model insists, an array whose columns end at each sequence's last token."""
        if return_array and N > 1:
            return causal_mask(N, self.size(), window_size or self.window, self.left_padding)
        if window_size and window_size != self.window:
            return CausalMask(window_size)
        return "causal" if N > 1 else None

    def prepare(self, *, left_padding=None, lengths=None, right_padding=None) -> None:
        """Say how the next tokens, until `finalize`, are padded on the right: `lengths` of them are real."""
        if left_padding is not None and any(int_list(left_padding)):
            raise ValueError("prompts padded on the left can't be used with a compressed cache: pad them on the right")
        if right_padding is not None and max(int_list(right_padding), default=0) > 0:
            if lengths is None:
                raise ValueError("right padding needs the prompts' lengths: prepare(lengths=..., right_padding=...)")
            self.todo = int_list(lengths)

    def finalize(self) -> None:
        """The padded prompts are over; their padding was never stored."""
        self.todo = None

    def _lengths(self, batch: int) -> tuple[Lengths, ...]:
        assert self._dense_k is not None
        return _lens(self.extents, self._dense_k.shape[2])

    def _packed(self, batch: int) -> list[int]:
        return [e.packed for e in self.extents]

    def _real(self, batch: int, length: int) -> list[int]:
        return [length] * batch if self.todo is None else [min(t, length) for t in self.todo]

    # ---- writing

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Handle, Handle]:
        if keys.shape[0] != len(self.extents):
            raise ValueError(f"a batch cache of {len(self.extents)} sequences was given {keys.shape[0]}")
        return super().update_and_fetch(keys, values)

    def _grow_quietly(self, count: int) -> bool:
        if self.todo is not None:
            return False
        grown = grow(self.extents, (count,) * len(self.extents), self.limits)
        if grown.quiet:
            self.extents = grown.extents
        return grown.quiet

    def _absorb(self, dense_k: mx.array, dense_v: mx.array, count: int) -> bool:
        old = dense_k.shape[2] - count
        real = self._real(len(self.extents), count)
        before = self.extents
        self.extents, moves, quiet = grow(before, tuple(real), self.limits)
        if self.todo is not None:
            self.todo = [t - n for t, n in zip(self.todo, real)]
        if quiet and all(n == count for n in real):
            self.dense_k, self.dense_v = dense_k, dense_v
            return False
        # Columns of every sequence's tail, new tokens included: [first, end).
        first = [old - e.tail for e in before]
        work = [
            (e.packed, move.forget, at + move.to_sink + move.skip, move.flush)
            for e, move, at in zip(before, moves, first)
        ]
        if self.spec.center:
            dense_k = self._center(dense_k, [at for _, _, at, _ in work], [flush for *_, flush in work])
        for sequences, job in _together(work):
            for buffer, codec, layout, y in self._sides(dense_k, dense_v):
                packed, forget, start, flush = job
                if forget:
                    buffer.forget(forget, packed, sequences)
                if flush:
                    block = y[sequences, :, start : start + flush]
                    buffer.append(codec, layout, packed - forget, block, sequences, len(before))
        ends = [at + e.tail + n for at, e, n in zip(first, before, real)]
        sinks = [[*range(e.sink), *range(at, at + m.to_sink)] for e, at, m in zip(before, first, moves)]
        tails = [range(end - e.tail, end) for end, e in zip(ends, self.extents)]
        self._arrange(dense_k, dense_v, sinks, tails)
        return any(move.forget for move in moves)

    def _center(self, dense_k: mx.array, first: Sequence[int], flush: Sequence[int]) -> mx.array:
        """Take the mean of its first packed keys off every sequence that packs keys for the first time."""
        new = [not done and n > 0 for done, n in zip(self.centered, flush)]
        if not any(new):
            return dense_k
        zero = mx.zeros((1, dense_k.shape[1], 1, dense_k.shape[3]), mx.float16)
        means = [
            mean_key(dense_k[b : b + 1, :, at : at + FLUSH]) if is_new else zero
            for b, (is_new, at) in enumerate(zip(new, first))
        ]
        shift = mx.concatenate(means)
        self.center = shift if self.center is None else self.center + shift
        self.centered = [done or is_new for done, is_new in zip(self.centered, new)]
        return shifted(dense_k, shift)

    def _arrange(self, dense_k: mx.array, dense_v: mx.array, sinks: Columns, tails: Columns) -> None:
        """Set the fp16 columns from those of `dense_k`, `dense_v`: sinks to the left edge, tails to the right."""
        width = _width(sinks, tails)
        if not width:
            self.dense_k, self.dense_v = (mx.zeros((*d.shape[:2], 0, d.shape[3]), d.dtype) for d in (dense_k, dense_v))
            return
        index = [[*sink, *[0] * (width - len(sink) - len(tail)), *tail] for sink, tail in zip(sinks, tails)]
        columns = mx.array(index, dtype=mx.int32).reshape(len(index), 1, width, 1)
        self.dense_k, self.dense_v = (mx.take_along_axis(d, columns, axis=2) for d in (dense_k, dense_v))

    def trim(self, n: int | Sequence[int]) -> int:
        """Drop the newest n tokens of every sequence, or of each as many as its own n says; all, where it has fewer."""
        before, self._lent = self.extents, None
        counts = [n] * len(before) if isinstance(n, int) else n
        self.extents = tuple(e.trim(count) for e, count in zip(before, counts))
        if self.dense_k is not None and self.dense_v is not None:
            columns, alike = self.dense_k.shape[2], min(counts, default=0)
            if all(alike == count <= e.tail for count, e in zip(counts, before)):  # the columns at the right edge
                self.dense_k, self.dense_v = (d[:, :, : columns - alike] for d in (self.dense_k, self.dense_v))
            else:
                starts = [columns - e.tail for e in before]
                tails = [range(at, at + e.tail) for at, e in zip(starts, self.extents)]
                self._arrange(self.dense_k, self.dense_v, [range(e.sink) for e in self.extents], tails)
            if self.sketches is not None:
                self.sketches.trim(self._packed(len(self.extents)))
        return max((b.held - e.held for b, e in zip(before, self.extents)), default=0)

    # ---- sequences come and go

    @classmethod
    def merge(cls, caches: Sequence[OpenTQCache]) -> BatchOpenTQCache:
        """One batch of single caches, empty ones included; raises ValueError where they don't fit together."""
        first = caches[0]
        batch = cls(first.spec, 0, first.stats, first.window)
        batch._made_like(first)
        for c in caches:
            batch._check_same(c)
            if c.dense_k is not None and c.dense_k.shape[0] != 1:
                raise ValueError(f"merge takes caches of one sequence each, one has {c.dense_k.shape[0]}")
        batch._join([([c.extent], c) for c in caches])
        return batch

    def extend(self, other: BatchOpenTQCache) -> None:
        """Take the sequences of `other` in; allocates the new batch and nothing else."""
        self._check_same(other)
        self._join([(self.extents, self), (other.extents, other)])

    def _check_same(self, other: OpenTQCache) -> None:
        if type(other) not in (type(self), self.Single):
            raise ValueError(
                f"a compressed cache and a {type(other).__name__} can't share a batch: make all of them with the "
                "same model, after opentq.compress"
            )
        if (other.spec, other.window) != (self.spec, self.window):
            raise ValueError(f"caches of different specs can't share a batch: {self.spec} and {other.spec}")

    def _join(self, parts: Sequence[tuple[Sequence[Extent], OpenTQCache]]) -> None:
        self._lent = self._kept = None
        extents = tuple(e for part, _ in parts for e in part)
        like = next((c for _, c in parts if c.dense_k is not None), None)
        if like is not None:
            self._stored_like(like)
            pairs = []
            for side, layout in (("packed_k", self.k_layout), ("packed_v", self.v_layout)):
                buffer = Buffer(layout.block)
                rows = buffer.capacity(max(buffer.rows_of(e.packed) for e in extents))
                buffer.arrays = joined([(len(part), _stored(c, part, side, layout)) for part, c in parts], rows)
                pairs.append(buffer)
            width = _width([range(e.sink) for e in extents], [range(e.tail) for e in extents])
            dense_k, dense_v = (_join_dense(parts, side, width, like) for side in ("dense_k", "dense_v"))
            centers = [_centers_of(c.center, len(part), dense_k) for part, c in parts]
            centered = [done for part, c in parts for done in _centered(c, len(part))]
            self.packed_k, self.packed_v = pairs
            self.dense_k, self.dense_v = dense_k, dense_v
            self.center = mx.concatenate(centers) if any(centered) else None
            self.centered = centered
            if self.spec.pages:
                self.sketches = Sketches.join([_sketches(c, len(part)) for part, c in parts])
            mx.eval(*self._arrays())  # layer by layer, so that old and new never coexist for the whole model
        self.extents = extents
        if like is None:
            self.centered = [False] * len(extents)

    def filter(self, batch_indices: Iterable[int] | mx.array) -> None:
        """Keep the given sequences, in the given order; none at all is allowed."""
        keep, self._lent, self._kept = int_list(batch_indices), None, None
        self.extents = tuple(self.extents[i] for i in keep)
        self.centered = [self.centered[i] for i in keep]
        if self.todo is not None:
            self.todo = [self.todo[i] for i in keep]
        if self.dense_k is None or self.dense_v is None:
            return
        pick = mx.array(keep, dtype=mx.int32)
        if self.center is not None:
            self.center = mx.take(self.center, pick, axis=0)
        if self.sketches is not None:
            self.sketches = self.sketches.pick(keep)
        for buffer in (self.packed_k, self.packed_v):
            rows = buffer.capacity(max((buffer.rows_of(e.packed) for e in self.extents), default=0))
            buffer.arrays = tuple(mx.take(a[:, :, :rows], pick, axis=0) for a in buffer.arrays)
        dense_k, dense_v = (mx.take(d, pick, axis=0) for d in (self.dense_k, self.dense_v))
        columns = dense_k.shape[2]
        tails = [range(columns - e.tail, columns) for e in self.extents]
        self._arrange(dense_k, dense_v, [range(e.sink) for e in self.extents], tails)
        mx.eval(*self._arrays())

    def extract(self, idx: int) -> OpenTQCache:
        """Sequence `idx` as a single cache of its own."""
        cache = self.Single(self.spec, self.stats, self.window)
        cache._made_like(self)
        if self.dense_k is None or self.dense_v is None:
            return cache
        extent = self.extents[idx]
        sequence = slice(idx, idx + 1)
        cache._stored_like(self)
        cache.extent = extent
        cache.sketches = None if self.sketches is None else self.sketches.pick([idx])
        cache.center = own(self.center[sequence]) if self.center is not None and self.centered[idx] else None
        cache.packed_k, cache.packed_v = (
            Buffer(
                b.block,
                tuple(own(a[sequence, :, : b.rows_of(extent.packed)]) for a in b.arrays) if extent.packed else (),
            )
            for b in (self.packed_k, self.packed_v)
        )
        columns = self.dense_k.shape[2]
        cache.dense_k, cache.dense_v = (
            mx.concatenate([d[sequence, :, : extent.sink], d[sequence, :, columns - extent.tail :]], axis=2)
            for d in (self.dense_k, self.dense_v)
        )
        mx.eval(*cache._arrays())
        return cache

    def canonical(self, idx: int = 0) -> tuple[Packed, Packed]:
        """Packed keys and values of sequence `idx` as canonical arrays."""
        tokens, sequence = self.extents[idx].packed, slice(idx, idx + 1)
        return self.packed_k.canonical(self.k_layout, tokens, sequence), self.packed_v.canonical(
            self.v_layout, tokens, sequence
        )

    @property
    def state(self):
        """Arrays and scalars that mlx-lm evaluates and saves."""
        lengths = [list(e) for e in self.extents]
        layouts = f"{self.k_layout.name} {self.v_layout.name}"
        head = str(self.spec), layouts, self.window, int(self.lends), self.latent, lengths or None
        if self.dense_k is None:
            return BatchState(*head, beside=self._beside())
        used = max((e.packed for e in self.extents), default=0)
        packed_k, packed_v = (
            list(b.truncated(b.rows_of(used))) if used else None for b in (self.packed_k, self.packed_v)
        )
        sketches = None if self.sketches is None else self.sketches.state
        centered = [int(done) for done in self.centered] or None
        return BatchState(
            *head, packed_k, packed_v, self.dense_k, self.dense_v, self.center, centered, sketches, self._beside()
        )

    @state.setter
    def state(self, value) -> None:
        state = BatchState(*value)
        if not hasattr(self, "spec"):
            self.__init__(state.spec, 0)  # type: ignore[misc]
        self.todo = None
        self.extents = tuple(Extent(*numbers) for numbers in state.lengths or ())
        self.centered = [bool(done) for done in state.centered or ()] or [False] * len(self.extents)
        self._restore(state)


OpenTQCache.Batch = BatchOpenTQCache


def _together(work: Sequence[tuple[int, int, int, int]]) -> Iterable[tuple[slice, tuple[int, int, int, int]]]:
    """Sequences and what to do with them: all at once where they agree, else one by one; idle ones are left out."""
    if work and all(job == work[0] for job in work):
        sequences: list[tuple[slice, tuple[int, int, int, int]]] = [(EVERY, work[0])]
    else:
        sequences = [(slice(b, b + 1), job) for b, job in enumerate(work)]
    return [(where, job) for where, job in sequences if job[1] or job[3]]


def _width(sinks: Columns, tails: Columns) -> int:
    """fp16 columns that hold the widest sink and, beside it, the widest tail."""
    return max(map(len, sinks), default=0) + max(map(len, tails), default=0)


def _join_dense(
    parts: Sequence[tuple[Sequence[Extent], OpenTQCache]], side: str, width: int, like: OpenTQCache
) -> mx.array:
    """The fp16 columns of several caches side by side."""
    shape = getattr(like, side).shape
    count = sum(len(part) for part, _ in parts)
    out = mx.zeros((count, shape[1], width, shape[3]), mx.float16)
    start = 0
    for part, cache in parts:
        dense = getattr(cache, side)
        sink, tail = (max((getattr(e, name) for e in part), default=0) for name in ("sink", "tail"))
        rows = slice(start, start + len(part))
        if dense is not None and sink:
            out[rows, :, :sink] = dense[:, :, :sink]
        if dense is not None and tail:
            out[rows, :, width - tail :] = dense[:, :, dense.shape[2] - tail :]
        start += len(part)
    return out


def _stored(cache: OpenTQCache, part: Sequence[Extent], side: str, layout: Layout) -> tuple[mx.array, ...]:
    """A cache's packed rows in `layout`: one that is older than the failure of a kernel has another."""
    buffer, its = getattr(cache, side), cache.k_layout if side == "packed_k" else cache.v_layout
    arrays = buffer.truncated(buffer.rows_of(max((e.packed for e in part), default=0)))
    return relay(arrays, its.name, layout) if arrays else ()


def _sketches(cache: OpenTQCache, count: int) -> Sketches:
    """A cache's sketches, or those of sequences that have none yet."""
    return cache.sketches or Sketches(cache.spec.pages, cache.rotary, cache.spec.channels, count)


def _centers_of(center: mx.array | None, count: int, like: mx.array) -> mx.array:
    """A cache's centers, zeros where it has none."""
    return mx.zeros((count, like.shape[1], 1, like.shape[3]), mx.float16) if center is None else center


def _centered(cache: OpenTQCache, count: int) -> list[bool]:
    return cache.centered if isinstance(cache, BatchOpenTQCache) else [cache.center is not None] * count


@functools.lru_cache(maxsize=64)
def _lens(extents: tuple[Extent, ...], columns: int) -> tuple[Lengths, ...]:
    return tuple((e.packed, e.sink, columns - e.tail) for e in extents)


@functools.lru_cache(maxsize=64)
def _longest(extents: tuple[Extent, ...]) -> int:
    return max((e.held for e in extents), default=0)
