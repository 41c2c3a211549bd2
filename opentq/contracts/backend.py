"""The kernels of one kind of machine: what a back end offers to attention, caches and `opentq doctor`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .attention import AttnArgs
from .check import Check
from .codec import Codec
from .layout import Layout
from .shared import Shared

Pair = tuple[Any, Any]
"""Something of keys and the same of values."""


@dataclass(frozen=True)
class Backend(Shared):
    """Fused kernels and the storage that they want.

    Attributes:
        name: "cpu", "cuda" or "metal".
        available: whether this machine can run them.
        attend: `[B, Hq, L, Dv]` in q's dtype, or None for calls that the kernels do not serve.
        layouts: the storage of keys and values of two codecs and `(Dk, Dv)`.
        layout_named: the layout of that name, on any machine, or None when it is another back end's.
        extend: `(codecs, dense, fresh)`: new keys and values behind the fp16 columns in one launch, rotated; None for
            codecs that it does not serve.
        step: `(args, fresh, center)`, a decode step in one launch, or None for what it does not serve. Everything is as
            the model made it: `args.q` and the `fresh` keys and values are not rotated, `args.dense_k` and `dense_v`
            are without these. Returns the output, rotated back, and the columns with the new tokens behind them,
            `center` taken off keys. None in place of the function where there is no such launch.
        rotate: `codecs.rotation.rotate` in one launch, or None for vectors that it does not serve.
        choose: `(sketches, rows, packed, count)`: the pages of most weight (`attention.pages`), or None.
        checks: what `opentq doctor` should say.
    """

    name: str
    available: Callable[[], bool]
    attend: Callable[[AttnArgs], mx.array | None]
    layouts: Callable[[Codec, Codec, tuple[int, int]], tuple[Layout, Layout]]
    layout_named: Callable[[str], Layout | None] = lambda name: None
    extend: Callable[[Pair, Pair, Pair], Pair | None] = lambda codecs, dense, fresh: None
    step: Callable[[AttnArgs, Pair, mx.array | None], tuple[mx.array, mx.array, mx.array] | None] | None = None
    rotate: Callable[[mx.array], mx.array | None] = lambda x: None
    choose: Callable[[mx.array, mx.array, tuple[int, ...], int], mx.array | None] = lambda *_: None
    checks: Callable[[], list[Check]] = list
