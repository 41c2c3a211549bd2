"""Caches: who owns the bytes over time. mlx-lm's cache protocol over packed buffers."""

from . import batch  # noqa: F401  (single caches know their batches once these are defined)
