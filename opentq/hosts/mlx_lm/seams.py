"""Models that don't call mlx-lm's attention function with keys and values, and what is done about each.

Most models need nothing from this file. A few compute attention in their own words (soft-capped scores, repeated heads,
a direct call to MLX); their attention classes get a `__call__` that serves compressed caches the same way and passes
everything else to the original. Some take keys and values out of a cache that another layer has filled. And some read a
cache as plain arrays, which a compressed cache can't give without decoding itself: those stay native, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ...caches.single import OpenTQCache
from .. import sparse
from ..plan import Traits
from ..seams import Patches, flat, gemma2, heads, latent, modules_of, plamo

PACKAGE = "mlx_lm.models."

NATIVE = {"minimax_m3_vl.Attention": "sparse attention: single tokens are picked out of the cache as arrays"}
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

SPARSE = ("deepseek_v32.DeepseekV32Attention",)
"""Attention classes with latents and, in the second of a layer's caches, the keys of an indexer (`hosts/sparse.py`)."""


def traits(model: Any) -> Traits:
    """What is special about this model's attention."""
    classes = dict(modules_of(model, PACKAGE))
    arrays = [
        reason for name, reason in NATIVE.items() if getattr(classes.get(name), "is_sparse_attn", name in classes)
    ]
    return Traits(
        arrays=next(iter(arrays), ""),
        windows=next((reason for name, reason in WIDE_MASKS.items() if name in classes), ""),
        latent=any(name in classes for name in (*LATENT, *SPARSE)),
        lends=any(name in classes for name in LENDERS),
        indexed=sparse.INDEX if any(name in classes for name in SPARSE) else "",
    )


def enter(model: Any) -> None:
    """Give the attention classes of this model that need it a `__call__` that knows compressed caches."""
    for name, module in modules_of(model, PACKAGE):
        serve = latent if name in LATENT else OWN.get(name)
        if serve:
            patches.put(type(module), serve)


def leave() -> None:
    """Take every patched `__call__` back."""
    patches.take_back()


patches = Patches()


def _plamo2(layer: Any, x: mx.array, mask: Any, cache: OpenTQCache) -> mx.array:
    """Calls MLX's attention directly, past mlx-lm's function."""
    offset, ends = cache.offset, [layer.q_proj_dim, layer.q_proj_dim + layer.k_proj_dim]
    q, k, v = mx.split(layer.qkv_proj(x), ends, axis=-1)
    q, k = heads(q, layer.q_num_heads), heads(k, layer.k_num_heads)
    q = mx.fast.rms_norm(q, weight=None, eps=1e-6) * layer.q_weight[:, None]
    k = mx.fast.rms_norm(k, weight=None, eps=1e-6) * layer.k_weight[:, None]
    keys, _ = cache.update_and_fetch(layer.rope(k, offset=offset), heads(v, layer.v_num_heads))
    return layer.o_proj(flat(keys.step.attend(layer.rope(q, offset=offset), scale=layer.scale, mask=mask)))


OWN: dict[str, Callable[..., mx.array]] = {
    "deepseek_v32.DeepseekV32Attention": sparse.deepseek,
    "gemma2.Attention": gemma2,
    "plamo.Attention": plamo,
    "plamo2.Attention": _plamo2,
}
"""Attention classes that are served at their own seam."""


def served() -> dict[str, Callable[..., mx.array]]:
    """Attention classes that are served at their own seam, and by what."""
    return OWN | dict.fromkeys(LATENT, latent)
