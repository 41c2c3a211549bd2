"""`opentq serve` over real HTTP: the clients that people use, and what must not get through."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest

from opentq.errors import UserError
from opentq.server import anthropic, schema
from opentq.server.options import ServeOptions, check

from .server_support import HI, LONG, PERSON, TOOL, content, events, serving, wait_for

# ---- OpenAI's API


def test_openai_client(server):
    models = server.openai.models.list().data
    assert models[0].id == "tiny" and server.openai.models.retrieve("tiny").id == "tiny"
    answer = server.openai.chat.completions.create(model="tiny", messages=HI, max_tokens=10, temperature=0)
    choice = answer.choices[0]
    assert choice.message.content and choice.finish_reason in ("length", "stop")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    text = server.openai.completions.create(model="tiny", prompt="once upon", max_tokens=10, temperature=0)
    assert text.choices[0].text and text.usage.prompt_tokens == 9
    ids = server.openai.completions.create(model="tiny", prompt=[70, 71, 72], max_tokens=3, temperature=0)
    assert ids.usage.prompt_tokens == 3


@pytest.mark.parametrize("page", ["README.md", "docs/server.md"])
def test_snippets_work_as_written(folder, page, capsys):
    """The curl line and the Python of the pages, with another port."""
    blocks = re.findall(r"```(?:python)?\n(.*?)```", (Path(__file__).parents[1] / page).read_text(), re.S)
    curl = next((b for b in blocks if b.startswith("curl")), "")
    assert curl or page == "README.md"
    python = next(b for b in blocks if "OpenAI(" in b)
    with serving(folder, names=("tiny-llama",), max_tokens=20) as server:
        here = f"127.0.0.1:{server.port}"
        if curl and shutil.which("curl"):
            command = curl.replace("127.0.0.1:8080", here)
            out = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
            assert json.loads(out)["choices"][0]["message"]["content"]
        exec(python.replace("127.0.0.1:8080", here), {})
        assert capsys.readouterr().out.strip()


def test_streaming_equals_not_streaming(server):
    body = {
        "model": "tiny",
        "messages": HI,
        "max_tokens": 40,
        "temperature": 1,
        "seed": 5,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = server.openai.chat.completions.create(**body)
    stream = list(server.openai.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    assert stream[0].choices[0].delta.role == "assistant"
    assert stream[-1].choices == [] and stream[-1].usage == whole.usage
    assert all(c.usage is None for c in stream[:-1])
    pieces = [c.choices[0] for c in stream[:-1]]
    assert "".join(p.delta.content or "" for p in pieces) == whole.choices[0].message.content
    assert pieces[-1].finish_reason == whole.choices[0].finish_reason
    assert [t for p in pieces if p.logprobs for t in p.logprobs.content] == whole.choices[0].logprobs.content
    first = whole.choices[0].logprobs.content[0]
    assert len(first.top_logprobs) == 2 and first.logprob <= first.top_logprobs[0].logprob <= 0
    lines = server.client.post("/v1/chat/completions", json=body | {"stream": True}).text.splitlines()
    assert events(lines)[-1] == "[DONE]"


def test_async_client_in_parallel_equals_one_by_one(server):
    prompts = [LONG[: 37 * n] for n in range(1, 11)]
    single = [content(server.chat(p, max_tokens=24)) for p in prompts]

    async def all_at_once():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            answers = await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model="tiny", messages=[{"role": "user", "content": p}], max_tokens=24, temperature=0
                    )
                    for p in prompts
                )
            )
        return [a.choices[0].message.content for a in answers]

    assert asyncio.run(all_at_once()) == single
    assert len(set(single)) > 5


def test_seed_and_temperature(server):
    def sample(**body):
        return content(server.chat("roll", temperature=1.5, max_tokens=30, **body))

    assert sample(seed=1) == sample(seed=1) != sample(seed=2)
    assert sample(seed=1, top_k=1) == content(server.chat("roll", max_tokens=30))
    assert sample(seed=1, min_p=1.0) == sample(seed=2, top_p=0.0001)
    assert sample() != sample()


def test_stop(server):
    text = content(server.chat("stop", max_tokens=30))
    stop = text[4:7]
    body = server.chat("stop", max_tokens=30, stop=["never seen", stop]).json()
    assert body["choices"][0]["message"]["content"] == text[: text.index(stop)]
    assert body["choices"][0]["finish_reason"] == "stop" and body["usage"]["completion_tokens"] < 30
    wait_for(server.quiet)


def test_penalties_and_bias(server):
    base = server.post("/v1/completions", prompt="x", max_tokens=30).json()["choices"][0]["text"]
    token = 65
    biased = server.post("/v1/completions", prompt="x", max_tokens=30, logit_bias={str(token): 100}).json()
    assert biased["choices"][0]["text"] == server.service.engine.tokenizer.decode([token]) * 30 != base
    calm = server.post(
        "/v1/completions", prompt="x", max_tokens=30, logit_bias={str(token): 12}, frequency_penalty=2.0
    ).json()
    assert calm["choices"][0]["text"] != biased["choices"][0]["text"]
    assert server.post("/v1/completions", prompt="x", logit_bias={"99999": 1}).status_code == 400
    assert server.post("/v1/completions", prompt=[99999]).status_code == 400


def test_legacy_logprobs(server):
    body = {"model": "tiny", "prompt": "once", "max_tokens": 12, "logprobs": 2, "temperature": 0}
    whole = server.openai.completions.create(**body).choices[0].logprobs
    assert len(whole.tokens) == len(whole.token_logprobs) == len(whole.text_offset) == 12
    chunks = [c.choices[0].logprobs for c in server.openai.completions.create(**body, stream=True)]
    assert [t for c in chunks if c for t in c.tokens] == whole.tokens
    assert [o for c in chunks if c for o in c.text_offset] == whole.text_offset


def test_json_schema(server):
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    for seed in range(3):
        answer = server.openai.chat.completions.create(
            model="tiny", messages=HI, max_tokens=100, response_format=form, temperature=1, seed=seed
        )
        person = json.loads(answer.choices[0].message.content)
        assert person["name"] in ("Ada", "Alan") and 1800 <= person["born"] <= 1999
        assert answer.choices[0].finish_reason == "stop"
    loose = server.chat("go", response_format={"type": "json_object"}, max_tokens=3).json()["choices"][0]
    assert loose["message"]["content"].startswith("{")
    bad = {"type": "json_schema", "json_schema": {"schema": {"type": "no such type"}}}
    refused = server.chat("go", response_format=bad)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "response_format"


def test_schema_without_its_extra(server, monkeypatch):
    monkeypatch.setattr("opentq.server.grammar.available", lambda: False)
    refused = server.chat("go", response_format={"type": "json_object"})
    assert refused.status_code == 400 and "opentq[schema]" in refused.json()["error"]["message"]


def test_tools(server):
    choice = {"tools": [TOOL], "tool_choice": "required"}
    body = {"model": "tiny", "messages": HI, "max_tokens": 150, "temperature": 1, "seed": 3, **choice}
    whole = server.openai.chat.completions.create(**body).choices[0]
    call = whole.message.tool_calls[0]
    assert whole.finish_reason == "tool_calls" and whole.message.content is None and call.function.name == "look_up"
    assert json.loads(call.function.arguments)["word"] in ("sun", "moon")
    chunks = [c.choices[0] for c in server.openai.chat.completions.create(**body, stream=True)]
    streamed = [c for chunk in chunks for c in chunk.delta.tool_calls or []]
    assert [(c.index, c.function.name, c.function.arguments) for c in streamed] == [
        (0, "look_up", call.function.arguments)
    ]
    assert chunks[-1].finish_reason == "tool_calls"
    named = body | {"tool_choice": {"type": "function", "function": {"name": "look_up"}}}
    assert server.openai.chat.completions.create(**named).choices[0].message.tool_calls
    history = [
        *HI,
        {"role": "assistant", "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "a star"},
    ]
    assert server.post(messages=history, tools=[TOOL], max_tokens=5).status_code == 200


def test_reasoning(server):
    body = {"chat_template_kwargs": {"think": True}, "max_tokens": 8}
    message = server.chat("why", **body).json()["choices"][0]["message"]
    assert message["reasoning"] == message["reasoning_content"] != "" and message["content"] == ""
    lines = server.chat("why", stream=True, **body).text.splitlines()
    deltas = [json.loads(e)["choices"][0]["delta"] for e in events(lines)[:-1]]
    assert "".join(d.get("reasoning_content", "") for d in deltas) == message["reasoning"]


# ---- Anthropic's API


def test_messages(server):
    body = {"model": "tiny", "max_tokens": 20, "system": "Be kind.", "messages": HI}
    whole = server.client.post("/v1/messages", json=body).json()
    assert whole["type"] == "message" and whole["content"][0]["type"] == "text"
    assert whole["stop_reason"] in ("max_tokens", "end_turn") and whole["usage"]["output_tokens"] <= 20
    lines = server.client.post("/v1/messages", json=body | {"stream": True}).text.splitlines()
    data = [json.loads(e) for e in events(lines)]
    kinds = [d["type"] for d in data]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    text = "".join(d["delta"]["text"] for d in data if d["type"] == "content_block_delta")
    assert text == whole["content"][0]["text"] and data[-2]["delta"]["stop_reason"] == whole["stop_reason"]
    count = server.client.post("/v1/messages/count_tokens", json={"messages": HI, "system": "Be kind."}).json()
    assert count["input_tokens"] == whole["usage"]["input_tokens"] + whole["usage"]["cache_read_input_tokens"]


def test_messages_with_tools(server):
    tool = {"name": "look_up", "description": "", "input_schema": TOOL["function"]["parameters"]}
    body = {"max_tokens": 150, "messages": HI, "tools": [tool], "tool_choice": {"type": "any"}, "temperature": 1}
    whole = server.client.post("/v1/messages", json=body).json()
    use = whole["content"][0]
    assert whole["stop_reason"] == "tool_use" and use["name"] == "look_up" and use["input"]["word"] in ("sun", "moon")
    turns = [
        *HI,
        {"role": "assistant", "content": [{"type": "text", "text": "Let me see."}, use]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use["id"], "content": "a star"},
                                     {"type": "text", "text": "well?"}]},
    ]  # fmt: skip
    assert (
        server.client.post("/v1/messages", json={"max_tokens": 4, "messages": turns, "tools": [tool]}).status_code
        == 200
    )
    roles = [m["role"] for m in anthropic.read({"max_tokens": 4, "messages": turns, "tools": [tool]}).messages]
    assert roles == ["user", "assistant", "tool", "user"]
    error = server.client.post("/v1/messages", json={"messages": HI}).json()
    assert error["type"] == "error" and "max_tokens" in error["error"]["message"]
    image = [{"role": "user", "content": [{"type": "image", "source": {"type": "file", "path": "/etc/passwd"}}]}]
    assert server.client.post("/v1/messages", json={"max_tokens": 4, "messages": image}).status_code == 400


# ---- security and errors


def test_errors_have_openais_shape(server):
    post = server.client.post
    json_type = {"content-type": "application/json"}
    cases = [
        (post("/v1/chat/completions", content=b"{", headers=json_type), 400),
        (post("/v1/chat/completions", content=b"{}", headers={"content-type": "text/plain"}), 415),
        (server.post(messages=HI, model="gpt-4"), 404),
        (server.client.get("/v1/models/../../etc/passwd"), 404),
        (server.client.get("/etc/passwd"), 404),
        (server.client.get("/v1/chat/completions"), 405),
        (server.post(messages=[{"role": "user", "content": "x"}], n=9), 400),
    ]
    for response, status in cases:
        error = response.json()["error"]
        assert response.status_code == status and set(error) == {"message", "type", "param", "code"}
    with pytest.raises(openai.BadRequestError, match="prediction is not supported"):
        form = {"type": "content", "content": "x"}
        server.openai.chat.completions.create(model="tiny", messages=HI, prediction=form)
    with pytest.raises(openai.NotFoundError):
        server.openai.chat.completions.create(model="other", messages=HI)


def test_malformed_bodies_over_http(server):
    rng = random.Random(2)
    good = json.dumps({"messages": HI, "max_tokens": 1}).encode()
    for _ in range(150):
        body = bytearray(good)
        for _ in range(3):
            body[rng.randrange(len(body))] = rng.randrange(256)
        response = server.client.post(
            rng.choice(["/v1/chat/completions", "/v1/completions", "/v1/messages"]),
            content=bytes(body),
            headers={"content-type": "application/json"},
        )
        assert response.status_code == 200 or (response.status_code < 500 and response.json()["error"]["message"])


def test_keys_hosts_and_limits(folder, caplog):
    with serving(folder, api_key="sécret", max_body=2000) as server:
        bare = httpx.Client(base_url=server.url)
        assert bare.get("/health").status_code == 200
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Basic sécret".encode()},
            {"x-api-key": ""},
        ):
            refused = bare.get("/v1/models", headers=headers)
            assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
        assert bare.get("/v1/models", headers={"x-api-key": "sécret".encode()}).status_code == 200
        assert bare.get("/health", headers={"host": "evil.example"}).status_code == 403
        key = {"authorization": "Bearer sécret".encode(), "content-type": "application/json"}
        big = bare.post("/v1/completions", content=b"x" * 3000, headers=key)
        assert big.status_code == 413
        chunked = bare.post("/v1/completions", content=(b"x" * 500 for _ in range(9)), headers=key)
        assert chunked.status_code == 413
        cors = bare.options(
            "/v1/models", headers={"origin": "http://a.example", "access-control-request-method": "GET"}
        )
        assert "access-control-allow-origin" not in cors.headers
        assert bare.get("/health", headers={"x": "y" * 70_000}).status_code >= 400
        with caplog.at_level("DEBUG"):
            bare.post("/v1/completions", json={"prompt": "hush hush", "max_tokens": 2}, headers=key)
        assert "hush" not in caplog.text and "2 written" in caplog.text


def test_other_addresses_need_a_key():
    with pytest.raises(UserError, match="api-key"):
        check(ServeOptions("m", host="0.0.0.0"))
    check(ServeOptions("m", host="0.0.0.0", insecure=True))
    check(ServeOptions("m", host="0.0.0.0", api_key="k"))


def test_cors_when_asked(folder):
    with serving(folder, origins=("http://a.example",)) as server:
        response = server.client.get("/health", headers={"origin": "http://a.example"})
        assert response.headers["access-control-allow-origin"] == "http://a.example"


def test_health_metrics_and_openapi(server):
    server.chat("count me")
    wait_for(server.quiet)
    health = server.client.get("/health").json()
    assert health["status"] == "ok" and health["running"] == 0 and health["max_context"] == 4096
    text = server.client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["opentq_generated_tokens_total"]) > 0 and float(values["opentq_running"]) == 0
    document = server.client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    for form, path in (("ChatRequest", "/v1/chat/completions"), ("MessagesRequest", "/v1/messages")):
        posted = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert posted == {"$ref": f"#/components/schemas/{form}"}
        assert schemas[form]["properties"]["messages"]["maxItems"] == schema.MAX_MESSAGES
    named = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert len(named) > 15 and named <= set(schemas)


# ---- heavier clients, run with -m slow where they are installed


@pytest.mark.slow
def test_litellm(server):
    litellm = pytest.importorskip("litellm")
    base = {"model": "openai/tiny", "api_base": f"{server.url}/v1", "api_key": "none", "messages": HI, "temperature": 0}
    whole = litellm.completion(**base, max_tokens=12)
    chunks = list(litellm.completion(**base, max_tokens=12, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content and chunks[-1].usage.total_tokens == whole.usage.total_tokens
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    assert "born" in json.loads(
        litellm.completion(**base, max_tokens=90, response_format=form).choices[0].message.content
    )
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**base | {"messages": [{"role": "user", "content": "x" * 9999}]})


@pytest.mark.slow
def test_schemathesis(folder, tmp_path):
    command = shutil.which("schemathesis", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if command is None:
        pytest.skip("schemathesis is not installed")
    checks = "not_a_server_error,status_code_conformance,response_schema_conformance,negative_data_rejection"
    with serving(folder, names=("tiny",), max_context=256, max_tokens=4) as server:
        url = f"{server.url}/openapi.json"
        run = subprocess.run(
            [command, "run", url, "--checks", checks, "-n", "20", "--request-timeout", "60"],
            capture_output=True,
            text=True,
            timeout=540,
            cwd=tmp_path,
        )
    assert run.returncode == 0, run.stdout[-3000:]
