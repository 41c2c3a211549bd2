"""What clients send, as fixtures for `tests/clients/`: the form of every request, with filler in the place of texts.

Equal texts have equal filler, and texts that begin alike begin alike, so that what is remembered of a prompt can be
measured. Texts are cut at `LONGEST` characters and tools at `TOOLS`, which keeps fixtures small.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

LONGEST, TOOLS, SHORT, BLOCK = 600, 4, 24, 64
WORDS = "lorem ipsum dolor sit amet elit sed do eiusmod tempor ut labore et dolore magna aliqua".split()  # noqa: SIM905
KEPT = {"type", "role", "model", "name", "pattern", "format", "$schema", "$ref", "encoding", "media_type", "arguments"}
KEPT |= {"required", "enum", "tool_choice", "include", "effort", "summary", "service_tier", "const", "syntax"}
HEADERS = {"accept", "content-type", "anthropic-beta", "anthropic-version"}


def filler(text: str) -> str:
    """Words of the same length, a block at a time, each a function of the text up to its end."""
    out = ""
    for start in range(0, min(len(text), LONGEST), BLOCK):
        rng = random.Random(hashlib.sha256(text[: start + BLOCK].encode()).hexdigest())
        out += " ".join(rng.choices(WORDS, k=BLOCK // 2))[: len(text[start : start + BLOCK])]
    return out[:LONGEST]


def anonymous(value, key=""):
    """`value` with filler for every longer text, and as many tools as are kept."""
    if isinstance(value, dict):
        return {k: anonymous(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [anonymous(v, key) for v in (value[:TOOLS] if key == "tools" else value)]
    if isinstance(value, str) and len(value) > SHORT and key not in KEPT:
        return filler(value)
    return value


class Recorder:
    """Keeps the requests of one client at a time; without a folder, nothing."""

    def __init__(self, folder: str | None):
        self.folder = Path(folder) if folder else None
        self.requests: list[dict] = []

    def around(self, app):
        """The ASGI application `app`, listened to."""

        async def listening(scope, receive, send):
            if not self.folder or scope["type"] != "http" or scope["method"] != "POST":
                return await app(scope, receive, send)
            parts = []

            async def received():
                message = await receive()
                parts.append(message.get("body", b""))
                if message["type"] == "http.request" and not message.get("more_body"):
                    self._take(scope, b"".join(parts))
                return message

            return await app(scope, received, send)

        return listening

    def _take(self, scope, body: bytes) -> None:
        headers = {k.decode(): v.decode() for k, v in scope["headers"] if k.decode() in HEADERS}
        query = f"?{scope['query_string'].decode()}" if scope["query_string"] else ""
        request = {"method": scope["method"], "path": scope["path"] + query, "headers": headers}
        self.requests.append(request | {"body": anonymous(json.loads(body))})

    def write(self, client: str, version: str) -> None:
        """The requests so far as `CLIENT.json`."""
        if self.folder and self.requests:
            found = {"client": client, "version": version, "requests": self.requests}
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"{client}.json").write_text(json.dumps(found, indent=1) + "\n")
        self.requests = []
