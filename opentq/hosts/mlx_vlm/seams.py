"""Models of mlx-vlm that don't call its attention function with keys and values, and what is done about each."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import mlx.core as mx

from ...caches.composite import members
from ...caches.single import OpenTQCache
from ...caches.step import Handle
from .. import sparse
from ..patches import Seams
from ..plan import Traits
from ..seams import gemma2, heads, plamo
from ..shim import attend
from . import qsa

DIRECT = ("moondream2", "moondream3", "phi3_v", "phi4_siglip", "phi4mm", "plamo2vl")
"""Packages whose language model calls MLX's attention function and not mlx-vlm's."""

CHOOSER = "qwen4_exp.language.Qwen4ExpAttention"


def _gemma3n(layer: Any, x: mx.array, mask: Any, cache: OpenTQCache) -> mx.array:
    """Layers that share keys and values take them from the cache that another layer has filled in this step."""
    if not layer.is_kv_shared_layer:
        return NotImplemented
    keys, _ = cache.keys_and_values()
    q = layer.q_norm(layer.q_proj(x).reshape(*x.shape[:2], -1, layer.head_dim)).transpose(0, 2, 1, 3)
    out = keys.step.attend(layer.rope(q, offset=cache.offset), scale=layer.scale, mask=mask)
    return layer.o_proj(out.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1))


def _afm7(model: Any, inputs: Any, embeds: Any, cache: list[Any]) -> mx.array:
    """The last layers attend to the keys and values of one cache, which lends those of this step."""
    h = model.embedding(inputs) if embeds is None else embeds
    mask = cache[0].make_mask(h.shape[1])
    for layer, c in zip(model.layers, cache):
        h = layer(h, mask, cache=c)
    keys, values = cache[-1].keys_and_values()
    for layer in model.kv_reuse_layers:
        h = layer(h, keys, values, mask)
    return model.output_norm(h)


def _dsa(layer: Any, x: mx.array, mask: Any, *rest: Any) -> tuple[mx.array, Any]:
    """As DeepSeek's; an indexer serves several layers or blocks, and HyV4 has sinks and a gate."""
    *caches, chosen = rest
    latents, index, *_ = caches if len(caches) == 2 else (*members(caches[0]), None)
    out, chosen = sparse.attend(layer, x, mask, latents, index, chosen, getattr(layer, "learnable_sink_param", None))
    if hasattr(layer, "linear_gate"):
        out = out * mx.sigmoid(heads(layer.linear_gate(x), layer.num_heads))
    return sparse.project(layer, out), chosen


def _glm5(layer: Any, x: mx.array, padding: Any, cache: Any, chosen: Any, last: bool) -> tuple[mx.array, mx.array]:
    """As DeepSeek's, with latents alone, and pools of tokens, which the indexer chooses."""
    latents, *others = members(cache)
    low, latent = mx.split(layer.qkv_a_proj(x), [layer.q_lora_rank], axis=-1)
    low, latent, offset = layer.q_a_layernorm(low), layer.kv_a_layernorm(latent)[:, None], latents.offset
    keys, _ = latents.update_and_fetch(latent, latent[..., :0])
    if layer.indexer is not None:
        index, pools = others[:2]
        chosen = layer.indexer(x, low, padding, index, pools, offset)
        # Flags of what is padding are evaluated even where nothing reads them, so that their graph does not grow.
        latents.keys = mx.depends(latents.keys, (index.keys, index.values))
    q = layer.embed_q(heads(layer.q_b_proj(low), layer.num_heads))
    if last:
        q, chosen = q[:, :, -1:], chosen[:, -1:]
    mask = None if q.shape[2] == 1 else mx.ones((1, 1, 1, latents.size()), mx.bool_)
    out = sparse.see(keys.step, latents, q, chosen[:, None], mask, layer.scale)
    return sparse.project(layer, layer.unembed_out(out)), chosen


def _beside_glm5(count: int, part: int) -> str:
    """The last of a layer's caches is for prompts that are read on latents of mlx-vlm's own."""
    if part and part == count - 1:
        return "keys and values of all heads, which compressed latents don't use: it stays empty"
    return sparse.INDEX if part else ""


