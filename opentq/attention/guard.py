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
import hashlib
import importlib.metadata
import logging
import os
import platform
from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from .. import kernels, machine, records
from ..codecs.rotation import plain as plain_rotation
from ..contracts.attention import EXACT, AttnArgs, Lengths, PackedKV
from ..contracts.backend import Backend, Finding, Pair
from ..contracts.codec import Codec
from ..contracts.layout import CANONICAL, FLUSH, Layout
from ..errors import UserError
from ..kernels import build
from . import tiled

log = logging.getLogger("opentq")

AttnFn = Callable[[AttnArgs], "mx.array | None"]

BOUND = {mx.bfloat16: 1e-2}
"""Relative error to the portable path from which a kernel is wrong, by the query's dtype; `BOUND_HALF` for others."""
BOUND_HALF = 5e-3
PACKED_BOUND = 1.01
"""How much further from the vector than the codec's own bits a back end's may be."""
PREFILL = 24
"""Query tokens of the cases that stand for a prompt; shorter calls are judged as long as they are."""

settled: dict[Hashable, bool] = {}
"""What this process knows: whether a function may serve calls of a kind."""
judging = True
"""Tests that judge kernels themselves switch this off."""


class SetAside(UserError):
    """`OPENTQ_KERNELS=native`, and a kernel of this machine is wrong."""


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
        if not _passes(name, function, what, lambda: _judge_attention(function, args)):
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
    if key not in memo and judging:
        kind = (launch, center is None, args.kind())
        if settled.get(kind) is False:
            return None
        if kind not in settled:
            done = launch(args, fresh, center)
            if done is None:
                return None
            what = f"step {args.kind_words()}" + ("" if center is None else " centred")
            settled[kind] = _passes(backend.name, launch, what, lambda: _judge_step(launch, args, center is not None))
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
    if not judging:
        return wanted
    for side, codec, dim, layout in zip(("keys", "values"), (k, v), dims, wanted):
        key = (backend.layouts, side, codec, dim)
        if key not in settled:
            what = f"packing of {side} {codec} D={dim}"
            judge = functools.partial(_judge_packing, layout, codec, dim)
            settled[key] = layout is CANONICAL or _passes(backend.name, backend.layouts, what, judge)
        if not settled[key]:
            return CANONICAL, CANONICAL
    return wanted


def extend(backend: Backend, codecs: Pair, dense: Pair, fresh: Pair) -> Pair | None:
    """What the back end's `extend` gives, once it was right on this machine."""
    done = backend.extend(codecs, dense, fresh)
    if done is None or not judging:
        return done
    dims = dense[0].shape[3], dense[1].shape[3]
    key = (backend.extend, codecs, dims, fresh[0].dtype)
    if key not in settled:
        what = f"appending {codecs[0]}/{codecs[1]} D={dims[0]}/{dims[1]} {fresh[0].dtype}"
        judge = functools.partial(_judge_extend, backend, codecs, dims, fresh[0].dtype)
        settled[key] = _passes(backend.name, backend.extend, what, judge)
    return done if settled[key] else None


def rotation(backend: Backend) -> Callable[[mx.array], mx.array | None]:
    """The back end's `rotate`, believed of a head dim and dtype once it was right on this machine."""

    def rotate(x: mx.array) -> mx.array | None:
        key = (backend.rotate, x.shape[-1], x.dtype)
        known = settled.get(key)
        if known is None and judging and backend.rotate(x) is not None:
            judge = functools.partial(_judge_rotation, backend, x.shape[-1], x.dtype)
            what = f"rotation D={x.shape[-1]} {x.dtype}"
            known = settled[key] = _passes(backend.name, backend.rotate, what, judge)
        return None if known is False else backend.rotate(x)

    return rotate


# ---- judging: each returns "" or what is wrong


CASES: tuple[tuple[tuple[Lengths, ...], bool, int], ...] = (
    (((2 * FLUSH, 2, 5), (FLUSH, 0, 3)), False, 9),
    (((2 * FLUSH, 0, 0),), True, 17),
)
"""Lengths; whether with the model's own number of KV heads, or one; fp16 columns besides the call's own."""


