"""The seam with mlx-lm; with `seams.py`, for single models, the only file that knows its internals.

Two hooks. First, `model.make_cache` on the instance, so that every path that asks a model for caches gets ours. Second,
the code object of `mlx_lm.models.base.scaled_dot_product_attention` is swapped for a shim that recognises our handles:
model files import that function by name, so rebinding the name would reach none of them, but all of them share
the function object. The shim is global, immediate, independent of import order and reversible; it refuses to
install on a signature that it does not know. `compress` then runs one token through the model and fails if a
planned layer was not entered.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
from mlx_lm.models import base
from mlx_lm.models import cache as mlx_cache

from ...caches import alive, disk
from ...caches.batch import BatchOpenTQCache
from ...caches.composite import members
from ...caches.latent import BatchOpenTQLatentCache, OpenTQLatentCache
from ...caches.single import OpenTQCache
from ...caches.step import Handle, LayerStats
from ...contracts.rotary import NO_ROTARY
from ...errors import UserError
from ...spec.kv import KVSpec
from ...spec.recipe import Recipe
from ...spec.recommended import AUTO, recommend
from ..plan import LayerPlan
from . import floats, private, rotary, seams
from .identity import fingerprint
from .policy import decide, shaped
from .private import HookError

disk.CLASSES.update({name: c for name, c in vars(mlx_cache).items() if isinstance(c, type)})
CLASSES = (OpenTQCache, BatchOpenTQCache, OpenTQLatentCache, BatchOpenTQLatentCache)


@dataclass
class Installation:
    """What `compress` did to one model: kept on the model, read by the report."""

    spec: KVSpec
    plans: list[LayerPlan]
    stats: dict[tuple[int, int], LayerStats]
    original: Callable | None  # the model's own make_cache attribute, if the instance had one
    own_caches: Callable[[], list[Any]] = field(repr=False)
    lends: bool = False  # layers attend to keys and values that another layer's cache has taken


def compress(model: Any, spec: KVSpec | str = AUTO, self_test: bool = True) -> list[LayerPlan]:
    """Make `model` use compressed KV caches from now on, in place; returns one plan per layer.

    Everything in mlx-lm that asks the model for caches (generate, stream_generate, speculative decoding, batches)
    then uses them. Calling it again replaces the spec. "auto" is what is recommended for the model's family
    (`spec/recommended.toml`). `self_test` runs one token through the model. On a CPU the model's half-precision
    weights become float32, quantised ones where they fit, because such products are fast; `uninstall` leaves them so.

    Raises:
        SpecError, CalibrationError: the spec can't be read, or was calibrated on another model.
        NothingCompressed: no layer can be compressed.
        HookError: mlx-lm's internals are not as expected, or a layer did not enter the compressed path.
    """
    spec = recommend(model).spec if spec == AUTO else KVSpec.parse(spec)
    uninstall(model)
    record = prepare(model, spec, self_test)
    model.make_cache = lambda: make_caches(record)
    model._opentq = record
    return record.plans


def prepare(model: Any, spec: KVSpec, self_test: bool = True) -> Installation:
    """All that `compress` does but the last step: caches made of the record (`make_caches`) are compressed, those that
    the model itself makes are its own. Raises what `compress` raises.
    """
    if isinstance(spec, Recipe) and spec.calibration is not None:
        spec.calibration.check(fingerprint(model))
    alive.computing()
    traits, own = seams.traits(model), own_caches(model)
    plans = decide(own(), spec, traits)
    stats = {(p.index, p.part): LayerStats() for p in plans if p.compressed}
    record = Installation(spec, plans, stats, model.__dict__.get("make_cache"), own, traits.lends)
    floats.settle(model)
    install_shim()
    seams.enter(model)
    if self_test:
        _self_test(model, record)
    return record


def plan(model: Any, spec: KVSpec) -> list[LayerPlan]:
    """What `compress` would do to each layer, its shapes filled in; nothing is changed and nothing is computed.

    Raises NothingCompressed.
    """
    caches = own_caches(model)()
    plans = decide(caches, spec, seams.traits(model))
    model(mx.array([[0]]), cache=caches)
    held = [members(caches[p.index])[p.part] for p in plans]
    return [shaped(_used(p, cache), cache) for p, cache in zip(plans, held)]


def own_caches(model: Any) -> Callable[[], list[Any]]:
    """What makes the model's own caches, whether it is compressed or not."""
    record = installed(model)
    if record:
        return record.own_caches
    return model.make_cache if hasattr(model, "make_cache") else lambda: [mlx_cache.KVCache() for _ in model.layers]


def uninstall(model: Any = None) -> None:
    """Give `model` its own caches back; without a model, take the attention shim out of mlx-lm."""
    if model is None:
        seams.leave()
        remove_shim()
        return
    record = installed(model)
    if record is None:
        return
    del model._opentq
    del model.make_cache
    if record.original is not None:
        model.make_cache = record.original


def installed(model: Any) -> Installation | None:
    """The record of what `compress` did to `model`, or None."""
    return getattr(model, "_opentq", None)


def make_caches(record: Installation) -> list[Any]:
    """Fresh caches for one generation: the model's own, with the planned ones replaced."""
    # The model's own factory runs at call time: sharding may have changed what it makes.
    caches = record.own_caches()
    for plan in record.plans:
        if plan.spec is None:
            continue
        kind = OpenTQLatentCache if plan.latent else OpenTQCache
        ours = kind(plan.spec, record.stats[plan.index, plan.part], plan.window)
        ours.lends, ours.rotary, ours.seam = record.lends, plan.rotary, _seam
        slot = caches[plan.index]
        if isinstance(slot, mlx_cache.CacheList):
            slot.caches = tuple(ours if n == plan.part else c for n, c in enumerate(members(slot)))
        else:
            caches[plan.index] = ours
    return caches


