"""Grammars of requests: references, grammars that no answer fits, and those that fail late."""

from __future__ import annotations

import json

import pytest

from opentq.dialogue.errors import ApiError
from opentq.dialogue.request import GenerationRequest
from opentq.server import anthropic, grammar, openai
from opentq.server.grammar import Grammars

from .server_support import HI, TOOL, Streaming, wait_for


@pytest.fixture(scope="module")
def grammars(folder):
    from mlx_lm.tokenizer_utils import load

    tokenizer = load(folder)
    return Grammars(tokenizer, len(tokenizer))


def forced(*parameters, name=""):
    tools = tuple(
        {"type": "function", "function": {"name": f"f{i}", "parameters": p}} for i, p in enumerate(parameters)
    )
    return GenerationRequest(
        messages=tuple(HI), tools=tools, tool_choice="required", tool_names=frozenset([name] if name else ())
    )


def takes(grammars, request, value, name="f0"):
    """Whether the grammar of a forced call takes `value` as the arguments."""
    matcher = grammars.constraint(request, "normal").matcher
    call = f"<tool_call>{json.dumps({'name': name, 'arguments': value})}</tool_call>"
    tokens = grammars.tokenizer.encode(call, add_special_tokens=False)
    return matcher.validate_tokens(tokens) == len(tokens)


PERSON = {
    "type": "object",
    "properties": {"age": {"type": "integer"}},
    "required": ["age"],
    "additionalProperties": False,
}
REFERENCES = {
    "$defs": {"$defs": {"P": PERSON}, "type": "object", "properties": {"p": {"$ref": "#/$defs/P"}}},
    "definitions": {"definitions": {"P": PERSON}, "type": "object", "properties": {"p": {"$ref": "#/definitions/P"}}},
    "another property": {"type": "object", "properties": {"q": PERSON, "p": {"$ref": "#/properties/q"}}},
    "items": {"$defs": {"P": PERSON}, "type": "object", "properties": {"p": {"anyOf": [{"$ref": "#/$defs/P"}]}}},
    "an id of its own": {"$id": "http://x/y", "$defs": {"P": PERSON}, "properties": {"p": {"$ref": "#/$defs/P"}}}
    | {"type": "object"},
}  # fmt: skip


@pytest.mark.parametrize("kind", REFERENCES)
def test_references_in_a_tool_count_from_its_own_parameters(grammars, kind):
    parameters = REFERENCES[kind]
    for request, name in ((forced(parameters), "f0"), (forced(PERSON, parameters), "f1")):
        assert takes(grammars, request, {"p": {"age": 3}}, name)
        assert not takes(grammars, request, {"p": {"age": "x"}}, name)
        assert not takes(grammars, request, {"p": {"name": "f0", "arguments": {}}}, name)


def test_a_tool_that_refers_to_itself(grammars):
    tree = {"type": "object", "properties": {"left": {"$ref": "#"}}, "additionalProperties": False}
    assert takes(grammars, forced(tree), {"left": {"left": {}}})
    assert not takes(grammars, forced(tree), {"left": {"name": "f0", "arguments": {}}})


def test_a_named_tool_is_forced_by_the_grammar_and_the_prompt_stays(grammars):
    request = forced(PERSON, PERSON, name="f1")
    assert takes(grammars, request, {"age": 1}, "f1") and not takes(grammars, request, {"age": 1}, "f0")
    both = [TOOL, {"type": "function", "function": {"name": "other"}}]
    choice = {"type": "function", "function": {"name": "look_up"}}
    asked = openai.read_chat({"messages": HI, "tools": both, "tool_choice": choice})
    assert [t["function"]["name"] for t in asked.tools] == ["look_up", "other"] and asked.tool_names == {"look_up"}
    claude = [{"name": n, "input_schema": {"type": "object"}} for n in ("a", "b")]
    body = {"messages": HI, "max_tokens": 1, "tools": claude, "tool_choice": {"type": "tool", "name": "b"}}
    asked = anthropic.read(body)
    assert [t["function"]["name"] for t in asked.tools] == ["a", "b"] and asked.tool_names == {"b"}
    with pytest.raises(ApiError, match="tool_choice"):
        anthropic.read(body | {"tool_choice": {"type": "tool", "name": "c"}})


HEAVY = {"type": "string", "pattern": "^(a?){500}a{500}$"}
HOPELESS = {
    "itself": {"$ref": "#"},
    "a circle": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "all of itself": {"allOf": [{"$ref": "#"}]},
    "too large a pattern": HEAVY,
    "nothing": {"enum": []},
    "an empty range": {"type": "integer", "minimum": 5, "maximum": 4},
}


@pytest.mark.parametrize("kind", HOPELESS)
def test_schemas_that_no_answer_fits_are_refused(grammars, kind):
    form = GenerationRequest(messages=tuple(HI), schema=HOPELESS[kind])
    tool = forced({"type": "object", "properties": {"x": HOPELESS[kind]}, "required": ["x"]})
    with pytest.raises(ApiError) as caught:
        grammars.constraint(form, "normal")
    assert (caught.value.status, caught.value.param) == (400, "response_format")
    if kind not in ("itself", "all of itself", "too large a pattern"):  # in a tool these mean something, or come late
        with pytest.raises(ApiError) as caught:
            grammars.constraint(tool, "normal")
        assert (caught.value.status, caught.value.param) == (400, "tool_choice")


LATE = {"type": "string", "pattern": "^b{30}(c|d){2}(a?){150}a{150}$"}


def test_a_grammar_that_fails_late_is_an_error_and_nobody_elses(server, monkeypatch):
    monkeypatch.setattr(grammar, "PROBE_STEPS", 0)
    alone = Streaming(server, "steady", max_tokens=120).rest()
    steady = Streaming(server, "steady", max_tokens=120)
    form = {"type": "json_schema", "json_schema": {"schema": LATE}}
    failed = server.chat("go", response_format=form, max_tokens=100)
    assert failed.status_code == 400 and "grammar failed" in failed.json()["error"]["message"]
    lines = list(Streaming(server, "go", response_format=form, max_tokens=100, logit_bias=None).lines)
    assert any("grammar failed" in line for line in lines) and not any(
        'finish_reason": "stop' in line for line in lines
    )
    assert len(alone) > 50 and steady.rest() == alone
    wait_for(server.quiet)
