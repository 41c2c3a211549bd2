"""What a cache gives the model in place of arrays: handles that look like `[B, H, T, D]` and can only be attended.

The two handles of one update share a `Step`, a snapshot of the cache as this forward step sees it. Models that take
keys and values from another layer's cache, or attend twice, hold handles and get the right tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from ..attention import dispatch, guard, pages, selected
from ..contracts.attention import AttnArgs, Lengths, PackedKV
from ..contracts.shared import Shared
from ..errors import UserError

if TYPE_CHECKING:
    from .single import OpenTQCache
    from .sketches import Sketches


@dataclass
class LayerStats(Shared):
    """What really happened in one layer: shared by all caches of the layer, never copied with them."""

    calls: int = 0
    served_by: str = ""
    steps: int = 0  # decode steps of sequences, of layers that read in pages: packed tokens that they
    read: int = 0  # attended to, and
    held: int = 0  # how many there were
    shape: tuple[int, int, int] | None = None  # (KV heads, key dim, value dim)


class Handle(Shared):
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

    def __getitem__(self, key) -> Handle:
        """`handle[..., :n, :]`: the tokens without the newest ones of this step, for who verifies drafts one by one."""
        index = (*key[:-2], key[-2]) if len(key) == (3 if key[0] is Ellipsis else 4) and key[-1] == slice(None) else key
        end, length = index[-1], self.shape[2]
        rest = index[:-1] in ((Ellipsis,), (slice(None), slice(None)))
        if not (rest and isinstance(end, slice) and end.start is end.step is None and isinstance(end.stop, int)):
            raise TypeError(f"compressed keys and values can only be cut to their first tokens, not by {key}")
        stop = min(end.stop, length) if end.stop >= 0 else length + end.stop
        if stop == length:
            return self
        return Handle(self.step.without(length - stop), (*self.shape[:2], stop, self.shape[3]), self.dtype)

    def astype(self, dtype: mx.Dtype) -> Handle:
        """The same tokens, said to be of another dtype: attention computes in the query's (stablelm asks for this)."""
        return Handle(self.step, self.shape, dtype)


class Step:
    """The cache as one forward step sees it: packed prefix and `[sink | tail | new]` in fp16.

    A decode step's new tokens may still be `fresh`: where the back end appends and attends in one launch, they join the
    fp16 columns when they are attended, or when somebody looks at the columns before.
    """

    __slots__ = (
        *("_dense_k", "_dense_v", "cache", "centered", "cuts", "fresh", "k", "lens"),
        *("sketches", "stats", "v", "window"),
    )

    def __init__(
        self,
        k: PackedKV,
        v: PackedKV,
        dense_k: mx.array,
        dense_v: mx.array,
        lens: tuple[Lengths, ...],
        window: int,
        stats: LayerStats,
        centered: bool = False,
        sketches: Sketches | None = None,
    ):
        self.k, self.v, self._dense_k, self._dense_v = k, v, dense_k, dense_v
        self.lens, self.window, self.stats, self.centered, self.sketches = lens, window, stats, centered, sketches
        self.fresh: tuple[mx.array, mx.array] | None = None
        self.cache: OpenTQCache | None = None  # whose columns the fresh tokens are to join
        self.cuts: dict[int, Step] | None = None

    @property
    def dense_k(self) -> mx.array:
        self.append_fresh()
        return self._dense_k

    @property
    def dense_v(self) -> mx.array:
        self.append_fresh()
        return self._dense_v

    def without(self, newest: int) -> Step:
        """The cache as the tokens of this step before the `newest` see it; they are in fp16 columns all."""
        self.cuts = self.cuts or {}
        if newest not in self.cuts:
            k, v = (d[:, :, : d.shape[2] - newest] for d in (self.dense_k, self.dense_v))
            self.cuts[newest] = Step(self.k, self.v, k, v, self.lens, self.window, self.stats, self.centered)
        return self.cuts[newest]

    def append_fresh(self) -> None:
        """Let fresh tokens join the columns, in a launch of their own."""
        if self.fresh is not None and self.cache is not None:
            self.join(*self.cache.extended(self._dense_k, self._dense_v, *self.fresh))

    def join(self, dense_k: mx.array, dense_v: mx.array) -> None:
        """The columns with the fresh tokens behind them: this step's from now on, and its cache's."""
        assert self.cache is not None
        self._dense_k, self._dense_v = dense_k, dense_v
        self.cache.adopt(self, dense_k, dense_v)
        self.fresh = self.cache = None

    def attend(self, q, *, scale: float, mask=None, sinks=None, softcap: float = 0.0) -> mx.array:
        """Attention of `q [B, Hq, L, Dk]` (as the model made it, not rotated): `[B, Hq, L, Dv]` in q's dtype."""
        causal, window = False, self.window
        if isinstance(mask, str):
            if mask != "causal":
                raise ValueError(f"attention mask {mask!r} is not known: use None, 'causal' or an array")
            asked = getattr(mask, "window", 0)
            causal, mask, window = True, None, min(asked, window) if asked and window else asked or window
        if self.centered and (sinks is not None or softcap):
            raise UserError(
                "centred keys can't serve attention sinks or soft-capped logits: drop center from the KV spec"
            )
        args = AttnArgs(
            q, self.k, self.v, self._dense_k, self._dense_v, self.lens, float(scale), causal, window, mask, sinks,
            softcap,
        )  # fmt: skip
        rotated = None
        if self.sketches is not None:
            self.sketches.observe(q)
            if (selector := self._selector(args)) is not None:
                rotated = self.k.codec.rotate(q)
                args.pages = dispatch.choose(selector, args, rotated)
        stats, cache, fresh = self.stats, self.cache, self.fresh
        stats.calls += 1
        if cache is not None and fresh is not None:
            backend = cache.backend
            assert backend is not None
            done = guard.step(backend, args, fresh, cache.center) if mask is None else None
            if done is not None:
                stats.served_by = backend.name
                self.join(done[1], done[2])
                return done[0]
            args.dense_k, args.dense_v = self.dense_k, self.dense_v
        args.q = self.k.codec.rotate(q) if rotated is None else rotated
        out, stats.served_by = dispatch.attend(args)
        return self.v.codec.unrotate(out)

    def attend_rows(self, q, positions, *, scale: float, sinks=None) -> mx.array:
        """Attention of `q [B, Hq, 1, Dk]` to tokens `positions` int32 `[B, K]` (negative: none), and no others."""
        if self.centered and sinks is not None:
            raise UserError("centred keys can't serve attention sinks: drop center from the KV spec")
        q, dense_k, dense_v = self.k.codec.rotate(q), self.dense_k, self.dense_v
        args = AttnArgs(q, self.k, self.v, dense_k, dense_v, self.lens, float(scale), sinks=sinks)
        self.stats.calls += 1
        self.stats.served_by = "selected"
        return self.v.codec.unrotate(selected.attend(args, positions))

    def _selector(self, args: AttnArgs) -> pages.Selector | None:
        """What chooses the pages that this call reads; None for everything, as with a mask or a window."""
        if args.q.shape[2] > pages.ROWS or self.sketches is None:
            return None
        packed = tuple(n for n, _, _ in self.lens)
        selector = None if args.window or args.mask is not None else self.sketches.selector(packed)
        selector = selector if selector and dispatch.pays(args) else None
        self.stats.steps += sum(n > 0 for n in packed)
        self.stats.held += sum(packed)
        self.stats.read += sum(min(n, selector.budget) for n in packed) if selector else sum(packed)
        return selector
