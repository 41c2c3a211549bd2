"""Anthropic's Messages API over the same engine: bodies become requests, events become content blocks."""

from __future__ import annotations

import json
import logging
from typing import Any

from ..dialogue import pictures
from ..dialogue.clearing import ClearTools
from ..dialogue.errors import ApiError, bad, missing, text_of, unsupported
from ..dialogue.request import Delta, Done, Generated, GenerationRequest, SamplingParams, Usage
from .claude_tools import function
from .openai import check_continued, refuse_unsupported
from .schema import ClaudeToolChoice, CountRequest, MessagesRequest, OutputConfig, check
from .tool_choice import choose

log = logging.getLogger("opentq.serve")

IDLE: dict[str, tuple[Any, ...]] = {"container": (), "mcp_servers": ([],)}

EFFORT = {"xhigh": "high", "max": "high"}
"""Efforts that templates do not know, by the nearest that they do."""


def read(body: dict[str, Any], count_only: bool = False) -> GenerationRequest:
    """The `GenerationRequest` of a /v1/messages body (or of /v1/messages/count_tokens). Raises ApiError."""
    refuse_unsupported(body, IDLE)
    asked = check(body, CountRequest if count_only else MessagesRequest)
    choice = asked.tool_choice or ClaudeToolChoice(type="auto")
    tools = [function(t, f"tools[{i}]") for i, t in enumerate(body.get("tools") or ())]
    mode = {"any": "required", "tool": "required"}.get(choice.type, choice.type)
    messages: list[dict[str, Any]] = []
    if system := _blocks(body.get("system"), "system"):
        messages.append({"role": "system", "content": system})
    for i, turn in enumerate(body["messages"]):
        messages += _turn(turn, f"messages[{i}]")
    wanted = asked.output_config or OutputConfig()
    where = "output_format" if asked.output_format else "output_config.format"
    form = asked.output_format or wanted.format
    if len(messages) > 1 and messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()  # nothing to go on with
    if goes_on := messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"):
        check_continued(messages, form, where)
    template: dict[str, Any] = {}
    if asked.thinking:
        template["enable_thinking"] = asked.thinking.type != "disabled"
    if wanted.effort:
        template["reasoning_effort"] = EFFORT.get(wanted.effort, wanted.effort)
    return GenerationRequest(
        model=asked.model,
        messages=tuple(messages),
        max_tokens=asked.max_tokens,
        stop=tuple(s for s in asked.stop_sequences or () if s),
        parallel_calls=not choice.disable_parallel_tool_use,
        schema=_format(form, where),
        continue_last=goes_on,
        template=template,
        clear=_clearing(body.get("context_management") or {}),
        stream=bool(asked.stream),
        sampling=SamplingParams(asked.temperature, asked.top_p, asked.top_k),  # type: ignore[arg-type]  # None: default
        **choose(tools, mode, [choice.name] if choice.type == "tool" else None),
    )


def _format(wanted: dict[str, Any] | None, path: str) -> dict[str, Any] | None:
    if not wanted:
        return None
    if not isinstance(wanted, dict) or wanted.get("type") != "json_schema":
        raise bad(f"{path}.type must be json_schema", f"{path}.type")
    if not isinstance(wanted.get("schema"), dict):
        raise missing(f"{path}.schema")
    return wanted["schema"]


_ignored: set[str] = set()


def _clearing(management: dict[str, Any]) -> ClearTools | None:
    """The edit that clears old tool results, if it is asked for. Others change nothing here: the log says so, once."""
    found = None
    for i, edit in enumerate(management.get("edits") or ()):
        kind = str(edit.get("type"))
        if kind.startswith("clear_tool_uses_"):
            found = _clear_tools(edit, f"context_management.edits[{i}]")
        elif kind not in _ignored and len(_ignored) < 16 and edit.get("keep") != "all":
            _ignored.add(kind)
            log.info(
                "context_management asks for %s, which is not done here; such requests are served without", kind[:60]
            )
    return found


