"""OpenAI's wire format, the way in: a body becomes a `GenerationRequest`.

Fields that nobody knows are ignored, as clients expect. Fields that OpenAI's API (or a known server) knows and this
one can't serve are refused with a 400 that names them, unless their value asks for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..dialogue import pictures
from ..dialogue.errors import bad, missing, unsupported
from ..dialogue.request import GenerationRequest, SamplingParams
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
        raise missing("tool_choice.allowed_tools")
    allowed = [t.get(str(t.get("type"))) or t for t in choice.allowed_tools.tools]
    return choose(tools, choice.allowed_tools.mode, [a.get("name") for a in allowed if isinstance(a, dict)])


def _read_tool(tool: Tool, path: str) -> dict[str, Any]:
    """OpenAI's function, whichever form it was given in; a custom tool is a function with one text."""
    if tool.type == "custom":
        custom = tool.custom or (CustomTool(name=tool.name, description=tool.description) if tool.name else None)
        if custom is None:
            raise missing(f"{path}.custom")
        return free_text_tool(custom.name, custom.description or "", custom.format)
    if tool.function is None and tool.name is None:
        raise missing(f"{path}.function")
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


def read_content(
    content: str | list[Part] | None, path: str, images: bool = False, between: str = ""
) -> pictures.Content:
    """What a content holds: a string, or text parts joined with `between`; with `images`, those too. Raises ApiError
    for other parts and for images elsewhere.
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
    return pictures.content(found, between)


def check_continued(messages: Sequence[dict[str, Any]], form: Any, param: str) -> None:
    """Raise ApiError unless an answer can go on with the last message; `form` is what `param` asks of an answer."""
    last, path = messages[-1], f"messages[{len(messages) - 1}]"
    if last["role"] != "assistant" or last.get("tool_calls") or not last["content"].strip():
        raise bad(f"{path} is no text of the assistant's that an answer could go on with", path)
    if last["content"] != last["content"].rstrip():
        raise bad(f"{path}.content is to be gone on with, and so must not end with white space", f"{path}.content")
    if form:
        raise bad(f"{param} holds whole answers to a form; it can't be used where one was begun", param)


def form_schema(kind: str, schema: dict[str, Any] | None, path: str) -> dict[str, Any] | None:
    """The JSON Schema that a format of some `kind` asks for, None for plain text; `schema` comes with json_schema."""
    if kind == "json_schema" and schema is None:
        raise missing(f"{path}.schema")
    return {"text": None, "json_object": {"type": "object"}, "json_schema": schema}[kind]


def _read_call(call: MessageCall, path: str) -> dict[str, Any]:
    if call.custom:
        function: dict[str, Any] = {"name": call.custom.name, "arguments": {"input": call.custom.input}}
    elif call.function:
        arguments = parse_json(call.function.arguments or "{}", f"{path}.function.arguments")
        function = {"name": call.function.name, "arguments": arguments}
    else:
        raise missing(f"{path}.function")
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
    wanted = form.response_format or ResponseFormat(type="text")
    given = wanted.json_schema
    bias = form.logit_bias or {}
    wrong = next((k for k in bias if not (k.isascii() and k.isdigit() and len(k) < 12)), None)
    if wrong is not None:
        raise bad(f"logit_bias has the key {wrong[:20]!r}; keys are token ids", "logit_bias")
    return {
        "model": form.model,
        "stop": tuple(s for s in stops if s),
        "schema": form_schema(wanted.type, given.schema_ if given else None, "response_format.json_schema"),
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
