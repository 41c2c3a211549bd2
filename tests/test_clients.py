"""What agents and client libraries really send, recorded once and played back; texts in `clients/` are filler."""

from __future__ import annotations

import copy
import json
from itertools import pairwise

import pytest

from opentq.dialogue.errors import ApiError
from opentq.dialogue.roles import Roles
from opentq.dialogue.volatile import without
from opentq.errors import UserError
from opentq.server import anthropic
from opentq.server import openai as openai_wire
from opentq.server import responses as wire
from opentq.server.diverge import Watch

from .server_support import HI, TOOL, Slow, Streaming, cached, recorded, send, wait_for

# ---- Claude Code


def test_claude_code_from_first_request_to_a_new_session(agent):
    (request,) = recorded("claude-code-default", max_tokens=8)
    data = send(agent, request)
    assert data[0]["type"] == "message_start" and data[-1]["type"] == "message_stop"
    remembered, total = cached(data)
    assert remembered < total / 2
    other = copy.deepcopy(request)
    other["body"]["system"][0]["text"] = (
        "x-anthropic-billing-header: cc_version=9.9.9.abc; cc_entrypoint=cli; cch=0f0f0;"
    )
    remembered, total = cached(send(agent, other))
    assert remembered >= 0.9 * total


def test_claude_code_brings_a_tool_result(agent):
    first, second = recorded("claude-code-tool-result", max_tokens=8)
    _, total = cached(send(agent, first))
    remembered, longer = cached(send(agent, second))
    assert longer > total and remembered >= total - 256
    messages = anthropic.read(second["body"]).messages
    assert [m["role"] for m in messages] == ["system", "user", "system", "assistant", "tool"]


def test_claude_code_counts_tokens(agent):
    (request,) = recorded("claude-code-default")
    body = {k: v for k, v in request["body"].items() if k not in ("stream", "max_tokens", "metadata")}
    count = agent.client.post("/v1/messages/count_tokens?beta=true", json=body).json()["input_tokens"]
    _, total = cached(send(agent, recorded("claude-code-default", max_tokens=1)[0]))
    assert count == total


def anthropic_body(**fields):
    return {"max_tokens": 4, "messages": HI, **fields}


def test_tools_that_the_client_runs_are_functions():
    kinds = ("bash_20250124", "text_editor_20250728", "memory_20250818")
    ask = anthropic.read(anthropic_body(tools=[{"type": k, "name": k.split("_")[0]} for k in kinds]))
    fields = [set(t["function"]["parameters"]["properties"]) for t in ask.tools]
    assert {"command", "restart"} == fields[0] and "insert_text" in fields[1] and "old_path" in fields[2]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "computer_20250124", "name": "computer"}]}, "tools[0].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
         "messages[0].content[0].source"),
        ({"messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "url"}}]}]},
         "messages[0].content[0].type"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919", "keep": 3}]}},
         "context_management.edits[0].keep"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
    ],
)  # fmt: skip
def test_what_claude_code_may_ask_and_is_refused_by_name(fields, param):
    with pytest.raises(ApiError) as caught:
        anthropic.read(anthropic_body(**fields))
    assert (caught.value.status, caught.value.param) == (400, param)


def test_effort_form_and_documents_reach_the_prompt():
    document = {
        "type": "document",
        "title": "Plan",
        "source": {"type": "text", "media_type": "text/plain", "data": "ten"},
    }
    result = {"type": "tool_result", "tool_use_id": "1", "is_error": True, "content": [{"type": "text", "text": "no"}]}
    schema = {"type": "object"}
    ask = anthropic.read(
        anthropic_body(
            messages=[{"role": "user", "content": [document, result]}],
            output_config={"effort": "max", "format": {"type": "json_schema", "schema": schema}},
        )
    )
    assert [m["content"] for m in ask.messages] == ["Plan\nten", "Error: no"]
    assert ask.template["reasoning_effort"] == "high" and ask.schema == schema


