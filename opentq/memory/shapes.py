"""Named shapes: the configurations of well-known models, so that planning and benchmarks need no download.

`shapes.toml` holds the part of each model's config.json that decides sizes. `find` knows a model by its shape's name or
by a repository name that holds it, in any of the usual spellings (`meta-llama/Llama-3.1-70B-Instruct`,
`mlx-community/Meta-Llama-3.1-70B-Instruct-4bit`).
"""

from __future__ import annotations

import copy
import re
import tomllib
from pathlib import Path
from typing import Any

Config = dict[str, Any]


def _read() -> dict[str, Config]:
    named: dict[str, Config] = {}
    for name, own in tomllib.loads(Path(__file__).with_suffix(".toml").read_text()).items():
        named[name] = {**named.get(own.pop("like", ""), {}), **own}
    return named


NAMED = _read()


def find(name: str) -> tuple[str, Config] | None:
    """The shape that `name` (a shape, or a repository) stands for, as (shape name, config), or None."""
    base = _plain(name.rsplit("/", 1)[-1])
    # The longest name first, so that llama-3.1-70b is not taken for a shorter one.
    for shape in sorted(NAMED, key=len, reverse=True):
        if re.search(rf"(^|-){re.escape(_plain(shape))}($|-)", base):
            return shape, copy.deepcopy(NAMED[shape])
    return None


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").replace("meta-", "").replace("llama3", "llama-3").replace("gemma4", "gemma-4")


def bits_in_name(name: str) -> int | None:
    """Weight bits that a repository name promises: `...-4bit` -> 4, `...-bf16` -> 16, else None."""
    found = re.search(r"(\d+)[-_]?bit|(bf16|fp16)", name.lower())
    if not found:
        return None
    return 16 if found[2] else int(found[1])