def _judge_attention(function: AttnFn, args: AttnArgs) -> str:
    length = args.q.shape[2] if args.q.shape[2] <= EXACT else PREFILL
    for lens, own, columns in CASES:
        ours, theirs = _case(args, lens, args.kv_heads if own else 1, columns + length, length)
        out = function(ours)
        if out is None:  # kinds of calls that it serves at other lengths only
            continue
        error = _relative(out, tiled.attend(theirs))
        if not error <= BOUND.get(args.q.dtype, BOUND_HALF):  # not so for NaN
            return f"differs from the portable path by {error:.1e}"
    return ""


def _judge_step(launch: Callable, args: AttnArgs, centred: bool) -> str:
    length, (k_codec, v_codec) = args.q.shape[2], (args.k.codec, args.v.codec)
    for lens, own, columns in CASES:
        ours, theirs = _case(args, lens, args.kv_heads if own else 1, columns, length)
        shape = (len(lens), ours.kv_heads, length)
        k, v = (_draw(*shape, side.head_dim, seed=i).astype(args.q.dtype) for i, side in enumerate((args.k, args.v), 1))
        center = _draw(*shape[:2], 1, args.k.head_dim, seed=3).astype(mx.float16) if centred else None
        done = launch(ours, (k, v), center)
        if done is None:
            continue
        new = [c.rotate(x.astype(mx.float32)) for c, x in ((k_codec, k), (v_codec, v))]
        new[0] = new[0] if center is None else new[0] - center
        dense = [mx.concatenate([d, n.astype(mx.float16)], axis=2) for d, n in zip((ours.dense_k, ours.dense_v), new)]
        theirs = replace(theirs, q=k_codec.rotate(theirs.q), dense_k=dense[0], dense_v=dense[1])
        for got, expected in zip(done, (v_codec.unrotate(tiled.attend(theirs)), *dense)):
            error = _relative(got, expected)
            if not error <= BOUND.get(args.q.dtype, BOUND_HALF):
                return f"differs from the portable path by {error:.1e}"
    return ""


def _draw(*shape: int, seed: int = 0) -> mx.array:
    """Standard normal numbers, not from MLX's generator, which is the user's."""
    return mx.array(np.random.default_rng(seed).standard_normal(shape, np.float32))


