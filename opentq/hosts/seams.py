"""Attention of single models in words that serve compressed caches: what both hosts' models need of it. `patches.py`
puts it in the place of a class's `__call__`.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..caches.single import OpenTQCache


def heads(x: mx.array, count: int) -> mx.array:
    """`[B, L, H * D]` -> `[B, H, L, D]`."""
    return x.reshape(*x.shape[:2], count, -1).transpose(0, 2, 1, 3)


def flat(x: mx.array) -> mx.array:
    """`[B, H, L, D]` -> `[B, L, H * D]`."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def causal(length: int) -> str | None:
    """These models attend causally and nothing else; the array that they ask for says no more."""
    return "causal" if length > 1 else None


def gemma2(layer: Any, x: mx.array, mask: Any, cache: OpenTQCache) -> mx.array:
    """Scores are capped by a tanh, which the fused function of MLX does not know and ours does."""
    offset = cache.offset
    q = layer.rope(heads(layer.q_proj(x), layer.n_heads), offset=offset)
    k = layer.rope(heads(layer.k_proj(x), layer.n_kv_heads), offset=offset)
    keys, _ = cache.update_and_fetch(k, heads(layer.v_proj(x), layer.n_kv_heads))
    cap = layer.attn_logit_softcapping
    out = keys.step.attend(q, scale=layer.scale, mask=causal(x.shape[1]), softcap=cap)
    return layer.o_proj(flat(out))


def plamo(layer: Any, x: mx.array, mask: Any, cache: OpenTQCache) -> mx.array:
    """Keys are tiled over the query heads, so query head h uses KV head h % Hkv: here the query heads move instead."""
    offset, shared = cache.offset, layer.config.n_shared_head
    q = layer.rotary_emb(heads(layer.q_proj(x), layer.q_num_heads), offset=offset)
    k = layer.rotary_emb(heads(layer.k_proj(x), layer.k_num_heads), offset=offset)
    keys, _ = cache.update_and_fetch(k, heads(layer.v_proj(x), layer.v_num_heads))
    grouped = q.reshape(q.shape[0], shared, layer.k_num_heads, *q.shape[2:]).swapaxes(1, 2).reshape(q.shape)
    out = keys.step.attend(grouped, scale=layer.scale, mask=mask)
    out = out.reshape(out.shape[0], layer.k_num_heads, shared, *out.shape[2:]).swapaxes(1, 2).reshape(out.shape)
    return layer.o_proj(flat(out))


def latent_and_rotary(layer: Any, x: mx.array) -> tuple[mx.array, mx.array]:
    """What a layer of latents caches of `x [B, L, E]`, the rotary part not yet turned: two `[B, 1, L, ...]`."""
    latent, rotary = mx.split(layer.kv_a_proj_with_mqa(x), [layer.kv_lora_rank], axis=-1)
    latent = layer.kv_a_layernorm(latent)[:, None]
    scale = getattr(layer, "mla_scale_kv_lora", None)
    return latent if scale is None else latent * scale, rotary[:, None]


def queries(layer: Any, q: mx.array) -> tuple[mx.array, mx.array]:
    """Projected queries `[B, L, H * D]` of such a layer: the plain part and the rotary part, not yet turned."""
    q = heads(q, getattr(layer, "num_heads", 0) or layer.num_attention_heads)
    if getattr(layer, "mla_scale_q_lora", None) is not None:
        q = q * layer.mla_scale_q_lora
    plain, rotary = mx.split(q, [layer.qk_nope_head_dim], axis=-1)
    return plain, rotary


def latent(layer: Any, x: mx.array, *rest: Any) -> mx.array:
    """Queries are taken into the latent's space, the output back; keys are `[latent | rotary]`, values the latent."""
    *scales, _mask, cache = rest
    if getattr(layer, "q_lora_rank", None) is None:
        q = layer.q_proj(x)
    else:
        q = layer.q_b_proj(layer.q_a_layernorm(layer.q_a_proj(x)))
    q_plain, q_rotary = queries(layer, q)
    latent, rotary = latent_and_rotary(layer, x)
    if hasattr(layer, "rope"):
        offset = cache.offset
        q_rotary, rotary = layer.rope(q_rotary, offset), layer.rope(rotary, offset)
    for scale in scales:
        q_plain, q_rotary = q_plain * scale, q_rotary * scale
    keys, _ = cache.update_and_fetch(latent, rotary)
    q = mx.concatenate([layer.embed_q(q_plain), q_rotary], axis=-1)
    out = layer.unembed_out(keys.step.attend(q, scale=layer.scale, mask=causal(x.shape[1])))
    if hasattr(layer, "g_proj"):
        gate = mx.sigmoid(layer.g_proj(x).astype(mx.float32)).astype(out.dtype)
        # One gate per head, or one per channel.
        out = out * gate.reshape(*x.shape[:2], out.shape[1], -1).swapaxes(1, 2)
    return (layer.dense if hasattr(layer, "dense") else layer.o_proj)(flat(out))
