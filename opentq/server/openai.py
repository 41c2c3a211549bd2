"""OpenAI's wire format, both ways, as pure functions: a body becomes a `GenerationRequest`, events responses.

Fields that nobody knows are ignored, as clients expect. Fields that OpenAI's API (or a known server) knows and this
one can't serve are refused with a 400 that names them, unless their value asks for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..dialogue import pictures
from ..dialogue.errors import bad, unsupported
from ..dialogue.request import Chosen, Delta, Done, GenerationRequest, SamplingParams, ToolCall, Usage
from .schema import (
    MAX_PROMPTS,
    ChatRequest,
    ChosenTool,
    Common,
    CompletionRequest,
    CustomTool,
    Message,
    MessageCall,
    Part,
    ResponseFormat,
    Tool,
    check,
    parse_json,
)
from .tool_choice import choose

# Known fields that are not served, with the values that ask for nothing.
IDLE: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "modalities": (["text"],),
    "functions": ([],),
    "function_call": (),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "draft_model": (),
    "num_draft_tokens": (),
    "adapters": (),
    "role_mapping": (),
    "xtc_probability": (0, 0.0),
    "xtc_threshold": (0, 0.0),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "use_beam_search": (False,),
}

HINTS = {
    "xtc_probability": "it draws from a random state that all requests share; min_p and top_p don't",
    "draft_model": "start the server with --draft-model",
    "num_draft_tokens": "start the server with --num-draft-tokens",
    "adapters": "start the server with --adapter-path",
    "role_mapping": "start the server with --chat-template",
    "best_of": "ask for n and choose",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "guided_json": "use response_format with json_schema",
}


def refuse_unsupported(body: dict[str, Any], idle: dict[str, tuple[Any, ...]] = IDLE) -> None:
    """Raise ApiError for a known field that asks for something this server does not do."""
    if body.get("best_of") not in (None, 1, body.get("n")):
        raise unsupported("best_of", HINTS["best_of"])
    for name, harmless in idle.items():
        value = body.get(name)
        empty = isinstance(value, dict) and value and all(inner is None for inner in value.values())
        if value is not None and not empty and value not in harmless:
            raise unsupported(name, HINTS.get(name, ""))


def read_chat(body: dict[str, Any]) -> GenerationRequest:
    """The request in a /v1/chat/completions body. Raises ApiError."""
    refuse_unsupported(body)
    form = check(body, ChatRequest)
    if form.top_logprobs is not None and not form.logprobs:
        raise bad("top_logprobs needs logprobs: true", "top_logprobs")
    messages = tuple(read_message(m, f"messages[{i}]") for i, m in enumerate(form.messages))
    if form.continue_final_message:
        check_continued(messages, form.response_format, "response_format")
    return GenerationRequest(
        messages=messages,
        continue_last=bool(form.continue_final_message),
        max_tokens=form.max_tokens if form.max_completion_tokens is None else form.max_completion_tokens,
        logprobs=(form.top_logprobs or 0) if form.logprobs else None,
        custom=frozenset(t.custom.name if t.custom else t.name or "" for t in form.tools or () if t.type == "custom"),
        n=form.n or 1,
        parallel_calls=form.parallel_tool_calls is not False,
        template=_template(form),
        **choose_tools(form.tools or [], form.tool_choice or "auto"),
        **_common(form),
    )


def read_completion(body: dict[str, Any]) -> GenerationRequest:
    """The request in a /v1/completions body. Raises ApiError."""
    refuse_unsupported(body)
    form = check(body, CompletionRequest)
    given: Any = form.prompt
    several = isinstance(given, list) and not isinstance(given[0], int)
    prompts = [p if isinstance(p, str) else tuple(p) for p in (given if several else [given])]
    if form.echo and form.logprobs is not None:
        raise unsupported("echo", "log probabilities are of the answer alone; send echo without logprobs")
    if len(prompts) * (form.n or 1) > MAX_PROMPTS:
        raise bad(f"prompts and n ask for {len(prompts) * (form.n or 1)} answers; {MAX_PROMPTS} at most", "n")
    return GenerationRequest(
        prompt=prompts[0],
        prompts=tuple(prompts),
        max_tokens=form.max_tokens,
        logprobs=form.logprobs,
        n=form.n or 1,
        echo=bool(form.echo),
        **_common(form),
    )


def choose_tools(given: list[Tool], choice: str | ChosenTool) -> dict[str, Any]:
    """The tools as chat templates take them, and which of them may or must be called (`choose`). Raises ApiError."""
    tools = [_read_tool(t, f"tools[{i}]") for i, t in enumerate(given)]
    if isinstance(choice, str):
        return choose(tools, choice)
    if choice.type != "allowed_tools":
        inner = choice.function or choice.custom
        return choose(tools, "required", [inner.name if inner else choice.name])
    if choice.allowed_tools is None:
        raise bad("tool_choice.allowed_tools is missing", "tool_choice.allowed_tools")
    allowed = [t.get(str(t.get("type"))) or t for t in choice.allowed_tools.tools]
    return choose(tools, choice.allowed_tools.mode, [a.get("name") for a in allowed if isinstance(a, dict)])


def _read_tool(tool: Tool, path: str) -> dict[str, Any]:
    """OpenAI's function, whichever form it was given in; a custom tool is a function with one text."""
    if tool.type == "custom":
        custom = tool.custom or (CustomTool(name=tool.name, description=tool.description) if tool.name else None)
        if custom is None:
            raise bad(f"{path}.custom is missing", f"{path}.custom", "missing_required_parameter")
        return free_text_tool(custom.name, custom.description or "", custom.format)
    if tool.function is None and tool.name is None:
        raise bad(f"{path}.function is missing", f"{path}.function", "missing_required_parameter")
    function: Any = tool.function or tool
    out: dict[str, Any] = {"name": function.name}
    out |= {k: v for k in ("description", "parameters") if (v := getattr(function, k)) is not None}
    return {"type": "function", "function": out}


