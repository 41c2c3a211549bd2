"""One record that says everything about one attention call over a compressed cache.

Where a token lives, in logical order: `[sink: dense] [packed] [tail: dense]`. Dense columns are float16 in the codec's
basis: sink tokens, the recent tail, and last the L tokens of this very call. Packed tokens are strictly older than the
query block, so the packed region never needs a causal mask, only its length (and a window's lower bound).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import mlx.core as mx

from .codec import Codec, Format, Packed
from .layout import FLUSH, Layout

T = TypeVar("T")


@dataclass(slots=True)
class PackedKV:
    """Packed keys or values: storage arrays `[B, H, rows, ...]` (over-allocated), their codec, layout and head dim.

    `memo` is what is kept for attention of these very arrays: what serves it, and what is made once.
    """

    codec: Codec
    layout: Layout
    arrays: tuple[mx.array, ...]
    head_dim: int
    memo: dict = field(default_factory=dict, compare=False, repr=False)

    @property
    def format(self) -> Format | None:
        """What the packed arrays are."""
        return _format(self.codec, self.head_dim)

    def decode(self, start: int, stop: int, dtype: mx.Dtype) -> mx.array:
        """Tokens `[start, stop)` as rotated vectors `[B, H, stop - start, D]`."""
        return self.codec.decode(self.canonical(start, stop), dtype, self.head_dim)

    def pick(self, pages: mx.array) -> PackedKV:
        """The blocks of 64 tokens that `pages [B, H, P]` names, one behind the other, still packed."""
        rows = FLUSH // self.layout.block
        index = (pages[..., None] * rows + mx.arange(rows)).reshape(*pages.shape[:2], -1)
        return replace(self, arrays=tuple(_take_rows(a, index) for a in self.arrays))

    def canonical(self, start: int, stop: int) -> Packed:
        """Tokens `[start, stop)` in the canonical format."""
        block = self.layout.block
        first, last = start // block, -(-stop // block)
        packed = self.layout.load(tuple(a[:, :, first:last] for a in self.arrays))
        if (first * block, last * block) == (start, stop):
            return packed
        return tuple(a[:, :, start - first * block : stop - first * block] for a in packed)


Lengths = tuple[int, int, int]
"""(packed_len, sink_len, tail_start) of one sequence: valid are packed tokens `[0, packed_len)` and dense columns
`[0, sink_len)` and `[tail_start, Td)`."""


Alike = tuple[tuple[int, ...], mx.Dtype, bool, int, int, float, float, bool]
"""Shape and dtype of queries; causal, window, pages listed (0 without a list); scale, softcap, whether with sinks."""

EXACT = 16
"""Query tokens up to which calls of different length are different kinds."""


@dataclass(slots=True)
class AttnArgs:
    """Attention of `q` over `[sink | packed | tail]`, everything in the codecs' bases.

    Attributes:
        q: `[B, Hq, L, Dk]`, any float dtype; the output has its dtype.
        k, v: packed keys `[B, Hkv, ...]` of dim Dk and values of dim Dv.
        dense_k, dense_v: float16 `[B, Hkv, Td, D]`; the last L columns are the tokens of this call.
        lens: one `Lengths` per sequence.
        scale: multiplies `q . k`.
        causal: query row i, at dense column `Td - L + i`, sees no later token.
        window: 0, or how many tokens a row sees, itself included.
        mask: None, or bool / additive `[.., L, S]` in logical key order (right-aligned; portable path only).
        sinks: None, or logits `[Hq]` that join the softmax denominator (gpt-oss).
        softcap: 0, or c for `c * tanh(score / c)` (gemma2).
        pages: None, or the blocks of 64 packed tokens to read, int32 `[B, Hkv, P]`, ascending, the newest among them;
            a sequence with fewer blocks has all of them first, and what follows counts for nothing. Never with a mask
            or a window.
    """

    q: mx.array
    k: PackedKV
    v: PackedKV
    dense_k: mx.array
    dense_v: mx.array
    lens: tuple[Lengths, ...]
    scale: float
    causal: bool = False
    window: int = 0
    mask: mx.array | None = None
    sinks: mx.array | None = None
    softcap: float = 0.0
    pages: mx.array | None = None

    def picked(self) -> AttnArgs:
        """The same call with only the packed tokens of `pages`, for who reads contiguous tokens only.

        Their order does not matter to a softmax, and only the newest block can be a part of one.
        """
        if self.pages is None:
            return self
        return replace(self, k=self.k.pick(self.pages), v=self.v.pick(self.pages), lens=self.picked_lens, pages=None)

    @property
    def picked_lens(self) -> tuple[Lengths, ...]:
        """Lengths with no more packed tokens than those of `pages`."""
        if self.pages is None:
            return self.lens
        gone = [FLUSH * max(-(-packed // FLUSH) - self.listed, 0) for packed, _, _ in self.lens]
        return tuple((packed - n, sink, tail) for n, (packed, sink, tail) in zip(gone, self.lens))

    @property
    def projected(self) -> mx.array:
        """The queries that multiply packed codes (`Codec.project`), `[B, Hq, L, E]`; dense keys always take `q`."""
        return self.k.codec.project(self.q)

    @property
    def kv_heads(self) -> int:
        return self.dense_k.shape[1]

    @property
    def gqa(self) -> int:
        """Query heads per KV head."""
        return self.q.shape[1] // self.dense_k.shape[1]

    @property
    def max_packed(self) -> int:
        return max(packed for packed, _, _ in self.lens)

    @property
    def packed_bytes(self) -> float:
        """Of all packed keys and values, without what is allocated ahead."""
        tokens, sequences = sum(packed for packed, _, _ in self.lens), len(self.lens)
        rows = [(a.nbytes / a.shape[2], kv.layout.block) for kv in (self.k, self.v) for a in kv.arrays]
        return sum(tokens / block * width / sequences for width, block in rows)

    @property
    def listed(self) -> int:
        """Blocks in the list of pages; 0 without one."""
        return 0 if self.pages is None else self.pages.shape[2]

    @property
    def alike(self) -> Alike:
        """What calls over the same packed keys and values have in common if one launch serves them, whatever their
        lengths and columns.
        """
        mask = self.causal, self.window, self.listed
        return self.q.shape, self.q.dtype, *mask, self.scale, self.softcap, self.sinks is not None

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gave at first for these very keys and values; `key` names it, and the calls that it is for."""
        kept = self.k.memo.get(key)
        if kept is None or kept[0] is not self.v:
            kept = self.k.memo[key] = self.v, make()
        return kept[1]

    def kind(self) -> tuple:
        """What distinguishes one kind of call from another, hashable, no values; lengths to a power of two."""
        return (
            *(self.q.shape[1], min(self.q.shape[2], EXACT + 1), self.q.dtype, self.kv_heads),
            *(self.k.codec, self.k.head_dim, self.k.layout, self.v.codec, self.v.head_dim, self.v.layout),
            *(self.causal, self.window > 0, self.mask is not None, self.sinks is not None, self.softcap > 0),
            *(self.pages is not None, len(self.lens) > 1),
            (self.max_packed + self.dense_k.shape[2]).bit_length(),
        )

    def kind_words(self) -> str:
        """The kind of call in words, whatever its lengths."""
        length = self.q.shape[2]
        options = {"causal": self.causal, "window": self.window, "softcap": self.softcap}
        options |= {"sinks": self.sinks is not None, "mask": self.mask is not None, "pages": self.pages is not None}
        return " ".join(
            [
                f"{self.k.codec}/{self.v.codec} D={self.k.head_dim}/{self.v.head_dim}",
                f"{self.q.shape[1]}/{self.kv_heads} heads",
                f"{length} tokens" if length <= EXACT else "prompts",
                str(self.q.dtype).removeprefix("mlx.core."),
                self.k.layout.name,
                *(name for name, on in options.items() if on),
            ]
        )

    def describe(self) -> str:
        """The whole record in words, for the error when nobody serves it."""
        return (
            f"q {tuple(self.q.shape)} {self.q.dtype}, keys {self.k.codec} D={self.k.head_dim}, "
            f"values {self.v.codec} D={self.v.head_dim}, layout {self.k.layout.name}, KV heads {self.kv_heads}, "
            f"dense {tuple(self.dense_k.shape)}, lens {self.lens}, scale {self.scale:g}, causal {self.causal}, "
            f"window {self.window}, mask {None if self.mask is None else tuple(self.mask.shape)}, "
            f"sinks {self.sinks is not None}, softcap {self.softcap:g}, "
            f"pages {None if self.pages is None else self.pages.shape[2]}"
        )


AttnFn = Callable[[AttnArgs], "mx.array | None"]
"""What may serve a call: `[B, Hq, L, Dv]` in q's dtype, or None for "not me"."""


@functools.lru_cache(maxsize=256)
def _format(codec: Codec, head_dim: int) -> Format | None:
    return codec.format(head_dim)


def _take_rows(array: mx.array, index: mx.array) -> mx.array:
    """Rows `index [B, H, n]` of `[B, H, rows, ...]`, each head its own."""
    batch, heads, rows = array.shape[:3]
    first = mx.arange(batch * heads, dtype=mx.int32).reshape(batch, heads, 1) * rows
    return mx.take(array.reshape(batch * heads * rows, *array.shape[3:]), index + first, axis=0)


@functools.lru_cache(maxsize=64)
def lens_array(lens: tuple[Lengths, ...]) -> mx.array:
    """`AttnArgs.lens` as int32 `[B, 3]` for kernels."""
    return mx.array(lens, dtype=mx.int32)
