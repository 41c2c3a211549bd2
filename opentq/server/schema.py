"""The shape of requests, once: the models that bodies are checked against are the ones that /openapi.json publishes.

Values that JSON allows and this server can't use (infinite numbers, lone surrogates, text nested deeper than 200
levels) are refused when JSON is read, in `parse_json`: bodies, and every JSON text inside a body.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    Tag,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import core_schema, from_json

from ..dialogue.errors import bad, missing

MAX_MESSAGES = 4096
MAX_STOPS = 16
MAX_CHOICES = 8
MAX_PROMPTS = 64
MAX_STOP_CHARACTERS = 1024
MAX_TOP_LOGPROBS = 20
MAX_BIASES = 1024
MAX_TOKENS = 2**53


class Form(BaseModel):
    """A part of a request. Fields that nobody knows are ignored; null is the same as nothing."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


def _whole(value: Any) -> Any:
    """JSON knows one kind of number: 5.0 is a whole one."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _finite(value: Any) -> Any:
    json.dumps(value, allow_nan=False)  # ValueError: 1e999 is a number to JSON
    return value


def _tag(kind: Any) -> str:
    """The name of a type's JSON type, as it stands in the path of an error."""
    kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    tags = {list: "<array>", dict: "<object>"}
    return "<object>" if isinstance(kind, type(Form)) else tags.get(get_origin(kind), "<text>")


@dataclass(frozen=True)
class OneOf:
    """Which member of a union a value is checked against: the one of its JSON type. `words` say what there may be."""

    words: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        def tag(value: Any) -> str | None:
            tags = {"<text>": str, "<array>": list, "<object>": (dict, Form)}
            return next((name for name, kind in tags.items() if isinstance(value, kind)), None)  # type: ignore[arg-type]

        return core_schema.tagged_union_schema(
            {_tag(kind): handler.generate_schema(kind) for kind in get_args(source)},
            tag,
            custom_error_type="type",
            custom_error_message=f"must be {self.words}",
        )


Int = Annotated[int, BeforeValidator(_whole)]
Tokens = Annotated[Int, Field(ge=1, le=MAX_TOKENS)]
TokenId = Annotated[int, Field(ge=0, le=2**31)]
Choices = Annotated[Int, Field(ge=1, le=MAX_CHOICES)]
Name = Annotated[str, Field(min_length=1, max_length=256)]
JsonObject = Annotated[dict[str, Any], AfterValidator(_finite)]
StopText = Annotated[str, Field(max_length=MAX_STOP_CHARACTERS)]
Stops = Annotated[list[StopText], Field(max_length=MAX_STOPS)]
TopK = Annotated[Int, Field(ge=0, le=2**53)]
Share = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class ImageUrl(Form):
    url: str
    detail: str | None = None


class Part(Form):
    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: Annotated[str | ImageUrl, OneOf("a data URL, or an object with one")] | None = None


Parts = Annotated[list[Part], Field(max_length=MAX_MESSAGES)]
Content = Annotated[str | Parts, OneOf("a string or an array of parts")]


# ---- OpenAI


class Function(Form):
    name: Name
    description: str | None = None
    parameters: JsonObject | None = None


class CustomTool(Form):
    """A tool whose input is text."""

    name: Name
    description: str | None = None
    format: JsonObject | None = None


class Tool(Form):
    """A function or a custom tool; or a function in the short form, whose fields are the tool's own."""

    type: Literal["function", "custom"]
    function: Function | None = None
    custom: CustomTool | None = None
    name: Name | None = None
    description: str | None = None
    parameters: JsonObject | None = None


class CalledFunction(Form):
    name: Name
    arguments: str


class CalledCustom(Form):
    name: Name
    input: str


class MessageCall(Form):
    id: str | None = None
    type: str | None = None
    function: CalledFunction | None = None
    custom: CalledCustom | None = None


class Message(Form):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: Annotated[list[MessageCall], Field(max_length=128)] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class JsonSchemaFormat(Form):
    name: str | None = None
    schema_: JsonObject | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Form):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class NamedFunction(Form):
    name: Name


class AllowedTools(Form):
    mode: Literal["auto", "required"]
    tools: list[JsonObject]


class ChosenTool(Form):
    """A tool that must be called, in OpenAI's forms or the short one, or the tools that may be."""

    type: Literal["function", "custom", "allowed_tools"]
    function: NamedFunction | None = None
    custom: NamedFunction | None = None
    name: Name | None = None
    allowed_tools: AllowedTools | None = None


ToolChoice = Annotated[
    Literal["none", "auto", "required"] | ChosenTool,
    OneOf("none, auto, required, or an object that names a function"),
]


class StreamOptions(Form):
    include_usage: bool | None = None


class Common(Form):
    """What all of OpenAI's routes take."""

    model: str | None = None
    max_tokens: Tokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    min_p: Share | None = None
    seed: Annotated[Int, Field(ge=-(2**63), le=2**64 - 1)] | None = None
    stop: Annotated[StopText | Stops, OneOf("a string or an array of strings")] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    repetition_context_size: Annotated[Int, Field(ge=1, le=2**30)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)] | None = (
        None
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None


class ChatRequest(Common):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=256)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    n: Choices | None = None
    reasoning_effort: Annotated[str, Field(max_length=64)] | None = None
    chat_template_kwargs: JsonObject | None = None
    continue_final_message: bool | None = None


TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=2**22, fail_fast=True)]


def _prompt_kind(value: Any) -> str | None:
    """What a prompt is, by its first item: text, token ids, or several of either."""
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list):
        return None
    first = value[0] if value else None
    return "<texts>" if isinstance(first, str) else "<arrays>" if isinstance(first, list) else "<array>"


class CompletionRequest(Common):
    """POST /v1/completions."""

    prompt: Annotated[
        Annotated[str, Tag("<text>")]
        | Annotated[TokenIds, Tag("<array>")]
        | Annotated[list[str], Field(max_length=MAX_PROMPTS), Tag("<texts>")]
        | Annotated[list[TokenIds], Field(max_length=MAX_PROMPTS), Tag("<arrays>")],
        Discriminator(_prompt_kind, "type", "must be text, token ids, or an array of either"),
    ]
    n: Choices | None = None
    echo: bool | None = None
    logprobs: Annotated[Int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


# ---- Anthropic


class Block(Form):
    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: JsonObject | None = None
    tool_use_id: str | None = None
    tool_name: str | None = None
    title: str | None = None
    source: Annotated[str | JsonObject, OneOf("a string or an object")] | None = None
    content: Content | None = None
    is_error: bool | None = None


class Turn(Form):
    role: Literal["user", "assistant", "system"]
    content: Annotated[
        str | Annotated[list[Block], Field(max_length=MAX_MESSAGES)], OneOf("a string or an array of blocks")
    ]


class ClaudeTool(Form):
    name: Name
    type: str | None = None
    description: str | None = None
    input_schema: JsonObject | None = None


class ClaudeToolChoice(Form):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Form):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Tokens | None = None


class ContextManagement(Form):
    edits: Annotated[list[JsonObject], Field(max_length=64)] | None = None


class OutputConfig(Form):
    effort: Annotated[str, Field(max_length=64)] | None = None
    format: JsonObject | None = None


class CountRequest(Form):
    """POST /v1/messages/count_tokens: a message request whose answer is not wanted."""

    model: str | None = None
    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: Content | None = None
    max_tokens: Tokens | None = None
    tools: Annotated[list[ClaudeTool], Field(max_length=256)] | None = None
    tool_choice: ClaudeToolChoice | None = None
    thinking: Thinking | None = None
    context_management: ContextManagement | None = None
    output_config: OutputConfig | None = None
    output_format: JsonObject | None = None
    stop_sequences: Stops | None = None
    stream: bool | None = None
    temperature: Share | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    metadata: JsonObject | None = None


class MessagesRequest(CountRequest):
    """POST /v1/messages."""

    max_tokens: Tokens


# ---- reading

F = TypeVar("F")
# pydantic speaks of Python, clients of JSON.
WORDS = (
    (r"a valid dictionary( or instance of \w+)?", "object"),
    ("a valid list", "array"),
    ("a valid ", "a "),
    (r"be a? ?(object|array|integer)", r"be an \1"),
    (" after validation", ""),
)


def parse_json(text: bytes | str, where: str = "") -> Any:
    """JSON inside a request. Raises ApiError that names `where` it is (the body itself by default)."""
    try:
        value = from_json(text, allow_inf_nan=False)
        return _finite(value) if where else value  # a body's own fields have types that say it
    except ValueError as error:
        words = "is nested too deeply" if "recursion limit" in str(error) else f"is not valid JSON: {error}"
        raise bad(f"{where or 'the body'} {words}", where) from error


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object in a request body. Raises ApiError for anything else."""
    value = parse_json(body)
    if not isinstance(value, dict):
        raise bad(f"the body must be a JSON object, not {_show(value)}")
    return value


@cache
def _adapter(form: Any) -> TypeAdapter[Any]:
    return TypeAdapter(form)


def check(body: Any, form: type[F], path: str = "") -> F:
    """`body`, or what stands at `path`, as a `form`. Raises ApiError naming the first field that does not fit."""
    try:
        return _adapter(form).validate_python(body)  # type: ignore[arg-type]
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
    for part in wrong["loc"]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("<"):  # the tag of a union
            path += f".{part}" if path else part
    if wrong["type"] == "missing":
        raise missing(path)
    words = re.sub(r"^(Input|List|String|Dictionary) should |^Value error, must ", "must ", wrong["msg"])
    for theirs, ours in WORDS:
        words = re.sub(theirs, ours, words)
    words = words.removesuffix(", not more")
    if ", not " not in words:
        given = wrong["input"]
        words += f", not {len(given) if wrong['type'].endswith('too_long') else _show(given)}"
    raise bad(f"{path} {words}", path)


def _show(value: Any) -> str:
    """A value as an error may quote it: short, and never long text from a prompt."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else "a string" if isinstance(value, str) else "a number so long"
