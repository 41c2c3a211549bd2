"""Which rotary embedding each layer uses, seen rather than read: models name it in many ways, but all call MLX's.

While a token runs, `mx.fast.rope` is watched; what was called last before a cache takes its keys is that layer's. A
layer that turns its keys in words of its own, or only a part that is joined to others later, has none that we know of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from ..contracts.rotary import NO_ROTARY, Rotary


@contextmanager
def watch(caches: Sequence[Any]) -> Iterator[dict[int, Rotary]]:
    """The rotary embedding of every cache that is updated inside, by its `id`."""
    seen: dict[int, Rotary] = {}
    last: list[tuple[Rotary, int]] = []
    original = mx.fast.rope

    def rope(x: mx.array, dims: int, *args: Any, traditional: bool, **rest: Any) -> mx.array:
        last[:] = [(Rotary(dims, traditional), x.shape[-1])]
        return original(x, dims, *args, traditional=traditional, **rest)

    def taught(cache: Any) -> Any:
        own = cache.update_and_fetch

        def update_and_fetch(keys: mx.array, values: mx.array) -> Any:
            found, width = last.pop() if last else (NO_ROTARY, 0)
            seen[id(cache)] = found if width == keys.shape[-1] and found.dims <= width else NO_ROTARY
            last.clear()
            return own(keys, values)

        return update_and_fetch

    mx.fast.rope = rope  # type: ignore[assignment]
    for cache in caches:
        cache.update_and_fetch = taught(cache)
    try:
        yield seen
    finally:
        mx.fast.rope = original
        for cache in caches:
            del cache.update_and_fetch