def _self_test(model: Any, record: Installation) -> None:
    """One token through the model: every planned layer must be entered; fills in the shapes of the plans."""
    caches = make_caches(record)
    planned = {(p.index, p.part): members(caches[p.index])[p.part] for p in record.plans if p.compressed}
    with rotary.watch(list(planned.values())) as seen:
        mx.eval(model(mx.array([[0]]), cache=caches), [c.state for c in caches if not c.empty()])
    turned = {place: seen.get(id(cache), NO_ROTARY) for place, cache in planned.items()}
    record.plans[:] = [replace(p, rotary=turned.get((p.index, p.part), NO_ROTARY)) for p in record.plans]
    record.plans[:] = [_used(p, members(caches[p.index])[p.part]) for p in record.plans]
    record.plans[:] = [_with_shape(p, record.stats.get((p.index, p.part)), caches) for p in record.plans]
    missed = [p.index for p in record.plans if p.compressed and not record.stats[p.index, p.part].calls]
    if missed:
        raise HookError(
            f"self-test: layers {missed} of {type(model).__module__} never reached the compressed attention; this "
            "architecture computes attention in its own way and can't be compressed"
        )


def _used(plan: LayerPlan, cache: Any) -> LayerPlan:
    """The plan, or a native one where the model made a cache that no attention uses."""
    if plan.compressed and cache.empty():
        return replace(plan, spec=None, reason="the layer has no attention", window=0)
    return plan


def _with_shape(plan: LayerPlan, stats: LayerStats | None, caches: list[Any]) -> LayerPlan:
    if stats is not None and stats.shape is not None:
        heads, key_dim, value_dim = stats.shape
        return replace(plan, kv_heads=heads, key_dim=key_dim, value_dim=value_dim)
    return shaped(plan, members(caches[plan.index])[plan.part])


# ---- the attention shim


def _shim(queries, keys, values, cache, scale, mask, sinks=None):
    # Runs with mlx_lm.models.base's globals: it may use only names that install_shim put there.
    if type(keys) is _opentq_handle:  # type: ignore[name-defined]  # noqa: F821
        return _opentq_attend(queries, keys, values, scale, mask, sinks)  # type: ignore[name-defined]  # noqa: F821
    return _opentq_original(queries, keys, values, cache, scale, mask, sinks)  # type: ignore[name-defined]  # noqa: F821


def _attend(queries, keys, values, scale, mask, sinks):
    if type(values) is not Handle or values.step is not keys.step:
        raise HookError(
            f"attention got compressed keys but {type(values).__name__} values: both must come from the same update"
        )
    return keys.step.attend(queries, scale=scale, mask=mask, sinks=sinks)


def _make_shim(model, max_kv_size=None):
    if max_kv_size is not None:
        _opentq_bounded(model, max_kv_size)  # type: ignore[name-defined]  # noqa: F821
    return _opentq_make(model, max_kv_size)  # type: ignore[name-defined]  # noqa: F821


def _bounded(model, size):
    """mlx-lm bounds the caches of models that leave their making to it; ours keep every token."""
    record = installed(model)
    if record is not None and record.original is None and not hasattr(type(model), "make_cache"):
        raise UserError(
            f"max_kv_size={size} can't be used with a compressed cache, which keeps every token: leave it out (--kv "
            f"{record.spec} takes fewer bytes per token), or call opentq.uninstall(model) first"
        )


_seam = alive.Seam()


def install_shim() -> None:
    """Swap the code of mlx-lm's attention function and of the one that makes caches, once.

    Raises HookError on an unexpected signature.
    """
    if shim_installed():
        return
    attention, make = private.scaled_dot_product_attention, private.make_prompt_cache
    if attention.__closure__ is not None or make.__closure__ is not None:
        raise HookError("mlx-lm's attention function has a closure; is another tool installed in its place?")
    base.__dict__.update(_opentq_handle=Handle, _opentq_attend=_attend, _opentq_original=_twin(attention))
    mlx_cache.__dict__.update(_opentq_bounded=_bounded, _opentq_make=_twin(make))
    attention.__code__, make.__code__ = _shim.__code__, _make_shim.__code__
    # load_prompt_cache looks classes up by name in mlx-lm's own module.
    for cls in CLASSES:
        setattr(mlx_cache, cls.__name__, cls)
    _seam.live = True


def remove_shim() -> None:
    """Restore mlx-lm's functions; caches that were made with them refuse further tokens."""
    if shim_installed():
        base.scaled_dot_product_attention.__code__ = base.__dict__.pop("_opentq_original").__code__
        mlx_cache.make_prompt_cache.__code__ = mlx_cache.__dict__.pop("_opentq_make").__code__
        for module, name in ((base, "_opentq_handle"), (base, "_opentq_attend"), (mlx_cache, "_opentq_bounded")):
            module.__dict__.pop(name)
        for cls in CLASSES:
            delattr(mlx_cache, cls.__name__)
        _seam.live = False


def shim_installed() -> bool:
    return base.scaled_dot_product_attention.__code__ is _shim.__code__


def _twin(function: types.FunctionType) -> types.FunctionType:
    """The function as it is now, to be called when its code has been swapped."""
    return types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