def test_old_tool_results_are_cleared_when_asked(agent):
    turns = list(HI)
    for i in range(6):
        call = {"type": "tool_use", "id": f"c{i}", "name": "read", "input": {"path": "a" * 50}}
        turns += [
            {"role": "assistant", "content": [call]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": f"c{i}", "content": f"{i}" * 300}]},
        ]
    edit = {"type": "clear_tool_uses_20250919", "trigger": {"type": "input_tokens", "value": 1000}}
    edit["keep"] = {"type": "tool_uses", "value": 2}

    def count(**fields):
        body = {"messages": turns, **fields}
        return agent.client.post("/v1/messages/count_tokens", json=body).json()["input_tokens"]

    whole, less = count(), count(context_management={"edits": [edit]})
    assert whole - less > 4 * 200
    assert count(context_management={"edits": [edit | {"clear_tool_inputs": True}]}) < less - 4 * 40
    assert count(context_management={"edits": [edit | {"exclude_tools": ["read"]}]}) == whole
    edit["trigger"]["value"] = 100_000
    assert count(context_management={"edits": [edit]}) == whole


# ---- other clients: everything that they sent on the way from a request to a tool's result and an answer


def without_lengths(request):
    """A recorded request with a short answer; a form, which may need a longer one, keeps what it asked for."""
    body = request["body"]
    for name in ("max_tokens", "max_output_tokens", "max_completion_tokens"):
        body.pop(name, None)
    if not request["path"].endswith("count_tokens"):
        body["max_output_tokens" if "input" in body else "max_tokens"] = 6
    return request


@pytest.mark.parametrize("client", ["opencode", "aider", "openai", "anthropic", "litellm", "langchain", "instructor"])
def test_recorded_clients_are_answered(agent, client):
    requests = [without_lengths(r) for r in recorded(client)]
    assert sum(request["body"].pop("previous_response_id", "") != "" for request in requests) == (client == "openai")
    for request in requests:
        send(agent, request)


@pytest.mark.parametrize("client", ["opencode", "aider"])
def test_another_session_of_an_agent_finds_its_prompt_read(agent, client):
    longest = max(recorded(client), key=lambda r: len(json.dumps(r["body"]["messages"])))
    body = longest["body"] | {"max_tokens": 4, "stream": False}
    agent.post(**body)
    body["messages"][-1] = {"role": "user", "content": "Something else"}
    usage = agent.post(**body).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 0.75 * usage["prompt_tokens"]


# ---- what templates can show


class Template:
    """A tokenizer whose template refuses some orders of roles."""

    def __init__(self, allowed):
        self.allowed = allowed

    def apply_chat_template(self, messages, **_):
        if not self.allowed([m["role"] for m in messages]):
            raise ValueError("not in this order")
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


def alternating(roles):
    return all(a != b for a, b in pairwise(roles)) and "system" not in roles and "tool" not in roles


@pytest.mark.parametrize(
    ("allowed", "roles"),
    [
        (lambda roles: True, ["system", "system", "user", "system", "user"]),
        (lambda roles: "system" not in roles[1:], ["system", "user", "user", "user"]),
        (alternating, ["user"]),
    ],
)
def test_roles_are_folded_as_the_template_needs(allowed, roles):
    given = ["system", "system", "user", "system", "user"]
    messages = [{"role": r, "content": f"text {i}"} for i, r in enumerate(given)]
    fitted, _ = Roles(Template(allowed)).fit(messages, [])
    assert [m["role"] for m in fitted] == roles
    assert all(any(f"text {i}" in m["content"] for m in fitted) for i in range(5))
    # A longer conversation begins as the shorter one does.
    longer, _ = Roles(Template(allowed)).fit([*messages, {"role": "assistant", "content": "so"}], [])
    assert longer[: len(fitted)] == fitted


def test_a_template_without_tools_gets_them_as_text():
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": {"at": 3}}}
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "greetings"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "a star"},
    ]
    fitted, tools = Roles(Template(alternating), plain_tools=True).fit(messages, [tool])
    assert tools == [] and [m["role"] for m in fitted] == ["user", "assistant", "user"]
    text = fitted[0]["content"]
    assert text.index('"name": "look"') < text.index("Be kind.") < text.index("greetings")
    assert '{"name": "look", "arguments": {"at": 3}}' in fitted[1]["content"] and "a star" in fitted[2]["content"]


# ---- volatile text


def test_volatile_lines_are_dropped_and_nothing_else():
    header = "x-anthropic-billing-header: cc_version=1; cch=0;"
    warning = "<system_warning>Token usage: 35000/200000; 165000 remaining</system_warning>"
    messages = [
        {"role": "system", "content": f"{header}\n\nYou are kind."},
        {"role": "user", "content": f"What is {header}?"},
        {"role": "user", "content": warning},
        {"role": "user", "content": f"{warning}\nGo on. {warning}"},
    ]
    assert [m["content"] for m in without(messages)] == [
        "You are kind.",
        f"What is {header}?",
        f"Go on. {warning}",
    ]


