"""OpenAI's Responses API, the way in: a body of items becomes the messages of a `GenerationRequest`.

An item is a message, a thought, a call or the output of a call. What one turn of the model consisted of becomes one
assistant message again, in the model's own words, so that the prompt of the next turn begins as this one ended.
"""

from __future__ import annotations

import base64
import binascii
import logging
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from ..dialogue import pictures
from ..dialogue.errors import bad, missing, text_of, unsupported
from ..dialogue.request import GenerationRequest, SamplingParams
from .openai import form_schema, free_text_tool, read_content, refuse_unsupported
from .schema import MAX_MESSAGES, MAX_TOP_LOGPROBS, Content, Form, Int, JsonObject, Share, Tokens, check, parse_json
from .tool_choice import choose

log = logging.getLogger("opentq.serve")

Item = dict[str, Any]

# Known fields that are not served, with the values that ask for nothing.
IDLE: dict[str, tuple[Any, ...]] = {"background": (False,), "conversation": (), "prompt": (), "context_management": ()}

SEARCHES = ("web_search", "web_search_preview", "web_search_2025_08_26", "web_search_preview_2025_03_11")
"""Tools that run on OpenAI's servers and that Codex names in every request: the model is not told of them."""

OUTPUTS = ("function_call_output", "custom_tool_call_output")

SEALED = "opentq:"
"""How a thought begins that a client keeps for us as `encrypted_content`: it is text, in base64, and no secret."""


TEXT_OR_PARTS: Any = Content | None


class TextFormat(Form):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: JsonObject | None = Field(None, alias="schema")
    strict: bool | None = None


class Text(Form):
    format: TextFormat | None = None
    verbosity: str | None = None


class Reasoning(Form):
    effort: Annotated[str, Field(max_length=64)] | None = None
    summary: str | None = None


class ResponsesRequest(Form):
    """POST /v1/responses."""

    model: str | None = None
    input: Annotated[str | list[JsonObject], Field(union_mode="left_to_right")] | None = None
    instructions: str | None = None
    max_output_tokens: Tokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Share | None = None
    top_logprobs: Annotated[Int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[JsonObject], Field(max_length=256)] | None = None
    tool_choice: Annotated[str | JsonObject, Field(union_mode="left_to_right")] | None = None
    parallel_tool_calls: bool | None = None
    text: Text | None = None
    reasoning: Reasoning | None = None
    include: list[str] | None = None
    previous_response_id: Annotated[str, Field(max_length=256)] | None = None
    store: bool | None = None
    stream: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: JsonObject | None = None


@dataclass(frozen=True)
class ToolName:
    """What a function of the prompt is called in the client's words."""

    name: str
    namespace: str = ""
    custom: bool = False


@dataclass
class Asked:
    """A request, and what its answer has to repeat or to keep."""

    request: GenerationRequest
    body: Item
    items: list[Item]
    names: dict[str, ToolName] = field(default_factory=dict)

    @property
    def kept(self) -> bool:
        """Whether the answer can be gone on from by its id."""
        return self.body.get("store") is not False

    @property
    def sealed(self) -> bool:
        """Whether thoughts are to be given in a form that the client sends back."""
        return "reasoning.encrypted_content" in (self.body.get("include") or ())


def read(body: Item, earlier: list[Item]) -> Asked:
    """The request in a /v1/responses body, after the items of the conversation so far. Raises ApiError."""
    refuse_unsupported(body, IDLE)
    form = check(body, ResponsesRequest)
    given = form.input if form.input is not None else []
    items = [{"type": "message", "role": "user", "content": given}] if isinstance(given, str) else list(given)
    if not (items or earlier or form.instructions):
        raise missing("input")
    if len(items) + len(earlier) > MAX_MESSAGES:
        raise bad(f"input must have at most {MAX_MESSAGES} items, with those of the responses before it", "input")
    tools, names = read_tools([*(form.tools or ()), *_added_tools(items)])
    messages = [{"role": "system", "content": form.instructions}] if form.instructions else []
    messages += read_items([*earlier, *items], -len(earlier), names)
    template: dict[str, Any] = {}
    if form.reasoning and (effort := form.reasoning.effort):
        template = {"enable_thinking": False} if effort == "none" else {"reasoning_effort": effort}
    logprobs = form.top_logprobs or 0 if "message.output_text.logprobs" in (form.include or ()) else None
    if form.top_logprobs and logprobs is None:
        raise bad("top_logprobs needs include: message.output_text.logprobs", "top_logprobs")
    wanted = form.text.format if form.text else None
    request = GenerationRequest(
        model=form.model,
        messages=tuple(messages),
        max_tokens=form.max_output_tokens,
        logprobs=logprobs,
        parallel_calls=form.parallel_tool_calls is not False,
        schema=form_schema(wanted.type, wanted.schema_, "text.format") if wanted else None,
        template=template,
        stream=bool(form.stream),
        sampling=SamplingParams(form.temperature, form.top_p, None, None),  # type: ignore[arg-type]
        **_choose(form.tool_choice, tools, names),
    )
    return Asked(request, body, [*earlier, *items], names)


# ---- tools


def _added_tools(items: list[Item]) -> list[Item]:
    return [t for item in items if item.get("type") == "additional_tools" for t in item.get("tools") or ()]


