"""Prompt caches on disk: a long prefix is processed once, and later runs begin after it.

One safetensors file holds the packed bytes in the canonical format, so that a cache built on one machine opens on
another, and a manifest: which model, revision, chat template and spec made it, which tokens it holds, and a checksum
over every other byte of the file. A file that is cut, damaged, foreign or for another model is refused with the reason.
Writing goes to a temporary file that takes the name only when it is whole. Loading reads the bytes and decodes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import UserError
from ..files import appearing
from .composite import composite, members
from .latent import OpenTQLatentCache
from .single import OpenTQCache

FORMAT = "opentq-prompt-cache"
VERSION = 1
BLANK = "0" * 64
CHUNK = 1 << 22


CLASSES: dict[str, Any] = {cls.__name__: cls for cls in (OpenTQCache, OpenTQLatentCache)}
"""Cache classes by the names that files hold; a host adds its own."""


class CacheFileError(UserError):
    """A prompt cache file can't be used; the message says why."""


@dataclass(frozen=True)
class Manifest:
    """What a cache file says about itself.

    Attributes:
        model: the path or repository that the cache was built with, for people.
        revision: fingerprint of the model's configuration and weights (`records.fingerprint`).
        template: fingerprint of the chat template, "" without one.
        spec: the KV spec.
        tokens: the tokens whose keys and values the caches hold.
        classes: the cache class of every entry.
        scalars: kind of every leaf that is not an array in the original state.
        prompt: the text behind the tokens and how it was encoded, for `opentq cache use`.
    """

    model: str
    revision: str
    template: str
    spec: str
    tokens: tuple[int, ...]
    classes: tuple[str, ...]
    scalars: dict[str, str]
    prompt: dict[str, Any]


@dataclass
class PromptCache:
    """Caches that hold `manifest.tokens`, ready to go on."""

    manifest: Manifest
    caches: list[Any]

    def fit(self, prompt: Sequence[int]) -> tuple[list[Any], list[int]]:
        """Caches trimmed to what they share with `prompt`, and the tokens that are left to process (at least one).

        Raises CacheFileError when nothing is shared, or when a part would have to be taken back that can't be.
        """
        held = self.manifest.tokens
        shared = 0
        for ours, theirs in zip(held, prompt[:-1]):
            if ours != theirs:
                break
            shared += 1
        if not shared:
            raise CacheFileError("the prompt does not begin with the text that the prompt cache holds")
        if shared < len(held):
            if not all(cache.is_trimmable() for cache in self.caches):
                raise CacheFileError(
                    f"the prompt leaves the cached text after {shared} of {len(held)} tokens, and this model's caches "
                    "can't take tokens back; build the cache for the part that all prompts share"
                )
            for cache in self.caches:
                cache.trim(len(held) - shared)
        return self.caches, list(prompt[shared:])


def save(
    path: Path | str,
    caches: Sequence[Any],
    tokens: Sequence[int],
    *,
    model: str = "",
    revision: str = "",
    template: str = "",
    spec: str = "",
    prompt: dict[str, Any] | None = None,
) -> Manifest:
    """Write caches that hold `tokens`. The file appears whole or not at all; an existing one is replaced.

    Raises CacheFileError when the folder can't be written or a cache can't be saved.
    """
    path = Path(path)
    arrays: dict[str, mx.array] = {}
    scalars: dict[str, str] = {}
    leaves: list[tuple[str, Any]] = tree_flatten([portable(c) for c in caches])  # type: ignore[assignment]
    for key, leaf in leaves:
        arrays[key], kind = _to_array(leaf)
        if kind:
            scalars[key] = kind
    classes = tuple(type(c).__name__ for c in caches)
    held = tuple(int(t) for t in tokens)
    manifest = Manifest(model, revision, template, spec, held, classes, scalars, prompt or {})
    told = json.dumps(asdict(manifest), separators=(",", ":"))
    metadata = {"format": FORMAT, "version": str(VERSION), "manifest": told, "checksum": BLANK}
    try:
        with appearing(path, ".safetensors") as temporary:
            mx.save_safetensors(str(temporary), arrays, metadata)
            _seal(temporary)
    except (OSError, RuntimeError) as error:
        raise CacheFileError(f"can't write the prompt cache {str(path)!r}: {error}") from error
    return manifest


def load(
    path: Path | str,
    *,
    into: Sequence[Any] | None = None,
    revision: str = "",
    template: str | None = None,
    spec: str = "",
) -> PromptCache:
    """Read a cache file and check it: whole, undamaged, and (where given) for this model, template and spec.

    Args:
        into: fresh caches of the model to fill; they keep their counters. Without them new caches are made.

    Raises CacheFileError with the reason.
    """
    manifest, _ = read_manifest(path)
    other = f"the prompt cache {str(path)!r} is for another"
    if revision and revision != manifest.revision:
        raise CacheFileError(f"{other} model: it was built with {manifest.model!r}; build it again")
    if spec and spec != manifest.spec:
        raise CacheFileError(f"{other} KV spec: use --kv {manifest.spec}, or build it again")
    if template is not None and template != manifest.template:
        raise CacheFileError(f"{other} chat template; build it again")
    try:
        arrays: dict[str, mx.array] = mx.load(str(path), format="safetensors")  # type: ignore[assignment]
        mx.eval(arrays)
    except RuntimeError as error:
        raise CacheFileError(f"the prompt cache {str(path)!r} can't be read: {error}") from error
    states = tree_unflatten([(key, _from_array(a, manifest.scalars.get(key, ""))) for key, a in arrays.items()])
    if into is None:
        return PromptCache(manifest, [_class(n).from_state(state) for n, state in zip(manifest.classes, states)])
    if [type(c).__name__ for c in into] != list(manifest.classes):
        raise CacheFileError(f"the prompt cache {str(path)!r} is for a model with other caches; build it again")
    for cache, state in zip(into, states):
        restore(cache, state)
    return PromptCache(manifest, list(into))


