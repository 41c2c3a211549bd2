"""The Responses API: what Codex sends, events, kept responses and items."""

from __future__ import annotations

import json

import openai
import pytest

from opentq.dialogue.errors import ApiError
from opentq.server import responses as wire
from opentq.server.responses_store import Responses

from .server_support import PERSON, TOOL, recorded, send


def responses(data):
    return next(d["response"] for d in data if d["type"] in ("response.completed", "response.incomplete"))


def test_codex_from_first_request_to_the_next_turn(agent):
    (request,) = recorded("codex-responses", max_output_tokens=12)
    data = send(agent, request)
    assert [d["sequence_number"] for d in data] == list(range(len(data)))
    assert [d["type"] for d in data[:3]] == ["response.created", "response.in_progress", "response.output_item.added"]
    answer = responses(data)
    kinds = {"namespace": "multi_agent_v1", "call_id": "c1", "name": "close_agent", "arguments": '{"target": "x"}'}
    call = {"type": "function_call", **kinds}
    request["body"]["input"] += [*answer["output"], call]
    request["body"]["input"].append({"type": "function_call_output", "call_id": "c1", "output": "closed"})
    after = responses(send(agent, request))
    details = after["usage"]["input_tokens_details"]
    assert details["cached_tokens"] >= answer["usage"]["input_tokens"] - 256
    with pytest.raises(openai.NotFoundError):  # store: false
        agent.openai.responses.retrieve(after["id"])


def test_responses_events_make_up_the_response(agent):
    body = {"model": "tiny", "input": "hi", "temperature": 1, "top_p": 0.9, "max_output_tokens": 150}
    tool = {"type": "function", **TOOL["function"]}
    space = {"type": "namespace", "name": "words", "description": "", "tools": [tool]}
    with agent.openai.responses.stream(**body, tools=[space], tool_choice="required") as stream:
        kinds = [event.type for event in stream]
        (call,) = stream.get_final_response().output
    assert kinds[2:-1] == [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
    ]
    assert (call.name, call.namespace) == ("look_up", "words")
    assert json.loads(call.arguments)["word"] in ("sun", "moon")
    free = {"type": "custom", "name": "say", "description": "", "format": {"type": "text"}}
    answer = agent.openai.responses.create(**body, tools=[free], tool_choice={"type": "custom", "name": "say"})
    (said,) = answer.output  # a call of this tool, or the beginning of one
    begun = '"say"' in said.content[0].text if answer.status == "incomplete" else said.name == "say"
    assert begun and said.type == ("message" if answer.status == "incomplete" else "custom_tool_call"), answer


def test_responses_are_gone_on_from(agent):
    make = agent.openai.responses.create
    first = make(model="tiny", input="hi", instructions="Be kind.", max_output_tokens=6)
    second = make(model="tiny", input="and?", previous_response_id=first.id, max_output_tokens=6)
    said = first.output_text
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": said}]
    same = make(model="tiny", input=[*turns, {"role": "user", "content": "and?"}], max_output_tokens=6)
    assert second.output_text == same.output_text and second.usage.input_tokens == same.usage.input_tokens
    assert agent.openai.responses.retrieve(second.id).output_text == second.output_text
    agent.openai.responses.delete(first.id)
    with pytest.raises(openai.BadRequestError, match="not kept"):
        make(model="tiny", input="and?", previous_response_id=first.id)
    assert make(model="tiny", input="x", previous_response_id=second.id, max_output_tokens=1)


def test_kept_responses_are_bounded():
    store = Responses(most=3, most_bytes=2000)
    for i in range(5):
        store.keep({"id": str(i), "output": []}, [{"type": "message"}])
    with pytest.raises(ApiError):
        store.get("1")
    store.get("2")
    store.keep({"id": "5", "output": []}, [])
    assert store.get("2") and store.get("4")
    store.keep({"id": "6", "output": ["x" * 1990]}, [])
    assert store.get("6") and len(store._kept) == 1
    store.forget("6")
    assert store.nbytes == 0


def test_a_turn_of_items_is_one_message_and_thoughts_come_back():
    _, names = wire.read_tools([{"type": "namespace", "name": "a", "tools": [{"type": "function", "name": "f"}]}])
    items = [
        {
            "role": "developer",
            "content": [{"type": "input_text", "text": "Be"}, {"type": "input_text", "text": "kind"}],
        },
        {"type": "reasoning", "summary": [], "encrypted_content": wire.seal("hm")},
        {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "namespace": "a", "arguments": "{}"},
        {"type": "custom_tool_call", "call_id": "2", "name": "g", "input": "x"},
        {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "one"}]},
        {"type": "reasoning", "summary": [], "encrypted_content": "of another service"},
        {"type": "message", "role": "assistant", "content": "a"},
        {"type": "message", "role": "assistant", "content": "b"},
    ]
    messages = wire.read_items(items, 0, names)
    assert [m["role"] for m in messages] == ["system", "assistant", "tool", "assistant", "assistant"]
    assert messages[0]["content"] == "Be\nkind"
    assert (messages[1]["reasoning_content"], messages[1]["content"]) == ("hm", "no")
    assert [c["function"]["name"] for c in messages[1]["tool_calls"]] == ["a__f", "g"]
    assert messages[1]["tool_calls"][1]["function"]["arguments"] == {"input": "x"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": "x", "background": True}, "background"),
        ({"input": "x", "conversation": "c"}, "conversation"),
        ({"input": "x", "temperature": 9}, "temperature"),
        ({"input": "x", "tools": [{"type": "file_search"}]}, "tools[0].type"),
        ({"input": "x", "tools": [{"type": "function"}]}, "tools[0].name"),
        ({"input": "x", "tool_choice": "required"}, "tool_choice"),
        ({"input": "x", "tool_choice": {"type": "mcp"}}, "tool_choice.type"),
        ({"input": "x", "text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"input": "x", "top_logprobs": 2}, "top_logprobs"),
        ({"input": [{"type": "item_reference", "id": "1"}]}, "input[0].type"),
        ({"input": [{"role": "king", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "function_call", "name": "f", "call_id": "1", "arguments": "{"}]}, "input[0].arguments"),
    ],
)
def test_what_responses_cannot_do_is_refused_by_name(fields, param):
    with pytest.raises(ApiError) as caught:
        wire.read(fields, [])
    assert (caught.value.status, caught.value.param) == (400, param)


def test_thoughts_are_items_and_are_counted(agent):
    agent.service.prompter.template = {"think": True}
    try:
        answer = agent.openai.responses.create(
            model="tiny", input="why", max_output_tokens=8, include=["reasoning.encrypted_content"]
        )
    finally:
        agent.service.prompter.template = {}
    (item,) = answer.output
    assert item.type == "reasoning" and 0 < answer.usage.output_tokens_details.reasoning_tokens <= 8
    assert wire.read_items([item.model_dump()], 0, {})[0]["reasoning_content"] == item.content[0].text
    assert wire._thought({"encrypted_content": item.encrypted_content}) == item.content[0].text


def test_responses_hold_a_schema_and_give_logprobs(agent):
    form = {"format": {"type": "json_schema", "name": "person", "schema": PERSON, "strict": True}}
    answer = agent.openai.responses.create(
        model="tiny", input="hi", max_output_tokens=100, text=form, include=["message.output_text.logprobs"]
    )
    assert 1800 <= json.loads(answer.output_text)["born"] <= 1999
    logprobs = answer.output[0].content[0].logprobs
    assert "".join(t.token for t in logprobs) == answer.output_text
