"""Who computes an attention call: an ordered list of candidates, each of which may say "not me" by returning None.

The first candidate that serves wins, once it was judged on this machine (`guard`). `OPENTQ_KERNELS=tiled` leaves only
the portable path, `=native` only the kernels, so that tests and users can force either; unset, kernels come first. When
nobody serves, the error prints the whole record.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx

from ..contracts.attention import AttnArgs, AttnFn
from ..contracts.backend import Backend
from ..contracts.codec import Codec
from ..contracts.layout import CANONICAL, Layout
from . import backends, guard, pages, tiled


class NoAttention(RuntimeError):
    """No candidate serves these arguments."""


STEP = 16
"""Tokens of a decode step, at most."""


def attend(args: AttnArgs) -> tuple[mx.array, str]:
    """`[B, Hq, L, Dv]` in q's dtype by the first candidate that serves, and its name.

    Raises NoAttention, and under `OPENTQ_KERNELS=native` `guard.SetAside`.
    """
    for name, function in candidates():
        out = guard.attend(name, function, args)
        if out is None and args.pages is not None:
            # A kernel without page lists reads the pages as a cache of their own.
            out = guard.attend(name, function, args.picked())
        if out is not None:
            return out, name
    mode = os.environ.get("OPENTQ_KERNELS", "")
    raise NoAttention(f"no attention function serves this call (OPENTQ_KERNELS={mode or 'unset'}): {args.describe()}")


def serving() -> Backend | None:
    """The back end whose kernels a new cache is made for; None where only the portable path runs.

    A cache asks once and keeps the answer: a step of a model asks for nothing that is the same in every step.
    """
    backend = backends.active() if kernel_mode() != "tiled" else None
    return None if backend is None else guard.guarded(backend)


def candidates() -> list[tuple[str, AttnFn]]:
    """Names and functions in the order in which they are asked."""
    mode = kernel_mode()
    found: list[tuple[str, AttnFn]] = []
    if mode != "tiled":
        found += native_candidates()
    if mode != "native":
        found.append((tiled.NAME, tiled.attend))
    return found


def native_candidates() -> list[tuple[str, AttnFn]]:
    """The fused kernels of the active back end."""
    backend = backends.active()
    return [(backend.name, backend.attend)] if backend else []


def layouts(k_codec: Codec, v_codec: Codec, dims: tuple[int, int]) -> tuple[Layout, Layout]:
    """The storage layouts that this machine's kernels want for keys and values of `dims = (Dk, Dv)`."""
    backend = serving()
    return backend.layouts(k_codec, v_codec, dims) if backend else (CANONICAL, CANONICAL)


def pays(args: AttnArgs) -> bool:
    """Whether choosing pages takes less time than it saves."""
    active = backends.active()
    return active is None or kernel_mode() == "tiled" or args.packed_bytes > active.choosing


def choose(selector: pages.Selector, args: AttnArgs, rotated: mx.array) -> mx.array:
    """The pages that `args`, whose queries are not yet `rotated`, is to read: int32 `[B, Hkv, budget / 64]`, ascending.

    Sketches name the candidates, and of these the ones whose keys have the most weight are read; by kernels where there
    are any.
    """
    active = backends.active()
    selector = replace(selector, sums=active is not None and active.sums)
    count = selector.budget // pages.PAGE
    given = replace(args, q=rotated), args.q, pages.CANDIDATES * count, count
    if active is None or kernel_mode() == "tiled":
        return pages.select(selector, *given)
    chosen = guard.select(active, selector, *given)
    if chosen is not None:
        return chosen
    stages = (
        _kernel_first(functools.partial(guard.choose, active, selector), selector.choose),
        _kernel_first(functools.partial(guard.weigh, active), pages.weigh),
        _kernel_first(functools.partial(guard.top, active), pages.top),
    )
    return pages.select(selector, *given, stages)


def _kernel_first(kernel: Callable[..., mx.array | None], portable: Callable[..., mx.array]) -> Callable[..., mx.array]:
    def stage(*given: Any) -> mx.array:
        out = kernel(*given)
        return portable(*given) if out is None else out

    return stage


def kernel_mode() -> str:
    """`OPENTQ_KERNELS`: "", "native" or "tiled"."""
    mode = os.environ.get("OPENTQ_KERNELS", "")
    if mode not in ("", "native", "tiled"):
        raise ValueError(f"OPENTQ_KERNELS={mode!r} is not known: use native, tiled, or leave it unset")
    return mode
