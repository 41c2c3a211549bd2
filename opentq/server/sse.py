"""One server-sent event as bytes."""

from __future__ import annotations

import json
from typing import Any


def frame(data: Any, event: str = "") -> bytes:
    """`data` as JSON (text is sent as it is), with an event name if there is one."""
    head = f"event: {event}\n" if event else ""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"{head}data: {text}\n\n".encode()
