"""Conversations in the words of the model's own chat template: what it has no form for is put into one that it has.

Agents put system messages in the middle, several in front, tools everywhere. Templates differ: many take a system
message at the front only, some want user and assistant to alternate, some know no tools. What a template shows is
found by rendering probes with it, not by names of models. The result is a function of the messages alone, and a longer
conversation begins as a shorter one does, so remembered prefixes stay useful.
"""

from __future__ import annotations

import json
import logging
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from . import pictures

Message = dict[str, Any]

log = logging.getLogger("opentq.serve")

TOOLS = """You can call functions. These are their definitions, one a line, in JSON:
<tools>
{definitions}
</tools>
To call one, write its name and its arguments in this form and nothing after it; the result comes back to you:
<tool_call>
{{"name": "NAME", "arguments": {{"PARAMETER": "VALUE"}}}}
</tool_call>"""


class Roles:
    """Fits messages to one tokenizer's chat template."""

    def __init__(self, tokenizer: Any, plain_tools: bool = False):
        """`plain_tools`: the template has no form for tools, so they are written as text (Hermes' form)."""
        self.tokenizer = tokenizer
        self.plain_tools = plain_tools

    def fit(self, messages: list[Message], tools: list[Message]) -> tuple[list[Message], list[Message]]:
        """Messages and tools as the template can show them."""
        if self.plain_tools:
            messages, tools = plain(messages, tools), []
        elif any(m["role"] == "tool" or m.get("tool_calls") for m in messages) and not self.calls:
            messages = [_plain(m) for m in messages]
        roles = [m["role"] for m in messages]
        front = next((i for i, r in enumerate(roles) if r != "system"), len(roles))
        head, rest = messages[:front], messages[front:]
        if "system" in roles[front:] and not self.late_system:
            rest = [_as_user(m) if m["role"] == "system" else m for m in rest]
        if len(head) > 1 and not self.two_systems:
            head = [{"role": "system", "content": _paragraphs(head)}]
        if head and not self.system:
            rest = [{"role": "user", "content": _paragraphs(head)}, *rest]
            head = []
        if not self.two_users:
            rest = _joined_users(rest)
        return head + rest, tools

    @cached_property
    def calls(self) -> bool:
        """Whether the template shows calls and their results; what it refuses is left to it, which says why."""
        marks = ["mark_name", "mark_value", "mark result"]
        call: dict[str, Any] = {"id": "mark00000", "type": "function"}
        call |= {"function": {"name": marks[0], "arguments": {"key": marks[1]}}}
        messages = [
            {"role": "user", "content": "question"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "name": marks[0], "content": marks[2]},
        ]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
            return True
        return all(mark in text for mark in marks)

    @cached_property
    def system(self) -> bool:
        return self._shows(("system", "user"))

    @cached_property
    def two_systems(self) -> bool:
        return self._shows(("system", "system", "user"))

    @cached_property
    def late_system(self) -> bool:
        front = ("system",) if self.system else ()
        return self._shows((*front, "user", "system", "assistant", "user", "system"))

    @cached_property
    def two_users(self) -> bool:
        return self._shows(("user", "user"))

    def _shows(self, roles: tuple[str, ...]) -> bool:
        """Whether a conversation of these roles is rendered with every message in it, in its order."""
        marks = [f"mark {i} of {len(roles)}" for i in range(len(roles))]
        messages = [{"role": r, "content": mark} for r, mark in zip(roles, marks)]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            log.debug("the chat template does not take the roles %s (%s)", ", ".join(roles), type(error).__name__)
            return False
        places = [text.find(mark) for mark in marks]
        return -1 not in places and places == sorted(places)


def plain(messages: list[Message], tools: list[Message]) -> list[Message]:
    """Tools, calls and results as text, for templates that know none of them."""
    out = [_plain(m) for m in messages]
    if tools:
        definitions = "\n".join(json.dumps(t["function"], ensure_ascii=False) for t in tools)
        # First of all: they are the same in every session, and what an agent's own text says of the day is not.
        out.insert(0, {"role": "system", "content": TOOLS.format(definitions=definitions)})
    return out


def _plain(message: Message) -> Message:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    if not message.get("tool_calls"):
        return message
    calls = [
        json.dumps({"name": c["function"]["name"], "arguments": c["function"]["arguments"]}, ensure_ascii=False)
        for c in message["tool_calls"]
    ]
    text = "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)
    content = f"{message['content']}\n{text}" if message.get("content") else text
    return {k: v for k, v in message.items() if k != "tool_calls"} | {"content": content}


def _as_user(message: Message) -> Message:
    return {"role": "user", "content": f"<system>\n{message['content']}\n</system>"}


def _joined_users(messages: list[Message]) -> list[Message]:
    """Neighbouring user messages as one, for templates that want user and assistant to alternate."""
    out: list[Message] = []
    for m in messages:
        if out and m["role"] == out[-1]["role"] == "user":
            out[-1] = {"role": "user", "content": _paragraphs([out[-1], m])}
        else:
            out.append(m)
    return out


def _paragraphs(messages: list[Message]) -> pictures.Content:
    return pictures.content([p for m in messages for p in pictures.parts(m["content"])], "\n\n")
