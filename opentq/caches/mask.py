"""Masks that a cache makes: a word where the kernels know what it means, an array where a model insists on one."""

from __future__ import annotations

import mlx.core as mx


class CausalMask(str):
    """The mask "causal", with the window that the model asked for: what `make_mask` returns in place of an array."""

    window: int

    def __new__(cls, window: int) -> CausalMask:
        mask = super().__new__(cls, "causal")
        mask.window = window
        return mask


def causal_mask(length: int, held: int, window: int = 0, left_padding: mx.array | None = None) -> mx.array:
    """What `length` new tokens behind `held` old ones may see: bool `[L, held + L]`, true where they may.

    Args:
        window: 0, or how many tokens a row sees, itself included.
        left_padding: int `[B]`, leading columns that belong to no token; the result is then `[B, 1, L, held + L]`.
    """
    columns, rows = mx.arange(held + length)[None], mx.arange(held, held + length)[:, None]
    mask = columns <= rows
    if window:
        mask = mask & (columns > rows - window)
    return mask if left_padding is None else mask & (columns >= left_padding[:, None, None, None])
