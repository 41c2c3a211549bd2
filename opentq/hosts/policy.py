"""What each layer does: compress with which codecs, or stay as the host made it, and why.

`decide` looks at the caches that the model itself asks for and returns one `LayerPlan` per cache. The start-up report,
the memory planner and the server's admission check read the same plans, so they can't disagree. A request to compress
that would compress nothing is an error, never a no-op.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import mlx.core as mx

from ..caches.composite import members
from ..spec.kv import KVSpec
from ..spec.latent import latent_spec
from ..spec.text import Spec
from .plan import PLAIN, LayerPlan, NothingCompressed, Traits


def decide(caches: Sequence[Any], spec: Spec, kinds: ModuleType, traits: Traits = PLAIN) -> list[LayerPlan]:
    """One plan per cache (and per member of a CacheList). Raises NothingCompressed.

    Args:
        caches: what the model's own factory makes, after a token was traced through them, so that their shapes show
            what the codecs are asked for.
        kinds: the module of the host's cache classes.
        traits: what is special about the model (`patches.Seams`).
    """
    slots = [(i, part, c) for i, cache in enumerate(caches) for part, c in enumerate(members(cache))]
    reasons = {(i, part): native_reason(caches[i], part, spec, kinds, traits) for i, part, _ in slots}
    compressible = [slot for slot in slots if not reasons[slot[:2]]]
    order = {(i, part): n for n, (i, part, _) in enumerate(compressible)}
    plans = []
    for i, part, cache in slots:
        kind = type(cache).__name__
        reason, beside = reasons[i, part], _beside(cache, traits)
        if reason:
            plans.append(LayerPlan(i, kind, None, reason, part, bound=native_bound(cache), beside=beside))
        else:
            own = spec.for_layer(order[i, part], len(compressible))
            window = native_bound(cache)
            whole = _read_whole(own, window, traits, beside > 0)
            if whole:
                own = replace(own, pages=0)
            if window:
                own = replace(own, sink=0)  # a window forgets its first tokens
            elif traits.latent:
                own = latent_spec(own)
            latent = traits.latent and not window
            plan = LayerPlan(i, kind, own, "", part, window=window, latent=latent, whole=whole, beside=beside)
            if refusal := _refused(shaped(plan, cache)):
                plan = LayerPlan(i, kind, None, refusal, part, bound=window, beside=beside)
            plans.append(plan)
    packed = [p for p in plans if p.spec and p.spec.compresses]
    if spec.compresses and not packed and any(p.compressed for p in plans):
        raise NothingCompressed(
            f"--kv {spec} would compress nothing in this model: skip leaves all {len(compressible)} layers in fp16; "
            "skip fewer, or use --kv f16"
        )
    if not any(p.compressed for p in plans):
        found = ", ".join(sorted({f"{p.kind}: {p.reason}" for p in plans})) or "the model has no caches"
        windows = any(native_bound(c) for _, _, c in slots if isinstance(c, kinds.RotatingKVCache))
        remedy = "use --kv off"
        if windows and spec.window == "native":
            remedy = f"use --kv {spec}:window=compress"
        elif compressible:
            remedy = "use --kv f16, or --kv off"
        raise NothingCompressed(f"--kv {spec} would compress nothing in this model ({found}); {remedy}")
    return plans


def left_alone(caches: Sequence[Any], traits: Traits = PLAIN) -> list[LayerPlan]:
    """One native plan per cache, as where nobody asks for compression; their shapes filled in."""
    slots = [(i, n, c) for i, cache in enumerate(caches) for n, c in enumerate(members(cache))]
    plans = [LayerPlan(i, type(c).__name__, None, "not compressed", n, beside=_beside(c, traits)) for i, n, c in slots]
    return [shaped(p, c) for p, (_, _, c) in zip(plans, slots)]


def _beside(cache: Any, traits: Traits) -> float:
    """Bytes per token that a layer's indexer keeps beside keys and values."""
    return traits.beside if type(cache).__name__ == traits.kind else 0.0


def _refused(plan: LayerPlan) -> str:
    """Why the plan's codecs can't serve its vectors; "" when they can, or where its shape is not known."""
    try:
        for codec, dim in zip(plan.codecs, (plan.key_dim, plan.value_dim)):
            if dim:
                codec.check(dim)
    except ValueError as error:
        return str(error).partition(";")[0]
    return ""


def _read_whole(spec: KVSpec, window: int, traits: Traits, chooses: bool) -> str:
    """Why a layer whose spec asks for pages has none; "" where it has, or doesn't ask."""
    if not spec.pages:
        return ""
    if chooses:
        return "the model chooses tokens itself"
    if window:
        return "a window is short"
    if traits.latent:
        return "latents are keys and values at once"
    return "other layers attend to its tokens, too" if traits.lends else ""


def shaped(plan: LayerPlan, cache: Any) -> LayerPlan:
    """`plan` with the heads, dims, bound and constant state that a cache which has seen a token shows."""
    keys, values = getattr(cache, "keys", None), getattr(cache, "values", None)
    if isinstance(keys, mx.array) and isinstance(values, mx.array) and keys.ndim == 4:
        bound = plan.bound or getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None) or 0
        return replace(
            plan,
            kv_heads=keys.shape[1],
            key_dim=keys.shape[3],
            value_dim=values.shape[3],
            bound=0 if plan.spec else bound,
        )
    state = getattr(cache, "cache", None)
    if isinstance(state, list):
        return replace(plan, constant=sum(a.nbytes for a in state if a is not None))
    return plan


def native_bound(cache: Any) -> int:
    """Tokens that a native cache holds at most; 0 when it has no such limit."""
    return getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None) or 0


def native_reason(slot: Any, part: int, spec: Spec | None, kinds: ModuleType, traits: Traits = PLAIN) -> str:
    """Why member `part` of a layer's cache stays as it is; "" when it can be compressed."""
    cache = members(slot)[part]
    if traits.indexed and (reason := traits.indexed(len(members(slot)), part)):
        return reason
    if type(cache) is kinds.KVCache or type(cache).__name__ == traits.kind:
        return traits.arrays
    if isinstance(cache, kinds.RotatingKVCache):
        if cache.keep:
            return f"sliding window that keeps its first {cache.keep} tokens, bounded at {cache.max_size}"
        if spec is None or spec.window != "compress":
            return f"sliding window, bounded at {cache.max_size} tokens"
        return traits.windows and f"sliding window, bounded at {cache.max_size} tokens; {traits.windows}"
    if isinstance(cache, kinds.ArraysCache):
        return "recurrent state, constant size"
    if isinstance(cache, kinds.ChunkedKVCache):
        return f"chunked attention, bounded at {cache.chunk_size} tokens"
    return traits.arrays or f"cache class {type(cache).__name__} is not known to opentq"
