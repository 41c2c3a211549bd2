"""The seam with a host: what its models' caches become, and how that is taken back.

Two hooks: `make_cache` on the model's instance, so that every path that asks a model for caches gets ours, and a shim
in the host's attention function (`shim.py`), with seams for the few models that don't call it (`seams.py`). `compress`
then runs one token through the model and fails if a planned layer was not entered. What is private to a host stays in
its folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from ..caches import alive
from ..caches.composite import composite, members
from ..caches.step import LayerStats
from ..contracts.rotary import NO_ROTARY
from ..spec.recipe import Recipe
from ..spec.recommended import recommend
from ..spec.text import AUTO, Spec, parse
from . import floats, rotary, shim
from .host import HookError, Host, host_of
from .identity import fingerprint
from .plan import LayerPlan, Traits
from .policy import decide, shaped


@dataclass
class Installation:
    """What `compress` did to one model: kept on the model, read by the report."""

    host: Host
    spec: Spec
    plans: list[LayerPlan]
    stats: dict[tuple[int, int], LayerStats]
    original: Callable | None  # the model's own make_cache attribute, if the instance had one
    own_caches: Callable[[], list[Any]] = field(repr=False)
    traits: Traits


def compress(model: Any, kv: Spec | str = AUTO, self_test: bool = True) -> list[LayerPlan]:
    """Make `model` use compressed KV caches from now on, in place; returns one plan per layer.

    Everything in the host that asks the model for caches (generate, stream_generate, speculative decoding, batches)
    then uses them; of a model of mlx-vlm, that is its language model. Calling it again replaces the spec. "auto" is
    what is recommended for the model's family (`spec/recommended.toml`). `self_test` runs one token through the model.
    On a CPU the model's half-precision weights become float32, quantised ones where they fit, because such products
    are fast; `uninstall` leaves them so.

    Raises:
        SpecError, CalibrationError: the spec can't be read, or was calibrated on another model.
        NothingCompressed: no layer can be compressed.
        HookError: the host is not as expected, or a layer did not enter the compressed path.
    """
    spec = recommend(host_of(model).decoder(model)).spec if kv == AUTO else parse(kv)
    uninstall(model)
    record = prepare(model, spec, self_test)
    decoder = record.host.decoder(model)
    decoder.make_cache = lambda: make_caches(record)
    decoder._opentq = record
    return record.plans


def prepare(model: Any, spec: Spec, self_test: bool = True) -> Installation:
    """All that `compress` does but the last step: caches made of the record (`make_caches`) are compressed, those that
    the model itself makes are its own. Raises what `compress` raises.
    """
    if isinstance(spec, Recipe) and spec.calibration is not None:
        spec.calibration.check(fingerprint(model))
    alive.computing()
    host, own = host_of(model), own_caches(model)
    decoder = host.decoder(model)
    traits = host.traits(decoder)
    plans = decide(_traced(decoder, own), spec, host.caches, traits)
    stats = {(p.index, p.part): LayerStats() for p in plans if p.compressed}
    record = Installation(host, spec, plans, stats, decoder.__dict__.get("make_cache"), own, traits)
    floats.to_float32(model)
    shim.install(host)
    host.enter(decoder)
    _entered[host.name] = host
    if self_test:
        _self_test(decoder, record)
    return record


def plan(model: Any, spec: Spec) -> list[LayerPlan]:
    """What `compress` would do to each layer, its shapes filled in; nothing is changed and nothing is computed.

    Raises NothingCompressed.
    """
    host = host_of(model)
    decoder = host.decoder(model)
    traits, caches = host.traits(decoder), _traced(decoder, own_caches(model))
    plans = decide(caches, spec, host.caches, traits)
    held = [members(caches[p.index])[p.part] for p in plans]
    return [shaped(_used(p, cache, traits.unused), cache) for p, cache in zip(plans, held)]


def _traced(decoder: Any, make: Callable[[], list[Any]]) -> list[Any]:
    """Caches through which a token was traced, uncomputed, so that they show their shapes."""
    caches = make()
    decoder(mx.array([[0]]), cache=caches)
    return caches


def own_caches(model: Any) -> Callable[[], list[Any]]:
    """What makes the model's own caches, whether it is compressed or not."""
    record = installed(model)
    if record:
        return record.own_caches
    host = host_of(model)
    decoder = host.decoder(model)
    if hasattr(decoder, "make_cache"):
        return decoder.make_cache
    return lambda: [host.caches.KVCache() for _ in decoder.layers]