def _clear_tools(edit: dict[str, Any], path: str) -> ClearTools:
    trigger, keep = edit.get("trigger") or {"type": "input_tokens", "value": 100_000}, edit.get("keep") or {"value": 3}
    for name, part in (("trigger", trigger), ("keep", keep)):
        if not isinstance(part, dict) or not isinstance(part.get("value"), int) or part["value"] < 0:
            raise bad(f"{path}.{name} must be an object with a number as its value", f"{path}.{name}")
    names = edit.get("exclude_tools") or []
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise bad(f"{path}.exclude_tools must be an array of names", f"{path}.exclude_tools")
    by_uses = trigger.get("type") == "tool_uses"
    return ClearTools(
        tokens=None if by_uses else trigger["value"],
        uses=trigger["value"] if by_uses else None,
        keep=keep["value"],
        exclude=frozenset(names),
        inputs=bool(edit.get("clear_tool_inputs")),
    )


def _turn(turn: dict[str, Any], path: str) -> list[dict[str, Any]]:
    """One turn as OpenAI messages: tool results become messages of their own, in order, and the images in them a
    message of the user's after them.
    """
    if isinstance(turn["content"], str):
        return [{"role": turn["role"], "content": turn["content"]}]
    out: list[dict[str, Any]] = []
    current: dict[str, Any] = {"role": turn["role"], "content": ""}
    said: list[str | pictures.Picture] = []
    shown: list[str | pictures.Picture] = []
    for i, block in enumerate(turn["content"]):
        where, kind = f"{path}.content[{i}]", block["type"]
        if kind in TEXTS:
            said.append(_text(block, where))
        elif kind == "image" and turn["role"] == "user":
            said.append(_image(block, where))
        elif kind == "thinking":
            current["reasoning_content"] = current.get("reasoning_content", "") + text_of(block, "thinking", where)
        elif kind == "tool_use":
            function = {"name": text_of(block, "name", where), "arguments": block.get("input") or {}}
            current.setdefault("tool_calls", []).append(
                {"id": block.get("id") or "", "type": "function", "function": function}
            )
        elif kind == "tool_result":
            if any(said):
                out.append(current | {"content": _joined(said)})
                current, said = {"role": turn["role"], "content": ""}, []
            content = block.get("content")
            inner = content if isinstance(content, list) else []
            shown += [_image(b, f"{where}.content[{j}]") for j, b in enumerate(inner) if b["type"] == "image"]
            result = _blocks(content, f"{where}.content", skip=("image",))
            if block.get("is_error") and "error" not in result[:80].lower():
                result = f"Error: {result}"
            out.append({"role": "tool", "tool_call_id": text_of(block, "tool_use_id", where), "content": result})
        elif kind != "redacted_thinking":
            known = "only text, thinking, tool_use, tool_result, and images of the user's, can be read"
            raise unsupported(f"{where}.type", f"{kind!r}; {known}")
    current["content"] = _joined(shown + said)
    if len(current) > 2 or current["content"] or not out:
        out.append(current)
    return out


def _joined(said: list[str | pictures.Picture]) -> pictures.Content:
    return pictures.content([part for part in said if part], "\n")


def _image(block: dict[str, Any], path: str) -> pictures.Picture:
    """The image in a block. Raises ApiError: nothing is fetched for a request."""
    source = block.get("source")
    if not isinstance(source, dict) or source.get("type") != "base64" or not isinstance(source.get("data"), str):
        raise unsupported(f"{path}.source", "images come in base64; nothing is fetched and no file is kept")
    return pictures.from_base64(source["data"], f"{path}.source.data")


TEXTS = ("text", "document", "search_result", "tool_reference")


