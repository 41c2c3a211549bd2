"""Anthropic's Messages API over the same engine: bodies become requests, events become content blocks."""

from __future__ import annotations

import json
from typing import Any

from ..dialogue.errors import ApiError, bad, unsupported
from ..dialogue.request import Delta, Done, Generated, GenerationRequest, SamplingParams, Usage
from .openai import as_int, read_content, refuse_unsupported
from .schema import COUNT, MESSAGES, check
from .sse import frame

IDLE: dict[str, tuple[Any, ...]] = {
    "container": (),
    "mcp_servers": ([],),
    "context_management": (),
    "output_config": (),
    "output_format": (),
    "service_tier": ("auto", "standard_only"),
}


def read(body: dict[str, Any], count_only: bool = False) -> GenerationRequest:
    """The `GenerationRequest` of a /v1/messages body (or of /v1/messages/count_tokens). Raises ApiError."""
    refuse_unsupported(body, IDLE)
    check(body, COUNT if count_only else MESSAGES)
    choice = body.get("tool_choice") or {"type": "auto"}
    tools = tuple(_tool(t, f"tools[{i}]") for i, t in enumerate(body.get("tools") or ()))
    if choice["type"] == "none":
        tools = ()
    if choice["type"] == "tool":
        name = choice.get("name")
        tools = tuple(t for t in tools if t["function"]["name"] == name)
    if choice["type"] in ("any", "tool") and not tools:
        raise bad("tool_choice names no tool that is given in tools", "tool_choice")
    messages: list[dict[str, Any]] = []
    if system := read_content(body.get("system"), "system"):
        messages.append({"role": "system", "content": system})
    for i, turn in enumerate(body["messages"]):
        messages += _turn(turn, f"messages[{i}]")
    thinking = body.get("thinking")
    return GenerationRequest(
        model=body.get("model"),
        messages=tuple(messages),
        max_tokens=as_int(body.get("max_tokens")),
        stop=tuple(s for s in body.get("stop_sequences") or () if s),
        tools=tools,
        tool_choice="required" if choice["type"] in ("any", "tool") else "auto",
        parallel_calls=not choice.get("disable_parallel_tool_use"),
        template={} if thinking is None else {"enable_thinking": thinking["type"] != "disabled"},
        stream=bool(body.get("stream")),
        sampling=SamplingParams(
            temperature=body.get("temperature"),  # type: ignore[arg-type]  # None: the server's default
            top_p=body.get("top_p"),  # type: ignore[arg-type]
            top_k=as_int(body.get("top_k")) or 0,
        ),
    )


def _tool(tool: dict[str, Any], path: str) -> dict[str, Any]:
    if tool.get("type") not in (None, "custom"):
        raise unsupported(f"{path}.type", f"{tool['type']!r}; only tools of your own can be called")
    if tool.get("input_schema") is None:
        raise bad(f"{path}.input_schema is missing", f"{path}.input_schema", "missing_required_parameter")
    function = {"name": tool["name"], "description": tool.get("description") or "", "parameters": tool["input_schema"]}
    return {"type": "function", "function": function}


def _turn(turn: dict[str, Any], path: str) -> list[dict[str, Any]]:
    """One turn as OpenAI messages: tool results become messages of their own, in order."""
    if isinstance(turn["content"], str):
        return [{"role": turn["role"], "content": turn["content"]}]
    out: list[dict[str, Any]] = []
    current: dict[str, Any] = {"role": turn["role"], "content": ""}
    for i, block in enumerate(turn["content"]):
        where, kind = f"{path}.content[{i}]", block["type"]
        if kind == "text":
            current["content"] += _field(block, "text", where)
        elif kind == "thinking":
            current["reasoning_content"] = current.get("reasoning_content", "") + _field(block, "thinking", where)
        elif kind == "tool_use":
            function = {"name": _field(block, "name", where), "arguments": block.get("input") or {}}
            current.setdefault("tool_calls", []).append(
                {"id": block.get("id") or "", "type": "function", "function": function}
            )
        elif kind == "tool_result":
            if current["content"]:
                out.append(current)
                current = {"role": turn["role"], "content": ""}
            result = read_content(block.get("content"), f"{where}.content")
            out.append({"role": "tool", "tool_call_id": _field(block, "tool_use_id", where), "content": result})
        elif kind != "redacted_thinking":
            raise unsupported(f"{where}.type", f"{kind!r}; only text, thinking, tool_use and tool_result can be read")
    if len(current) > 2 or current["content"] or not out:
        out.append(current)
    return out


