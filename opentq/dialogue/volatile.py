"""Text that means nothing to the model and differs from one request to the next: dropped before the template.

A prefix is remembered up to the first token that differs. A line like these near the front of a prompt of 20,000
tokens costs reading all of them again, each turn. Only what is listed here is dropped, only where it is a whole line,
and `--keep-volatile` keeps it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True)
class Marker:
    """A kind of line that is dropped.

    Attributes:
        roles: the messages that it is looked for in.
        pattern: what is dropped, with the line's end.
        reason: why the model does not need it.
    """

    name: str
    roles: frozenset[str]
    pattern: re.Pattern[str]
    reason: str


MARKERS = (
    Marker(
        "billing header",
        frozenset({"system"}),
        re.compile(r"^x-anthropic-billing-header:[^\n]*\n*", re.M),
        "Claude Code's first system block: its version, entry point and a checksum of the request, for the bill. "
        "The last two differ by session and by request.",
    ),
    Marker(
        "token budget",
        frozenset({"system", "user"}),
        re.compile(
            r"^<system_warning>Token usage: \d+/\d+; \d+ remaining</system_warning>\n?"
            r"|^<budget:token_budget>\d+</budget:token_budget>\n?"
            r"|^<total_tokens>\d+ tokens left</total_tokens>\n?",
            re.M,
        ),
        "How much of another service's context is left. It differs by turn, and its numbers are not this model's.",
    ),
)


def without(messages: list[Message]) -> list[Message]:
    """The messages without such lines; a message that held nothing else is gone."""
    out = []
    for message in messages:
        text = message.get("content")
        if isinstance(text, str):
            kept = drop(text, message["role"])
            if kept != text:
                if not kept.strip() and not message.get("tool_calls"):
                    continue
                message = message | {"content": kept}
        out.append(message)
    return out


def drop(text: str, role: str) -> str:
    """`text` of a message of `role` without the lines of `MARKERS`."""
    for marker in MARKERS:
        if role in marker.roles:
            text = marker.pattern.sub("", text)
    return text
