"""Caches of one model side by side: some layers hold several, in a cache with `caches` (mlx-lm's CacheList)."""

from __future__ import annotations

from typing import Any


def composite(cache: Any) -> bool:
    """Whether a layer's cache is several caches in one."""
    return hasattr(cache, "caches")


def members(cache: Any) -> tuple[Any, ...]:
    """The caches inside a composite cache, or the cache itself."""
    return tuple(cache.caches) if composite(cache) else (cache,)
