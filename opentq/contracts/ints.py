"""Whole numbers of the host as arrays of the device, and back: lengths, positions, what a launch is told."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import mlx.core as mx


@functools.lru_cache(maxsize=1024)
def int_array(values: tuple[int, ...]) -> mx.array:
    """int32 `[n]`; the same array for the same numbers, since layers and steps ask for the same again and again."""
    return mx.array(values, dtype=mx.int32)


def int_list(values: Iterable[int] | mx.array) -> list[int]:
    return [int(v) for v in (values.tolist() if isinstance(values, mx.array) else values)]  # type: ignore
