"""From text to specs: the one reader for the command line, files and the public functions. Inside, they are objects."""

from __future__ import annotations

import re
from typing import Literal

from .kv import FILE, KVSpec, SpecError
from .recipe import BAR, Recipe

Spec = KVSpec | Recipe
"""What the compressed cache of a model is made of: one spec, or one per layer."""
Asked = KVSpec | Recipe | Literal["auto"] | None
"""What a user asked for: a spec, AUTO, or None for the host's own cache."""

AUTO: Literal["auto"] = "auto"
"""In place of a spec: what is recommended for the model."""
OFF = ("off", "native")
"""In place of a spec: the host's own cache, as if this package were not there."""


def parse(text: str | Spec) -> Spec:
    """A spec or a recipe from its text; objects pass. Raises SpecError naming the part that is wrong."""
    if not isinstance(text, str):
        return text
    if BAR not in text and not FILE.fullmatch(text.strip()):
        return KVSpec.parse(text)
    try:
        return Recipe.read(text)
    except SpecError as error:
        raise SpecError(f"KV spec {text!r}: {error}") from error


def asked(kv: str | Spec | None, kv_bits: int | None = None, kv_group_size: int | None = None) -> Asked:
    """What `--kv` asks for, AUTO where it is not given; None for "off".

    mlx-lm's `--kv-bits` and `--kv-group-size` are aliases of `--kv`. Raises SpecError.
    """
    if kv is not None and (kv_bits is not None or kv_group_size is not None):
        raise SpecError("give --kv or mlx-lm's --kv-bits/--kv-group-size, not both")
    if kv_bits is not None:
        return KVSpec.parse(f"int{kv_bits}:g{kv_group_size or 64}")  # 64 is mlx-lm's default group
    if kv_group_size is not None:
        raise SpecError("--kv-group-size needs --kv-bits")
    word = kv.strip().lower() if isinstance(kv, str) else ""
    if kv is None or word == AUTO:
        return AUTO
    return None if word in OFF else parse(kv)


def split(text: str, option: str = "--kv") -> list[str]:
    """The parts of a list of specs; the comma in `skip=first1,last1` separates nothing. Raises SpecError for none."""
    parts = [part.strip() for part in re.split(r",(?!(?:first|last)\d)", text)]
    if not all(parts):
        raise SpecError(f"{option} {text!r} must name specs separated by commas, as in int4,k8v4")
    return parts


def specs(text: str) -> list[Spec | None]:
    """A list of specs, None for the host's own cache; each once. Raises SpecError."""
    found: list[Spec | None] = [None if part.lower() in OFF else parse(part) for part in split(text)]
    if len(set(found)) < len(found):
        raise SpecError(f"--kv {text!r} names a spec twice")
    return found


def name(spec: Spec | None) -> str:
    """How records and tables call a cache: its spec, or `native` for the host's own."""
    return "native" if spec is None else str(spec)
