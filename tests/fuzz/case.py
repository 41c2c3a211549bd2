"""A case: a kind of cache, and what is done to it, as plain data that can be printed, read again and cut down."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from random import Random

from opentq.spec.kv import KVSpec

from . import specs

HEAD_DIMS = (64, 64, 80, 96, 112, 128, 128, 160, 192, 256, 320, 512)
GQA = (1, 1, 2, 3, 4, 5, 7, 8, 12, 16, 24, 48)
LENGTHS = (1, 2, 5, 17, 62, 63, 64, 65, 66, 127, 128, 129, 150, 200)
WINDOWS = (1, 13, 64, 100, 150)
WAYS = ("state", "copy", "file", "disk")
MODES = ("", "native", "tiled")

START = ("append",) * 4 + ("merge", "store", "decode")
OPS = ("append",) * 6 + ("decode", "trim", "store") * 3 + ("fork", "merge", "extend", "filter", "take")

Op = list
"""A name and its arguments."""


@dataclass(frozen=True)
class Case:
    """What is lived.

    Attributes:
        spec: the layer's spec.
        dims: channels of keys and values; of the latent and its rotary part, where `latent`.
        kv_heads, gqa: KV heads, and query heads for each.
        dtype: of keys, values and queries.
        scale: of keys and values.
        window: tokens that a query sees, 0 for all.
        given: whether a recipe says which channels pages are sketched by.
        ops: what is done, in order.
    """

    seed: int
    spec: str
    dims: tuple[int, int]
    kv_heads: int
    gqa: int
    dtype: str
    scale: float
    window: int
    latent: bool
    given: bool
    ops: tuple[Op, ...]

    def text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> Case:
        fields = json.loads(text)
        return cls(**{**fields, "dims": tuple(fields["dims"]), "ops": tuple(fields["ops"])})


def draw(seed: int, serves: Callable[[KVSpec, tuple[int, int]], bool] | None = None) -> Case:
    """The case of a seed; one that the kernels serve where `serves` says what that is."""
    rng = Random(seed)
    while True:
        window = rng.choice(WINDOWS) if rng.random() < 0.15 else 0
        latent = rng.random() < 0.15 and not window and serves is None
        text = specs.draw(rng, bool(window))
        if latent:  # a latent is key and value at once, can't be centred, and has no pages
            text = ":".join(part for part in text.split(":") if part != "center" and not part.startswith("pages"))
        spec = specs.derive(text, rng, latent)
        if latent:
            dims = rng.choice((64, 128, 256, 512)), rng.choice((8, 16, 32, 64))
        else:
            key = rng.choice(HEAD_DIMS)
            dims = key, key if rng.random() < 0.75 else rng.choice(HEAD_DIMS)
        if _fits(spec, dims, latent) and (serves is None or serves(spec, dims)):
            break
    return Case(
        seed=seed,
        spec=str(spec),
        dims=dims,
        kv_heads=1 if latent else rng.choice((1, 1, 2, 3)),
        gqa=rng.choice(GQA),
        dtype=rng.choice(("float32", "float16", "bfloat16")),
        scale=rng.choice((1.0, 1.0, 1.0, 0.03, 3.0)),
        window=window,
        latent=latent,
        given=rng.random() < 0.4,
        ops=tuple(_op(rng, first=i == 0) for i in range(rng.randint(2, 7))),
    )


def _fits(spec: KVSpec, dims: tuple[int, int], latent: bool) -> bool:
    codecs = spec.codecs()
    try:
        for codec, dim in zip(codecs[: 1 if latent else 2], dims):
            codec.check(dim)
    except ValueError:
        return False
    return True


def _counts(rng: Random, least: int = 1) -> list[int]:
    return [rng.choice((0, *LENGTHS)) if rng.random() < 0.8 else 1 for _ in range(rng.randint(least, 3))]


def _attention(rng: Random) -> dict:
    """How often a step is attended and with what besides its tokens."""
    found: dict = {"times": rng.choice((0, 1, 1, 1, 2)), "seed": rng.randrange(1 << 16)}
    for what, chance in (("array", 0.1), ("sinks", 0.1), ("softcap", 0.1), ("lend", 0.1), ("rows", 0.1), ("drop", 0.1)):
        if rng.random() < chance:
            found[what] = 1
    return found


def _op(rng: Random, first: bool) -> Op:
    name = rng.choice(START if first else OPS)
    if name == "append":
        return [name, _counts(rng), rng.choice((0, 0, 40, 64)), _attention(rng)]
    if name == "decode":
        return [name, rng.choice((1, 2, 3)), rng.choice((1, 1, 1, 2, 8)), _attention(rng)]
    if name == "trim":
        return [name, rng.choice((1, 2, 3, 40, 63, 64, 65, 130, 1000))]
    if name == "store":
        return [name, rng.choice(WAYS), rng.choice(MODES)]
    if name == "fork":
        return [name, rng.choice(LENGTHS)]
    if name in ("merge", "extend"):
        return [name, _counts(rng)]
    return [name, [rng.randrange(4) for _ in range(rng.choice((0, 1, 1, 2, 2, 3)))]]
