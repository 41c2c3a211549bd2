"""What a cache gives the model in place of arrays: handles that look like `[B, H, T, D]` and can only be attended.

The two handles of one update share a `Step`, a snapshot of the cache as this forward step sees it. Models that take
keys and values from another layer's cache, or attend twice, hold handles and get the right tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import mlx.core as mx

from ..attention import dispatch, pages
from ..contracts.attention import AttnArgs, Lengths, PackedKV
from ..errors import UserError

if TYPE_CHECKING:
    from .sketches import Sketches


@dataclass
class LayerStats:
    """What really happened in one layer: shared by all caches of the layer, never copied with them."""

    calls: int = 0
    served_by: str = ""
    read: int = 0  # packed tokens that decode steps attended to, and
    held: int = 0  # how many there were, of layers that read in pages
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

    def __getattr__(self, name: str):
        raise AttributeError(
            f"compressed keys and values have no {name!r}: they can be attended but not read as arrays, so this model "
            "can't be used with a compressed cache"
        )

    def __deepcopy__(self, memo: dict) -> Handle:
        return self

    def astype(self, dtype: mx.Dtype) -> Handle:
        """The same tokens, said to be of another dtype: attention computes in the query's (stablelm asks for this)."""
        return Handle(self.step, self.shape, dtype)


@dataclass(frozen=True)
class Step:
    """The cache as one forward step sees it: packed prefix and `[sink | tail | new]` in fp16."""

    k: PackedKV
    v: PackedKV
    dense_k: mx.array
    dense_v: mx.array
    lens: tuple[Lengths, ...]
    window: int
    stats: LayerStats = field(compare=False)
    centered: bool = False
    sketches: Sketches | None = field(default=None, compare=False)

    def attend(self, q, *, scale: float, mask=None, sinks=None, softcap: float = 0.0) -> mx.array:
        """Attention of `q [B, Hq, L, Dk]` (as the model made it, not rotated): `[B, Hq, L, Dv]` in q's dtype."""
        if isinstance(mask, str) and mask != "causal":
            raise ValueError(f"attention mask {mask!r} is not known: use None, 'causal' or an array")
        if self.centered and (sinks is not None or softcap):
            raise UserError(
                "centred keys can't serve attention sinks or soft-capped logits: drop center from the KV spec"
            )
        asked = getattr(mask, "window", 0)
        window = min(asked, self.window) if asked and self.window else asked or self.window
        listed = None
        if self.sketches is not None:
            self.sketches.observe(q)
            listed = self._pages(q, float(scale), window or (mask is not None and not isinstance(mask, str)))
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
            pages=listed,
        )
        out, name = dispatch.attend(args)
        self.stats.calls += 1
        self.stats.served_by = name
        return self.v.codec.unrotate(out)

    def _pages(self, q: mx.array, scale: float, whole: bool | int) -> mx.array | None:
        """The pages that this call reads; None for everything, as where `whole` says so."""
        if q.shape[2] > pages.ROWS or self.sketches is None:
            return None
        packed = tuple(n for n, _, _ in self.lens)
        selector = None if whole else self.sketches.selector(packed)
        self.stats.held += sum(packed)
        self.stats.read += sum(min(n, selector.budget) for n in packed) if selector else sum(packed)
        return selector.choose(q, scale, packed) if selector else None
