"""The shims in a host: its attention function recognises compressed keys and values, and what makes caches for its
generators refuses a bound that ours would not keep.

Model files import these functions by name, so rebinding a name would reach none of them, but all of them share the
function object: so its code object is swapped. That is global, immediate, independent of import order and reversible.
"""

from __future__ import annotations

import types
from typing import Any

import mlx.core as mx

from ..caches.single import OpenTQCache
from ..caches.step import Handle
from ..errors import UserError
from .host import HookError, Host


def _shim(queries, keys, values, cache, scale, mask, sinks=None):
    # Runs with the globals of the host's module: it may use only names that `install` put there.
    if type(keys) is _opentq_handle:  # type: ignore[name-defined]  # noqa: F821
        return _opentq_attend(queries, keys, values, scale, mask, sinks)  # type: ignore[name-defined]  # noqa: F821
    if isinstance(cache, _opentq_cache):  # type: ignore[name-defined]  # noqa: F821
        cache = None  # the keys of something else, such as an image that the layer looks at
    return _opentq_original(queries, keys, values, cache, scale, mask, sinks)  # type: ignore[name-defined]  # noqa: F821


def attend(queries: mx.array, keys: Any, values: Any, scale: float, mask: Any, sinks: mx.array | None) -> mx.array:
    """Attention to the handles of one update."""
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
    """Hosts bound the caches of models that leave their making to them; ours keep every token."""
    record = getattr(model, "_opentq", None)
    if record is not None and record.original is None and not hasattr(type(model), "make_cache"):
        raise UserError(
            f"max_kv_size={size} can't be used with a compressed cache, which keeps every token: leave it out (--kv "
            f"{record.spec} takes fewer bytes per token), or call opentq.uninstall(model) first"
        )


def install(host: Host) -> None:
    """Swap the code of the host's two functions, once. Raises HookError when the host is not as expected."""
    if installed(host):
        return
    host.check()
    attention, make = host.base.scaled_dot_product_attention, host.caches.make_prompt_cache
    if attention.__closure__ is not None or make.__closure__ is not None:
        raise HookError(f"{host.name}'s attention function has a closure; is another tool installed in its place?")
    host.base.__dict__.update(_opentq_handle=Handle, _opentq_attend=attend, _opentq_original=_twin(attention))
    host.base.__dict__.update(_opentq_cache=OpenTQCache)
    host.caches.__dict__.update(_opentq_bounded=_bounded, _opentq_make=_twin(make))
    attention.__code__, make.__code__ = _shim.__code__, _make_shim.__code__
    # Hosts look cache classes up by name in their own module when they load a cache.
    for cls in host.classes:
        setattr(host.caches, cls.__name__, cls)
    host.seam.live = True


def remove(host: Host) -> None:
    """Restore the host's functions; caches that were made with them refuse further tokens."""
    if not installed(host):
        return
    host.base.scaled_dot_product_attention.__code__ = host.base.__dict__.pop("_opentq_original").__code__
    host.caches.make_prompt_cache.__code__ = host.caches.__dict__.pop("_opentq_make").__code__
    for name in ("_opentq_handle", "_opentq_attend", "_opentq_cache"):
        host.base.__dict__.pop(name)
    host.caches.__dict__.pop("_opentq_bounded")
    for cls in host.classes:
        delattr(host.caches, cls.__name__)
    host.seam.live = False


def installed(host: Host) -> bool:
    return host.base.scaled_dot_product_attention.__code__ is _shim.__code__


def _twin(function: types.FunctionType) -> types.FunctionType:
    """The function as it is now, to be called when its code has been swapped."""
    return types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
