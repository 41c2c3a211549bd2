"""Codecs: how one head vector becomes bits. One file each; `REGISTRY` maps the names that specs use to them.

To add a codec: write the dataclass (`contracts/codec.py` is the contract), give it a line here and a row in
`tests/matrix.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..contracts.codec import Codec, Packed
from . import affine, turbo
from .affine import GROUPS, Affine
from .outliers import Outliers
from .polar import Polar
from .qjl import QJL
from .raw import Raw
from .turbo import Fractional, Prod, Turbo

__all__ = ["GROUPS", "REGISTRY", "Affine", "Codec", "Method", "Options", "Packed", "Raw", "Turbo", "make"]


@dataclass(frozen=True)
class Options:
    """What a spec may say about its codecs; a codec reads what it takes.

    Attributes:
        group: channels per scale (integers).
        rotation: "hadamard", "haar" or "none".
        fit: which scale a codebook codec stores (`turbo.FITS`).
        sketch: "orth" or "gauss" rows of the random projection; "" is the method's own.
        out: channels per vector kept in fp16.
    """

    group: int = 32
    rotation: str = "hadamard"
    fit: str = "length"
    sketch: str = ""
    out: int = 0


@dataclass(frozen=True)
class Method:
    """One line of the registry: how to make the codec, the options it takes, and, for a codec that serves keys only,
    the one that values get when the name stands alone.
    """

    make: Callable[[Options], Codec]
    takes: tuple[str, ...] = ()
    partner: str = ""


def _affine(bits: int) -> Method:
    return Method(lambda o: Affine(bits, o.group, o.rotation != "none"), ("group", "rot", "out"))


def _turbo(bits: int) -> Method:
    return Method(lambda o: Turbo(bits, o.rotation, o.fit), ("rot", "haar", "fit", "out"))


def _fractional(bits: float) -> Method:
    return Method(lambda o: Fractional(bits, o.rotation, o.fit), ("rot", "haar", "fit", "out"))


def _prod(bits: int) -> Method:
    return Method(lambda o: Prod(bits, o.sketch == "orth", o.rotation), ("rot", "haar", "sketch", "out"), f"tq{bits}")


def _qjl(ratio: int) -> Method:
    return Method(lambda o: QJL(ratio, o.sketch != "gauss"), ("sketch", "out"), "int4")


REGISTRY: dict[str, Method] = {
    "f16": Method(lambda o: Raw()),
    **{f"int{b}": _affine(b) for b in affine.BITS},
    **{f"tq{b}": _turbo(b) for b in turbo.BITS},
    **{f"tq{b}": _fractional(b) for b in (1.5, 2.5, 3.5)},
    **{f"tq{b}p": _prod(b) for b in (2, 3, 4)},
    "polar4": Method(lambda o: Polar(o.rotation), ("rot", "haar", "out")),
    "qjl": _qjl(2),  # a spec gives the first layers twice the bits: spec.KVSpec.for_layer
    **{f"qjl{r}": _qjl(r) for r in (1, 2, 4, 6, 8)},
}


def make(name: str, group: int = 32, rotate: bool = True, options: Options | None = None) -> Codec:
    """The codec called `name`; `options` instead of `group` and `rotate` where more is to be said.

    Raises KeyError for unknown names (`spec/kv.py` says it in words).
    """
    options = options or Options(group, "hadamard" if rotate else "none")
    codec = REGISTRY[name].make(options)
    return Outliers(codec, options.out) if options.out and "out" in REGISTRY[name].takes else codec
