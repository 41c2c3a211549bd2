"""Qwen's sparse attention (QSA): in layers of full attention an indexer chooses blocks of a few tokens, by the mean of
each block's index keys; a query sees those, and the tokens behind the last whole block.

Keys and values are packed, and a decode step gathers and decodes the chosen rows only (`attention/selected.py`). While
a prompt is read the choice is a mask. What the model's indexer makes is kept as it makes it, for every sequence by
itself (`Index`): one small key a token and the blocks' means, all of which are scored at every step. So a sequence
chooses in a batch what it chooses alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import mlx.core as mx

from ...caches.buffer import Buffer
from ...caches.extent import Extent
from ...caches.single import OpenTQCache
from ...contracts.ints import int_list
from ...contracts.layout import CANONICAL
from ..seams import flat
from .caches import BatchVLMCache, VLMCache

AXES = 3
"""Of positions: time, height and width."""

ROWS = 256
"""Queries whose mask exists at one time: it is as wide as the context."""


def bytes_per_token(indexer: Any) -> float:
    """Bytes of one token's index key in fp16, its share of a mean, and its position."""
    return indexer.head_dim * 2 * (1 + 1 / indexer.compress_ratio) + AXES * 4


class Index:
    """One sequence's index keys, by the names that the model's indexer knows."""

    def __init__(self) -> None:
        self.offset = 0
        self.buffer = Buffer(1)  # keys [1, 1, T, D] and positions int32 [1, 1, T, 3]
        self.index_block_keys: mx.array | None = None  # normed and turned means [1, 1, blocks, D]
        self.index_block_ratio: int | None = None

    def update_indexer(self, keys: mx.array, positions: mx.array) -> tuple[mx.array, mx.array]:
        """Append `[1, L, D]` and `[3, 1, L]` (of text `[1, L]`, too); returns the same of all tokens."""
        axes = mx.broadcast_to(positions if positions.ndim == 3 else positions[None], (AXES, *positions.shape[-2:]))
        self.buffer.write(self.offset, (keys[:, None], axes.astype(mx.int32).transpose(1, 2, 0)[:, None]))
        self.offset += keys.shape[1]
        held, places = self.buffer.truncated(self.offset)
        return held[:, 0], places[:, 0].transpose(2, 0, 1)

    def trim(self, count: int) -> None:
        """Forget the newest `count` tokens; whole blocks before them stay what they are."""
        self.offset -= min(count, self.offset)
        if self.index_block_keys is not None and self.index_block_ratio:
            self.index_block_keys = self.index_block_keys[:, :, : self.offset // self.index_block_ratio]

    @property
    def arrays(self) -> list[mx.array]:
        return [*self.buffer.arrays, *([] if self.index_block_keys is None else [self.index_block_keys])]

    @property
    def state(self) -> list[Any]:
        """Tokens, tokens per block, index keys, positions, means."""
        keys, places = self.buffer.truncated(self.offset) or (None, None)
        return [self.offset, self.index_block_ratio or 0, keys, places, self.index_block_keys]

    @classmethod
    def from_state(cls, state: Sequence[Any]) -> Index:
        index = cls()
        index.offset, ratio, keys, places, index.index_block_keys = state
        index.index_block_ratio = ratio or None
        if keys is not None:
            index.buffer.write(0, (keys, places))
        return index

    def seen(self, indexer: Any, chosen: Any) -> mx.array:
        """Positions int32 `[1, K]` that the newest query sees of `chosen`; negative where there are fewer than K."""
        ratio, budget = indexer.compress_ratio, indexer.block_topk * indexer.compress_ratio
        if chosen is None:  # all of them; padding, which sees nothing, may see the first
            every = mx.arange(budget + ratio - 1)
            return mx.where(every < max(self.offset, 1), every, -1)[None]
        blocks = chosen.selected_blocks[:, 0, :, None]
        inside = mx.where(blocks < 0, -1, blocks * ratio + mx.arange(ratio)).reshape(1, -1)
        behind = self.offset // ratio * ratio + mx.arange(ratio - 1)
        return mx.concatenate([inside, mx.where(behind < self.offset, behind, -1)[None]], axis=1)


class Choosing(OpenTQCache):
    """What the single and the batch cache of such a layer have in common."""

    defers = False
    indices: list[Index]

    def _reset(self) -> None:
        super()._reset()
        self.indices = []

    def _choose_layouts(self) -> None:
        super()._choose_layouts()
        if max(self.k_layout.block, self.v_layout.block) > 1:  # single tokens are gathered
            self.k_layout = self.v_layout = CANONICAL
            self.packed_k, self.packed_v = Buffer(1), Buffer(1)

    def choose(self, indexer: Any, projected: mx.array, positions: mx.array | None) -> list[Any]:
        """What every sequence chooses for `projected [B, L, ...]`, None for all; the indices take its keys in."""
        batch, length, _ = projected.shape
        self.indices = self.indices or [Index() for _ in range(batch)]
        found = []
        for b, (index, (first, real)) in enumerate(zip(self.indices, self._columns(batch, length))):
            part = slice(b, b + 1), slice(first, first + real)
            where = None if positions is None else positions[(..., *part)]
            found.append(indexer.select_from_projected(projected[part], index, where) if real else None)
        return found

    def _columns(self, batch: int, length: int) -> list[tuple[int, int]]:
        """First and number of the columns, among the next `length`, that are tokens of each sequence."""
        return [(0, real) for real in self._real(batch, length)]

    def tie_index(self) -> None:
        """Have the indices evaluated with the keys, even where nothing was chosen: their graph must not grow."""
        assert self.dense_k is not None
        self.dense_k = mx.depends(self.dense_k, [a for index in self.indices for a in index.arrays])

    def _arrays(self) -> list[mx.array]:
        return super()._arrays() + [a for index in self.indices for a in index.arrays]

    def trim(self, n: int | Sequence[int]) -> int:
        for index, count in zip(self.indices, [n] * len(self.indices) if isinstance(n, int) else n):
            index.trim(count)
        return super().trim(n)  # type: ignore[arg-type]

    def _beside(self) -> list[Any] | None:
        return [super()._beside(), [index.state for index in self.indices] or None]

    def _restore_beside(self, beside: list[Any] | None) -> None:
        others, indices = beside or (None, None)
        super()._restore_beside(others)
        self.indices = [Index.from_state(state) for state in indices or ()]

    def copies(self, count: int) -> list[Index]:
        """The indices of the first `count` sequences, for another cache."""
        return [Index.from_state(i.state) for i in self.indices] or [Index() for _ in range(count)]


class VLMQSACache(Choosing, VLMCache):  # type: ignore[misc]
    """One sequence in one layer that chooses tokens."""


class BatchVLMQSACache(Choosing, BatchVLMCache):
    """Many sequences in one layer that chooses tokens."""

    Single = VLMQSACache

    def _columns(self, batch: int, length: int) -> list[tuple[int, int]]:
        if not any(self.pads):
            return super()._columns(batch, length)
        return [(min(p, length), length - min(p, length)) for p in self.pads]

    def filter(self, batch_indices) -> None:
        keep = int_list(batch_indices)
        self.indices = [self.indices[i] for i in keep] if self.indices else []
        super().filter(keep)

    def extract(self, idx: int) -> OpenTQCache:
        cache = super().extract(idx)
        assert isinstance(cache, VLMQSACache)
        cache.indices = self.copies(0)[idx : idx + 1]
        return cache

    def _join(self, parts: Sequence[tuple[Sequence[Extent], OpenTQCache]]) -> None:
        super()._join(parts)
        self.indices = [i for part, c in parts if isinstance(c, Choosing) for i in c.copies(len(part))]


def attention(layer: Any, x: mx.array, mask: Any, cache: Choosing, positions: mx.array | None, _: Any) -> mx.array:
    """An indexer chooses blocks of tokens; their packed rows are gathered, and nothing else is read."""
    return attend(layer, x, cache, positions, lambda linear, x: linear(x))


def one_by_one(layer: Any, x: mx.array, cache: Choosing, positions: mx.array | None, linear: Any) -> mx.array:
    """Every token as a step of its own, for drafts and for batches: `[B, L, E]`."""
    steps = [slice(i, i + 1) for i in range(x.shape[1])]
    places = [None if positions is None else positions[..., s] for s in steps]
    return mx.concatenate([attend(layer, x[:, s], cache, p, linear) for s, p in zip(steps, places)], axis=1)


def attend(layer: Any, x: mx.array, cache: Choosing, positions: mx.array | None, linear: Any) -> mx.array:
    """One layer of attention, `[B, L, E]`; `linear` multiplies by its projections."""
    batch, length, _ = x.shape
    if length > 1 and isinstance(cache, BatchVLMQSACache) and (batch > 1 or any(cache.pads)):
        return one_by_one(layer, x, cache, positions, linear)  # the model itself reads prompts sequence by sequence
    indexer = layer.indexer
    chosen = cache.choose(indexer, linear(indexer.index_qk_proj, x), positions)
    q, keys, _, gate, _ = layer._prepare_projected_qkv(
        *(linear(projection, x) for projection in (layer.q_proj, layer.k_proj, layer.v_proj)),
        cache, positions, None, None,
    )  # fmt: skip
    cache.tie_index()
    whole = all(index.offset // indexer.compress_ratio <= indexer.block_topk for index in cache.indices)
    if whole:
        out = keys.step.attend(q, scale=layer.scale, mask="causal" if length > 1 else None)
    elif length == 1:
        seen = [index.seen(indexer, c) for index, c in zip(cache.indices, chosen)]
        out = keys.step.attend_rows(q, mx.concatenate(seen), scale=layer.scale)
    else:
        parts = [slice(start, start + ROWS) for start in range(0, length, ROWS)]
        masks = (mx.concatenate([indexer.build_mask(_rows(c, part)) for c in chosen]) for part in parts)
        outs = [keys.step.attend(q[:, :, part], scale=layer.scale, mask=mask) for part, mask in zip(parts, masks)]
        out = mx.concatenate(outs, axis=2)
    return linear(layer.o_proj, flat(out) * mx.sigmoid(gate))


def _rows(chosen: Any, part: slice) -> SimpleNamespace:
    """What the indexer says of some of a step's queries."""
    each = {name: getattr(chosen, name)[:, part] for name in ("selected_blocks", "query_ends", "complete_counts")}
    return SimpleNamespace(**vars(chosen) | each)
