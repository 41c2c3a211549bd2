"""What each layer of an mlx-vlm model does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...caches.latent import latent_spec
from ...spec.kv import KVSpec
from .. import sparse
from ..mlx_lm import policy as lm
from ..mlx_lm.policy import LayerPlan, NothingCompressed
from .private import caches as mlx_cache


@dataclass(frozen=True)
class Traits(lm.Traits):
    """See mlx-lm's; `indexed`: the second of a layer's caches holds the keys of an indexer."""

    indexed: bool = False


PLAIN = Traits()


def decide(caches: Sequence[Any], spec: KVSpec, traits: Traits = PLAIN) -> list[LayerPlan]:
    """One plan per cache (and per member of a CacheList). Raises NothingCompressed.

    Args:
        caches: what the model's own factory makes.
        traits: what is special about the model (`seams.traits`).
    """
    slots = [(i, part, c) for i, cache in enumerate(caches) for part, c in enumerate(members(cache))]
    reasons = {(i, part): slot_reason(caches[i], part, spec, traits) for i, part, _ in slots}
    compressible = [slot for slot in slots if not reasons[slot[:2]]]
    order = {(i, part): n for n, (i, part, _) in enumerate(compressible)}
    plans = []
    for i, part, cache in slots:
        kind = type(cache).__name__
        reason = reasons[i, part]
        if reason:
            plans.append(LayerPlan(i, kind, None, reason, part, bound=native_bound(cache)))
        else:
            own = spec.for_layer(order[i, part], len(compressible))
            window = native_bound(cache)
            if window:
                own = replace(own, sink=0)  # a window forgets its first tokens
            elif traits.latent:
                own = latent_spec(own)
            plans.append(LayerPlan(i, kind, own, "", part, window=window, latent=traits.latent and not window))
    if not compressible:
        kinds = ", ".join(sorted({f"{p.kind}: {p.reason}" for p in plans})) or "the model has no caches"
        windows = any(native_bound(c) for _, _, c in slots if isinstance(c, mlx_cache.RotatingKVCache))
        remedy = f"use --kv {spec}:window=compress" if windows and spec.window == "native" else "use it without --kv"
        raise NothingCompressed(f"--kv {spec} would compress nothing in this model ({kinds}); {remedy}")
    return plans


def members(cache: Any) -> tuple[Any, ...]:
    """The caches inside a CacheList, or the cache itself."""
    return tuple(cache.caches) if isinstance(cache, mlx_cache.CacheList) else (cache,)


def slot_reason(slot: Any, part: int, spec: KVSpec | None, traits: Traits) -> str:
    """Why member `part` of a layer's caches stays as it is; "" when it can be compressed."""
    several = members(slot)
    if traits.indexed and part == 1:
        return sparse.INDEX
    return native_reason(several[part], spec, traits)


def native_bound(cache: Any) -> int:
    """Tokens that a native cache holds at most; 0 when it has no such limit."""
    return getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None) or 0


def native_reason(cache: Any, spec: KVSpec | None = None, traits: Traits = PLAIN) -> str:
    """Why a cache stays as it is; "" when it can be compressed."""
    if type(cache) is mlx_cache.KVCache:
        return traits.arrays
    if isinstance(cache, mlx_cache.RotatingKVCache):
        if cache.keep:
            return f"sliding window that keeps its first {cache.keep} tokens, bounded at {cache.max_size}"
        if spec is None or spec.window != "compress":
            return f"sliding window, bounded at {cache.max_size} tokens"
        return traits.windows and f"sliding window, bounded at {cache.max_size} tokens; {traits.windows}"
    if isinstance(cache, mlx_cache.ArraysCache):
        return "recurrent state, constant size"
    if isinstance(cache, mlx_cache.ChunkedKVCache):
        return f"chunked attention, bounded at {cache.chunk_size} tokens"
    return f"cache class {type(cache).__name__} is not known to opentq"
