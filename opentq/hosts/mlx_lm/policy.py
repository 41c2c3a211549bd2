"""What each layer does: compress with which codecs, or stay as mlx-lm made it, and why.

`decide` looks at the caches that the model itself asks for and returns one `LayerPlan` per cache. The start-up report,
the memory planner and the server's admission check read the same plans, so they can't disagree. A request to compress
that would compress nothing is an error, never a no-op.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_cache

from ...caches.latent import latent_spec
from ...errors import UserError
from ...spec.kv import KVSpec

FP16_BITS = 16


class NothingCompressed(UserError):
    """Compression was asked for and no layer can be compressed."""


@dataclass(frozen=True)
class LayerPlan:
    """One layer's KV cache.

    Attributes:
        index: position in the model's cache list; for a `CacheList`, `part` says which member.
        kind: name of the cache class that mlx-lm would use.
        spec: the layer's spec, or None when it stays native.
        reason: why it is native ("" when compressed).
        kv_heads, key_dim, value_dim: 0 while unknown (before the first forward step).
        bound: tokens that a native cache holds at most; 0 when it grows with the context.
        constant: bytes that a native layer holds whatever the context (recurrent state).
        window: tokens that a query of a compressed sliding-window layer sees; 0 when it sees all.
        latent: the cache holds latents (MLA): the key is the latent, the value its rotary part.
    """

    index: int
    kind: str
    spec: KVSpec | None
    reason: str = ""
    part: int = 0
    kv_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    bound: int = 0
    constant: int = 0
    window: int = 0
    latent: bool = False

    @property
    def compressed(self) -> bool:
        return self.spec is not None

    @property
    def codec(self) -> str:
        """Short name for tables."""
        return str(self.spec) if self.spec else "native"

    def bytes_per_token(self) -> float:
        """Bytes that one packed token takes in this layer, metadata included."""
        if self.spec is None:
            return self.kv_heads * (self.key_dim + self.value_dim) * FP16_BITS / 8
        key, value = self.spec.codecs()
        bits = key.bits_per_value(self.key_dim) * self.key_dim + value.bits_per_value(self.value_dim) * self.value_dim
        return self.kv_heads * bits / 8


@dataclass(frozen=True)
class Traits:
    """What is special about a model's attention (`seams.traits`).

    Attributes:
        arrays: why it reads its growing caches as arrays; "" when it doesn't.
        windows: why its sliding windows can't be compressed; "" when they can.
        latent: its growing caches hold a latent and a rotary part (MLA), not keys and values.
        lends: layers attend to keys and values that another layer's cache has taken.
    """

    arrays: str = ""
    windows: str = ""
    latent: bool = False
    lends: bool = False


PLAIN = Traits()


def decide(caches: Sequence[Any], spec: KVSpec, traits: Traits = PLAIN) -> list[LayerPlan]:
    """One plan per cache (and per member of a CacheList). Raises NothingCompressed.

    Args:
        caches: what the model's own factory makes.
        traits: what is special about the model (`seams.traits`).
    """
    slots = [(i, part, c) for i, cache in enumerate(caches) for part, c in enumerate(members(cache))]
    compressible = [slot for slot in slots if not native_reason(slot[2], spec, traits)]
    order = {(i, part): n for n, (i, part, _) in enumerate(compressible)}
    plans = []
    for i, part, cache in slots:
        kind = type(cache).__name__
        reason = native_reason(cache, spec, traits)
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
