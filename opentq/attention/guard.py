"""Believe a kernel after it was judged on this machine.

Before a kernel variant serves for the first time, it is compiled and compared with the portable path on two small
cases: sequences of ragged length, and the model's own shape. What comes of it is kept, by kernel text, MLX version,
device and system, so that a machine judges once. A variant that fails to compile, or differs, is set aside: the
portable path serves, one line says so, and generation goes on; under `OPENTQ_KERNELS=native` it is an error. The first
call of every kind, and the first at twice the length, is waited for: where it fails (a pipeline that can't be made at
this shape), the variant is set aside in this process and the portable path computes that very call.

So it is with all that a back end offers: attention, decode steps in one launch, appends, rotations, the choice of
pages. Storage is judged when a cache begins, before anything is written: what a back end packs must decode like what
the codec packs. Later calls cost one look-up.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, TypeVar

import mlx.core as mx

from ..contracts.attention import AttnArgs, AttnFn, PackedKV
from ..contracts.backend import Backend, Pair, StepFn, Stepped
from ..contracts.codec import Codec
from ..contracts.layout import CANONICAL, Layout
from ..errors import UserError
from . import judge, tiled, verdicts
from .pages import Selector

log = logging.getLogger("opentq")

T = TypeVar("T")

trusted: dict[Hashable, bool] = {}
"""What this process knows: whether a function may serve calls of a kind."""
judging = True
"""Tests that judge kernels themselves switch this off."""


class SetAside(UserError):
    """`OPENTQ_KERNELS=native`, and a kernel of this machine is wrong."""


@functools.lru_cache(maxsize=8)
def _guarded(backend: Backend) -> Backend:
    changes: dict[str, Any] = {"layouts": functools.partial(layouts, backend)}
    if backend.extend is not Backend.extend:
        changes["extend"] = functools.partial(extend, backend)
    return replace(backend, **changes)


def guarded(backend: Backend) -> Backend:
    """The back end with its storage and appends believed once they were right here; caches ask `step` for decode steps,
    dispatch for `attend` and `choose`.
    """
    return _guarded(backend) if judging else backend


# ---- the calls


def attend(name: str, function: AttnFn, args: AttnArgs) -> mx.array | None:
    """`function(args)`, once it was right on this machine; None where it does not serve, or was set aside."""
    memo = args.k.memo
    key = (function, args.q.shape[2], args.causal, args.window > 0, args.pages is not None)
    if key in memo:  # this cache has believed it before
        try:
            return function(args)
        except RuntimeError as error:
            del memo[key]
            _failed(name, (function, args.kind()), _attention(args), error)
            return None
    out = _first(
        name,
        (function, args.kind()),
        functools.partial(_attention, args),
        functools.partial(function, args),
        functools.partial(judge.attention, function, args),
    )
    if out is not None:
        memo[key] = True
    return out


def step(backend: Backend, args: AttnArgs, fresh: Pair, center: mx.array | None) -> Stepped | None:
    """The back end's decode step in one launch, once it was right on this machine; None where there is none."""
    memo, key = args.k.memo, (args.alike, fresh[0].shape[2], fresh[0].dtype, center is None)
    kept: tuple[PackedKV, StepFn | None] | None = memo.get(key)
    if kept is None or kept[0] is not args.v:
        launch, done = _first_step(backend, args, fresh, center)
        memo[key] = args.v, launch
        return done
    if kept[1] is None:
        return None
    try:
        return kept[1](args, fresh, center)
    except RuntimeError as error:
        del memo[key]
        _failed(backend.name, (backend.step, center is None, args.kind()), _step(args, center), error)
        memo[key] = args.v, None
        return None


