"""The compressed caches under mlx-vlm's cache protocol, which differs from mlx-lm's in three ways.

It pads ragged prompts on the left, where mlx-lm pads them on the right; it copies and restores caches as `state` and
`meta_state`; and it asks a single cache for its batch (`to_batch`). The bytes, and everything done with them, are those
of `opentq.caches`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx

from ...caches.batch import BatchOpenTQCache
from ...caches.latent import BatchOpenTQLatentCache, OpenTQLatentCache
from ...caches.single import OpenTQCache
from ...caches.step import Handle, Step
from ...contracts.ints import int_array, int_list


class _Protocol:
    """What mlx-vlm asks of every cache beyond mlx-lm's protocol."""

    meta_state = ""
    bits = 0
    """mlx-vlm knows quantised caches by this name: their keys and values are no arrays to cut up."""

    @classmethod
    def from_state(cls, state, meta_state: str = ""):
        """A cache that holds `state`; there is nothing beside it."""
        cache = cls.__new__(cls)
        cache.state = state  # type: ignore[attr-defined]
        mx.eval(cache._arrays())  # type: ignore[attr-defined]  # another thread may write it to a disk
        return cache

    def memory_profile(self, token_count: int) -> None:
        """None: mlx-vlm then counts `nbytes`."""


class _Single(_Protocol):
    """What it asks of a cache of one sequence."""

    Batch: type[BatchVLMCache]

    def to_batch(self, left_padding: Iterable[int]) -> BatchVLMCache:
        """An empty batch of this layer whose prompts are padded on the left."""
        return self.Batch.empty_like(self, left_padding)  # type: ignore[arg-type]

    def prefix_cache_merge(self, rows: Sequence[OpenTQCache], prefix_lens: Sequence[int]) -> BatchVLMCache:
        """One batch of rows that came out of mlx-vlm's prefix cache."""
        return self.Batch.merge(rows)


class VLMCache(_Single, OpenTQCache):  # type: ignore[misc]
    """One sequence in one layer."""


class VLMLatentCache(_Single, OpenTQLatentCache):  # type: ignore[misc]
    """One sequence of latents (MLA) in one layer."""


class BatchVLMCache(_Protocol, BatchOpenTQCache):
    """Many sequences in one layer, with prompts that are padded on the left.

    The padded columns of a step are rotated behind the real ones, keys, values, queries and mask alike, and the output
    is rotated back: so they are padding on the right, which is never stored (`caches/batch.py`).
    """

    Single: type[OpenTQCache] = VLMCache

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.pads = [0] * len(self.extents)
        self.cut: list[int] | None = None

    @classmethod
    def empty_like(cls, single: OpenTQCache, left_padding: Iterable[int]):
        pads = [int(p) for p in left_padding]
        batch = cls(single.spec, len(pads), single.stats, single.window)
        batch._made_like(single)
        batch.pads = pads
        return batch

    def prepare(self, *, left_padding=None, lengths=None, right_padding=None) -> None:
        """Say how the next tokens are padded: on the left, or on the right until `finalize`.

        Right padding without `lengths` is of the newest tokens that are stored: drafts that were not accepted, which
        `finalize` takes back.
        """
        if right_padding is not None and lengths is None:
            self.cut = int_list(right_padding)
            return
        if left_padding is not None:
            self.pads = [p + int(more) for p, more in zip(self.pads, left_padding)]
        super().prepare(lengths=lengths, right_padding=right_padding)

    def finalize(self) -> None:
        if self.cut is not None:
            self.trim(self.cut)
            self.cut = None
        super().finalize()

    @property
    def offset(self) -> mx.array:
        """Position of every sequence's next column, int32 `[B]`: negative while its padding is still to come."""
        return int_array(tuple(e.offset - p for e, p in zip(self.extents, self.pads)))

    @offset.setter
    def offset(self, value: mx.array) -> None:
        # Models that run a batch row by row say in this way how much padding is still to come.
        self.pads = [max(0, e.offset - v) for e, v in zip(self.extents, int_list(value))]

    @property
    def left_padding(self) -> mx.array:
        """Columns of the batch's timeline before every sequence's first token, int32 `[B]`."""
        longest = self.size()
        return int_array(tuple(longest - e.held + p for e, p in zip(self.extents, self.pads)))

    @left_padding.setter
    def left_padding(self, value: mx.array) -> None:
        """Nothing: it follows from the lengths and the padding to come."""

    def empty(self) -> bool:
        """Whether there are no sequences; a batch whose sequences have no tokens yet is one all the same."""
        return not self.extents

    @property
    def _idx(self) -> int:
        """Columns of the timeline that all sequences share."""
        return max((e.offset for e in self.extents), default=0)

    def is_single_row(self) -> bool:
        return len(self.extents) == 1

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Handle, Handle]:
        if not any(self.pads):
            return super().update_and_fetch(keys, values)
        count = keys.shape[2]
        pads = [min(p, count) for p in self.pads]
        self.todo = [count - p for p in pads]
        handles = super().update_and_fetch(_rolled(keys, pads, 2), _rolled(values, pads, 2))
        self.todo = None
        self.pads = [p - now for p, now in zip(self.pads, pads)]
        step = PaddedStep(handles[0].step, pads)
        for handle in handles:
            handle.step = step  # type: ignore[assignment]
        return handles

    def filter(self, batch_indices) -> None:
        keep = int_list(batch_indices)
        self.pads = [self.pads[i] for i in keep]
        super().filter(keep)

    def extend(self, other) -> None:
        self.pads = self.pads + getattr(other, "pads", [0] * len(other.extents))
        super().extend(other)

    @classmethod
    def merge(cls, caches: Sequence[OpenTQCache]):
        batch = super().merge(caches)
        batch.pads = [0] * len(caches)  # type: ignore[attr-defined]
        return batch

    def _beside(self) -> list[Any] | None:
        """The padding that is still to come."""
        return list(self.pads) or None

    def _restore_beside(self, beside: list[Any] | None) -> None:
        self.pads = beside or []


