"""Images in messages. The content of a message with images is a list of parts, in order: `{"type": "text", "text": T}`
and `{"type": "image", "image": Picture}`; all other contents are text.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from .errors import bad, unsupported

Content = str | list[dict[str, Any]]

MOST = 32
"""Images in one prompt."""


@dataclass(frozen=True)
class Picture:
    """The bytes of an image file, and the field of the request that it came in."""

    data: bytes = field(repr=False)
    where: str = ""

    @cached_property
    def digest(self) -> bytes:
        return hashlib.blake2b(self.data, digest_size=20).digest()


def from_url(url: str, where: str) -> Picture:
    """The image in a data URL. Raises ApiError: nothing is fetched and no file is read for a request."""
    head, comma, data = url.partition(",")
    if not head.startswith("data:"):
        raise unsupported(where, "images come as data URLs (data:image/png;base64,...); nothing is fetched")
    if not comma or not head.endswith(";base64"):
        raise bad(f"{where} must be a data URL in base64", where, "invalid_image_url")
    return from_base64(data, where)


def from_base64(data: str, where: str) -> Picture:
    """The image in base64 text. Raises ApiError."""
    try:
        return Picture(base64.b64decode(data, validate=True), where)
    except (binascii.Error, ValueError) as error:
        raise bad(f"{where} is not base64: {error}", where, "invalid_base64") from error


def of(messages: Iterable[dict[str, Any]]) -> list[Picture]:
    """All images of a conversation, in their order."""
    return [p["image"] for m in messages if isinstance(m["content"], list) for p in m["content"] if "image" in p]


def content(parts: Sequence[str | Picture], between: str = "") -> Content:
    """What a message holds: text where there is no image; neighbouring texts are joined with `between`."""
    found: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, Picture):
            found.append({"type": "image", "image": part})
        elif found and found[-1]["type"] == "text":
            found[-1]["text"] += between + part
        elif part:
            found.append({"type": "text", "text": part})
    if any(p["type"] == "image" for p in found):
        return found
    return found[0]["text"] if found else ""


def parts(content: Content) -> list[str | Picture]:
    """The texts and images of a content."""
    if isinstance(content, str):
        return [content]
    return [p["image"] if p["type"] == "image" else p["text"] for p in content]


def characters(content: Content) -> int:
    return sum(len(p) for p in parts(content) if isinstance(p, str))
