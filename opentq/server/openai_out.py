"""OpenAI's wire format, the way out: events of an answer become chunks, or one response."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..dialogue.errors import ApiError
from ..dialogue.request import Chosen, Delta, Done, Generated, ToolCall, Usage
from .sse import frame


@dataclass(frozen=True)
class Head:
    """What all chunks of one response share."""

    id: str
    created: int
    model: str
    fingerprint: str
    chat: bool
    include_usage: bool = False
    custom: frozenset[str] = frozenset()
    echo: tuple[str, ...] = ()

    def call(self, call: ToolCall) -> dict[str, Any]:
        """A tool call in the client's form: of a function, or of a tool whose input is text."""
        if call.name not in self.custom:
            return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        return {"id": call.id, "type": "custom", "custom": {"name": call.name, "input": free_text(call)}}

    def echoed(self, choice: int) -> str:
        """What an answer begins with: its prompt, where that was asked for."""
        return self.echo[choice] if self.echo else ""

    def wrap(self, choices: list[dict[str, Any]], chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion" + (".chunk" if chunk else "")) if self.chat else "text_completion"
        body = {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }
        if chunk and self.include_usage:
            body["usage"] = None
        return body


def free_text(call: ToolCall) -> str:
    """The text in a call of a custom tool; the arguments as they are where the model gave it another form."""
    try:
        given = json.loads(call.arguments or "{}")
    except ValueError:
        return call.arguments
    text = given.get("input") if isinstance(given, dict) else None
    return text if isinstance(text, str) else call.arguments


class Chunks:
    """Chunks of one streamed answer; numbers its tool calls and its text offsets."""

    def __init__(self, head: Head, logprobs: bool, index: int = 0):
        self.head = head
        self.logprobs = logprobs
        self.index = index
        self.calls = 0
        self.offset = 0

    def opening(self) -> list[dict[str, Any]]:
        """The chunks before the first token: chat names the role, an echo repeats the prompt."""
        if self.head.chat:
            return [self._chunk({"role": "assistant", "content": ""})]
        return [self._chunk(echo)] if (echo := self.head.echoed(self.index)) else []

    def step(self, deltas: tuple[Delta, ...], tokens: tuple[Chosen, ...]) -> list[dict[str, Any]]:
        """One chunk per delta; log probabilities of tokens whose text is still held back come with an empty one."""
        deltas = deltas or ((Delta("content"),) if self.logprobs and tokens else ())
        chunks = [self._said(d) for d in deltas]
        if self.logprobs and tokens and chunks:
            chunks[0]["choices"][0]["logprobs"] = _logprobs(self.head, tokens, self.offset)
            self.offset += sum(len(t.text) for t in tokens)
        return chunks

    def _said(self, delta: Delta) -> dict[str, Any]:
        if not self.head.chat:
            return self._chunk(delta.text)
        if delta.call:
            self.calls += 1
            return self._chunk({"tool_calls": [{"index": self.calls - 1, **self.head.call(delta.call)}]})
        if delta.kind == "reasoning":
            return self._chunk({"reasoning": delta.text, "reasoning_content": delta.text})
        return self._chunk({"content": delta.text})

    def end(self, done: Done) -> list[dict[str, Any]]:
        """The chunk with the finish reason, and the one with the usage (its `choices` are empty) when asked for."""
        last = self._chunk({} if self.head.chat else "", done.reason) | {"opentq": timings(done.usage)}
        if not (self.head.include_usage and done.last):
            return [last]
        return [last, self.head.wrap([], True) | {"usage": usage(done.usage)}]

    def _chunk(self, delta: Any, reason: str | None = None) -> dict[str, Any]:
        body = {"delta": delta} if self.head.chat else {"text": delta}
        return self.head.wrap([{"index": self.index, **body, "finish_reason": reason, "logprobs": None}], True)


class Feed:
    """The chunks of all answers as server-sent events."""

    ping = b": keep-alive\n\n"

    def __init__(self, head: Head, logprobs: bool, count: int = 1):
        self.choices = [Chunks(head, logprobs, i) for i in range(count)]

    def opening(self) -> bytes:
        return b"".join(frame(chunk) for choice in self.choices for chunk in choice.opening())

    def step(self, step: Generated) -> bytes:
        return b"".join(map(frame, self.choices[step.choice].step(step.deltas, step.tokens)))

    def done(self, done: Done) -> bytes:
        chunks = b"".join(map(frame, self.choices[done.choice].end(done)))
        return chunks + frame("[DONE]") if done.last else chunks

    def error(self, error: ApiError) -> bytes:
        return frame(error.body()) + frame("[DONE]")


class Gathered:
    """The whole response, for clients that don't stream."""

    def __init__(self, head: Head, logprobs: bool, count: int = 1):
        self.head, self.logprobs = head, logprobs
        self.deltas: list[list[Delta]] = [[] for _ in range(count)]
        self.tokens: list[list[Chosen]] = [[] for _ in range(count)]
        self.choices: dict[int, dict[str, Any]] = {}

    def step(self, step: Generated) -> None:
        self.deltas[step.choice] += step.deltas
        self.tokens[step.choice] += step.tokens

    def done(self, done: Done) -> dict[str, Any]:
        """The response so far, which is whole when the last answer has ended."""
        logprobs = _logprobs(self.head, self.tokens[done.choice]) if self.logprobs else None
        choice = {"index": done.choice, "finish_reason": done.reason, "logprobs": logprobs}
        self.choices[done.choice] = choice | self._said(done.choice)
        choices = [self.choices[i] for i in sorted(self.choices)]
        return self.head.wrap(choices, False) | {"usage": usage(done.usage), "opentq": timings(done.usage)}

    def _said(self, index: int) -> dict[str, Any]:
        """An answer's message, or its text."""
        deltas = self.deltas[index]
        content, reasoning = (
            "".join(d.text for d in deltas if not d.call and (d.kind == "reasoning") == thought)
            for thought in (False, True)
        )
        if not self.head.chat:
            return {"text": self.head.echoed(index) + content}
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if reasoning:
            message |= {"reasoning": reasoning, "reasoning_content": reasoning}
        if calls := [self.head.call(d.call) for d in deltas if d.call]:
            message |= {"content": content or None, "tool_calls": calls}
        return {"message": message}


def usage(u: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": u.prompt,
        "completion_tokens": u.completion,
        "total_tokens": u.prompt + u.completion,
        "prompt_tokens_details": {"cached_tokens": u.cached},
    }


def timings(u: Usage) -> dict[str, float]:
    """Seconds, under this server's own key: never inside `usage`."""
    return {
        "queue_seconds": round(u.queue_seconds, 4),
        "prompt_seconds": round(u.prompt_seconds, 4),
        "generation_seconds": round(u.generation_seconds, 4),
    }


def _logprobs(head: Head, tokens: Sequence[Chosen], offset: int = 0) -> dict[str, Any]:
    """The log probabilities of an answer's tokens; those of /v1/completions say where in the text each stands."""
    if head.chat:
        return {"content": [chosen(t) for t in tokens], "refusal": None}
    return _legacy(tokens, offset)


def chosen(token: Chosen) -> dict[str, Any]:
    """A token with its log probability and those of the likeliest others."""

    def entry(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return entry(token.text, token.logprob) | {"top_logprobs": [entry(t, p) for t, p in token.top]}


def _legacy(tokens: Sequence[Chosen], offset: int) -> dict[str, Any]:
    """The log probabilities of /v1/completions."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [t.text for t in tokens],
        "token_logprobs": [t.logprob for t in tokens],
        "top_logprobs": [dict(t.top) for t in tokens],
        "text_offset": offsets,
    }
