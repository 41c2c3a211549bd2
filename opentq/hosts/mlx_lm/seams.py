"""Models that don't call mlx-lm's attention function with keys and values, and what is done about each.

Most models need nothing from this file. A few compute attention in their own words (soft-capped scores, repeated heads,
a direct call to MLX); their attention classes get a `__call__` that serves compressed caches the same way and passes
everything else to the original. Some take keys and values out of a cache that another layer has filled. And some read a
cache as plain arrays, which a compressed cache can't give without decoding itself: those stay native, with the reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from ...caches.single import OpenTQCache
from ..plan import Traits

PACKAGE = "mlx_lm.models."

SPARSE = "sparse attention: single tokens are picked out of the cache as arrays"

NATIVE = {"deepseek_v32.DeepseekV32Attention": SPARSE, "minimax_m3_vl.Attention": SPARSE}
"""Attention classes whose caches stay as they are. Layers share masks, so one keeps all KVCaches of a model native."""

WIDE_MASKS = {"plamo3.Attention": "its mask is one token wider than its cache"}
"""Attention classes whose sliding windows stay native even under window=compress."""

LENDERS = ("afm7.KVReuseAttention", "gemma3n.Gemma3nAttention")
"""Classes that ask a cache for its keys and values again, in the step that filled it."""

LATENT = (
    "bailing_hybrid.MultiLatentAttention",
    "bailing_moe_v3.BailingMLA",
    "deepseek_v3.DeepseekV3Attention",
    "glm4_moe_lite.Glm4MoeLiteAttention",
    "kimi_k3.KimiK3MLAAttention",
    "kimi_linear.KimiMLAAttention",
    "longcat_flash.LongcatFlashMLA",
    "mistral4.Mistral4Attention",
)
"""Attention classes that cache a latent and a rotary part (MLA) in place of keys and values."""


def traits(model: Any) -> Traits:
    """What is special about this model's attention."""
    classes = dict(_attention_classes(model))
    arrays = [
        reason for name, reason in NATIVE.items() if getattr(classes.get(name), "is_sparse_attn", name in classes)
    ]
    return Traits(
        arrays=next(iter(arrays), ""),
        windows=next((reason for name, reason in WIDE_MASKS.items() if name in classes), ""),
        latent=any(name in classes for name in LATENT),
        lends=any(name in classes for name in LENDERS),
    )


def enter(model: Any) -> None:
    """Give the attention classes of this model that need it a `__call__` that knows compressed caches."""
    for name, module in _attention_classes(model):
        serve = _latent if name in LATENT else OWN.get(name)
        if serve:
            _patch(type(module), serve)


def leave() -> None:
    """Take every patched `__call__` back."""
    while _patched:
        cls, original = _patched.popitem()
        cls.__call__ = original  # type: ignore[method-assign]


def _attention_classes(model: Any) -> Iterator[tuple[str, Any]]:
    for module in model.modules():
        cls = type(module)
        if cls.__module__.startswith(PACKAGE):
            yield f"{cls.__module__.removeprefix(PACKAGE)}.{cls.__name__}", module


_patched: dict[type, Callable] = {}


def _patch(cls: type, serve: Callable[..., mx.array]) -> None:
    if cls in _patched:
        return
    original = cls.__call__
    signature = inspect.signature(original)

    def call(*args: Any, **kwargs: Any) -> mx.array:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if isinstance(bound.arguments["cache"], OpenTQCache):
            return serve(*bound.arguments.values())
        return original(*args, **kwargs)

    _patched[cls] = original
    cls.__call__ = call  # type: ignore[method-assign]


def _heads(x: mx.array, count: int) -> mx.array:
    """`[B, L, H * D]` -> `[B, H, L, D]`."""
    return x.reshape(*x.shape[:2], count, -1).transpose(0, 2, 1, 3)


