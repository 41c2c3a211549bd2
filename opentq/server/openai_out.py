"""OpenAI's wire format, the way out: events of an answer become chunks, or one response."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from .. import __version__
from ..dialogue.errors import ApiError
from ..dialogue.request import Chosen, Delta, Done, Generated, GenerationRequest, ToolCall, Usage

FINGERPRINT = f"opentq-{__version__}"


@dataclass
class Choice:
    """One answer of a response so far; `offset` is where in the text its next token stands."""

    deltas: list[Delta] = field(default_factory=list)
    tokens: list[Chosen] = field(default_factory=list)
    calls: int = 0
    offset: int = 0
    reason: str | None = None


class Writer:
    """A response as it grows, of one answer or several; every change says itself as chunks."""

    ping = b": keep-alive\n\n"

    def __init__(self, id: str, model: str, asked: GenerationRequest, chat: bool, echo: tuple[str, ...] = ()):
        """`echo` is what each answer begins with: its prompt, where that was asked for."""
        self.asked = asked
        self.chat = chat
        self.echo = echo
        self.choices = [Choice() for _ in range(asked.n * max(len(asked.prompts), 1))]
        self.usage = Usage()
        self.kind = "chat.completion" if chat else "text_completion"
        self.head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + id,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }

    def opening(self) -> list[Any]:
        """The chunks before the first token: chat names the role, an echo repeats the prompt."""
        if self.chat:
            return [self._chunk(i, {"role": "assistant", "content": ""}) for i in range(len(self.choices))]
        return [self._chunk(i, text) for i, text in enumerate(self.echo) if text]

    def step(self, step: Generated) -> list[Any]:
        """One chunk per delta; log probabilities of tokens whose text is still held back come with an empty one."""
        choice, deltas = self.choices[step.choice], step.deltas
        choice.deltas += deltas
        choice.tokens += step.tokens
        if step.tokens and not deltas:
            deltas = (Delta("content"),)
        chunks = [self._chunk(step.choice, self._said(choice, d)) for d in deltas]
        if step.tokens:
            chunks[0]["choices"][0]["logprobs"] = self._logprobs(step.tokens, choice.offset)
            choice.offset += sum(len(t.text) for t in step.tokens)
        return chunks

    def done(self, done: Done) -> list[Any]:
        """The chunk with the finish reason, and the one with the usage (its `choices` are empty) when asked for."""
        self.choices[done.choice].reason, self.usage = done.reason, done.usage
        last = self._chunk(done.choice, {} if self.chat else "", done.reason) | {"opentq": timings(done.usage)}
        if not done.last:
            return [last]
        if self.asked.include_usage:
            return [last, self._wrap([]) | {"usage": usage(done.usage)}, "[DONE]"]
        return [last, "[DONE]"]

    def error(self, error: ApiError) -> list[Any]:
        return [error.body(), "[DONE]"]

    def whole(self) -> dict[str, Any]:
        choices = []
        for i, choice in enumerate(self.choices):
            logprobs = None if self.asked.logprobs is None else self._logprobs(tuple(choice.tokens))
            choices.append({"index": i, **self._whole(i), "finish_reason": choice.reason, "logprobs": logprobs})
        told = {"choices": choices, "usage": usage(self.usage), "opentq": timings(self.usage)}
        return self.head | {"object": self.kind, **told}

    def _whole(self, index: int) -> dict[str, Any]:
        """An answer's message, or its text."""
        deltas = self.choices[index].deltas
        reasoning = "".join(d.text for d in deltas if d.kind == "reasoning")
        content = "".join(d.text for d in deltas if d.kind == "content")
        if not self.chat:
            return {"text": (self.echo[index] if self.echo else "") + content}
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if reasoning:
            message |= {"reasoning": reasoning, "reasoning_content": reasoning}
        if calls := [self._call(d.call) for d in deltas if d.call]:
            message |= {"content": content or None, "tool_calls": calls}
        return {"message": message}

    def _chunk(self, index: int, said: Any, reason: str | None = None) -> dict[str, Any]:
        body = {"delta": said} if self.chat else {"text": said}
        return self._wrap([{"index": index, **body, "finish_reason": reason, "logprobs": None}])

    def _wrap(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else self.kind
        none_yet = {"usage": None} if self.asked.include_usage else {}
        return self.head | {"object": kind, "choices": choices, **none_yet}

    def _said(self, choice: Choice, delta: Delta) -> Any:
        if not self.chat:
            return delta.text
        if delta.call:
            choice.calls += 1
            return {"tool_calls": [{"index": choice.calls - 1, **self._call(delta.call)}]}
        if delta.kind == "reasoning":
            return {"reasoning": delta.text, "reasoning_content": delta.text}
        return {"content": delta.text}

    def _call(self, call: ToolCall) -> dict[str, Any]:
        """A tool call in the client's form: of a function, or of a tool whose input is text."""
        if call.name not in self.asked.custom:
            return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        return {"id": call.id, "type": "custom", "custom": {"name": call.name, "input": free_text(call)}}

    def _logprobs(self, tokens: tuple[Chosen, ...], offset: int = 0) -> dict[str, Any]:
        """The log probabilities of an answer's tokens; those of /v1/completions say where in the text each stands."""
        if self.chat:
            return {"content": [chosen(t) for t in tokens], "refusal": None}
        *offsets, _end = accumulate((len(t.text) for t in tokens), initial=offset)
        return {
            "tokens": [t.text for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [dict(t.top) for t in tokens],
            "text_offset": offsets,
        }


def free_text(call: ToolCall) -> str:
    """The text in a call of a custom tool; the arguments as they are where the model gave it another form."""
    try:
        given = json.loads(call.arguments or "{}")
    except ValueError:
        return call.arguments
    text = given.get("input") if isinstance(given, dict) else None
    return text if isinstance(text, str) else call.arguments


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


def chosen(token: Chosen) -> dict[str, Any]:
    """A token with its log probability and those of the likeliest others."""

    def entry(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return entry(token.text, token.logprob) | {"top_logprobs": [entry(t, p) for t, p in token.top]}
