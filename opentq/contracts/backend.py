"""The kernels of one kind of machine: what a back end offers to attention, caches and `opentq doctor`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .attention import AttnArgs
from .codec import Codec
from .layout import Layout

Pair = tuple[Any, Any]
"""Something of keys and the same of values."""


@dataclass(frozen=True)
class Finding:
    """One line of `opentq doctor`: state is `ok`, `slow` (works, could be faster) or `wrong`."""

    name: str
    state: str
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Backend:
    """Fused kernels and the storage that they want.

    Attributes:
        name: "cpu", "cuda" or "metal".
        available: whether this machine can run them.
        attend: `[B, Hq, L, Dv]` in q's dtype, or None for calls that the kernels do not serve.
        layouts: the storage of keys and values of two codecs and `(Dk, Dv)`.
        layout_named: the layout of that name, on any machine, or None when it is another back end's.
        extend: `(codecs, dense, fresh)`: new keys and values behind the fp16 columns in one launch, rotated; None for
            codecs that it does not serve.
        rotate: `codecs.rotation.rotate` in one launch, or None for vectors that it does not serve.
        findings: what `opentq doctor` should say.
    """

    name: str
    available: Callable[[], bool]
    attend: Callable[[AttnArgs], mx.array | None]
    layouts: Callable[[Codec, Codec, tuple[int, int]], tuple[Layout, Layout]]
    layout_named: Callable[[str], Layout | None] = lambda name: None
    extend: Callable[[Pair, Pair, Pair], Pair | None] = lambda codecs, dense, fresh: None
    rotate: Callable[[mx.array], mx.array | None] = lambda x: None
    findings: Callable[[], list[Finding]] = list
