"""The one dial: a KV spec such as `int4`, `k8v4:g64` or `int3:sink=4:recent=128:skip=first1,last1`.

A spec says which codec keys and values use and what stays in fp16. It parses, prints in canonical form and round-trips,
so the same token works on the command line, in a table cell, in a file and in a cache manifest.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field, replace
from typing import Any

from ..codecs import GROUPS, REGISTRY, Codec, Options, make
from ..contracts.layout import FLUSH
from ..errors import UserError

GRAMMAR = (
    "NAME[:option]*, NAME one of {names}, or kAvB for different keys and values (k8v4), or K/V with two names "
    "(int8/int4); options: " + ", ".join(f"g{g}" for g in GROUPS) + ", rot, norot, haar, nc, ub, center, out=N, "
    "sketch=orth|gauss, sink=N, recent=N, pages=N, skip=firstN,lastN, firstN=NAME, lastN=NAME, window=native|compress"
)


FILE = re.compile(r"(.+\.toml)((?::[^:/\\]+)*)")
"""A recipe file, and options for all its layers."""


class SpecError(UserError):
    """A KV spec that can't be understood; the message names the wrong part and what is allowed."""


@dataclass(frozen=True)
class KVSpec:
    """What the KV cache of a model is made of.

    Attributes:
        keys, values: codec names (`codecs.REGISTRY`).
        group: channels per scale.
        rotate: rotate vectors before they are rounded.
        sink: first tokens kept in fp16.
        recent: newest tokens kept in fp16 at least (blocks are flushed whole, so up to 63 more are).
        skip: (first, last) layers kept in fp16.
        window: what sliding-window layers do: `native` keeps mlx-lm's bounded cache, `compress` packs them too.
        first, last: (number of layers, codec names) of layers at either end that use another codec.
        haar: rotate by a random orthogonal matrix instead of Hadamard's (codebook codecs).
        fit: the scale of codebook codecs: "length", "norm" (`nc`) or "unbiased" (`ub`); see `codecs.turbo.Turbo`.
        sketch: "orth" or "gauss" random rows in `qjl` and `tqNp`; "" is the method's own.
        out: largest channels of every vector kept in fp16.
        center: take the mean of the first 64 packed keys off all keys. Softmax does not see it, the codec does.
        pages: 0, or how many packed tokens a decode step reads: the pages of 64 that matter most (`attention.pages`).
        channels: what a calibrated recipe chose to sketch keys by, per KV head; not a part of the spec's name.
    """

    keys: str = "int4"
    values: str = "int4"
    group: int = 32
    rotate: bool = True
    sink: int = 0
    recent: int = 0
    skip: tuple[int, int] = (0, 0)
    window: str = "native"
    first: tuple[int, str] = (0, "")
    last: tuple[int, str] = (0, "")
    haar: bool = False
    fit: str = "length"
    sketch: str = ""
    out: int = 0
    center: bool = False
    pages: int = 0
    channels: tuple[tuple[int, ...], ...] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def parse(cls, text: str | KVSpec) -> KVSpec:
        """Read one spec (`text.parse` also reads recipes). Raises SpecError naming the part that is wrong."""
        if isinstance(text, KVSpec):
            return text
        head, *options = text.strip().lower().split(":")
        keys, values = _names(head, text)
        return with_options(cls(keys, values), options, text)

    def __str__(self) -> str:
        parts = [_short(self.keys, self.values)]
        if self.group != 32:
            parts.append(f"g{self.group}")
        if not self.rotate:
            parts.append("norot")
        if self.haar:
            parts.append("haar")
        if self.fit != "length":
            parts.append(FITS[self.fit])
        if self.sketch:
            parts.append(f"sketch={self.sketch}")
        if self.center:
            parts.append("center")
        if self.out:
            parts.append(f"out={self.out}")
        if self.sink:
            parts.append(f"sink={self.sink}")
        if self.recent:
            parts.append(f"recent={self.recent}")
        if any(self.skip):
            ends = [f"{end}{n}" for end, n in zip(("first", "last"), self.skip) if n]
            parts.append("skip=" + ",".join(ends))
        parts += [f"{end}{n}={head}" for end, (n, head) in (("first", self.first), ("last", self.last)) if n]
        if self.pages:
            parts.append(f"pages={self.pages}")
        if self.window != "native":
            parts.append(f"window={self.window}")
        return ":".join(parts)

    def codecs(self) -> tuple[Codec, Codec]:
        """The key codec and the value codec."""
        rotation = "none" if not self.rotate else "haar" if self.haar else "hadamard"
        options = Options(self.group, rotation, self.fit, self.sketch, self.out)
        return make(self.keys, options=options), make(self.values, options=options)

    def for_layer(self, index: int, count: int) -> KVSpec:
        """The spec of layer `index` of `count` attention layers: f16 where `skip` protects it, `first` and `last`."""
        first, last = self.skip
        plain = replace(self, skip=(0, 0), first=(0, ""), last=(0, ""))
        if index < first or index >= count - last:
            return KVSpec("f16", "f16", window=self.window)
        end = self.first[1] if index < self.first[0] else self.last[1] if index >= count - self.last[0] else ""
        if end:
            keys, values = _names(end, end)
            plain = replace(plain, keys=keys, values=values)
        if plain.keys == "qjl":
            # As in the authors' code: 512 sketch bits for 128 channels in the first 15 of 32 layers, then 256.
            plain = replace(plain, keys="qjl4" if index * 32 < 15 * count else "qjl2")
        return plain.tidy()

    def tidy(self) -> KVSpec:
        """The same spec without the options that none of its codecs reads."""
        default, taken = KVSpec(), _taken(self)[1]
        unread: dict[str, Any] = {f: getattr(default, f) for kind, f in OPTION_FIELDS.items() if kind not in taken}
        return replace(self, **unread)

    def bits_per_value(self, head_dim: int, value_dim: int | None = None) -> float:
        """Bits per stored value of a packed token, metadata included; keys and values averaged by their sizes."""
        value_dim = value_dim or head_dim
        key, value = self.codecs()
        total = key.bits_per_value(head_dim) * head_dim + value.bits_per_value(value_dim) * value_dim
        return total / (head_dim + value_dim)

    @property
    def compresses(self) -> bool:
        return (self.keys, self.values) != ("f16", "f16")


