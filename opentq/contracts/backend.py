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

Stepped = tuple[mx.array, mx.array, mx.array]
"""The output of a decode step, rotated back, and the fp16 columns of keys and of values with its tokens behind them."""

StepFn = Callable[[AttnArgs, Pair, mx.array | None], Stepped]
"""`(args, fresh, center)`: a decode step. All is as the model made it: `args.q` and the `fresh` keys and values are not
rotated, `args.dense_k` and `dense_v` are without these; `center` is taken off keys."""


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
        step: `(args, fresh, center)` of a decode step to what makes such steps in one launch, or None for what it does
            not serve. It makes them as long as `args.k` and `args.v` are these very objects and queries have this shape
            and dtype, whatever the lengths and columns; mask, window, scale, softcap, and whether there are sinks and a
            center, stay the same. None in place of the function where there is no such launch.
        rotate: `codecs.rotation.rotate` in one launch, or None for vectors that it does not serve.
        choose: `(sketches, rows, packed, count)`: the pages of most weight (`attention.pages`), or None.
        checks: what `opentq doctor` should say.
        sums: whether `choose` weighs a page by the sum of its scores' exponentials, which cost a GPU nothing, or by the
            largest score, where exponentials would be most of the work.
        weigh: the weights by their keys of the pages that `args` lists (`attention.pages.weigh`), or None.
        choosing: bytes of packed keys and values that a layer reads in the time that choosing pages takes: steps over
            less read everything.
        top: `(weights, packed, count)`: the pages of most weight (`attention.pages.top`), or None.
        select: `(sketches, channels, args, plain, many, count)`: all of the choice in one call
            (`attention.pages.select`), or None; its parts are judged with it.
    """

    name: str
    available: Callable[[], bool]
    attend: Callable[[AttnArgs], mx.array | None]
    layouts: Callable[[Codec, Codec, tuple[int, int]], tuple[Layout, Layout]]
    layout_named: Callable[[str], Layout | None] = lambda name: None
    extend: Callable[[Pair, Pair, Pair], Pair | None] = lambda codecs, dense, fresh: None
    step: Callable[[AttnArgs, Pair, mx.array | None], StepFn | None] | None = None
    rotate: Callable[[mx.array], mx.array | None] = lambda x: None
    choose: Callable[[mx.array, mx.array, tuple[int, ...], int], mx.array | None] = lambda *_: None
    checks: Callable[[], list[Check]] = list
    sums: bool = False
    weigh: Callable[[AttnArgs], mx.array | None] = lambda args: None
    choosing: int = 0
    top: Callable[[mx.array, tuple[int, ...], int], mx.array | None] = lambda *_: None
    select: Callable[[mx.array, mx.array, AttnArgs, mx.array, int, int], mx.array | None] = lambda *_: None
