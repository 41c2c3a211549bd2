"""What a cache's state is made of: what mlx-lm evaluates, saves and loads, in order and by name.

A part that is not there yet (no packed row, no sinks, no center) is None: an empty list has no leaves and would be lost
on its way through a file. `beside` is what a host's kind of cache holds besides (`OpenTQCache._beside`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx

Arrays = list[mx.array] | None


class State(NamedTuple):
    """Of a single cache. `layouts` are the names of the layouts of packed keys and values; lengths are in tokens."""

    spec: str
    layouts: str
    window: int
    lends: int
    latent: int
    base: int
    sink: int
    packed: int
    packed_k: Arrays = None
    packed_v: Arrays = None
    dense_k: mx.array | None = None
    dense_v: mx.array | None = None
    center: mx.array | None = None
    sketches: list[Any] | None = None
    beside: list[Any] | None = None


class BatchState(NamedTuple):
    """Of a batch. `lengths` has (base, sink, packed, tail) of every sequence; `centered` whether it has a center."""

    spec: str
    layouts: str
    window: int
    lends: int
    latent: int
    lengths: list[list[int]] | None
    packed_k: Arrays = None
    packed_v: Arrays = None
    dense_k: mx.array | None = None
    dense_v: mx.array | None = None
    center: mx.array | None = None
    centered: list[int] | None = None
    sketches: list[Any] | None = None
    beside: list[Any] | None = None