def _first_step(
    backend: Backend, args: AttnArgs, fresh: Pair, center: mx.array | None
) -> tuple[StepFn | None, Stepped | None]:
    """What makes such steps, and the first of them."""
    launch = None if backend.step is None else backend.step(args, fresh, center)
    if backend.step is None or launch is None:
        return None, None
    done = _first(
        backend.name,
        (backend.step, center is None, args.kind()),
        functools.partial(_step, args, center),
        functools.partial(launch, args, fresh, center),
        functools.partial(judge.step, backend.step, args, center is not None),
    )
    return (None if done is None else launch), done


def layouts(backend: Backend, k: Codec, v: Codec, dims: tuple[int, int]) -> tuple[Layout, Layout]:
    """What the back end wants, or canonical where what it packs is wrong on this machine."""
    wanted = backend.layouts(k, v, dims)
    for side, codec, dim, layout in zip(("keys", "values"), (k, v), dims, wanted):
        key = (backend.layouts, side, codec, dim)
        if key not in trusted:
            what = f"packing of {side} {codec} D={dim}"
            verdict = functools.partial(judge.packing, layout, codec, dim)
            trusted[key] = layout is CANONICAL or _passes(backend.name, what, verdict)
        if not trusted[key]:
            return CANONICAL, CANONICAL
    return wanted


def extend(backend: Backend, codecs: Pair, dense: Pair, fresh: Pair) -> Pair | None:
    """What the back end's `extend` gives, once it was right on this machine."""
    dims, dtype = (dense[0].shape[3], dense[1].shape[3]), fresh[0].dtype
    return _first(
        backend.name,
        (backend.extend, codecs, dims, dtype),
        lambda: f"appending {codecs[0]}/{codecs[1]} D={dims[0]}/{dims[1]} {dtype}",
        functools.partial(backend.extend, codecs, dense, fresh),
        functools.partial(judge.extend, backend, codecs, dims, dtype),
    )


def rotation(backend: Backend) -> Callable[[mx.array], mx.array | None]:
    """The back end's `rotate`, believed of a head dim and dtype once it was right on this machine."""

    def rotate(x: mx.array) -> mx.array | None:
        dim, dtype = x.shape[-1], x.dtype
        return _first(
            backend.name,
            (backend.rotate, dim, dtype),
            lambda: f"rotation D={dim} {dtype}",
            functools.partial(backend.rotate, x),
            functools.partial(judge.rotation, backend, dim, dtype),
        )

    return rotate


def choose(
    backend: Backend, selector: Selector, rows: mx.array, packed: tuple[int, ...], count: int
) -> mx.array | None:
    """The back end's choice of pages for scaled `rows`, once it was right on this machine; None where it has none."""
    channels, (heads, length, width) = selector.channels.shape[2], rows.shape[1:]
    return _first(
        backend.name,
        (backend.choose, channels, heads, length, width),
        lambda: f"pages by {channels} of {width - channels} channels, {length} queries of {heads} heads",
        functools.partial(backend.choose, selector.sketches, rows, packed, count),
        functools.partial(judge.choice, backend, channels, heads, length, width - channels),
    )


def weigh(backend: Backend, args: AttnArgs) -> mx.array | None:
    """The back end's weights of pages by their keys, once they were right on this machine; None where it has none."""
    return _first(
        backend.name,
        (backend.weigh, args.kind()),
        lambda: f"weights of pages {args.kind_words()}",
        functools.partial(backend.weigh, args),
        functools.partial(judge.weights, backend, args),
    )


def top(backend: Backend, weights: mx.array, packed: tuple[int, ...], count: int) -> mx.array | None:
    """The back end's pages of most weight, once they were right on this machine; None where it has none."""
    return _first(
        backend.name,
        (backend.top, weights.shape[1:3]),
        lambda: f"the pages of most weight of {weights.shape[1]} heads",
        functools.partial(backend.top, weights, packed, count),
        functools.partial(judge.top, backend, *weights.shape[1:3]),
    )


