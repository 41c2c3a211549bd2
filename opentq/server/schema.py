"""The shape of requests, once: the JSON Schemas that are published in /openapi.json are the ones that are enforced.

`check` knows the part of JSON Schema that the request schemas below use, and no more. Values that JSON allows and this
server can't use (NaN, lone surrogates) are refused when the body is read, in `parse`.
"""

from __future__ import annotations

import json
from typing import Any

from ..dialogue.errors import ApiError, bad

Schema = dict[str, Any]

MAX_MESSAGES = 4096
MAX_STOP = 16
MAX_TOP_LOGPROBS = 20

STRING: Schema = {"type": "string"}
BOOLEAN: Schema = {"type": "boolean"}
OBJECT: Schema = {"type": "object"}


def number(low: float, high: float) -> Schema:
    return {"type": "number", "minimum": low, "maximum": high}


def integer(low: int, high: int = 2**53) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


def array(items: Schema, high: int, low: int = 0) -> Schema:
    return {"type": "array", "items": items, "minItems": low, "maxItems": high}


def optional(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def obj(properties: dict[str, Schema], required: tuple[str, ...] = ()) -> Schema:
    """An object whose fields are optional and may be null unless required."""
    fields = {name: s if name in required else optional(s) for name, s in properties.items()}
    return {"type": "object", "properties": fields, "required": list(required)}


NAME: Schema = {"type": "string", "minLength": 1, "maxLength": 256}
STOP: Schema = {"anyOf": [STRING, array(STRING, MAX_STOP)]}

SAMPLING: dict[str, Schema] = {
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "top_k": integer(0),
    "min_p": number(0, 1),
    "seed": integer(-(2**63), 2**64 - 1),
    "stop": STOP,
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "repetition_penalty": number(0.01, 10),
    "logit_bias": {"type": "object", "additionalProperties": number(-100, 100)},
    "stream": BOOLEAN,
    "stream_options": obj({"include_usage": BOOLEAN}),
}

FUNCTION: Schema = obj({"name": NAME, "description": STRING, "parameters": OBJECT}, ("name",))
TOOL: Schema = obj({"type": {"enum": ["function"]}, "function": FUNCTION}, ("type", "function"))
CALL: Schema = obj(
    {"id": STRING, "type": STRING, "function": obj({"name": NAME, "arguments": STRING}, ("name", "arguments"))},
    ("function",),
)
PART: Schema = obj({"type": STRING, "text": STRING}, ("type",))
MESSAGE: Schema = obj(
    {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {"anyOf": [STRING, array(PART, MAX_MESSAGES)]},
        "name": STRING,
        "tool_calls": array(CALL, 128),
        "tool_call_id": STRING,
        "reasoning": STRING,
        "reasoning_content": STRING,
    },
    ("role",),
)
FORMAT: Schema = obj(
    {
        "type": {"enum": ["text", "json_object", "json_schema"]},
        "json_schema": obj({"name": STRING, "schema": OBJECT, "strict": BOOLEAN}),
    },
    ("type",),
)
CHOICE: Schema = {
    "anyOf": [
        {"enum": ["none", "auto", "required"]},
        obj({"type": {"enum": ["function"]}, "function": obj({"name": NAME}, ("name",))}, ("type", "function")),
    ]
}

CHAT: Schema = obj(
    {
        "model": STRING,
        "messages": array(MESSAGE, MAX_MESSAGES, low=1),
        "max_tokens": integer(1),
        "max_completion_tokens": integer(1),
        "logprobs": BOOLEAN,
        "top_logprobs": integer(0, MAX_TOP_LOGPROBS),
        "tools": array(TOOL, 256),
        "tool_choice": CHOICE,
        "parallel_tool_calls": BOOLEAN,
        "response_format": FORMAT,
        "reasoning_effort": {"type": "string", "maxLength": 64},
        "chat_template_kwargs": OBJECT,
        **SAMPLING,
    },
    ("messages",),
)

COMPLETION: Schema = obj(
    {
        "model": STRING,
        "prompt": {"anyOf": [STRING, array(integer(0, 2**31), 2**22, low=1), array(STRING, 1, low=1)]},
        "max_tokens": integer(1),
        "logprobs": integer(0, MAX_TOP_LOGPROBS),
        "response_format": FORMAT,
        **SAMPLING,
    },
    ("prompt",),
)

CACHE_CONTROL: Schema = OBJECT
BLOCK: Schema = obj(
    {
        "type": STRING,
        "text": STRING,
        "thinking": STRING,
        "id": STRING,
        "name": STRING,
        "input": OBJECT,
        "tool_use_id": STRING,
        "tool_name": STRING,
        "title": STRING,
        "content": {"anyOf": [STRING, array(PART, MAX_MESSAGES)]},
        "is_error": BOOLEAN,
        "cache_control": CACHE_CONTROL,
    },
    ("type",),
)
TURN: Schema = obj(
    {"role": {"enum": ["user", "assistant", "system"]}, "content": {"anyOf": [STRING, array(BLOCK, MAX_MESSAGES)]}},
    ("role", "content"),
)
CLAUDE_TOOL: Schema = obj(
    {"name": NAME, "type": STRING, "description": STRING, "input_schema": OBJECT, "cache_control": CACHE_CONTROL},
    ("name",),
)
COUNT: Schema = obj(
    {
        "model": STRING,
        "messages": array(TURN, MAX_MESSAGES, low=1),
        "system": {"anyOf": [STRING, array(PART, MAX_MESSAGES)]},
        "tools": array(CLAUDE_TOOL, 256),
        "tool_choice": obj(
            {"type": {"enum": ["auto", "any", "tool", "none"]}, "name": STRING, "disable_parallel_tool_use": BOOLEAN},
            ("type",),
        ),
        "thinking": obj(
            {"type": {"enum": ["enabled", "disabled", "adaptive"]}, "budget_tokens": integer(1)}, ("type",)
        ),
        "context_management": obj({"edits": array(OBJECT, 64)}),
        "output_config": obj({"effort": {"type": "string", "maxLength": 64}, "format": OBJECT}),
        "output_format": OBJECT,
    },
    ("messages",),
)
MESSAGES: Schema = {
    **COUNT,
    "properties": {
        **COUNT["properties"],
        "max_tokens": integer(1),
        "stop_sequences": optional(array(STRING, MAX_STOP)),
        "stream": optional(BOOLEAN),
        "temperature": optional(number(0, 1)),
        "top_p": optional(number(0, 1)),
        "top_k": optional(integer(0)),
        "metadata": optional(OBJECT),
    },
    "required": ["messages", "max_tokens"],
}


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object in a request body. Raises ApiError for anything else."""
    try:
        # Strict UTF-8 decoding refuses raw surrogates; escaped ones are found by encoding the strings again.
        value = json.loads(body.decode("utf-8"), parse_constant=_constant)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeError as error:
        raise bad("the body is not valid Unicode text") from error
    except RecursionError as error:
        raise bad("the body is nested too deeply") from error
    except ValueError as error:
        raise bad(f"the body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise bad(f"the body must be a JSON object, not {_kind(value)}")
    return value


def _constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def check(value: Any, schema: Schema, path: str = "") -> None:
    """Raise ApiError naming the first field of `value` that does not fit `schema`, by its path."""
    if "anyOf" in schema:
        _check_any(value, schema["anyOf"], path)
        return
    if "enum" in schema and not any(value == e and type(value) is type(e) for e in schema["enum"]):
        allowed = ", ".join(map(str, schema["enum"]))
        raise bad(f"{path or 'the body'} must be one of {allowed}, not {_show(value)}", path)
    kind = schema.get("type")
    if kind and not _is(value, kind):
        raise bad(f"{path or 'the body'} must be {_article(kind)}, not {_kind(value)}", path)
    if kind in ("number", "integer"):
        low, high = schema.get("minimum"), schema.get("maximum")
        if (low is not None and value < low) or (high is not None and value > high):
            raise bad(f"{path} must be from {low} to {high}, not {_show(value)}", path)
    elif kind == "string":
        low, high = schema.get("minLength", 0), schema.get("maxLength")
        if len(value) < low or (high is not None and len(value) > high):
            raise bad(f"{path} must have from {low} to {high} characters, not {len(value)}", path)
    elif kind == "array":
        if not schema["minItems"] <= len(value) <= schema["maxItems"]:
            raise bad(
                f"{path} must have from {schema['minItems']} to {schema['maxItems']} items, not {len(value)}", path
            )
        for i, item in enumerate(value):
            check(item, schema["items"], f"{path}[{i}]")
    elif kind == "object":
        for name in schema.get("required", ()):
            if name not in value:
                where = f"{path}.{name}" if path else name
                raise bad(f"{where} is missing", where, "missing_required_parameter")
        properties, rest = schema.get("properties", {}), schema.get("additionalProperties")
        for name, item in value.items():
            if (inner := properties.get(name, rest)) is not None:
                check(item, inner, f"{path}.{name}" if path else name)


def _check_any(value: Any, options: list[Schema], path: str) -> None:
    """Some option must fit; the error is that of the option whose type fits, which says more than "none fits"."""
    failures: list[ApiError] = []
    for option in options:
        try:
            return check(value, option, path)
        except ApiError as error:
            failures.append(error)
    named = [o for o in options if o.get("type") != "null"]
    for option, failure in zip(options, failures):
        if len(named) == 1 and option is named[0]:
            raise failure
        if "type" in option and _is(value, option["type"]) and failure.param != path:
            raise failure
    kinds = " or ".join(_article(o["type"]) if "type" in o else f"one of {o.get('enum')}" for o in named)
    raise bad(f"{path} must be {kinds}, not {_show(value)}", path)


def _is(value: Any, kind: str) -> bool:
    if kind == "null":
        return value is None
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer":
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer() and abs(value) < 2**53)
    types: dict[str, Any] = {"string": str, "number": (int, float), "array": list, "object": dict}
    return kind in types and isinstance(value, types[kind])


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aio" else f"a {kind}"


def _show(value: Any) -> str:
    """A value as an error may quote it: short, and never long text from a prompt."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else _kind(value)
