"""OpenAI's wire format, both ways, as pure functions: a body becomes a `GenerationRequest`, events responses.

Fields that nobody knows are ignored, as clients expect. Fields that OpenAI's API (or a known server) knows and this
one can't serve are refused with a 400 that names them, unless their value asks for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..dialogue.errors import bad, unsupported
from ..dialogue.request import Chosen, Delta, Done, GenerationRequest, SamplingParams, ToolCall, Usage
from .schema import (
    ChatRequest,
    Common,
    CompletionRequest,
    Message,
    MessageCall,
    NamedTool,
    Part,
    ResponseFormat,
    check,
    parse_json,
)

# Known fields that are not served, with the values that ask for nothing.
IDLE: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "store": (False,),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "functions": ([],),
    "function_call": (),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "verbosity": (),
    "draft_model": (),
    "num_draft_tokens": (),
    "adapters": (),
    "role_mapping": (),
    "xtc_probability": (0, 0.0),
    "repetition_context_size": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "use_beam_search": (False,),
}

HINTS = {
    "n": "send the request n times; the prompt is read once",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "guided_json": "use response_format with json_schema",
}


def refuse_unsupported(body: dict[str, Any], idle: dict[str, tuple[Any, ...]] = IDLE) -> None:
    """Raise ApiError for a known field that asks for something this server does not do."""
    for name, harmless in idle.items():
        if body.get(name) is not None and body[name] not in harmless:
            raise unsupported(name, HINTS.get(name, ""))


def read_chat(body: dict[str, Any]) -> GenerationRequest:
    """The request in a /v1/chat/completions body. Raises ApiError."""
    refuse_unsupported(body)
    form = check(body, ChatRequest)
    if form.top_logprobs is not None and not form.logprobs:
        raise bad("top_logprobs needs logprobs: true", "top_logprobs")
    tools: tuple[dict[str, Any], ...] = tuple(body.get("tools") or ())
    choice = form.tool_choice or "auto"
    if choice == "none":
        tools = ()
    elif choice != "auto" and not tools:
        raise bad("tool_choice needs tools", "tool_choice")
    if isinstance(choice, NamedTool):
        name = choice.function.name
        if name not in {t["function"]["name"] for t in tools}:
            raise bad(f"tool_choice names {name!r}, which is not in tools", "tool_choice")
        tools = tuple(t for t in tools if t["function"]["name"] == name)
        choice = "required"
    return GenerationRequest(
        messages=tuple(read_message(m, f"messages[{i}]") for i, m in enumerate(form.messages)),
        max_tokens=form.max_tokens if form.max_completion_tokens is None else form.max_completion_tokens,
        logprobs=(form.top_logprobs or 0) if form.logprobs else None,
        tools=tools,
        tool_choice=choice,
        parallel_calls=form.parallel_tool_calls is not False,
        template=_template(form),
        **_common(form),
    )


def read_completion(body: dict[str, Any]) -> GenerationRequest:
    """The request in a /v1/completions body. Raises ApiError."""
    refuse_unsupported(body)
    form = check(body, CompletionRequest)
    prompt = form.prompt if isinstance(form.prompt, str) else tuple(form.prompt)
    return GenerationRequest(prompt=prompt, max_tokens=form.max_tokens, logprobs=form.logprobs, **_common(form))


def read_message(message: Message, path: str) -> dict[str, Any]:
    """A message as chat templates take it: text content, developer as system, call arguments as objects."""
    role = "system" if message.role == "developer" else message.role
    out: dict[str, Any] = {"role": role, "content": read_content(message.content, f"{path}.content")}
    if message.name is not None:
        out["name"] = message.name
    if message.tool_call_id is not None:
        out["tool_call_id"] = message.tool_call_id
    if reasoning := message.reasoning_content or message.reasoning:
        out["reasoning_content"] = reasoning
    if message.tool_calls:
        out["tool_calls"] = [_read_call(c, f"{path}.tool_calls[{i}]") for i, c in enumerate(message.tool_calls)]
    return out


def read_content(content: str | list[Part] | None, path: str) -> str:
    """The text of a content: a string, or text parts joined. Raises ApiError for images, audio and files."""
    if content is None or isinstance(content, str):
        return content or ""
    for i, part in enumerate(content):
        if part.type not in ("text", "input_text", "output_text") or part.text is None:
            raise unsupported(f"{path}[{i}].type", f"{part.type!r}; only text parts can be read")
    return "".join(part.text or "" for part in content)


def read_format(wanted: ResponseFormat | None) -> dict[str, Any] | None:
    """The JSON Schema that response_format asks for, or None."""
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"}
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise bad("response_format.json_schema.schema is missing", "response_format.json_schema.schema")
    return wanted.json_schema.schema_


def _read_call(call: MessageCall, path: str) -> dict[str, Any]:
    arguments = parse_json(call.function.arguments or "{}", f"{path}.function.arguments")
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id or "", "type": "function", "function": function}


def _template(form: ChatRequest) -> dict[str, Any]:
    variables = dict(form.chat_template_kwargs or {})
    for name, value in variables.items():
        plain = value is None or isinstance(value, (bool, int, float)) or (isinstance(value, str) and len(value) < 256)
        if name in RESERVED or not name.isidentifier() or name.startswith("_") or not plain:
            path = f"chat_template_kwargs.{name}"
            raise bad(
                f"{path} can't be set by a request; only simple values for the template's own variables can", path
            )
    if form.reasoning_effort:
        variables.setdefault("reasoning_effort", form.reasoning_effort)
    return variables


# Arguments of the tokenizer's template function itself: a request may set only the template's variables.
RESERVED = frozenset(
    {"conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "padding", "tokenize"}
    | {"continue_final_message", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"}
    | {"return_assistant_tokens_mask", "processor_kwargs"}
)


def _common(form: Common) -> dict[str, Any]:
    stops = [form.stop] if isinstance(form.stop, str) else form.stop or []
    bias = form.logit_bias or {}
    wrong = next((k for k in bias if not (k.isascii() and k.isdigit() and len(k) < 12)), None)
    if wrong is not None:
        raise bad(f"logit_bias has the key {wrong[:20]!r}; keys are token ids", "logit_bias")
    return {
        "model": form.model,
        "stop": tuple(s for s in stops if s),
        "schema": read_format(form.response_format),
        "stream": bool(form.stream),
        "include_usage": bool(form.stream_options and form.stream_options.include_usage),
        "sampling": SamplingParams(
            temperature=form.temperature,  # type: ignore[arg-type]  # None: the server's default, filled in later
            top_p=form.top_p,  # type: ignore[arg-type]
            top_k=form.top_k or 0,
            min_p=form.min_p or 0.0,
            seed=None if form.seed is None else form.seed % 2**64,
            presence_penalty=form.presence_penalty or 0.0,
            frequency_penalty=form.frequency_penalty or 0.0,
            repetition_penalty=form.repetition_penalty or 1.0,
            logit_bias=tuple((int(k), v) for k, v in bias.items()),
        ),
    }


def first(body: dict[str, Any], *names: str) -> Any:
    """The first of several fields that is given."""
    return next((body[n] for n in names if body.get(n) is not None), None)


def as_int(value: Any) -> int | None:
    return None if value is None else int(value)


# ---- what goes back


@dataclass
class GatheredAnswer:
    """An answer gathered from its events, for clients that don't stream."""

    content: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    tokens: list[Chosen] = field(default_factory=list)

    def add(self, deltas: Iterable[Delta], tokens: Iterable[Chosen]) -> None:
        for delta in deltas:
            if delta.call:
                self.calls.append(delta.call)
            elif delta.kind == "reasoning":
                self.reasoning += delta.text
            else:
                self.content += delta.text
        self.tokens.extend(tokens)


