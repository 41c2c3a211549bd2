"""Models that don't call mlx-lm's attention function with keys and values, and what is done about each.

Most models need nothing from this file. A few compute attention in their own words (soft-capped scores, repeated heads,
a direct call to MLX); their attention classes get a `__call__` that serves compressed caches the same way and passes
everything else to the original. Some take keys and values out of a cache that another layer has filled. And some read a
cache as plain arrays, which a compressed cache can't give without decoding itself: those stay native, with the reason.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ...caches.single import OpenTQCache
from .. import sparse
from ..patches import Seams
from ..seams import flat, gemma2, heads, plamo


def _plamo2(layer: Any, x: mx.array, mask: Any, cache: OpenTQCache) -> mx.array:
    """Calls MLX's attention directly, past mlx-lm's function."""
    offset, ends = cache.offset, [layer.q_proj_dim, layer.q_proj_dim + layer.k_proj_dim]
    q, k, v = mx.split(layer.qkv_proj(x), ends, axis=-1)
    q, k = heads(q, layer.q_num_heads), heads(k, layer.k_num_heads)
    q = mx.fast.rms_norm(q, weight=None, eps=1e-6) * layer.q_weight[:, None]
    k = mx.fast.rms_norm(k, weight=None, eps=1e-6) * layer.k_weight[:, None]
    keys, _ = cache.update_and_fetch(layer.rope(k, offset=offset), heads(v, layer.v_num_heads))
    return layer.o_proj(flat(keys.step.attend(layer.rope(q, offset=offset), scale=layer.scale, mask=mask)))


SEAMS = Seams(
    package="mlx_lm.models.",
    own={
        "deepseek_v32.DeepseekV32Attention": sparse.deepseek,
        "gemma2.Attention": gemma2,
        "plamo.Attention": plamo,
        "plamo2.Attention": _plamo2,
    },
    latent=(
        "bailing_hybrid.MultiLatentAttention",
        "bailing_moe_v3.BailingMLA",
        "deepseek_v3.DeepseekV3Attention",
        "glm4_moe_lite.Glm4MoeLiteAttention",
        "kimi_k3.KimiK3MLAAttention",
        "kimi_linear.KimiMLAAttention",
        "longcat_flash.LongcatFlashMLA",
        "mistral4.Mistral4Attention",
    ),
    sparse={"deepseek_v32.DeepseekV32Attention": sparse.beside_latents},
    native={"minimax_m3_vl.Attention": "sparse attention: single tokens are picked out of the cache as arrays"},
    reads="is_sparse_attn",
    wide_masks={"plamo3.Attention": "its mask is one token wider than its cache"},
    lenders=("afm7.KVReuseAttention", "gemma3n.Gemma3nAttention"),
)