def uninstall(model: Any = None) -> None:
    """Give `model` its own caches back; without a model, take the shims and seams out of every host."""
    if model is None:
        while _entered:
            _, host = _entered.popitem()
            host.leave()
            shim.remove(host)
        return
    record = installed(model)
    if record is None:
        return
    decoder = record.host.decoder(model)
    del decoder._opentq
    del decoder.make_cache
    if record.original is not None:
        decoder.make_cache = record.original


_entered: dict[str, Host] = {}


def installed(model: Any) -> Installation | None:
    """The record of what `compress` did to `model`, or None."""
    return getattr(host_of(model).decoder(model), "_opentq", None)


def make_caches(record: Installation) -> list[Any]:
    """Fresh caches for one generation: the model's own, with the planned ones replaced."""
    # The model's own factory runs at call time: sharding may have changed what it makes.
    caches = record.own_caches()
    for plan in record.plans:
        if plan.spec is None:
            continue
        host = record.host
        kind = host.latent if plan.latent else host.choosing if plan.beside else host.single
        assert kind is not None
        ours = kind(plan.spec, record.stats[plan.index, plan.part], plan.window)
        ours.lends, ours.rotary, ours.seam = record.traits.lends, plan.rotary, record.host.seam
        slot = caches[plan.index]
        if composite(slot):
            slot.caches = tuple(ours if n == plan.part else c for n, c in enumerate(members(slot)))
        else:
            caches[plan.index] = ours
    return caches


def _self_test(model: Any, record: Installation) -> None:
    """One token through the model: every planned layer must be entered; fills in the shapes of the plans."""
    caches = make_caches(record)
    planned = {(p.index, p.part): members(caches[p.index])[p.part] for p in record.plans if p.compressed}
    with rotary.watch(list(planned.values())) as seen:
        out = model(mx.array([[0]]), cache=caches)
        mx.eval(getattr(out, "logits", out), [c.state for c in caches if not c.empty()])
    turned = {place: seen.get(id(cache), NO_ROTARY) for place, cache in planned.items()}
    record.plans[:] = [replace(p, rotary=turned.get((p.index, p.part), NO_ROTARY)) for p in record.plans]
    record.plans[:] = [_used(p, members(caches[p.index])[p.part], record.traits.unused) for p in record.plans]
    record.plans[:] = [_with_shape(p, record.stats.get((p.index, p.part)), caches) for p in record.plans]
    missed = [p.index for p in record.plans if p.compressed and not record.stats[p.index, p.part].calls]
    if missed:
        raise HookError(
            f"self-test: layers {missed} of {type(model).__module__} never reached the compressed attention; this "
            "architecture computes attention in its own way and can't be compressed"
        )


def _used(plan: LayerPlan, cache: Any, unused: str) -> LayerPlan:
    """The plan, or a native one where the model made a cache that no attention uses."""
    if plan.compressed and cache.empty():
        return replace(plan, spec=None, reason=unused, window=0)
    return plan


def _with_shape(plan: LayerPlan, stats: LayerStats | None, caches: list[Any]) -> LayerPlan:
    if stats is not None and stats.shape is not None:
        heads, key_dim, value_dim = stats.shape
        return replace(plan, kv_heads=heads, key_dim=key_dim, value_dim=value_dim)
    return shaped(plan, members(caches[plan.index])[plan.part])
