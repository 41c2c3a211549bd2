"""OpenAI's Responses API, the way out: events of an answer become items, and the named events of their making."""

from __future__ import annotations

import time
from typing import Any

from ..dialogue.errors import ApiError
from ..dialogue.request import Delta, Done, Generated, Usage
from .openai_out import chosen, free_text
from .responses import Asked, Item, ToolName, seal
from .responses_store import Responses

REPEATED = ("instructions", "previous_response_id", "top_logprobs", "user", "prompt_cache_key", "safety_identifier")


class Writer:
    """The response and its items as they grow; every change says itself as events, which are numbered."""

    ping = b": keep-alive\n\n"

    def __init__(self, id: str, model: str, asked: Asked, kept: Responses):
        """`kept` takes the response when it is whole, if its client wants that."""
        self.asked = asked
        self.kept = kept
        self.sent = 0
        self.id = id
        self.output: list[Item] = []
        self.thoughts = 0  # steps that thought
        self._open = False  # whether the last item still grows
        body = asked.body
        self.response: Item = {
            "id": f"resp_{id}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "max_output_tokens": body.get("max_output_tokens"),
            "metadata": body.get("metadata") or {},
            "model": model,
            "output": [],
            "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
            "reasoning": {"effort": None, "summary": None} | (body.get("reasoning") or {}),
            "store": asked.kept,
            "temperature": body.get("temperature"),
            "text": {"format": {"type": "text"}} | (body.get("text") or {}),
            "tool_choice": body.get("tool_choice") or "auto",
            "tools": body.get("tools") or [],
            "top_p": body.get("top_p"),
            "truncation": "disabled",
            "usage": None,
        } | {name: body.get(name) for name in REPEATED}

    def opening(self) -> list[Item]:
        return self._numbered(
            [{"type": f"response.{n}", "response": self.response} for n in ("created", "in_progress")]
        )

    def step(self, step: Generated) -> list[Item]:
        self.thoughts += any(d.kind == "reasoning" for d in step.deltas)
        events: list[Item] = []
        for delta in step.deltas:
            events += self._call(delta) if delta.call else self._words(delta, [])
        if step.tokens:
            logprobs = [chosen(t) for t in step.tokens]
            if self._open and self.output[-1]["type"] == "message":
                self.output[-1]["content"][0]["logprobs"] += logprobs
                for event in events:
                    if event["type"] == "response.output_text.delta":
                        event["logprobs"], logprobs = logprobs, []
        return self._numbered(events)

    def done(self, done: Done) -> list[Item]:
        """The events of the end, the last of which holds the whole response."""
        cut = done.reason == "length"
        events = self._close("incomplete" if cut else "completed")
        self.response |= {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "completed_at": None if cut else int(time.time()),
            "output": self.output,
            "usage": usage(done.usage, self.thoughts),
        }
        if self.asked.kept:
            self.kept.keep(self.response, self.asked.items)
        end = {"type": f"response.{self.response['status']}", "response": self.response}
        return self._numbered([*events, end])

    def error(self, error: ApiError) -> list[Item]:
        code = error.code or error.kind
        self.response |= {"status": "failed", "error": {"code": code, "message": error.message}, "output": self.output}
        return self._numbered([{"type": "response.failed", "response": self.response}])

    def whole(self) -> Item:
        return self.response

    def _numbered(self, events: list[Item]) -> list[Item]:
        first, self.sent = self.sent, self.sent + len(events)
        return [event | {"sequence_number": i} for i, event in enumerate(events, first)]

    def _words(self, delta: Delta, logprobs: list[Item]) -> list[Item]:
        thought = delta.kind == "reasoning"
        kind, part = ("reasoning", "reasoning_text") if thought else ("message", "output_text")
        events: list[Item] = []
        if not (self._open and self.output[-1]["type"] == kind):
            events += self._close()
            item: Item = {"id": self._name("rs" if thought else "msg"), "type": kind, "status": "in_progress"}
            item |= {"summary": [], "content": []} if thought else {"role": "assistant", "content": []}
            events += self._begin(item)
            empty: Item = {"type": part, "text": ""} | ({} if thought else {"annotations": [], "logprobs": []})
            item["content"].append(empty)
            events.append(self._event("response.content_part.added", content_index=0, part=dict(empty)))
        self.output[-1]["content"][0]["text"] += delta.text
        event = self._event(f"response.{part}.delta", content_index=0, delta=delta.text)
        return [*events, event if thought else event | {"logprobs": logprobs}]

    def _call(self, delta: Delta) -> list[Item]:
        call = delta.call
        assert call is not None
        outside = self.asked.names.get(call.name) or ToolName(call.name)
        events = self._close()
        item: Item = {"id": self._name("fc"), "call_id": call.id, "name": outside.name, "status": "in_progress"}
        if outside.namespace:
            item["namespace"] = outside.namespace
        if outside.custom:
            kind, field, text = "custom_tool_call", "input", free_text(call)
        else:
            kind, field, text = "function_call", "arguments", call.arguments
        item |= {"type": kind, field: ""}
        events += self._begin(item)
        item[field] = text
        name = f"response.{kind}_{field}"
        events += [self._event(f"{name}.delta", delta=text), self._event(f"{name}.done", **{field: text})]
        return events + self._close()

    def _begin(self, item: Item) -> list[Item]:
        self.output.append(item)
        self._open = True
        copy = {k: list(v) if isinstance(v, list) else v for k, v in item.items()}
        return [{"type": "response.output_item.added", "output_index": len(self.output) - 1, "item": copy}]

    def _close(self, status: str = "completed") -> list[Item]:
        if not self._open:
            return []
        self._open = False
        item, events = self.output[-1], []
        item["status"] = status
        if item["type"] in ("message", "reasoning"):
            part = item["content"][0]
            done = self._event(f"response.{part['type']}.done", content_index=0, text=part["text"])
            if item["type"] == "message":
                done["logprobs"] = part["logprobs"]
            events = [done, self._event("response.content_part.done", content_index=0, part=part)]
            if item["type"] == "reasoning" and self.asked.sealed:
                item["encrypted_content"] = seal(part["text"])
        index = len(self.output) - 1
        return [*events, {"type": "response.output_item.done", "output_index": index, "item": item}]

    def _event(self, kind: str, **fields: Any) -> Item:
        return {"type": kind, "item_id": self.output[-1]["id"], "output_index": len(self.output) - 1, **fields}

    def _name(self, prefix: str) -> str:
        return f"{prefix}_{self.id}{len(self.output):02}"


def usage(u: Usage, thoughts: int) -> Item:
    return {
        "input_tokens": u.prompt,
        "input_tokens_details": {"cached_tokens": u.cached, "cache_write_tokens": 0},
        "output_tokens": u.completion,
        "output_tokens_details": {"reasoning_tokens": thoughts},
        "total_tokens": u.prompt + u.completion,
    }