class BatchVLMLatentCache(BatchVLMCache, BatchOpenTQLatentCache):
    """Many sequences of latents in one layer."""

    Single = VLMLatentCache


class PaddedStep:
    """A step whose new columns were rotated: `pads` columns of every sequence are padding, the real ones come first."""

    def __init__(self, step: Step, pads: list[int]):
        self.step, self.pads = step, pads

    def attend(self, q, *, scale: float, mask=None, sinks=None, softcap: float = 0.0) -> mx.array:
        """`Step.attend`, for queries in the order that the model knows."""
        back = [q.shape[2] - p for p in self.pads]
        if isinstance(mask, mx.array):
            mask = self._mask(mask, q.shape[2])
        q = _rolled(q, self.pads, 2)
        return _rolled(self.step.attend(q, scale=scale, mask=mask, sinks=sinks, softcap=softcap), back, 2)

    def attend_rows(self, q, positions, *, scale: float, sinks=None) -> mx.array:
        """`Step.attend_rows`: one column, rotated, is itself."""
        return self.step.attend_rows(q, positions, scale=scale, sinks=sinks)

    def _mask(self, mask: mx.array, count: int) -> mx.array:
        """`mask [B or 1, H or 1, L, S]` for the rotated columns; rows of padding may see anything."""
        while mask.ndim < 4:
            mask = mask[None]
        mask = mx.broadcast_to(mask, (len(self.pads), mask.shape[1], count, mask.shape[3]))
        old = mask.shape[3] - count
        mask = _rolled(mx.concatenate([mask[..., :old], _rolled(mask[..., old:], self.pads, 3)], axis=3), self.pads, 2)
        real = mx.arange(count) < (count - int_array(tuple(self.pads)))[:, None]
        anything = mx.array(True) if mask.dtype == mx.bool_ else mx.zeros((), mask.dtype)
        return mx.where(real[:, None, :, None], mask, anything)


def _rolled(x: mx.array, shifts: Sequence[int], axis: int) -> mx.array:
    """Every sequence of `x` rotated to the left along `axis` by its own shift."""
    count = x.shape[axis]
    index = (mx.arange(count) + int_array(tuple(shifts))[:, None]) % count
    shape = [1] * x.ndim
    shape[0], shape[axis] = len(shifts), count
    return mx.take_along_axis(x, index.reshape(shape), axis=axis)
