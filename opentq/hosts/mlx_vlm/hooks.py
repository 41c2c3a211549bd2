"""The seam with mlx-vlm: the language model's `make_cache`, and the code of its one attention function."""

from __future__ import annotations

import types
from dataclasses import replace
from typing import Any

import mlx.core as mx

from ...caches.step import Handle, LayerStats
from ...spec.kv import KVSpec
from ...spec.recommended import AUTO, recommend
from ..host import HookError
from ..mlx_lm.hooks import Installation, settle
from ..mlx_lm.hooks import _attend as attend
from ..mlx_lm.policy import shaped
from . import private, seams
from .caches import CLASSES, VLMCache, VLMLatentCache
from .policy import decide, members

PACKAGE = "mlx_vlm.models."


def owns(model: Any) -> bool:
    """Whether `model` is one of mlx-vlm's, or the language model of one."""
    return type(model).__module__.startswith(PACKAGE)


def language_model(model: Any) -> Any:
    """The part of `model` that has caches."""
    return getattr(model, "language_model", model)


def compress(model: Any, spec: KVSpec | str = AUTO, self_test: bool = True):
    private.check()
    language = language_model(model)
    spec = recommend(language).spec if spec == AUTO else KVSpec.parse(spec)
    if installed(language):
        uninstall(language)
    original = language.__dict__.get("make_cache")
    own = (
        language.make_cache
        if hasattr(language, "make_cache")
        else lambda: [private.caches.KVCache() for _ in language.layers]
    )
    traits = seams.traits(language)
    plans = decide(own(), spec, traits)
    stats = {(p.index, p.part): LayerStats() for p in plans if p.compressed}
    record = Installation(spec, plans, stats, original, own, traits.lends)
    settle(language)
    install_shim()
    seams.enter(language)
    language.make_cache = lambda: make_caches(record)
    language._opentq = record
    if self_test:
        try:
            _self_test(language, record)
        except BaseException:
            uninstall(language)
            raise
    return record.plans


def uninstall(model: Any = None) -> None:
    if model is None:
        seams.leave()
        remove_shim()
        return
    language = language_model(model)
    record = installed(language)
    if record is None:
        return
    del language._opentq
    del language.make_cache
    if record.original is not None:
        language.make_cache = record.original


def installed(model: Any):
    return getattr(language_model(model), "_opentq", None)


def make_caches(record: Installation) -> list[Any]:
    caches = record.own_caches()
    for plan in record.plans:
        if plan.spec is None:
            continue
        kind = VLMLatentCache if plan.latent else VLMCache
        ours = kind(plan.spec, record.stats[plan.index, plan.part], plan.window)
        ours.lends = record.lends
        slot = caches[plan.index]
        if isinstance(slot, private.caches.CacheList):
            slot.caches = tuple(ours if n == plan.part else c for n, c in enumerate(members(slot)))
        else:
            caches[plan.index] = ours
    return caches


def _self_test(model: Any, record: Installation) -> None:
    caches = make_caches(record)
    out = model(mx.array([[0]]), cache=caches)
    mx.eval(getattr(out, "logits", out), [c.state for c in caches if not c.empty()])
    record.plans[:] = [
        replace(p, spec=None, reason="the layer has no attention", window=0)
        if p.compressed and members(caches[p.index])[p.part].empty()
        else p
        for p in record.plans
    ]
    record.plans[:] = [_with_shape(p, record.stats.get((p.index, p.part)), caches) for p in record.plans]
    missed = [p.index for p in record.plans if p.compressed and not record.stats[p.index, p.part].calls]
    if missed:
        raise HookError(
            f"self-test: layers {missed} of {type(model).__module__} never reached the compressed attention; this "
            "architecture computes attention in its own way and can't be compressed"
        )


def _with_shape(plan, stats, caches):
    if stats is not None and stats.shape is not None:
        heads, key_dim, value_dim = stats.shape
        return replace(plan, kv_heads=heads, key_dim=key_dim, value_dim=value_dim)
    return shaped(plan, members(caches[plan.index])[plan.part])


def _shim(queries, keys, values, cache, scale, mask, sinks=None):
    # Runs with mlx_vlm.models.base's globals: it may use only names that install_shim put there.
    if type(keys) is _opentq_handle:  # type: ignore[name-defined]  # noqa: F821
        return _opentq_attend(queries, keys, values, scale, mask, sinks)  # type: ignore[name-defined]  # noqa: F821
    return _opentq_original(queries, keys, values, cache, scale, mask, sinks)  # type: ignore[name-defined]  # noqa: F821


def install_shim() -> None:
    base = private.base
    function = base.scaled_dot_product_attention
    if shim_installed():
        return
    original = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
    base.__dict__.update(_opentq_handle=Handle, _opentq_attend=attend, _opentq_original=original)
    function.__code__ = _shim.__code__
    for cls in CLASSES:
        setattr(private.caches, cls.__name__, cls)


def remove_shim() -> None:
    base = private.base
    if shim_installed():
        base.scaled_dot_product_attention.__code__ = base.__dict__.pop("_opentq_original").__code__
        for name in ("_opentq_handle", "_opentq_attend"):
            base.__dict__.pop(name)
        for cls in CLASSES:
            delattr(private.caches, cls.__name__)


def shim_installed() -> bool:
    return private.base.scaled_dot_product_attention.__code__ is _shim.__code__
