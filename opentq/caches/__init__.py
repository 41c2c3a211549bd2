"""Caches: who owns the bytes over time. mlx-lm's cache protocol over packed buffers."""
