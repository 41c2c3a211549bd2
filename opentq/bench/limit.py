"""`--memory-limit`: MLX's own limit, set for as long as a benchmark lasts.

Over it MLX waits for memory before it goes on, so a limit that outlived its benchmark would slow down, and shrink the
peaks of, whatever the process does next.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx


@contextmanager
def limited(limit: int) -> Iterator[None]:
    """At most about `limit` bytes (0: no other limit than before); the old limit is restored on the way out."""
    before = mx.set_memory_limit(limit) if limit else 0
    try:
        yield
    finally:
        if limit:
            mx.set_memory_limit(before)