def _qsa_exactly(forward: Any, layer: Any, x: mx.array, cache: Any, positions: mx.array | None, mask: Any) -> mx.array:
    """mlx-vlm's own way for decode steps and drafts: every token as it would be alone."""
    if isinstance(cache, qsa.Choosing):
        return qsa.one_by_one(layer, x, cache, positions, forward._linear)
    own = next(value for owner, _, value in _replaced if owner is type(forward))
    return own(forward, layer, x, cache, positions, mask)


class _Fast:
    """`mx.fast` whose attention function knows compressed keys and values."""

    def __getattr__(self, name: str) -> Any:
        return getattr(mx.fast, name)

    @staticmethod
    def scaled_dot_product_attention(
        q: Any, k: Any, v: Any, *, scale: float, mask: Any = None, **rest: Any
    ) -> mx.array:
        if type(k) is Handle:
            return attend(q, k, v, scale, mask, rest.pop("sinks", None))
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, **rest)


class _Core:
    """What the name `mx` stands for in a language model that calls `mx.fast.scaled_dot_product_attention` itself."""

    fast = _Fast()

    def __getattr__(self, name: str) -> Any:
        return getattr(mx, name)


_core = _Core()


class _Seams(Seams):
    """Of some models a module's names are replaced, too."""

    def traits(self, model: Any) -> Traits:
        found = super().traits(model)
        choosers = [module for name, module in self.modules(model) if name == CHOOSER]
        return replace(found, beside=qsa.bytes_per_token(choosers[0].indexer)) if choosers else found

    def enter(self, model: Any) -> None:
        super().enter(model)
        for name, module in self.modules(model):
            if name.split(".")[0] in DIRECT:
                _replace(sys.modules[type(module).__module__], "mx", _core)
            if name.startswith("inkling."):
                # What lies outside a window is masked in any case; compressed keys can't be cut to it.
                _replace(sys.modules[type(module).__module__], "_SLIDING_KV_SLICE", False)
            if name == CHOOSER:
                _replace(
                    sys.modules[type(module).__module__].Qwen4ExpBatchInvariantForward, "_qsa_attention", _qsa_exactly
                )

    def leave(self) -> None:
        while _replaced:
            setattr(*_replaced.pop())
        super().leave()


_replaced: list[tuple[Any, str, Any]] = []


def _replace(owner: Any, name: str, value: Any) -> None:
    if getattr(owner, name) is not value:
        _replaced.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)


SEAMS = _Seams(
    package="mlx_vlm.models.",
    own={
        "afm7.language.AFMModel": _afm7,
        "deepseek_v32.language.DeepseekV32Attention": sparse.deepseek,
        "gemma2.language.Attention": gemma2,
        "plamo.language.Attention": plamo,
        "glm5_next.language.Glm5NextAttention": _glm5,
        "glm_moe_dsa.language.GlmMoeDsaAttention": _dsa,
        "hy_v4.language.HyV4Attention": _dsa,
        "longcat_flash_sparse.language.LongcatFlashMLA": _dsa,
        "gemma3n.language.Gemma3nAttention": _gemma3n,
        CHOOSER: qsa.attention,
    },
    latent=(
        "deepseek_v3.language.DeepseekV3Attention",
        "glm4_moe_lite.language.Glm4MoeLiteAttention",
        "kimi_k3.language.KimiK3MLAAttention",
        "kimi_linear.language.KimiMLAAttention",
        "longcat_flash.language.LongcatFlashMLA",
        "youtu_vl.language.YoutuAttention",
    ),
    sparse={
        "deepseek_v32.language.DeepseekV32Attention": sparse.beside_latents,
        "glm5_next.language.Glm5NextAttention": _beside_glm5,
        "glm_moe_dsa.language.GlmMoeDsaAttention": sparse.beside_latents,
        "hy_v4.language.HyV4Attention": sparse.beside_latents,
        "longcat_flash_sparse.language.LongcatFlashMLA": sparse.beside_latents,
    },
    native={
        "limite.language.Attention": "the newest values are read back as arrays",
        "minimax_m3_vl.language.MiniMaxAttention": (
            "sparse attention: single blocks are picked out of the cache as arrays"
        ),
        "unlimited_ocr.language.LanguageModel": "the answer's tokens overwrite each other in a ring behind the prompt",
    },
    reads="has_sparse_index",
    lenders=("afm7.language.KVReuseAttention", "gemma3n.language.Gemma3nAttention"),
    cross=("mllama.language.MllamaTextCrossAttention",),
    kinds={"hy_v4.language.HyV4Attention": "HyV4KVCache", CHOOSER: "QSAKVCache"},
)
