"""The seams of one host: attention classes that compute attention in their own words get a `__call__` that serves
compressed caches the same way and passes everything else to the original. Each host has a table of them (`Seams`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..caches.composite import members
from ..caches.single import OpenTQCache
from .plan import Traits
from .seams import latent


@dataclass(frozen=True)
class Seams:
    """Attention classes that need something, by their names below `package`: "llama.Attention".

    Attributes:
        own: those that are served at their own seam, and by what.
        latent: those that cache a latent and a rotary part (MLA) in place of keys and values.
        sparse: those with latents and an indexer (`hosts/sparse.py`), and which of a layer's caches are not latents:
            number of caches, place -> why this one stays native, or "".
        native: those whose caches stay as they are, and why. Layers share masks, so one keeps all KVCaches native.
        reads: the attribute by which a class of `native` says whether a layer reads its cache in that way.
        wide_masks: those whose sliding windows stay native even under window=compress, and why.
        lenders: those that ask a cache for its keys and values again, in the step that filled it.
        cross: those that look at an image: its keys and values are made anew, and their caches stay empty.
        kinds: those with a cache class of their own that holds keys and values as KVCache does, and its name.
    """

    package: str
    own: dict[str, Callable[..., Any]]
    latent: tuple[str, ...]
    sparse: dict[str, Callable[[int, int], str]]
    native: dict[str, str]
    reads: str
    wide_masks: dict[str, str] = field(default_factory=dict)
    lenders: tuple[str, ...] = ()
    cross: tuple[str, ...] = ()
    kinds: dict[str, str] = field(default_factory=dict)
    originals: dict[type, Callable] = field(default_factory=dict)  # the `__call__`s that were replaced

    def modules(self, model: Any) -> Iterator[tuple[str, Any]]:
        """The modules of `model` whose class lies in the package, with the class's name."""
        for module in model.modules():
            cls = type(module)
            if cls.__module__.startswith(self.package):
                yield f"{cls.__module__.removeprefix(self.package)}.{cls.__name__}", module

    def traits(self, model: Any) -> Traits:
        """What is special about this model's attention."""
        found = list(self.modules(model))
        classes = {name for name, _ in found}
        arrays = [self.native[name] for name, m in found if name in self.native and getattr(m, self.reads, True)]
        return Traits(
            arrays=next(iter(arrays), ""),
            windows=next((reason for name, reason in self.wide_masks.items() if name in classes), ""),
            latent=not classes.isdisjoint((*self.latent, *self.sparse)),
            lends=not classes.isdisjoint(self.lenders),
            indexed=next((reason for name, reason in self.sparse.items() if name in classes), None),
            unused=Traits.unused if classes.isdisjoint(self.cross) else CROSS,
            kind=next((kind for name, kind in self.kinds.items() if name in classes), ""),
        )

    def served(self) -> dict[str, Callable[..., Any]]:
        """All that are served at their own seam, and by what."""
        return self.own | dict.fromkeys(self.latent, latent)

    def enter(self, model: Any) -> None:
        """Give the attention classes of this model that need it a `__call__` that knows compressed caches."""
        served = self.served()
        for name, module in self.modules(model):
            if name in served and type(module) not in self.originals:
                self._put(type(module), served[name])

    def leave(self) -> None:
        """Take every replaced `__call__` back."""
        while self.originals:
            cls, original = self.originals.popitem()
            cls.__call__ = original  # type: ignore[method-assign]

    def _put(self, cls: type, serve: Callable[..., Any]) -> None:
        """Let `serve` handle calls of `cls` with a compressed cache, and the original where it says NotImplemented."""
        original = cls.__call__
        signature = inspect.signature(original)

        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments
            if _compressed(given["cache"] if "cache" in given else given["latent_cache"]):
                served = serve(*given.values())
                if served is not NotImplemented:
                    return served
            return original(*args, **kwargs)

        self.originals[cls] = original
        cls.__call__ = call  # type: ignore[method-assign]


CROSS = "cross attention: keys and values of the image, not of tokens"


def _compressed(cache: Any) -> bool:
    """Whether a layer's cache, or one of several, is ours."""
    caches = cache if isinstance(cache, (list, tuple)) else (cache,)
    return any(isinstance(c, OpenTQCache) for layer in caches for c in members(layer))
