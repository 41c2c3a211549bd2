"""Old tool results left out of a conversation that has become long, as Anthropic's `context_management` asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]

CLEARED = "(an old result, removed to save room)"


@dataclass(frozen=True)
class ClearTools:
    """When old tool results go, and which.

    Attributes:
        tokens: prompts longer than this are cleared; None for no such limit.
        uses: conversations with more tool calls than this are cleared; None for no such limit.
        keep: newest calls whose results stay.
        exclude: tools whose results always stay.
        inputs: whether the calls' arguments go, too.
    """

    tokens: int | None = 100_000
    uses: int | None = None
    keep: int = 3
    exclude: frozenset[str] = frozenset()
    inputs: bool = False

    def due(self, tokens: int, messages: list[Message]) -> bool:
        if self.uses is not None and sum(len(m.get("tool_calls") or ()) for m in messages) > self.uses:
            return True
        return self.tokens is not None and tokens > self.tokens

    def apply(self, messages: list[Message]) -> list[Message]:
        """The messages with the old results replaced by a short note."""
        calls = {c["id"]: c["function"]["name"] for m in messages for c in m.get("tool_calls") or ()}
        old = [i for i, name in list(calls.items())[: max(len(calls) - self.keep, 0)] if name not in self.exclude]
        return [self._cleared(m, frozenset(old)) for m in messages]

    def _cleared(self, message: Message, old: frozenset[str]) -> Message:
        if message.get("tool_call_id") in old:
            return message | {"content": CLEARED}
        if self.inputs and any(c["id"] in old for c in message.get("tool_calls") or ()):
            empty = [
                c | {"function": c["function"] | {"arguments": {}}} if c["id"] in old else c
                for c in message["tool_calls"]
            ]
            return message | {"tool_calls": empty}
        return message
