"""The one dial: a KV spec such as `int4`, `k8v4:g64` or `int3:sink=4:recent=128:skip=first1,last1`.

A spec says which codec keys and values use and what stays in fp16. It parses, prints in canonical form and round-trips,
so the same token works on the command line, in a table cell, in a file and in a cache manifest.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace

from .codecs import GROUPS, REGISTRY, Codec, make
from .errors import UserError

GRAMMAR = (
    "NAME[:option]*, NAME one of {names}, or kAvB for different keys and values (k8v4), or K/V with two names "
    "(int8/int4); options: " + ", ".join(f"g{g}" for g in GROUPS) + ", rot, norot, sink=N, recent=N, "
    "skip=firstN,lastN, window=native|compress"
)


DEFAULT = "int4"


class SpecError(UserError):
    """A KV spec that can't be understood; the message names the wrong part and what is allowed."""


@dataclass(frozen=True)
class KVSpec:
    """What the KV cache of a model is made of.

    Attributes:
        keys, values: codec names (`codecs.REGISTRY`).
        group: channels per scale.
        rotate: rotate vectors before integer codecs.
        sink: first tokens kept in fp16.
        recent: newest tokens kept in fp16 at least (blocks are flushed whole, so up to 63 more are).
        skip: (first, last) layers kept in fp16.
        window: what sliding-window layers do: `native` keeps mlx-lm's bounded cache, `compress` packs them too.
    """

    keys: str = "int4"
    values: str = "int4"
    group: int = 32
    rotate: bool = True
    sink: int = 0
    recent: int = 0
    skip: tuple[int, int] = (0, 0)
    window: str = "native"

    @classmethod
    def parse(cls, text: str | KVSpec) -> KVSpec:
        """Read a spec. Raises SpecError naming the part that is wrong."""
        if isinstance(text, KVSpec):
            return text
        head, *options = text.strip().lower().split(":")
        keys, values = _names(head, text)
        spec = cls(keys, values)
        seen: set[str] = set()
        for option in options:
            spec, kind = _apply(spec, option, text)
            if kind in seen:
                raise SpecError(f"KV spec {text!r}: {kind} is given twice")
            seen.add(kind)
        return spec

    def __str__(self) -> str:
        parts = [_short(self.keys, self.values)]
        if self.group != 32:
            parts.append(f"g{self.group}")
        if not self.rotate:
            parts.append("norot")
        if self.sink:
            parts.append(f"sink={self.sink}")
        if self.recent:
            parts.append(f"recent={self.recent}")
        if any(self.skip):
            ends = [f"{end}{n}" for end, n in zip(("first", "last"), self.skip) if n]
            parts.append("skip=" + ",".join(ends))
        if self.window != "native":
            parts.append(f"window={self.window}")
        return ":".join(parts)

    def codecs(self) -> tuple[Codec, Codec]:
        """The key codec and the value codec."""
        return make(self.keys, self.group, self.rotate), make(self.values, self.group, self.rotate)

    def for_layer(self, index: int, count: int) -> KVSpec:
        """The spec of layer `index` of `count` attention layers: f16 where `skip` protects it."""
        first, last = self.skip
        if index < first or index >= count - last:
            return replace(self, keys="f16", values="f16", skip=(0, 0), sink=0, recent=0)
        return replace(self, skip=(0, 0))

    def bits_per_value(self, head_dim: int, value_dim: int | None = None) -> float:
        """Bits per stored value of a packed token, metadata included; keys and values averaged by their sizes."""
        value_dim = value_dim or head_dim
        key, value = self.codecs()
        total = key.bits_per_value(head_dim) * head_dim + value.bits_per_value(value_dim) * value_dim
        return total / (head_dim + value_dim)

    @property
    def compresses(self) -> bool:
        return (self.keys, self.values) != ("f16", "f16")


def _names(head: str, text: str) -> tuple[str, str]:
    """`int4` -> (int4, int4); `k8v4` -> (int8, int4); `k8tq4` -> (int8, tq4); `int8/tq4` -> (int8, tq4)."""
    mixed = re.fullmatch(r"k(\d+)v(\d+)", head)
    if mixed:
        names = (f"int{mixed[1]}", f"int{mixed[2]}")
    elif "/" in head:
        left, _, right = head.partition("/")
        names = (left, right)
    else:
        mixed = re.fullmatch(r"k(\d+)([a-z].*)", head)
        names = (f"int{mixed[1]}", mixed[2]) if mixed else (head, head)
    for name in names:
        if name not in REGISTRY:
            close = difflib.get_close_matches(name, REGISTRY, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise SpecError(f"KV spec {text!r}: unknown codec {name!r}{hint} Grammar: {grammar()}")
    return names


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
    key, _, value = option.partition("=")
    if key in ("sink", "recent"):
        if not value.isdigit():
            raise SpecError(f"KV spec {text!r}: {key}={value!r} must be a number of tokens, as in {key}=128")
        return replace(spec, **{key: int(value)}), key
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


def spec_from_flags(kv: str | None, kv_bits: int | None = None, kv_group_size: int | None = None) -> KVSpec:
    """The spec that command-line flags ask for; mlx-lm's `--kv-bits` and `--kv-group-size` are aliases of `--kv`."""
    if kv is not None and (kv_bits is not None or kv_group_size is not None):
        raise SpecError("give --kv or mlx-lm's --kv-bits/--kv-group-size, not both")
    if kv_bits is not None:
        return KVSpec.parse(f"int{kv_bits}:g{kv_group_size or 64}")  # 64 is mlx-lm's default group
    if kv_group_size is not None:
        raise SpecError("--kv-group-size needs --kv-bits")
    return KVSpec.parse(kv or DEFAULT)