# ---- who made it


def template_hash(tokenizer: Any) -> str:
    """A hash of the chat template; "" without one."""
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(str(template).encode()).hexdigest() if template else ""


# ---- states


def portable(cache: Any) -> Any:
    """A cache's state in the canonical format, whatever layout this machine stores it in."""
    if composite(cache):
        return [[portable(c), type(c).__name__] for c in members(cache)]
    if not isinstance(cache, OpenTQCache) or not cache.n_packed:
        return cache.state
    keys, values = cache.canonical()
    return cache.state._replace(layouts="canonical canonical", packed_k=list(keys), packed_v=list(values))


def restore(cache: Any, state: Any) -> None:
    """Fill a fresh cache with a state that `portable` made."""
    if composite(cache):
        for member, (inner, _) in zip(members(cache), state):
            restore(member, inner)
    else:
        cache.state = state


def _class(name: str) -> Any:
    if name not in CLASSES:
        raise CacheFileError(f"the prompt cache holds a {name}, which needs its model's own caches to be read into")
    return CLASSES[name]


def _to_array(leaf: Any) -> tuple[mx.array, str]:
    """A leaf of a state as an array, and what it was if it was none."""
    if isinstance(leaf, mx.array):
        return leaf, ""
    if isinstance(leaf, bool):
        return mx.array(int(leaf)), "bool"
    if isinstance(leaf, int):
        return mx.array(leaf, dtype=mx.int64), "int"
    if isinstance(leaf, str):
        return mx.array(list(leaf.encode()), dtype=mx.uint8), "str"
    if leaf is None:
        return mx.zeros((0,), dtype=mx.uint8), "none"
    raise CacheFileError(f"a cache state holds a {type(leaf).__name__}, which a cache file can't hold")


def _from_array(array: mx.array, kind: str) -> Any:
    if kind == "str":
        return bytes(array.tolist()).decode()  # type: ignore
    if kind == "none":
        return None
    if kind in ("int", "bool"):
        return {"int": int, "bool": bool}[kind](array.item())
    return array


# ---- the file


def _seal(path: Path) -> None:
    """Put the checksum into a file that was written with a blank one."""
    with path.open("r+b") as stream:
        _, place = _checksum_place(stream, path)
        digest = _hash(stream, place)
        stream.seek(place)
        stream.write(digest.encode())


def read_manifest(path: Path | str, check: bool = True) -> tuple[Manifest, int]:
    """The manifest of a file that is whole, and the bytes of its arrays. Raises CacheFileError otherwise.

    Without `check` only the file's head is read: damage to its arrays is left to `load`.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            length, place = _checksum_place(stream, path)
            stream.seek(place)
            written = stream.read(len(BLANK))
            if check and _hash(stream, place).encode() != written:
                raise CacheFileError(
                    f"the prompt cache {str(path)!r} is damaged (its checksum is wrong); build it again"
                )
            size = stream.seek(0, os.SEEK_END) - 8 - length
            stream.seek(8)
            metadata = json.loads(stream.read(length))["__metadata__"]
    except OSError as error:
        raise CacheFileError(f"can't read the prompt cache {str(path)!r}: {error.strerror}") from error
    if metadata.get("version") != str(VERSION):
        raise CacheFileError(
            f"the prompt cache {str(path)!r} has format version {metadata.get('version')}, this opentq reads "
            f"{VERSION}; build it again"
        )
    fields = json.loads(metadata["manifest"])
    fields |= {"tokens": tuple(fields["tokens"]), "classes": tuple(fields["classes"])}
    return Manifest(**fields), size


def _checksum_place(stream: BinaryIO, path: Path) -> tuple[int, int]:
    """Length of the header, and where in the file the checksum's 64 digits are."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    start = stream.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length + 8 > size:
        raise CacheFileError(f"{str(path)!r} is not a prompt cache, or it is cut off")
    header = stream.read(length)
    marker = b'"checksum":"'
    place = header.find(marker)
    if place < 0 or f'"format":"{FORMAT}"'.encode() not in header:
        raise CacheFileError(f"{str(path)!r} is not a prompt cache of opentq (`opentq cache build` makes them)")
    return length, 8 + place + len(marker)


def _hash(stream: BinaryIO, place: int) -> str:
    """SHA-256 of a file with its checksum blanked."""
    digest = hashlib.sha256()
    stream.seek(0)
    digest.update(stream.read(place))
    digest.update(BLANK.encode())
    stream.seek(place + len(BLANK))
    while chunk := stream.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()