def _blocks(content: Any, path: str, skip: tuple[str, ...] = ()) -> str:
    """The text of a string or of blocks, a paragraph each."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n\n".join(_text(b, f"{path}[{i}]") for i, b in enumerate(content) if b["type"] not in skip)


def _text(block: dict[str, Any], path: str) -> str:
    """A block as text: documents and search results as far as they are text. Raises ApiError for images and files."""
    kind, source = block["type"], block.get("source")
    if kind == "text":
        return text_of(block, "text", path)
    if kind == "tool_reference":
        return text_of(block, "tool_name", path)
    if kind == "search_result":
        title = f"{block.get('title') or ''}\n{source or ''}".strip()
        return f"{title}\n{_blocks(block.get('content'), f'{path}.content')}"
    if kind == "document" and isinstance(source, dict) and source.get("type") in ("text", "content"):
        text = (
            source.get("data") if source["type"] == "text" else _blocks(source.get("content"), f"{path}.source.content")
        )
        if not isinstance(text, str):
            raise missing(f"{path}.source.data")
        return f"{block['title']}\n{text}" if isinstance(block.get("title"), str) else text
    raise unsupported(f"{path}.type", f"{kind!r}; this model reads text only")


def error_body(error: ApiError) -> dict[str, Any]:
    """Anthropic's error object."""
    kind = {413: "request_too_large", 500: "api_error"}.get(error.status, error.kind)
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def usage(u: Usage) -> dict[str, int]:
    """Anthropic counts remembered tokens apart from the input's other tokens."""
    return {
        "input_tokens": u.prompt - u.cached,
        "cache_read_input_tokens": u.cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": u.completion,
    }


def stop_reason(done: Done) -> str:
    if done.matched:
        return "stop_sequence"
    return {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}[done.reason]


class Writer:
    """A message as it grows: pieces of an answer become content blocks, and every change says itself as events."""

    ping = b'event: ping\ndata: {"type": "ping"}\n\n'

    def __init__(self, id: str, model: str, prompt_tokens: int):
        self.blocks: list[dict[str, Any]] = []
        self.message = {
            "id": f"msg_{id}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": self.blocks,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage(Usage(prompt=prompt_tokens)),
        }

    def opening(self) -> list[dict[str, Any]]:
        return [{"type": "message_start", "message": self.message}, {"type": "ping"}]

    def step(self, step: Generated) -> list[dict[str, Any]]:
        return [event for delta in step.deltas for event in self._add(delta)]

    def done(self, done: Done) -> list[dict[str, Any]]:
        end = {"stop_reason": stop_reason(done), "stop_sequence": done.matched or None}
        self.message |= end | {"usage": usage(done.usage)}
        last = {"type": "message_delta", "delta": end, "usage": self.message["usage"]}
        return [*self._close(), last, {"type": "message_stop"}]

    def error(self, error: ApiError) -> list[dict[str, Any]]:
        return [error_body(error)]

    def whole(self) -> dict[str, Any]:
        return self.message

    def _add(self, delta: Delta) -> list[dict[str, Any]]:
        """One more piece: neighbouring text is one block."""
        if delta.call:
            inner = {"type": "input_json_delta", "partial_json": delta.call.arguments}
            block = {"type": "tool_use", "id": delta.call.id, "name": delta.call.name, "input": {}}
            events = self._open(block)
            block["input"] = _input(delta.call.arguments)
        else:
            kind = "thinking" if delta.kind == "reasoning" else "text"
            inner = {"type": f"{kind}_delta", kind: delta.text}
            events = []
            if not (self.blocks and self.blocks[-1]["type"] == kind):
                events = self._open({"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {}))
            self.blocks[-1][kind] += delta.text
        return [*events, {"type": "content_block_delta", "index": len(self.blocks) - 1, "delta": inner}]

    def _open(self, block: dict[str, Any]) -> list[dict[str, Any]]:
        events = self._close()
        self.blocks.append(block)
        start = {"type": "content_block_start", "index": len(self.blocks) - 1, "content_block": dict(block)}
        return [*events, start]

    def _close(self) -> list[dict[str, Any]]:
        return [{"type": "content_block_stop", "index": len(self.blocks) - 1}] if self.blocks else []


def _input(arguments: str) -> Any:
    value = json.loads(arguments or "{}")
    return value if isinstance(value, dict) else {"value": value}