def test_volatile_lines_can_be_kept(folder):
    from mlx_lm.tokenizer_utils import load

    from opentq.dialogue.prompt import Prompter
    from opentq.dialogue.request import GenerationRequest

    ask = GenerationRequest(messages=({"role": "system", "content": "x-anthropic-billing-header: a\nB"}, *HI))
    tokenizer = load(folder)
    dropped = Prompter(tokenizer, 512).encode(ask).tokens
    assert "billing" not in tokenizer.decode(dropped)
    assert "billing" in tokenizer.decode(Prompter(tokenizer, 512, keep_volatile=True).encode(ask).tokens)


def test_the_place_where_prompts_part_is_told():
    base = list(range(3000))
    watch = Watch()
    assert watch.see(base) == "" and watch.see(base[:2000]) == ""
    said = watch.see([*base[:37], 9999, 9998, *base[40:]])
    assert "diverges at token 37" in said and "9999" not in said
    assert watch.see(list(range(5000, 8000))) == ""  # another prompt altogether
    assert watch.see([*base[:2500], *range(9000, 9100)]) == ""  # the end differs: that is a conversation
    assert watch.see(base[:40]) == ""


# ---- names


def test_aliases_and_any_model(folder, agent):
    from opentq.server.options import ServeOptions, aliases

    options = ServeOptions("m/tiny", loadable=("m/other",))
    assert aliases(["claude", "gpt=other"], options) == (("claude", "tiny"), ("gpt", "other"))
    options.aliases = aliases(["claude=tiny"], options)
    assert options.served_names == ("tiny", "m/tiny", "default_model", "claude")
    with pytest.raises(UserError, match="one of tiny, other"):
        aliases(["x=nobody"], options)
    answer = agent.post(messages=HI, model="claude-opus-9", max_tokens=2).json()
    assert answer["model"] == "claude-opus-9"


# ---- what is harmless is taken


def test_several_answers_read_their_prompt_once(agent):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x" * 700}], "max_tokens": 12}
    body |= {"temperature": 1.0, "seed": 5}
    with Slow(agent.service.engine):
        several = agent.openai.chat.completions.create(**body, n=3)
    assert [c.index for c in several.choices] == [0, 1, 2]
    assert len({c.message.content for c in several.choices}) == 3
    for i in range(3):
        alone = agent.openai.chat.completions.create(**body | {"seed": 5 + i})
        assert alone.choices[0].message.content == several.choices[i].message.content
    assert several.usage.prompt_tokens == alone.usage.prompt_tokens
    assert several.usage.completion_tokens == 36
    chunks = list(
        agent.openai.chat.completions.create(**body, n=3, stream=True, stream_options={"include_usage": True})
    )
    texts = ["".join(c.choices[0].delta.content or "" for c in chunks if c.choices and c.choices[0].index == i)
             for i in range(3)]  # fmt: skip
    assert texts == [c.message.content for c in several.choices]
    assert sum(bool(c.choices and c.choices[0].finish_reason) for c in chunks) == 3
    assert chunks[-1].usage.completion_tokens == 36
    wait_for(agent.quiet)


def test_one_of_several_can_go_away_while_the_prompt_is_read(agent):
    engine = agent.service.engine
    with Slow(engine, 0.2):
        stream = Streaming(agent, "y" * 1500, n=3)
        wait_for(lambda: engine.reading and len(engine.reading[0].followers) == 2)
        stream.close()
        wait_for(agent.quiet)


def test_several_prompts_and_echo(agent):
    make = agent.openai.completions.create
    prompts = ["once", "upon", "a time"]
    several = make(model="tiny", prompt=prompts, max_tokens=5, temperature=0, echo=True, n=2)
    assert [c.index for c in several.choices] == list(range(6))
    for i, prompt in enumerate(prompts):
        alone = make(model="tiny", prompt=prompt, max_tokens=5, temperature=0).choices[0].text
        assert several.choices[2 * i].text == several.choices[2 * i + 1].text == prompt + alone
    assert several.usage.prompt_tokens == 4 + 4 + 6
    ids = make(model="tiny", prompt=[[70, 71], [72]], max_tokens=2, temperature=0)
    assert len(ids.choices) == 2 and ids.usage.prompt_tokens == 3
    refused = agent.post("/v1/completions", prompt="x", echo=True, logprobs=1)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "echo"
    assert agent.post("/v1/completions", prompt=["x"] * 65).status_code == 400