def _field(block: dict[str, Any], name: str, path: str) -> str:
    if not isinstance(block.get(name), str):
        raise bad(f"{path}.{name} is missing", f"{path}.{name}", "missing_required_parameter")
    return block[name]


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


class Blocks:
    """Pieces of an answer as content blocks; neighbouring text is one block."""

    def __init__(self) -> None:
        self.blocks: list[dict[str, Any]] = []

    def add(self, delta: Delta) -> tuple[dict[str, Any], bool]:
        """The block that the piece belongs to, and whether it is new."""
        if delta.call:
            call = delta.call
            block = {"type": "tool_use", "id": call.id, "name": call.name, "input": _input(call.arguments)}
        else:
            kind = "thinking" if delta.kind == "reasoning" else "text"
            if self.blocks and self.blocks[-1]["type"] == kind:
                self.blocks[-1][kind] += delta.text
                return self.blocks[-1], False
            block = {"type": kind, kind: delta.text}
            if kind == "thinking":
                block["signature"] = ""
        self.blocks.append(block)
        return block, True


def _input(arguments: str) -> Any:
    value = json.loads(arguments or "{}")
    return value if isinstance(value, dict) else {"value": value}


def message(id: str, model: str, blocks: list[dict[str, Any]], done: Done | None, u: Usage) -> dict[str, Any]:
    return {
        "id": f"msg_{id}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": blocks,
        "stop_reason": stop_reason(done) if done else None,
        "stop_sequence": (done.matched or None) if done else None,
        "usage": usage(u),
    }


class Gathered:
    """The whole message, for clients that don't stream."""

    def __init__(self, id: str, model: str):
        self.id, self.model, self.blocks = id, model, Blocks()

    def step(self, step: Generated) -> None:
        for delta in step.deltas:
            self.blocks.add(delta)

    def done(self, done: Done) -> dict[str, Any]:
        return message(self.id, self.model, self.blocks.blocks, done, done.usage)


EMPTY: dict[str, dict[str, Any]] = {"tool_use": {"input": {}}, "text": {"text": ""}, "thinking": {"thinking": ""}}


class MessageFeed:
    """The named events of a streamed message."""

    ping = frame({"type": "ping"}, "ping")

    def __init__(self, id: str, model: str, prompt_tokens: int):
        self.id, self.model, self.prompt_tokens, self.blocks = id, model, prompt_tokens, Blocks()

    def opening(self) -> bytes:
        start = message(self.id, self.model, [], None, Usage(prompt=self.prompt_tokens))
        return _event("message_start", message=start) + self.ping

    def step(self, step: Generated) -> bytes:
        return b"".join(self._delta(d) for d in step.deltas)

    def _delta(self, delta: Delta) -> bytes:
        out = b""
        before = len(self.blocks.blocks)
        block, new = self.blocks.add(delta)
        index = len(self.blocks.blocks) - 1
        if new:
            if before:
                out += _event("content_block_stop", index=before - 1)
            empty = {**block, **EMPTY[block["type"]]}
            out += _event("content_block_start", index=index, content_block=empty)
        if delta.call:
            inner = {"type": "input_json_delta", "partial_json": delta.call.arguments}
        elif block["type"] == "thinking":
            inner = {"type": "thinking_delta", "thinking": delta.text}
        else:
            inner = {"type": "text_delta", "text": delta.text}
        return out + _event("content_block_delta", index=index, delta=inner)

    def done(self, done: Done) -> bytes:
        out = _event("content_block_stop", index=len(self.blocks.blocks) - 1) if self.blocks.blocks else b""
        delta = {"stop_reason": stop_reason(done), "stop_sequence": done.matched or None}
        return out + _event("message_delta", delta=delta, usage=usage(done.usage)) + _event("message_stop")

    def error(self, error: ApiError) -> bytes:
        return frame(error_body(error), "error")


def _event(name: str, **fields: Any) -> bytes:
    return frame({"type": name, **fields}, name)