def _flat(x: mx.array) -> mx.array:
    """`[B, H, L, D]` -> `[B, L, H * D]`."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def _causal(length: int) -> str | None:
    """These models attend causally and nothing else; the array that they ask for says no more."""
    return "causal" if length > 1 else None


def _gemma2(layer: Any, x: mx.array, mask: Any, cache: OpenTQCache) -> mx.array:
    """Scores are capped by a tanh, which the fused function of MLX does not know and ours does."""
    offset = cache.offset
    q = layer.rope(_heads(layer.q_proj(x), layer.n_heads), offset=offset)
    k = layer.rope(_heads(layer.k_proj(x), layer.n_kv_heads), offset=offset)
    keys, _ = cache.update_and_fetch(k, _heads(layer.v_proj(x), layer.n_kv_heads))
    cap = layer.attn_logit_softcapping
    out = keys.step.attend(q, scale=layer.scale, mask=_causal(x.shape[1]), softcap=cap)
    return layer.o_proj(_flat(out))


def _plamo(layer: Any, x: mx.array, mask: Any, cache: OpenTQCache) -> mx.array:
    """Keys are tiled over the query heads, so query head h uses KV head h % Hkv: here the query heads move instead."""
    offset, shared = cache.offset, layer.config.n_shared_head
    q = layer.rotary_emb(_heads(layer.q_proj(x), layer.q_num_heads), offset=offset)
    k = layer.rotary_emb(_heads(layer.k_proj(x), layer.k_num_heads), offset=offset)
    keys, _ = cache.update_and_fetch(k, _heads(layer.v_proj(x), layer.v_num_heads))
    grouped = q.reshape(q.shape[0], shared, layer.k_num_heads, *q.shape[2:]).swapaxes(1, 2).reshape(q.shape)
    out = keys.step.attend(grouped, scale=layer.scale, mask=mask)
    out = out.reshape(out.shape[0], layer.k_num_heads, shared, *out.shape[2:]).swapaxes(1, 2).reshape(out.shape)
    return layer.o_proj(_flat(out))


def _plamo2(layer: Any, x: mx.array, mask: Any, cache: OpenTQCache) -> mx.array:
    """Calls MLX's attention directly, past mlx-lm's function."""
    offset, ends = cache.offset, [layer.q_proj_dim, layer.q_proj_dim + layer.k_proj_dim]
    q, k, v = mx.split(layer.qkv_proj(x), ends, axis=-1)
    q, k = _heads(q, layer.q_num_heads), _heads(k, layer.k_num_heads)
    q = mx.fast.rms_norm(q, weight=None, eps=1e-6) * layer.q_weight[:, None]
    k = mx.fast.rms_norm(k, weight=None, eps=1e-6) * layer.k_weight[:, None]
    keys, _ = cache.update_and_fetch(layer.rope(k, offset=offset), _heads(v, layer.v_num_heads))
    return layer.o_proj(_flat(keys.step.attend(layer.rope(q, offset=offset), scale=layer.scale, mask=mask)))


def _latent(layer: Any, x: mx.array, *rest: Any) -> mx.array:
    """Queries are taken into the latent's space, the output back; keys are `[latent | rotary]`, values the latent."""
    *scales, _mask, cache = rest
    if getattr(layer, "q_lora_rank", None) is None:
        q = layer.q_proj(x)
    else:
        q = layer.q_b_proj(layer.q_a_layernorm(layer.q_a_proj(x)))
    q = _heads(q, getattr(layer, "num_heads", 0) or layer.num_attention_heads)
    latent, rotary = mx.split(layer.kv_a_proj_with_mqa(x), [layer.kv_lora_rank], axis=-1)
    latent, rotary = layer.kv_a_layernorm(latent)[:, None], rotary[:, None]
    if getattr(layer, "mla_scale_q_lora", None) is not None:
        q = q * layer.mla_scale_q_lora
    if getattr(layer, "mla_scale_kv_lora", None) is not None:
        latent = latent * layer.mla_scale_kv_lora
    q_plain, q_rotary = mx.split(q, [layer.qk_nope_head_dim], axis=-1)
    if hasattr(layer, "rope"):
        offset = cache.offset
        q_rotary, rotary = layer.rope(q_rotary, offset), layer.rope(rotary, offset)
    for scale in scales:
        q_plain, q_rotary = q_plain * scale, q_rotary * scale
    keys, _ = cache.update_and_fetch(latent, rotary)
    q = mx.concatenate([layer.embed_q(q_plain), q_rotary], axis=-1)
    out = layer.unembed_out(keys.step.attend(q, scale=layer.scale, mask=_causal(x.shape[1])))
    if hasattr(layer, "g_proj"):
        gate = mx.sigmoid(layer.g_proj(x).astype(mx.float32)).astype(out.dtype)
        # One gate per head, or one per channel.
        out = out * gate.reshape(*x.shape[:2], out.shape[1], -1).swapaxes(1, 2)
    return (layer.dense if hasattr(layer, "dense") else layer.o_proj)(_flat(out))


OWN: dict[str, Callable[..., mx.array]] = {
    "gemma2.Attention": _gemma2,
    "plamo.Attention": _plamo,
    "plamo2.Attention": _plamo2,
}
"""Attention classes that are served at their own seam."""