def test_fields_that_change_nothing_are_taken():
    idle = {"store": True, "service_tier": "flex", "verbosity": "low", "metadata": {"a": "b"}, "user": "u"}
    empty = {"web_search_options": {"search_context_size": None, "user_location": None}}
    refusal = {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}
    request = openai_wire.read_chat({"messages": [*HI, refusal, *HI], **idle, **empty})
    assert request.messages[1]["content"] == "no"


def test_tools_in_every_form():
    flat = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}
    custom = {"type": "custom", "custom": {"name": "g", "description": "d", "format": {"type": "grammar", "grammar": {
        "syntax": "lark", "definition": "start: /x/"}}}}  # fmt: skip
    body = {"messages": HI, "tools": [flat, TOOL, custom]}
    request = openai_wire.read_chat(body)
    assert [t["function"]["name"] for t in request.tools] == ["f", "look_up", "g"] and request.custom == {"g"}
    assert "start: /x/" in request.tools[2]["function"]["description"]
    choices = [
        {"type": "function", "name": "f"},
        {"type": "function", "function": {"name": "f"}},
        {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [{"type": "function", "name": "f"}]}},
    ]
    for choice in choices:
        request = openai_wire.read_chat(body | {"tool_choice": choice})
        # All tools stay in the prompt, and so its prefix; the grammar forces the one that is named.
        assert [t["function"]["name"] for t in request.tools] == ["f", "look_up", "g"]
        assert (list(request.tool_names), request.tool_choice) == (["f"], "required")
    history = {
        "role": "assistant",
        "tool_calls": [{"id": "1", "type": "custom", "custom": {"name": "g", "input": "x"}}],
    }
    (_, call) = openai_wire.read_chat({"messages": [*HI, history]}).messages
    assert call["tool_calls"][0]["function"] == {"name": "g", "arguments": {"input": "x"}}


def choices(tools):
    """`tool_choice: none`, and one of two tools allowed, in the words of all three APIs; each with its reader."""
    flat = [{"type": "function", **t["function"]} for t in tools]
    claude = [{"name": t["name"], "input_schema": {"type": "object"}} for t in flat]
    chat, items = {"messages": HI, "tools": tools}, {"input": "hi", "tools": flat}
    allowed = {"mode": "auto", "tools": [{"type": "function", "name": flat[0]["name"]}]}
    yield openai_wire.read_chat, chat, "none", "none"
    yield anthropic.read, anthropic_body(tools=claude), {"type": "none"}, "none"
    yield lambda body: wire.read(body, []).request, items, "none", "none"
    yield openai_wire.read_chat, chat, {"type": "allowed_tools", "allowed_tools": allowed}, "auto"
    yield lambda body: wire.read(body, []).request, items, {"type": "allowed_tools", **allowed}, "auto"


def test_tools_that_must_not_be_called_stay_in_the_prompt(agent):
    """What is forbidden is the call, by the grammar: the prompt, and so what is remembered of it, is the same."""
    tools = [TOOL, {"type": "function", "function": {"name": "other"}}]
    service = agent.service
    marker = service.engine.tokenizer.encode("<tool_call>", add_special_tokens=False)[0]
    for read, body, choice, mode in choices(tools):
        request = service.grammars.fitted(read(body | {"tool_choice": choice}))
        assert request.tool_choice == mode
        assert service.prompter.encode(request) == service.prompter.encode(read(body))
        matcher = service.grammars.constraint(request, "normal").matcher
        calls = [f'x<tool_call>{{"name": "{name}", "arguments": {{}}}}</tool_call>y' for name in ("look_up", "other")]
        calls[0] = calls[0].replace("{}", '{"word": "sun", "exact": true}')
        taken = []
        for call in calls:
            tokens = service.engine.tokenizer.encode(call, add_special_tokens=False)
            taken.append(matcher.validate_tokens(tokens) == len(tokens))
        assert taken == [mode == "auto", False]
    # Not even where nothing is likelier than the marker.
    body = {"messages": HI, "tools": tools, "max_tokens": 8, "logit_bias": {str(marker): 100}}
    answer = agent.post(**body, tool_choice="none").json()
    assert "<tool_call>" not in answer["choices"][0]["message"]["content"] and answer["usage"]["completion_tokens"]
    assert "<tool_call>" in agent.post(**body).json()["choices"][0]["message"]["content"]


