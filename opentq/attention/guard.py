"""Believe a kernel after it was judged on this machine.

Before a kernel variant serves for the first time, it is compiled and compared with the portable path on two small
cases: sequences of ragged length, and the model's own shape. What comes of it is kept, by kernel text, MLX version,
device and system, so that a machine judges once. A variant that fails to compile, or differs, is set aside: the
portable path serves, one line says so, and generation goes on; under `OPENTQ_KERNELS=native` it is an error. The first
call of every kind, and the first at twice the length, is waited for: where it fails (a pipeline that can't be made at
this shape), the variant is set aside in the same way and the portable path computes that very call.

Storage is judged when a cache begins, before anything is written: what a back end packs must decode like what the codec
packs. Later calls cost one look-up.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import mlx.core as mx

from ..contracts.attention import AttnArgs
from ..contracts.backend import Backend, Pair
from ..contracts.codec import Codec
from ..contracts.layout import CANONICAL, Layout
from ..errors import UserError
from . import judge, tiled, verdicts

log = logging.getLogger("opentq")

AttnFn = Callable[[AttnArgs], "mx.array | None"]

settled: dict[Hashable, bool] = {}
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
    if backend.step is not None:
        changes["step"] = functools.partial(step, backend)
    return replace(backend, **changes)


def guarded(backend: Backend) -> Backend:
    """The back end with its storage, appends and steps believed once they were right here; `attend` is dispatch's."""
    return _guarded(backend) if judging else backend


# ---- the calls


def attend(name: str, function: AttnFn, args: AttnArgs) -> mx.array | None:
    """`function(args)`, once it was right on this machine; None where it does not serve, or was set aside."""
    memo = args.k.memo
    key = (function, args.q.shape[2], args.causal, args.window > 0, args.pages is not None)
    try:
        if key in memo:  # believed since this cache last packed a block
            return function(args)
        out = _asked(name, function, args)
    except RuntimeError as error:
        if name == tiled.NAME or not judging or out_of_memory(error):
            raise
        # A kind that was right before, or right when small: set aside in this process, and the next candidate computes.
        _say(name, f"attention {args.kind_words()}", f"fails at {args.max_packed} packed tokens: {_short(error)}")
        settled[function, args.kind()] = False
        memo.pop(key, None)
        return None
    if out is not None:
        memo[key] = True
    return out


def _asked(name: str, function: AttnFn, args: AttnArgs) -> mx.array | None:
    """The first call of a kind is judged, then waited for."""
    kind = (function, args.kind())
    if kind in settled:
        return function(args) if settled[kind] else None
    failure, out = None, None
    try:
        out = function(args)
    except RuntimeError as error:
        failure = error
    if out is None and failure is None:
        return None
    if name != tiled.NAME and judging:
        what = f"attention {args.kind_words()}"
        if not _passes(name, what, lambda: judge.attention(function, args)):
            settled[kind] = False
            return None
        if out is not None:
            mx.eval(out)
    if failure is not None:
        raise failure
    settled[kind] = True
    log.info("attention by %s: %s", name, args.describe())
    return out


Stepped = tuple[mx.array, mx.array, mx.array]
"""Output, and the fp16 columns of keys and of values with the new tokens behind them."""


def step(backend: Backend, args: AttnArgs, fresh: Pair, center: mx.array | None) -> Stepped | None:
    """The back end's decode step in one launch, once it was right on this machine; None where there is none."""
    launch = backend.step
    if launch is None:
        return None
    memo, key = args.k.memo, (launch, args.q.shape[2], args.causal, args.window > 0, center is None)
    if key not in memo:
        kind = (launch, center is None, args.kind())
        if settled.get(kind) is False:
            return None
        if kind not in settled:
            done = launch(args, fresh, center)
            if done is None:
                return None
            what = f"step {args.kind_words()}" + ("" if center is None else " centred")
            settled[kind] = _passes(backend.name, what, lambda: judge.step(launch, args, center is not None))
            if not settled[kind]:
                return None
            mx.eval(done)
            log.info("decode step by %s: %s", backend.name, args.describe())
            return done
        memo[key] = True
    return launch(args, fresh, center)


def layouts(backend: Backend, k: Codec, v: Codec, dims: tuple[int, int]) -> tuple[Layout, Layout]:
    """What the back end wants, or canonical where what it packs is wrong on this machine."""
    wanted = backend.layouts(k, v, dims)
    for side, codec, dim, layout in zip(("keys", "values"), (k, v), dims, wanted):
        key = (backend.layouts, side, codec, dim)
        if key not in settled:
            what = f"packing of {side} {codec} D={dim}"
            verdict = functools.partial(judge.packing, layout, codec, dim)
            settled[key] = layout is CANONICAL or _passes(backend.name, what, verdict)
        if not settled[key]:
            return CANONICAL, CANONICAL
    return wanted


def extend(backend: Backend, codecs: Pair, dense: Pair, fresh: Pair) -> Pair | None:
    """What the back end's `extend` gives, once it was right on this machine."""
    done = backend.extend(codecs, dense, fresh)
    if done is None:
        return None
    dims = dense[0].shape[3], dense[1].shape[3]
    key = (backend.extend, codecs, dims, fresh[0].dtype)
    if key not in settled:
        what = f"appending {codecs[0]}/{codecs[1]} D={dims[0]}/{dims[1]} {fresh[0].dtype}"
        verdict = functools.partial(judge.extend, backend, codecs, dims, fresh[0].dtype)
        settled[key] = _passes(backend.name, what, verdict)
    return done if settled[key] else None


def rotation(backend: Backend) -> Callable[[mx.array], mx.array | None]:
    """The back end's `rotate`, believed of a head dim and dtype once it was right on this machine."""

    def rotate(x: mx.array) -> mx.array | None:
        key = (backend.rotate, x.shape[-1], x.dtype)
        known = settled.get(key)
        if known is None and judging and backend.rotate(x) is not None:
            verdict = functools.partial(judge.rotation, backend, x.shape[-1], x.dtype)
            what = f"rotation D={x.shape[-1]} {x.dtype}"
            known = settled[key] = _passes(backend.name, what, verdict)
        return None if known is False else backend.rotate(x)

    return rotate


# ---- verdicts


def _passes(name: str, what: str, verdict: Callable[[], str]) -> bool:
    """The verdict that is kept, or a new one. Raises SetAside under `OPENTQ_KERNELS=native`."""
    kept = verdicts.kept(name)
    if what not in kept:
        try:
            why = verdict()
        except RuntimeError as error:  # what MLX raises for a kernel that a compiler or a driver refuses
            if out_of_memory(error):
                raise
            why = f"fails: {_short(error)}"
        verdicts.keep(name, what, why)
    if kept[what]:
        _say(name, what, kept[what])
    return not kept[what]


_said: set[str] = set()


def _say(name: str, what: str, why: str) -> None:
    """One line per back end and process, or SetAside; the others are for the log, and `opentq doctor` shows all."""
    line = f"opentq: the {name} kernel for {what} {why}"
    if os.environ.get("OPENTQ_KERNELS") == "native":
        raise SetAside(f"{line}; unset OPENTQ_KERNELS=native and the portable path serves")
    level = logging.INFO if name in _said else logging.WARNING
    _said.add(name)
    log.log(level, "%s; set aside, the portable path serves. To report it: opentq doctor --bench", line)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out, which is no fault of a kernel."""
    return any(word in str(error).lower() for word in ("insufficient memory", "out of memory", "unable to allocate"))


def _short(error: Exception) -> str:
    """The first line that says something, at most 200 characters."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
