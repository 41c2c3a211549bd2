"""The spec of a cache of latents (MLA), derived from the one that the user gave."""

from __future__ import annotations

from dataclasses import replace

from ..codecs import REGISTRY
from .kv import KVSpec


def latent_spec(spec: KVSpec) -> KVSpec:
    """The spec of a cache of latents: key and value are one vector, so one codec serves both, the one with more bits,
    or that of the values where the keys' is made for keys only.
    """
    key, value = spec.codecs()
    keys_only = bool(REGISTRY[spec.keys].partner)
    name = spec.values if keys_only or value.bits_per_value(512) > key.bits_per_value(512) else spec.keys
    return replace(spec, keys=name, values=name).tidy()