@dataclass(frozen=True)
class Head:
    """What all chunks of one response share."""

    id: str
    created: int
    model: str
    fingerprint: str
    chat: bool
    include_usage: bool = False

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


def response(head: Head, answer: GatheredAnswer, done: Done, logprobs: bool) -> dict[str, Any]:
    """The whole response of a request that does not stream."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": done.reason, "logprobs": None}
    if head.chat:
        message: dict[str, Any] = {"role": "assistant", "content": answer.content, "refusal": None}
        if answer.reasoning:
            message |= {"reasoning": answer.reasoning, "reasoning_content": answer.reasoning}
        if answer.calls:
            message["content"] = answer.content or None
            message["tool_calls"] = [_call(c) for c in answer.calls]
        choice["message"] = message
        if logprobs:
            choice["logprobs"] = {"content": [_chosen(t) for t in answer.tokens], "refusal": None}
    else:
        choice["text"] = answer.content
        if logprobs:
            choice["logprobs"] = _legacy(answer.tokens, 0)
    return head.wrap([choice], False) | {"usage": usage(done.usage), "opentq": timings(done.usage)}


def opening(head: Head) -> list[dict[str, Any]]:
    """The chunks before the first token: chat names the role."""
    return [_chunk(head, {"role": "assistant", "content": ""})] if head.chat else []


class Chunks:
    """Chunks of one streamed answer; numbers its tool calls and its text offsets."""

    def __init__(self, head: Head, logprobs: bool):
        self.head = head
        self.logprobs = logprobs
        self.calls = 0
        self.offset = 0

    def step(self, deltas: tuple[Delta, ...], tokens: tuple[Chosen, ...]) -> list[dict[str, Any]]:
        """One chunk per piece; log probabilities of tokens whose text is still held back come with an empty piece."""
        pieces = list(deltas) or ([Delta("content")] if self.logprobs and tokens else [])
        chunks = [self._piece(d) for d in pieces]
        if self.logprobs and tokens and chunks:
            choice = chunks[0]["choices"][0]
            choice["logprobs"] = (
                {"content": [_chosen(t) for t in tokens], "refusal": None}
                if self.head.chat
                else _legacy(list(tokens), self.offset)
            )
            self.offset += sum(len(t.text) for t in tokens)
        return chunks

    def _piece(self, delta: Delta) -> dict[str, Any]:
        if not self.head.chat:
            return _chunk(self.head, delta.text)
        if delta.call:
            self.calls += 1
            return _chunk(self.head, {"tool_calls": [{"index": self.calls - 1, **_call(delta.call)}]})
        if delta.kind == "reasoning":
            return _chunk(self.head, {"reasoning": delta.text, "reasoning_content": delta.text})
        return _chunk(self.head, {"content": delta.text})

    def end(self, done: Done) -> list[dict[str, Any]]:
        """The chunk with the finish reason, and the one with the usage (its `choices` are empty) when asked for."""
        last = _chunk(self.head, {} if self.head.chat else "", done.reason) | {"opentq": timings(done.usage)}
        if not self.head.include_usage:
            return [last]
        return [last, self.head.wrap([], True) | {"usage": usage(done.usage)}]


def _chunk(head: Head, delta: Any, reason: str | None = None) -> dict[str, Any]:
    body = {"delta": delta} if head.chat else {"text": delta}
    return head.wrap([{"index": 0, **body, "finish_reason": reason, "logprobs": None}], True)


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


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _chosen(token: Chosen) -> dict[str, Any]:
    def entry(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return entry(token.text, token.logprob) | {"top_logprobs": [entry(t, p) for t, p in token.top]}


def _legacy(tokens: list[Chosen], offset: int) -> dict[str, Any]:
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
