"""What a host is to this project: a program whose models are compressed (mlx-lm, mlx-vlm).

Hosts differ in names, not in kind: their models make caches by a factory and attend through one function. `HOST` of
`mlx_lm/host.py` and of `mlx_vlm/host.py` say the names; `hooks.py`, `policy.py`, `seams.py` and `shim.py` do the rest.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from ..caches.alive import Seam
from ..caches.single import OpenTQCache
from .plan import Traits


class HookError(RuntimeError):
    """A host is not as expected, or the compressed path was not entered; the message says in what."""


@dataclass(frozen=True)
class Host:
    """One host.

    Attributes:
        name: as people write it.
        base: the module of its attention function, `scaled_dot_product_attention`.
        caches: the module of its cache classes, which has `make_prompt_cache`, KVCache, RotatingKVCache,
            ChunkedKVCache, ArraysCache and CacheList.
        check: raises HookError, with versions, when the host is not as expected.
        decoder: the part of a model that has layers and caches.
        traits: what is special about a decoder's attention.
        enter, leave: give the attention classes that need it a seam of their own, and take all of them back.
        single, latent: our caches of one sequence under this host's protocol.
        choosing: the same of layers that hold an indexer's keys, too (`Traits.beside`), where the host has such models.
        classes: all of them, which the host looks up by name in `caches`.
        seam: whether its functions have ours in them.
    """

    name: str
    base: ModuleType
    caches: ModuleType
    check: Callable[[], None]
    decoder: Callable[[Any], Any]
    traits: Callable[[Any], Traits]
    enter: Callable[[Any], None]
    leave: Callable[[], None]
    single: type[OpenTQCache]
    latent: type[OpenTQCache]
    classes: tuple[type, ...]
    choosing: type[OpenTQCache] | None = None
    seam: Seam = field(default_factory=Seam)


def host_of(model: Any) -> Host:
    """The host that made `model`; only that one is imported."""
    own = type(model).__module__.startswith(("mlx_vlm.", f"{__package__}.mlx_vlm."))
    name = "mlx_vlm" if own else "mlx_lm"
    return importlib.import_module(f".{name}.host", __package__).HOST
