"""DeepSeek's sparse attention (DSA), in both hosts: an indexer names the tokens that a query may see.

The latents are packed, and a decode step gathers and decodes the chosen rows only (`attention/selected.py`). While a
prompt is read the choice is a mask. The indexer's own keys stay as the host made them: it scores all of them at every
step, so there is no row to spare. Selection counts positions in the host's timeline, padding included.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from .seams import flat, latent_and_rotary, queries

INDEX = "keys of the indexer: all of them are scored at every step"
"""Why a cache of an indexer stays native."""


def beside_latents(count: int, part: int) -> str:
    """Why member `part` of a sparse layer's `count` caches stays native; "" for latents."""
    return INDEX if part == 1 else ""


def attend(
    layer: Any, x: mx.array, mask: Any, latents: Any, index: Any, chosen: mx.array | None, sinks: mx.array | None = None
) -> tuple[mx.array, mx.array | None]:
    """One layer up to its output projection, and the tokens that were chosen.

    Args:
        layer: an attention module with DeepSeek-V3.2's projections; its `indexer` may be None or absent.
        x: `[B, L, E]`.
        mask: None, or bool `[B or 1, 1, L, S]`.
        latents: the compressed cache.
        index: the indexer's cache, the host's own.
        chosen: positions int `[B, 1, L, K]` of another layer, used where the layer has no indexer; None: all tokens.

    Returns:
        `[B, H, L, Dv]` and the positions.
    """
    length = x.shape[1]
    low = layer.q_a_layernorm(layer.q_a_proj(x))
    plain, rotated = queries(layer, layer.q_b_proj(low))
    latent, rotary = latent_and_rotary(layer, x)
    offset = latents.offset
    rotated, rotary = layer.rope(rotated, offset), layer.rope(rotary, offset)
    keys, _ = latents.update_and_fetch(latent, rotary)
    if getattr(layer, "indexer", None) is not None:
        if mask is None and hasattr(index, "left_padding"):
            mask = index.make_mask(length)  # compressed batches need none, the indexer's does
        chosen = layer.indexer(x, low, mask, cache=index)
        # The indexer's cache is evaluated even when it chose nothing, so that its graph does not grow.
        latents.keys = mx.depends(latents.keys, (index.keys, index.values))
    q = mx.concatenate([layer.embed_q(plain), rotated], axis=-1)
    return layer.unembed_out(see(keys.step, latents, q, chosen, mask, layer.scale, sinks)), chosen


def see(
    step: Any,
    latents: Any,
    q: mx.array,
    chosen: mx.array | None,
    mask: Any,
    scale: float,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attention of `q [B, H, L, D]` to the tokens `chosen [B, 1, L, K]` (negative: none): `[B, H, L, latent]`."""
    length = q.shape[2]
    if chosen is None:
        return step.attend(q, scale=scale, mask="causal" if length > 1 else None, sinks=sinks)
    if length == 1:
        seen = chosen[:, 0, 0].astype(mx.int32)
        valid = seen >= 0
        if mask is not None:
            valid = valid & mx.take_along_axis(_rows(mask, len(seen)), mx.maximum(chosen, 0), axis=-1)[:, 0, 0]
        padding = latents.left_padding[:, None] if hasattr(latents, "left_padding") else 0
        return step.attend_rows(q, mx.where(valid, seen - padding, -1), scale=scale, sinks=sinks)
    total = mask.shape[-1]
    allowed = mx.zeros((*chosen.shape[:3], total + 1), mx.bool_)  # one column more, for what is no token
    allowed = mx.put_along_axis(allowed, mx.where(chosen < 0, total, chosen), mx.array(True), axis=-1)
    return step.attend(q, scale=scale, mask=allowed[..., :total] & mask, sinks=sinks)


def project(layer: Any, out: mx.array) -> mx.array:
    """`[B, H, L, Dv]` through the layer's output projection."""
    return layer.o_proj(flat(out))


def deepseek(layer: Any, x: mx.array, mask: Any, cache: Any) -> mx.array:
    """An indexer chooses tokens; their packed rows are gathered, and nothing else is read."""
    return project(layer, attend(layer, x, mask, cache[0], cache[1], None)[0])


def _rows(mask: mx.array, batch: int) -> mx.array:
    return mx.broadcast_to(mask, (batch, *mask.shape[-3:])) if mask.ndim == 4 else mask[None, None]