def read_tools(tools: list[Item]) -> tuple[list[Item], dict[str, ToolName]]:
    """Functions as chat templates take them, and what each is called outside. Raises ApiError."""
    functions: list[Item] = []
    names: dict[str, ToolName] = {}

    def add(tool: Item, path: str, namespace: str = "") -> None:
        kind, name = tool.get("type"), tool.get("name")
        if kind not in ("function", "custom"):
            raise unsupported(f"{path}.type", f"{kind!r} does not run at the client; function, custom and namespace do")
        if not isinstance(name, str) or not name:
            raise missing(f"{path}.name")
        inner = f"{namespace}__{name}" if namespace else name
        description = tool.get("description") or ""
        names[inner] = ToolName(name, namespace, kind == "custom")
        if kind == "custom":
            functions.append(free_text_tool(inner, description, tool.get("format")))
            return
        schema = tool.get("parameters") or {"type": "object", "properties": {}}
        function = {"name": inner, "description": description, "parameters": schema}
        functions.append({"type": "function", "function": function})

    for i, tool in enumerate(tools):
        path = f"tools[{i}]"
        if tool.get("type") in SEARCHES:
            continue
        if tool.get("type") == "namespace":
            if not isinstance(tool.get("name"), str) or not isinstance(tool.get("tools"), list):
                raise bad(f"{path} must have a name and tools", path)
            for j, inner in enumerate(tool["tools"]):
                add(inner, f"{path}.tools[{j}]", tool["name"])
        else:
            add(tool, path)
    return functions, names


def _choose(choice: str | Item | None, tools: list[Item], names: dict[str, ToolName]) -> dict[str, Any]:
    """Which of the tools may or must be called, by the names that they have in the prompt."""
    if choice is None or isinstance(choice, str):
        if choice not in (None, "auto", "none", "required"):
            raise bad("tool_choice must be none, auto, required, or an object that names a tool", "tool_choice")
        return choose(tools, choice or "auto")
    mode, asked = "required", [choice]
    if choice.get("type") == "allowed_tools":
        mode = "required" if choice.get("mode") == "required" else "auto"
        asked = [t for t in choice.get("tools") or () if isinstance(t, dict)]
    elif choice.get("type") not in ("function", "custom"):
        raise unsupported(
            "tool_choice.type", f"{choice.get('type')!r}; function, custom and allowed_tools can be chosen"
        )
    wanted = {(t.get("namespace") or out.namespace, t.get("name")) for t in asked for out in names.values()}
    return choose(tools, mode, [n for n, out in names.items() if (out.namespace, out.name) in wanted])


# ---- items


def read_items(items: list[Item], first: int, names: dict[str, ToolName]) -> list[dict[str, Any]]:
    """Messages of items; `first` is the place of the first one in `input`, for errors. Raises ApiError."""
    inner = {(n.namespace, n.name): name for name, n in names.items()}
    out: list[dict[str, Any]] = []
    turn: dict[str, Any] | None = None  # the assistant's, while it goes on
    shown: list[str | pictures.Picture] = []  # by tools; the model sees them after the last result, as the user's

    def show() -> None:
        if shown:
            out.append({"role": "user", "content": pictures.content(shown)})
            shown.clear()

    def model(new: bool = False) -> dict[str, Any]:
        nonlocal turn
        if turn is None or new:
            turn = {"role": "assistant", "content": ""}
            out.append(turn)
        return turn

    for i, item in enumerate(items, first):
        path, kind = f"input[{i}]", item.get("type") or "message"
        if kind not in OUTPUTS:
            show()
        if kind == "message":
            role, where = item.get("role"), f"{path}.content"
            content = _content(item.get("content"), where, images=role == "user")
            if role == "assistant":
                said = model(new=turn is not None and ("tool_calls" in turn or bool(turn["content"])))
                said["content"] = content
                continue
            if role not in ("user", "system", "developer"):
                raise bad(f"{path}.role must be user, system, developer or assistant", f"{path}.role")
            turn = None
            out.append({"role": "user" if role == "user" else "system", "content": content})
        elif kind == "reasoning":
            if thought := _thought(item):
                model(new=turn is not None and (len(turn) > 2 or bool(turn["content"])))["reasoning_content"] = thought
        elif kind in ("function_call", "custom_tool_call"):
            name = text_of(item, "name", path)
            name = inner.get((item.get("namespace") or "", name), name)
            if kind == "function_call":
                where = f"{path}.arguments"
                arguments = parse_json(text_of(item, "arguments", path) or "{}", where)
            else:
                arguments = {"input": text_of(item, "input", path)}
            call = {"id": text_of(item, "call_id", path), "type": "function"}
            function = {"name": name, "arguments": arguments}
            model().setdefault("tool_calls", []).append(call | {"function": function})
        elif kind in OUTPUTS:
            turn = None
            found = pictures.parts(_content(item.get("output"), f"{path}.output", images=True))
            result = "\n".join(p for p in found if isinstance(p, str))
            out.append({"role": "tool", "tool_call_id": text_of(item, "call_id", path), "content": result})
            shown += [p for p in found if not isinstance(p, str)]
        elif kind != "additional_tools":
            hint = "send the item itself" if kind == "item_reference" else "it belongs to a tool that does not run here"
            raise unsupported(f"{path}.type", f"{kind!r}; {hint}")
    show()
    return out


def _content(content: Any, path: str, images: bool = False) -> pictures.Content:
    return read_content(check(content, TEXT_OR_PARTS, path), path, images, "\n")


def _thought(item: Item) -> str:
    """The text of a reasoning item: its content, or what was sealed here; another service's is not readable."""
    parts = item.get("content") or ()
    text = "".join(p["text"] for p in parts if isinstance(p, dict) and isinstance(p.get("text"), str))
    sealed = item.get("encrypted_content")
    if not text and isinstance(sealed, str) and sealed.startswith(SEALED):
        try:
            text = base64.b64decode(sealed[len(SEALED) :], validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return text


def seal(thought: str) -> str:
    return SEALED + base64.b64encode(thought.encode()).decode()
