"""Specs from the whole grammar, the derived ones (of a layer, a recipe, a latent) too."""

from __future__ import annotations

from random import Random

from opentq.codecs import GROUPS, REGISTRY
from opentq.spec.kv import KVSpec
from opentq.spec.latent import latent_spec
from opentq.spec.recipe import Recipe

KEYS = list(REGISTRY)
VALUES = [name for name in KEYS if not REGISTRY[name].partner]
OPTIONS = {
    "group": [f"g{g}" for g in GROUPS],
    "rot": ["rot", "norot"],
    "haar": ["haar"],
    "fit": ["nc", "ub"],
    "sketch": ["sketch=orth", "sketch=gauss"],
    "out": ["out=1", "out=2", "out=5"],
}
LAYERS = 6


def draw(rng: Random, window: bool = False) -> str:
    """A spec in words, as a person may write it."""
    keys, values = _names(rng)
    heads = [keys, values]
    ends = []
    for end in ("first", "last"):
        if rng.random() < 0.1:
            name = rng.choice(VALUES)
            ends.append(f"{end}{rng.randint(1, 3)}={name}")
            heads.append(name)
    takes = {kind for name in heads for kind in REGISTRY[name].takes}
    options = [rng.choice(OPTIONS[kind]) for kind in sorted(takes) if rng.random() < 0.25]
    if "norot" in options and "haar" in options:
        options.remove("norot")
    sink = rng.choice([0, 0, 0, 1, 4, 5, 70])
    recent = rng.choice([0, 0, 0, 1, 33, 64, 70])
    options += [f"sink={sink}"] * bool(sink) + [f"recent={recent}"] * bool(recent)
    options += ["center"] * (rng.random() < 0.2)
    if rng.random() < 0.15 and not window:
        least = -(-(sink + recent + 64) // 64) * 64
        options.append(f"pages={least + rng.choice([0, 0, 64])}")
    if rng.random() < 0.1:
        options.append(rng.choice(["skip=first1", "skip=last2", "skip=first1,last1"]))
    if window:
        options.append("window=compress")
    options += ends
    rng.shuffle(options)
    head = keys if keys == values and not REGISTRY[keys].partner else f"{keys}/{values}"
    return ":".join([head, *options])


def _names(rng: Random) -> tuple[str, str]:
    keys = rng.choice(KEYS)
    return keys, keys if keys in VALUES and rng.random() < 0.3 else rng.choice(VALUES)


def derive(text: str, rng: Random, latent: bool) -> KVSpec:
    """The spec of some layer. What prints must be read again, whatever it was derived from."""
    whole = KVSpec.parse(text)
    assert KVSpec.parse(str(whole)) == whole, f"{text} prints as {whole}"
    specs = whole if rng.random() < 0.7 else Recipe.of([str(whole.for_layer(i, LAYERS)) for i in range(LAYERS)])
    spec = specs.for_layer(rng.randrange(LAYERS), LAYERS)
    spec = latent_spec(spec) if latent else spec
    assert KVSpec.parse(str(spec)) == spec, f"{text}: its layer's spec prints as {spec}"
    return spec
