"""Models of mlx-vlm that don't call its attention function with keys and values, and what is done about each."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from ...caches.single import OpenTQCache
from ...caches.step import Handle
from .. import sparse
from ..mlx_lm.hooks import _attend as attend
from ..mlx_lm.seams import _gemma2, _latent
from . import private
from .policy import Traits

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

NATIVE = {"limite.language.Attention": "the newest values are read back as arrays"}
"""Attention classes whose caches stay as they are."""

WIDE_MASKS: dict[str, str] = {}

LENDERS = ("afm7.language.KVReuseAttention", "gemma3n.language.Gemma3nAttention")
"""Classes that ask a cache for its keys and values again, in the step that filled it."""

DIRECT = ("moondream2", "moondream3", "phi4_siglip", "phi4mm", "plamo2vl")
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


OWN: dict[str, Callable[..., mx.array]] = {
    "afm7.language.AFMModel": _afm7,
    "deepseek_v32.language.DeepseekV32Attention": sparse.deepseek,
    "gemma2.language.Attention": _gemma2,
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
    classes = dict(_attention_classes(model))
    arrays = [
        reason for name, reason in NATIVE.items() if getattr(classes.get(name), "is_sparse_attn", name in classes)
    ]
    return Traits(
        arrays=next(iter(arrays), ""),
        windows=next((reason for name, reason in WIDE_MASKS.items() if name in classes), ""),
        latent=any(name in classes for name in (*LATENT, *SPARSE)),
        indexed=any(name in classes for name in SPARSE),
        lends=any(name in classes for name in LENDERS),
    )


def enter(model: Any) -> None:
    for name, module in _attention_classes(model):
        serve = _latent if name in LATENT else OWN.get(name)
        if serve:
            _patch(type(module), serve)
        if name.split(".")[0] in DIRECT:
            sys.modules[type(module).__module__].mx = _core  # type: ignore[attr-defined]


def leave() -> None:
    """Take every patched `__call__`, and every module's `mx`, back."""
    for package in DIRECT:
        module = sys.modules.get(f"{PACKAGE}{package}.language")
        if module is not None:
            module.mx = mx  # type: ignore[attr-defined]
    while _patched:
        cls, original = _patched.popitem()
        cls.__call__ = original  # type: ignore[method-assign]


def _attention_classes(model: Any) -> Iterator[tuple[str, Any]]:
    for module in model.modules():
        cls = type(module)
        if cls.__module__.startswith(PACKAGE):
            yield f"{cls.__module__.removeprefix(PACKAGE)}.{cls.__name__}", module


def _compressed(cache: Any) -> bool:
    """Whether a layer's cache, or the first or last of several, is ours."""
    if isinstance(cache, private.caches.CacheList):
        cache = cache.caches
    return any(isinstance(c, OpenTQCache) for c in (cache if isinstance(cache, (list, tuple)) else (cache,)))


_patched: dict[type, Callable] = {}


def _patch(cls: type, serve: Callable[..., mx.array]) -> None:
    if cls in _patched:
        return
    original = cls.__call__
    signature = inspect.signature(original)

    def call(*args: Any, **kwargs: Any) -> mx.array:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if _compressed(next(bound.arguments[n] for n in ("cache", "latent_cache") if n in bound.arguments)):
            served = serve(*bound.arguments.values())
            if served is not NotImplemented:
                return served
        return original(*args, **kwargs)

    _patched[cls] = original
    cls.__call__ = call  # type: ignore[method-assign]


def served() -> dict[str, Callable[..., mx.array]]:
    """Attention classes that are served at their own seam, and by what."""
    return OWN | dict.fromkeys(LATENT, _latent)
