"""Models of mlx-vlm that don't call its attention function with keys and values, and what is done about each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import mlx.core as mx

from ...caches.single import OpenTQCache
from ...caches.step import Handle
from .. import sparse
from ..plan import Traits
from ..seams import Patches, gemma2, latent, modules_of, plamo
from ..shim import attend

PACKAGE = "mlx_vlm.models."

LATENT = (
    "deepseek_v3.language.DeepseekV3Attention",
    "glm4_moe_lite.language.Glm4MoeLiteAttention",
    "kimi_k3.language.KimiK3MLAAttention",
    "kimi_linear.language.KimiMLAAttention",
    "longcat_flash.language.LongcatFlashMLA",
    "youtu_vl.language.YoutuAttention",
)
"""Attention classes that cache a latent and a rotary part (MLA) in place of keys and values."""

SPARSE = (
    "deepseek_v32.language.DeepseekV32Attention",
    "glm_moe_dsa.language.GlmMoeDsaAttention",
    "longcat_flash_sparse.language.LongcatFlashMLA",
)
"""Attention classes with latents and, in the second of a layer's caches, the keys of an indexer (`hosts/sparse.py`)."""

NATIVE = {
    "glm5_next.language.Glm5NextAttention": "sparse attention: single tokens of every head are picked out as arrays",
    "limite.language.Attention": "the newest values are read back as arrays",
    "minimax_m3_vl.language.MiniMaxAttention": "sparse attention: single blocks are picked out of the cache as arrays",
}
"""Attention classes whose caches stay as they are. Layers share masks, so one keeps all KVCaches of a model native."""

WIDE_MASKS: dict[str, str] = {}

LENDERS = ("afm7.language.KVReuseAttention", "gemma3n.language.Gemma3nAttention")
"""Classes that ask a cache for its keys and values again, in the step that filled it."""

CROSS = ("mllama.language.MllamaTextCrossAttention",)
"""Attention classes that look at the image: its keys and values are made anew, and their caches stay empty."""

DIRECT = ("moondream2", "moondream3", "phi3_v", "phi4_siglip", "phi4mm", "plamo2vl")
"""Packages whose language model calls MLX's attention function and not mlx-vlm's."""


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


def _glm_dsa(layer: Any, x: mx.array, mask: Any, cache: Any, chosen: Any) -> tuple[mx.array, Any]:
    """As DeepSeek's; some layers see the tokens that an earlier one chose."""
    out, chosen = sparse.attend(layer, x, mask, cache[0], cache[1], chosen)
    return sparse.project(layer, out), chosen


def _longcat_sparse(layer: Any, x: mx.array, mask: Any, latents: Any, index: Any, chosen: Any) -> tuple[mx.array, Any]:
    """As DeepSeek's; one indexer serves several attention blocks."""
    out, chosen = sparse.attend(layer, x, mask, latents, index, chosen)
    return sparse.project(layer, out), chosen


OWN: dict[str, Callable[..., Any]] = {
    "afm7.language.AFMModel": _afm7,
    "deepseek_v32.language.DeepseekV32Attention": sparse.deepseek,
    "gemma2.language.Attention": gemma2,
    "plamo.language.Attention": plamo,
    "glm_moe_dsa.language.GlmMoeDsaAttention": _glm_dsa,
    "longcat_flash_sparse.language.LongcatFlashMLA": _longcat_sparse,
    "gemma3n.language.Gemma3nAttention": _gemma3n,
}
"""Attention classes that are served at their own seam."""


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


def traits(model: Any) -> Traits:
    """What is special about this model's attention."""
    found = list(modules_of(model, PACKAGE))
    classes = {name for name, _ in found}
    arrays = [NATIVE[name] for name, m in found if name in NATIVE and getattr(m, "has_sparse_index", True)]
    return Traits(
        arrays=next(iter(arrays), ""),
        windows=next((reason for name, reason in WIDE_MASKS.items() if name in classes), ""),
        latent=any(name in classes for name in (*LATENT, *SPARSE)),
        indexed=sparse.INDEX if any(name in classes for name in SPARSE) else "",
        lends=any(name in classes for name in LENDERS),
        unused="cross attention: keys and values of the image, not of tokens"
        if any(name in classes for name in CROSS)
        else Traits.unused,
    )


def enter(model: Any) -> None:
    """Give the attention classes of this model that need it a `__call__` (or an `mx`) that knows compressed caches."""
    for name, module in modules_of(model, PACKAGE):
        serve = latent if name in LATENT else OWN.get(name)
        if serve:
            patches.put(type(module), serve)
        if name.split(".")[0] in DIRECT:
            _replace(sys.modules[type(module).__module__], "mx", _core)
        if name.startswith("inkling."):
            # What lies outside a window is masked in any case; compressed keys can't be cut to it.
            _replace(sys.modules[type(module).__module__], "_SLIDING_KV_SLICE", False)


def _replace(module: ModuleType, name: str, value: Any) -> None:
    if getattr(module, name) is not value:
        _replaced.append((module, name, getattr(module, name)))
        setattr(module, name, value)


def leave() -> None:
    """Take every patched `__call__`, and every module's `mx`, back."""
    while _replaced:
        setattr(*_replaced.pop())
    patches.take_back()


_replaced: list[tuple[ModuleType, str, Any]] = []


patches = Patches()


def served() -> dict[str, Callable[..., Any]]:
    """Attention classes that are served at their own seam, and by what."""
    return OWN | dict.fromkeys(LATENT, latent)