def select(
    backend: Backend, selector: Selector, args: AttnArgs, plain: mx.array, many: int, count: int
) -> mx.array | None:
    """The back end's choice of pages in one call, once it and its parts were right on this machine; None where it has
    none.
    """
    channels, length = selector.channels.shape[2], args.gqa * args.q.shape[2]
    return _first(
        backend.name,
        (backend.select, channels, args.kind()),
        lambda: f"pages by {channels} channels, then by keys, {args.kind_words()}",
        functools.partial(backend.select, selector.sketches, selector.channels, args, plain, many, count),
        lambda: (
            judge.choice(backend, channels, args.kv_heads, length, args.k.head_dim)
            or judge.weights(backend, args)
            or judge.selection(backend, args, channels)
        ),
    )


def _first(
    name: str, kind: Hashable, what: Callable[[], str], call: Callable[[], T | None], verdict: Callable[[], str]
) -> T | None:
    """What `call` gives once the verdict on its kind was good; None where it does not serve, or was set aside.

    The first call of a kind is judged, then waited for; the portable path is what others are judged by.
    """
    known, failure, out = trusted.get(kind), None, None
    if known is False:
        return None
    try:
        out = call()
    except RuntimeError as error:
        failure = error
    if known is None and judging and name != tiled.NAME and (failure is not None or out is not None):
        if not _passes(name, what(), verdict):
            trusted[kind] = False
            return None
        try:
            mx.eval(out)
        except RuntimeError as error:
            failure = error
    if failure is not None:
        _failed(name, kind, what(), failure)
        return None
    if known is None and out is not None:
        trusted[kind] = True
        log.info("%s by %s", what(), name)
    return out


def _failed(name: str, kind: Hashable, what: str, error: RuntimeError) -> None:
    """A kind that was right before, or right when small, fails: set aside in this process. Raises what is no fault of a
    kernel, and what nobody else could do better.
    """
    if name == tiled.NAME or not judging or no_fault(error):
        raise error
    why = f"fails: {_short(error)}"
    trusted[kind] = False
    verdicts.keep(name, f"{what}, in a generation,", why)  # for `opentq doctor`; the next process tries again
    _say(name, what, why)


def _attention(args: AttnArgs) -> str:
    return f"attention {args.kind_words()}"


def _step(args: AttnArgs, center: mx.array | None) -> str:
    return f"step {args.kind_words()}" + ("" if center is None else " centred")


# ---- verdicts


def _passes(name: str, what: str, verdict: Callable[[], str]) -> bool:
    """The verdict that is kept, or a new one. Raises SetAside under `OPENTQ_KERNELS=native`."""
    kept = verdicts.kept(name)
    if what not in kept:
        try:
            why = verdict()
        except RuntimeError as error:  # what MLX raises for a kernel that a compiler or a driver refuses
            if no_fault(error):
                raise
            why = f"fails: {_short(error)}"
        verdicts.keep(name, what, why)
    if kept[what]:
        _say(name, what, kept[what])
    return not kept[what]


_said: set[str] = set()


def _say(name: str, what: str, why: str) -> None:
    """One line per back end and process, or SetAside; the others are for the log, and `opentq doctor` shows all."""
    line = f"the {name} kernel for {what} {why}"
    if os.environ.get("OPENTQ_KERNELS") == "native":
        raise SetAside(f"{line}; unset OPENTQ_KERNELS=native and the portable path serves")
    level = logging.INFO if name in _said else logging.WARNING
    _said.add(name)
    log.log(level, "opentq: %s; set aside, the portable path serves. To report it: opentq doctor --bench", line)


NO_FAULT = re.compile(
    r"insufficient memory|out of memory|unable to allocate|^\[(ring|jaccl|nccl|mpi|distributed)\]", re.IGNORECASE
)
"""What MLX says where memory ran out, and where another process of a model that is split over several is gone."""


def no_fault(error: RuntimeError) -> bool:
    """Whether an error that comes out of a kernel's evaluation is none of the kernel's."""
    return NO_FAULT.search(str(error)) is not None


def _short(error: Exception) -> str:
    """The first line that says something, at most 200 characters."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