def free_text_tool(name: str, description: str, form: dict[str, Any] | None) -> dict[str, Any]:
    """A function in the place of a tool whose input is text in some form."""
    grammar = (form or {}).get("grammar") or form or {}
    if grammar.get("definition"):
        description += f"\n\nThe input must follow this {grammar.get('syntax') or ''} grammar:\n{grammar['definition']}"
    schema = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def read_message(message: Message, path: str) -> dict[str, Any]:
    """A message as chat templates take it: text content, developer as system, call arguments as objects."""
    role = "system" if message.role == "developer" else message.role
    content = read_content(message.content, f"{path}.content", images=role == "user")
    out: dict[str, Any] = {"role": role, "content": content}
    if message.name is not None:
        out["name"] = message.name
    if message.tool_call_id is not None:
        out["tool_call_id"] = message.tool_call_id
    if reasoning := message.reasoning_content or message.reasoning:
        out["reasoning_content"] = reasoning
    if message.tool_calls:
        out["tool_calls"] = [_read_call(c, f"{path}.tool_calls[{i}]") for i, c in enumerate(message.tool_calls)]
    return out


def read_content(content: str | list[Part] | None, path: str, images: bool = False) -> pictures.Content:
    """What a content holds: a string, or text parts joined; with `images`, those too. Raises ApiError for other parts
    and for images elsewhere.
    """
    if content is None or isinstance(content, str):
        return content or ""
    found: list[str | pictures.Picture] = []
    for i, part in enumerate(content):
        where = f"{path}[{i}]"
        text = part.refusal if part.type == "refusal" else part.text
        if part.type in ("text", "input_text", "output_text", "refusal") and text is not None:
            found.append(text)
        elif part.type in ("image_url", "input_image") and part.image_url is not None and images:
            url = part.image_url if isinstance(part.image_url, str) else part.image_url.url
            found.append(pictures.from_url(url, f"{where}.image_url"))
        else:
            known = "only text parts, and images of the user's, can be read"
            raise unsupported(f"{where}.type", f"{part.type!r}; {known}")
    return pictures.content(found)


def check_continued(messages: Sequence[dict[str, Any]], form: Any, param: str) -> None:
    """Raise ApiError unless an answer can go on with the last message; `form` is what `param` asks of an answer."""
    last, path = messages[-1], f"messages[{len(messages) - 1}]"
    if last["role"] != "assistant" or last.get("tool_calls") or not last["content"].strip():
        raise bad(f"{path} is no text of the assistant's that an answer could go on with", path)
    if last["content"] != last["content"].rstrip():
        raise bad(f"{path}.content is to be gone on with, and so must not end with white space", f"{path}.content")
    if form:
        raise bad(f"{param} holds whole answers to a form; it can't be used where one was begun", param)


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
    if call.custom:
        function: dict[str, Any] = {"name": call.custom.name, "arguments": {"input": call.custom.input}}
    elif call.function:
        arguments = parse_json(call.function.arguments or "{}", f"{path}.function.arguments")
        function = {"name": call.function.name, "arguments": arguments}
    else:
        raise bad(f"{path}.function is missing", f"{path}.function", "missing_required_parameter")
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
            top_k=form.top_k,  # type: ignore[arg-type]
            min_p=form.min_p,  # type: ignore[arg-type]
            seed=None if form.seed is None else form.seed % 2**64,
            presence_penalty=form.presence_penalty or 0.0,
            frequency_penalty=form.frequency_penalty or 0.0,
            repetition_penalty=form.repetition_penalty or 1.0,
            repetition_context=form.repetition_context_size,
            logit_bias=tuple((int(k), v) for k, v in bias.items()),
        ),
    }


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


def response(head: Head, choices: list[dict[str, Any]], u: Usage) -> dict[str, Any]:
    """The whole response of a request that does not stream."""
    return head.wrap(choices, False) | {"usage": usage(u), "opentq": timings(u)}


def whole_choice(head: Head, answer: GatheredAnswer, done: Done, logprobs: bool) -> dict[str, Any]:
    """One answer, of one or several."""
    choice: dict[str, Any] = {"index": done.choice, "finish_reason": done.reason, "logprobs": None}
    if head.chat:
        message: dict[str, Any] = {"role": "assistant", "content": answer.content, "refusal": None}
        if answer.reasoning:
            message |= {"reasoning": answer.reasoning, "reasoning_content": answer.reasoning}
        if answer.calls:
            message["content"] = answer.content or None
            message["tool_calls"] = [head.call(c) for c in answer.calls]
        choice["message"] = message
        if logprobs:
            choice["logprobs"] = {"content": [_chosen(t) for t in answer.tokens], "refusal": None}
    else:
        choice["text"] = head.echoed(done.choice) + answer.content
        if logprobs:
            choice["logprobs"] = _legacy(answer.tokens, 0)
    return choice


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