def test_a_marker_of_several_tokens_is_forbidden_as_text(agent, monkeypatch):
    grammars = agent.service.grammars
    monkeypatch.setattr(grammars, "_marker", str)
    monkeypatch.setattr(grammars.tokenizer, "_tool_call_start", "</call.")
    request = openai_wire.read_chat({"messages": HI, "tools": [TOOL], "tool_choice": "none"})
    matcher = grammars.constraint(request, "normal").matcher
    for text, whole in (("a </call b", True), ("<think>a</think>b", True), ("a</callx", True), ("a </call. b", False)):
        tokens = grammars.tokenizer.encode(text, add_special_tokens=False)
        assert (matcher.validate_tokens(tokens) == len(tokens)) == whole, text


def test_without_grammars_forbidden_tools_are_not_shown(agent, monkeypatch):
    monkeypatch.setattr("opentq.server.grammar.available", lambda: False)
    for read, body, choice, mode in choices([TOOL, {"type": "function", "function": {"name": "other"}}]):
        request = agent.service.grammars.fitted(read(body | {"tool_choice": choice}))
        assert [t["function"]["name"] for t in request.tools] == ([] if mode == "none" else ["look_up"])
        assert agent.service.grammars.constraint(request, "normal") is None


# ---- an answer that the client began


def test_an_answer_goes_on_with_what_the_client_began(agent):
    begun = [*HI, {"role": "assistant", "content": "The answer is"}]
    answer = agent.client.post("/v1/messages", json={"messages": begun, "max_tokens": 6}).json()
    prompt = "<|user|>hi<|end|><|assistant|>The answer is"
    same = agent.post("/v1/completions", prompt=prompt, max_tokens=6, temperature=0).json()
    assert answer["content"][0]["text"] == same["choices"][0]["text"]
    assert (
        answer["usage"]["input_tokens"] + answer["usage"]["cache_read_input_tokens"] == same["usage"]["prompt_tokens"]
    )
    chat = agent.post(messages=begun, continue_final_message=True, max_tokens=6).json()
    assert chat["choices"][0]["message"]["content"] == same["choices"][0]["text"]
    empty = anthropic.read(anthropic_body(messages=[*HI, {"role": "assistant", "content": ""}]))
    assert len(empty.messages) == 1 and not empty.continue_last


@pytest.mark.parametrize(
    ("content", "fields", "param"),
    [
        ("Well ", {}, "messages[1].content"),
        ("{", {"output_config": {"format": {"type": "json_schema", "schema": {}}}}, "output_config.format"),
        ([{"type": "thinking", "thinking": "hm"}], {}, "messages[1]"),
    ],
)
def test_what_no_answer_can_go_on_with_is_refused(content, fields, param):
    with pytest.raises(ApiError) as caught:
        anthropic.read(anthropic_body(messages=[*HI, {"role": "assistant", "content": content}], **fields))
    assert (caught.value.status, caught.value.param) == (400, param)
    with pytest.raises(ApiError, match="go on"):
        openai_wire.read_chat({"messages": HI, "continue_final_message": True})


def test_custom_tools_are_called_with_text(agent):
    custom = {"type": "custom", "custom": {"name": "say"}}
    body = {"model": "tiny", "messages": HI, "tools": [custom], "tool_choice": "required", "max_tokens": 400}
    choice = agent.openai.chat.completions.create(**body, temperature=1, seed=1).choices[0]
    if choice.finish_reason == "tool_calls":
        assert choice.message.tool_calls[0].type == "custom" and choice.message.tool_calls[0].custom.name == "say"


@pytest.mark.parametrize("at", range(4))
def test_nested_models(agent, at):
    """pydantic models within models, as instructor and langchain ask for them."""
    request = recorded("nested-models", model="tiny", max_completion_tokens=90)[at]
    request["body"].pop("max_tokens", None)
    response = agent.client.post(request["path"], json=request["body"])
    assert response.status_code == 200, response.text
    message = response.json()["choices"][0]["message"]
    text = message["tool_calls"][0]["function"]["arguments"] if message.get("tool_calls") else message["content"]
    if response.json()["choices"][0]["finish_reason"] != "length":
        line = json.loads(text)
        assert 0 <= line["start"]["x"] <= 9 and 0 <= line["end"]["y"] <= 9