def with_options(spec: KVSpec, options: list[str], text: str) -> KVSpec:
    """`spec` with the options of the spec `text`, each given once. Raises SpecError."""
    seen: set[str] = set()
    for option in options:
        spec, kind = _apply(spec, option, text)
        if kind in seen:
            raise SpecError(f"KV spec {text!r}: {kind} is given twice")
        seen.add(kind)
    _check_options(spec, seen, text)
    return spec


def _names(head: str, text: str) -> tuple[str, str]:
    """`int4` -> (int4, int4); `k8v4` -> (int8, int4); `k8tq4` -> (int8, tq4); `int8/tq4` -> (int8, tq4).

    The name of a key sketch alone gets values of its partner: `tq3p` -> (tq3p, tq3), `qjl` -> (qjl, int4).
    """
    mixed = re.fullmatch(r"k(\d+)v(\d+)", head)
    if mixed:
        names = (f"int{mixed[1]}", f"int{mixed[2]}")
    elif "/" in head:
        left, _, right = head.partition("/")
        names = (left, right)
    else:
        mixed = re.fullmatch(r"k(\d+)([a-z].*)", head)
        names = (f"int{mixed[1]}", mixed[2]) if mixed else (head, head)
        if head in REGISTRY and REGISTRY[head].partner:
            names = (head, REGISTRY[head].partner)
    for name in names:
        if name not in REGISTRY:
            close = difflib.get_close_matches(name, REGISTRY, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise SpecError(f"KV spec {text!r}: unknown codec {name!r}{hint} Grammar: {grammar()}")
    partner = REGISTRY[names[1]].partner
    if partner:
        raise SpecError(
            f"KV spec {text!r}: {names[1]!r} estimates inner products and can't hold values; use {names[0]}/{partner}"
        )
    return names


FITS = {"norm": "nc", "unbiased": "ub"}


OPTION_FIELDS = {"group": "group", "rot": "rotate", "haar": "haar", "fit": "fit", "sketch": "sketch", "out": "out"}


def _taken(spec: KVSpec) -> tuple[set[str], set[str]]:
    """The names of all codecs of a spec, and the options that at least one of them reads."""
    heads = [_names(head, head) for _, head in (spec.first, spec.last) if head]
    names = {name for pair in ((spec.keys, spec.values), *heads) for name in pair}
    return names, {kind for name in names for kind in REGISTRY[name].takes}


def _check_options(spec: KVSpec, seen: set[str], text: str) -> None:
    """Raise SpecError for an option that none of the codecs named would read."""
    names, taken = _taken(spec)
    for kind in sorted(seen & OPTION_FIELDS.keys() - taken):
        take = "takes" if len(names) == 1 else "take"
        raise SpecError(f"KV spec {text!r}: {' and '.join(sorted(names))} {take} no option {kind!r}; leave it out")
    if spec.haar and not spec.rotate:
        raise SpecError(f"KV spec {text!r}: norot and haar exclude each other")
    least = -(-(spec.sink + spec.recent + FLUSH) // FLUSH) * FLUSH
    if spec.pages and spec.pages < least:
        raise SpecError(
            f"KV spec {text!r}: pages={spec.pages} is less than what is read anyway (sink, recent, the tail); "
            f"use at least pages={least}"
        )


def _short(keys: str, values: str) -> str:
    if keys == values:
        return keys
    if keys.startswith("int") and values.startswith("int"):
        return f"k{keys[3:]}v{values[3:]}"
    return f"{keys}/{values}"


def _apply(spec: KVSpec, option: str, text: str) -> tuple[KVSpec, str]:
    if option in {f"g{g}" for g in GROUPS}:
        return replace(spec, group=int(option[1:])), "group"
    if option in ("rot", "norot"):
        return replace(spec, rotate=option == "rot"), "rot"
    if option == "center":
        return replace(spec, center=True), "center"
    if option == "haar":
        return replace(spec, haar=True), "haar"
    if option in FITS.values():
        return replace(spec, fit=next(fit for fit, short in FITS.items() if short == option)), "fit"
    key, _, value = option.partition("=")
    if key == "sketch" and value in ("orth", "gauss"):
        return replace(spec, sketch=value), "sketch"
    if key == "out":
        if not value.isdigit() or not 1 <= int(value) <= 8:
            raise SpecError(f"KV spec {text!r}: out={value!r} must be 1 to 8 channels, as in out=2")
        return replace(spec, out=int(value)), "out"
    end = re.fullmatch(r"(first|last)([1-9]\d*)", key)
    if end and value:
        _names(value, text)
        layers = (int(end[2]), value)
        return (replace(spec, first=layers) if end[1] == "first" else replace(spec, last=layers)), end[1]
    if key == "pages":
        if not value.isdigit() or not int(value) or int(value) % FLUSH:
            raise SpecError(f"KV spec {text!r}: pages={value!r} must be a multiple of {FLUSH} tokens, as in pages=1024")
        return replace(spec, pages=int(value)), key
    if key in ("sink", "recent"):
        if not value.isdigit():
            raise SpecError(f"KV spec {text!r}: {key}={value!r} must be a number of tokens, as in {key}=128")
        tokens = int(value)
        return (replace(spec, sink=tokens) if key == "sink" else replace(spec, recent=tokens)), key
    if key == "skip":
        ends = {"first": 0, "last": 0}
        for part in value.split(","):
            match = re.fullmatch(r"(first|last)(\d+)", part)
            if not match:
                raise SpecError(
                    f"KV spec {text!r}: skip part {part!r} must be firstN or lastN, as in skip=first1,last1"
                )
            ends[match[1]] = int(match[2])
        return replace(spec, skip=(ends["first"], ends["last"])), "skip"
    if key == "window" and value in ("native", "compress"):
        return replace(spec, window=value), "window"
    raise SpecError(f"KV spec {text!r}: option {option!r} is not known. Grammar: {grammar()}")


def grammar() -> str:
    """The grammar in one line, with the codec names that exist."""
    return GRAMMAR.format(names=", ".join(REGISTRY))