def _case(
    args: AttnArgs, lens: tuple[Lengths, ...], kv_heads: int, columns: int, length: int
) -> tuple[AttnArgs, AttnArgs]:
    """Random vectors in the place of `args`' own: as the kernel reads them, and for the portable path in fp32."""
    batch, heads = len(lens), kv_heads * args.gqa
    q = _draw(batch, heads, length, args.q.shape[3]).astype(args.q.dtype)
    tokens = max(packed for packed, _, _ in lens)
    sides, plain, dense = [], [], []
    for seed, kv in enumerate((args.k, args.v), 4):
        canonical = kv.codec.encode(_draw(batch, kv_heads, tokens, kv.head_dim, seed=seed).astype(mx.float16))
        sides.append(PackedKV(kv.codec, kv.layout, kv.layout.store(canonical), kv.head_dim))
        plain.append(PackedKV(kv.codec, CANONICAL, canonical, kv.head_dim))
        dense.append(_draw(batch, kv_heads, columns, kv.head_dim, seed=seed + 2).astype(mx.float16))
    newest = [[[packed // FLUSH - 1]] * kv_heads for packed, _, _ in lens]
    case = replace(
        args,
        q=q,
        k=sides[0],
        v=sides[1],
        dense_k=dense[0],
        dense_v=dense[1],
        lens=lens,
        window=min(args.window, FLUSH + 7),
        sinks=None if args.sinks is None else _draw(heads, seed=8).astype(args.sinks.dtype),
        pages=None if args.pages is None else mx.array(newest, mx.int32),
    )
    return case, replace(case, q=q.astype(mx.float32), k=plain[0], v=plain[1]).picked()


def _judge_packing(layout: Layout, codec: Codec, dim: int) -> str:
    y = _draw(1, 2, 2 * FLUSH, dim).astype(mx.float16)
    packed, expected = layout.load(layout.encode(codec, y)), codec.encode(y)
    mine, theirs = (_relative(codec.decode(p, mx.float32, dim), y) for p in (packed, expected))
    if not mine <= PACKED_BOUND * theirs + 1e-6:
        return f"is {mine:.1e} from the vector, the codec {theirs:.1e}"
    return ""


def _judge_extend(backend: Backend, codecs: Pair, dims: tuple[int, int], dtype: mx.Dtype) -> str:
    dense = _draw(1, 2, 5, dims[0]).astype(mx.float16), _draw(1, 2, 5, dims[1], seed=1).astype(mx.float16)
    fresh = _draw(1, 2, 3, dims[0], seed=2).astype(dtype), _draw(1, 2, 3, dims[1], seed=3).astype(dtype)
    got = backend.extend(codecs, dense, fresh)
    for codec, old, new, out in zip(codecs, dense, fresh, got or dense):
        plain = mx.concatenate([old, codec.rotate(new.astype(mx.float32)).astype(mx.float16)], axis=2)
        if not (error := _relative(out, plain)) <= BOUND.get(dtype, BOUND_HALF):
            return f"differs from the portable path by {error:.1e}"
    return ""


def _judge_rotation(backend: Backend, dim: int, dtype: mx.Dtype) -> str:
    x = _draw(3, 7, dim).astype(dtype)
    y = backend.rotate(x)
    error = float("inf") if y is None else _relative(y, plain_rotation(x))
    return "" if error <= BOUND.get(dtype, BOUND_HALF) else f"differs from the portable path by {error:.1e}"


def _relative(out: mx.array, expected: mx.array) -> float:
    a, b = out.astype(mx.float32), expected.astype(mx.float32)
    if a.shape != b.shape:
        return float("inf")
    return (mx.linalg.norm(a - b) / mx.linalg.norm(b)).item()  # type: ignore[return-value]


# ---- verdicts


def _passes(name: str, function: Callable, what: str, judge: Callable[[], str]) -> bool:
    """The verdict that is kept, or a new one. Raises SetAside under `OPENTQ_KERNELS=native`."""
    kept = _kept(name, function)
    if what not in kept:
        try:
            why = judge()
        except RuntimeError as error:  # what MLX raises for a kernel that a compiler or a driver refuses
            if out_of_memory(error):
                raise
            why = f"fails: {_short(error)}"
        _keep(name, function, what, why)
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


_verdicts: dict[tuple[str, Callable], dict[str, str]] = {}


def _kept(name: str, function: Callable) -> dict[str, str]:
    """Verdicts of this machine for a function of a back end: what it does -> "" or what is wrong."""
    if (name, function) not in _verdicts:
        path = file(name)
        rows = records.read([path]) if path.exists() else []
        _verdicts[name, function] = {r["what"]: r["why"] for r in rows}
    return _verdicts[name, function]


def _keep(name: str, function: Callable, what: str, why: str) -> None:
    _kept(name, function)[what] = why
    try:
        records.append(file(name), [{"what": what, "why": why}])
    except UserError as error:  # then the next process judges again
        log.info("verdicts on kernels can't be kept: %s", error)


def file(name: str) -> Path:
    """Where verdicts on a back end's kernels are kept."""
    return build.cache_folder() / f"verdicts-{name}-{identity(name)}.jsonl"


@functools.cache
def identity(name: str) -> str:
    """What a verdict depends on: kernels' text and launch code, MLX, device and system."""
    digest = hashlib.sha256()
    folder = Path(kernels.__file__).parent / name
    for source in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc"):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    for part in (importlib.metadata.version("mlx"), *machine.device(), platform.platform()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def findings(name: str) -> list[Finding]:
    """What `opentq doctor` says of verdicts: how many variants were right here, and each that was set aside."""
    path = file(name)
    kept = {r["what"]: r["why"] for r in (records.read([path]) if path.exists() else [])}
    found = [Finding("judged kernels", "ok", f"{sum(not why for why in kept.values())} variants right on this machine")]
    remedy = f"report it with opentq doctor --bench; delete {path} to have it judged again"
    wrong = [(what, why) for what, why in kept.items() if why]
    return found + [Finding("set aside", "slow", f"{what} {why}", remedy) for what, why in wrong]
