"""What must not get through `opentq serve`, or stall it: work without bounds, depth, grammars and files that fail."""

from __future__ import annotations

import json
import resource
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import mlx.core as mx
import pytest
from typer.testing import CliRunner

from opentq.cli.main import app
from opentq.dialogue.errors import ApiError
from opentq.dialogue.output import StopText
from opentq.dialogue.prompt import Abandoned, Prompter
from opentq.dialogue.request import Draw, GenerationRequest
from opentq.dialogue.sampling import make_processors, make_sampler
from opentq.errors import UserError
from opentq.hosts.mlx_lm.tokens import SLICE
from opentq.server import anthropic, connections, openai, pace, schema
from opentq.server.options import ServeOptions

from .server_support import HI, LONG, Slow, Streaming, content, serving, wait_for
from .tiny_model import write

# ---- work that grows with what a client sends


class CountingTokenizer:
    """A token for every four characters; counts the characters that it is given."""

    has_chat_template = True
    has_tool_calling = True
    has_thinking = False
    response_initial_state = ""

    def __init__(self):
        self.seen = 0

    def get_vocab(self):
        return {"a" * 8: 0}

    def encode(self, text, add_special_tokens=True):
        self.seen += len(text)
        return [0] * -(-len(text) // 4)

    def apply_chat_template(self, messages, tokenize=False, **_):
        return "".join(m["content"] for m in messages)


@pytest.mark.parametrize("chat", [True, False])
def test_a_prompt_far_too_long_is_not_tokenized(chat):
    def ask(text):
        message = {"role": "user", "content": text}
        return GenerationRequest(messages=(message,)) if chat else GenerationRequest(prompt=text)

    tokenizer = CountingTokenizer()
    prompter = Prompter(tokenizer, 10)
    with pytest.raises(ApiError, match="maximum context length is 1000 "):
        prompter.encode(ask("x" * 16_000_000), 1000)
    assert tokenizer.seen == 0, "no text of so many characters has only a thousand tokens"
    limit = 50_000
    with pytest.raises(ApiError) as caught:
        prompter.encode(ask("x" * (8 * limit - 1)), limit)
    assert caught.value.code == "context_length_exceeded" and tokenizer.seen <= 4 * 1.1 * limit + 2 * SLICE
    assert len(prompter.encode(ask("x" * 4 * limit), limit).tokens) == limit
    looks = iter([False, False, False, True, True])
    before = tokenizer.seen
    with pytest.raises(Abandoned):
        prompter.encode(ask("x" * 10 * SLICE), None, lambda: next(looks))
    assert tokenizer.seen - before <= 3 * SLICE


def test_a_client_that_goes_away_ends_the_tokenizing_of_its_prompt(server, monkeypatch):
    prompter, begun, ended = server.service.prompter, threading.Event(), threading.Event()
    inner = prompter.encode

    def slow(request, limit=None, abandoned=lambda: False):
        if request.max_tokens != 77:
            return inner(request, limit, abandoned)
        begun.set()
        wait_for(abandoned)
        ended.set()
        raise Abandoned

    monkeypatch.setattr(prompter, "encode", slow)
    for stream in (True, False):
        begun.clear(), ended.clear()
        with pytest.raises(httpx.ReadTimeout):
            server_body = {"messages": HI, "max_tokens": 77, "stream": stream}
            httpx.post(f"{server.url}/v1/chat/completions", json=server_body, timeout=0.5)
        assert begun.is_set() and ended.wait(5)
    assert server.chat("still here", max_tokens=2).status_code == 200


def test_stops_are_bounded_and_cheap():
    for stop, param in (["x" * 1025], "stop[0]"), ("x" * 300_000, "stop"), (["x"] * 17, "stop"):
        with pytest.raises(ApiError) as caught:
            openai.read_chat({"messages": HI, "stop": stop})
        assert caught.value.param == param and len(caught.value.message) < 100
    with pytest.raises(ApiError, match="logit_bias must have at most 1024 items, not 300000"):
        openai.read_chat({"messages": HI, "logit_bias": {str(i): 1 for i in range(300_000)}})
    finder = StopText(tuple("ab" * 511 + chr(99 + i) for i in range(16)))
    tic = time.perf_counter()
    out = "".join(finder.feed("ab") for _ in range(2000)) + finder.flush()
    assert out == "ab" * 2000 and time.perf_counter() - tic < 2


def test_a_body_is_bounded_by_the_context(folder):
    with serving(folder, max_context=256) as server:
        assert server.service.max_body < 2 << 20
        big = server.post(messages=[{"role": "user", "content": "x" * (2 << 20)}])
        assert big.status_code == 413 and "context" in big.json()["error"]["message"]
        assert server.chat("x" * 100).status_code == 200


# ---- depth

PLACES = {
    "body": (openai.read_chat, '{"messages": [], "x": %s}'),
    "arguments": (openai.read_chat, '{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", '
                  '"arguments": %r}}]}]}'),
    "parameters": (openai.read_chat, '{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function", '
                   '"function": {"name": "f", "parameters": {"x": %s}}}], "tool_choice": "required"}'),
    "schema": (openai.read_chat, '{"messages": [{"role": "user", "content": "x"}], "response_format": {"type": '
               '"json_schema", "json_schema": {"schema": {"x": %s}}}}'),
    "template": (openai.read_chat, '{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": '
                 '{"x": %s}}'),
    "input": (anthropic.read, '{"max_tokens": 1, "messages": [{"role": "assistant", "content": [{"type": "tool_use", '
              '"id": "1", "name": "f", "input": {"x": %s}}]}]}'),
    "input_schema": (anthropic.read, '{"max_tokens": 1, "messages": [{"role": "user", "content": "x"}], "tools": '
                     '[{"name": "f", "input_schema": {"x": %s}}]}'),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_depth_is_refused_at_every_door(place):
    read, text = PLACES[place]
    for depth in (300, 900, 10_000):
        for nested in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
            if place == "arguments":
                body = text.replace("%r", json.dumps(nested))
            else:
                body = text % nested
            with pytest.raises(ApiError, match="nested too deeply") as caught:
                read(schema.parse(body.encode()))
            assert caught.value.status == 400


def test_depth_below_the_limit_is_no_server_error(server):
    nested = '{"a":' * 150 + "1" + "}" * 150
    for place, (_, text) in PLACES.items():
        body = text.replace("%r", json.dumps(nested)) if place == "arguments" else text % nested
        path = "/v1/messages" if place.startswith("input") else "/v1/chat/completions"
        sent = json.dumps(json.loads(body) | {"max_tokens": 2})
        answer = server.client.post(path, content=sent, headers={"content-type": "application/json"})
        assert answer.status_code in (200, 400), (place, answer.text)


# ---- one model, another, none


def ask_everywhere(server):
    """The status of every route."""
    client, tokens = server.client, {"messages": HI, "max_tokens": 1}
    found = {p: client.get(p).status_code for p in ("/health", "/metrics", "/openapi.json", "/v1/models", "/models/x")}
    found |= {p: client.post(p, json=tokens).status_code for p in ("/v1/messages", "/v1/messages/count_tokens")}
    return found | {p: client.post(p, json=tokens).status_code for p in ("/v1/chat/completions", "/chat/completions")}


def test_every_route_answers_while_a_model_is_changed_and_when_none_is_left(folder, tmp_path):
    other = write(tmp_path / "other", seed=1)
    with serving(folder, names=("tiny",), loadable=(str(other),)) as server:
        roster, release = server.server.roster, threading.Event()
        load, mended = roster._load, threading.Event()

        def fail(options):
            if mended.is_set():
                return load(options)
            assert release.wait(20)
            raise UserError("no such luck")

        roster._load = fail
        waiting = threading.Thread(target=lambda: server.chat("x", model="other"))
        waiting.start()
        wait_for(lambda: server.client.get("/health").json()["status"] == "loading")
        found = ask_everywhere(server)
        assert found.pop("/models/x") == 404 and set(found.values()) == {200, 503}, found
        assert server.client.get("/metrics").status_code == server.client.get("/v1/models").status_code == 200
        release.set()
        waiting.join(20)
        # Neither model could be loaded.
        assert server.client.get("/health").json()["status"] == "no model"
        lost = server.chat("x", model="tiny")
        assert lost.status_code == 507 and server.client.get("/health").status_code == 200
        found = ask_everywhere(server)
        assert 500 not in found.values()
        mended.set()
        assert content(server.chat("x", model="other")) and server.client.get("/health").json()["status"] == "ok"
        assert content(server.chat("x", model="tiny"))


def test_names_that_are_told_hold_no_folder(folder, tmp_path):
    options = ServeOptions(str(folder), loadable=(str(tmp_path),))
    assert options.shown_names == (Path(folder).name,) and str(folder) in options.served_names
    assert ServeOptions("org/name").shown_names == ("name", "org/name")
    with serving(folder) as server:
        texts = [server.client.get(p).text for p in ("/v1/models", "/v1/models/nobody", "/nowhere")]
        texts.append(server.chat("x", model="nobody").text)
        assert str(folder) not in "".join(texts) and Path(folder).name in texts[0]
        assert server.chat("x", model=str(folder), max_tokens=2).status_code == 200


# ---- habits of other clients


def test_what_clients_of_mlx_lms_server_send(server):
    body = json.dumps({"messages": HI, "max_tokens": 2, "model": "default_model"})
    form = {"content-type": "application/x-www-form-urlencoded"}  # curl -d
    assert server.client.post("/chat/completions", content=body, headers=form).status_code == 200
    assert server.client.get("/models").json() == server.client.get("/v1/models").json()
    assert (
        server.client.post("/v1/chat/completions", content=body, headers=form | {"origin": "http://a"}).status_code
        == 415
    )
    assert (
        server.client.post("/v1/chat/completions", content=body, headers={"content-type": "text/plain"}).status_code
        == 415
    )
    packed = {"content-type": "application/json", "content-encoding": "gzip"}
    refused = server.client.post("/v1/chat/completions", content=b"\x1f\x8b", headers=packed)
    assert refused.status_code == 415 and "gzip" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"prompt": 3}, "prompt must be text, token ids, or an array of either, not 3"),
        ({"prompt": "x", "stop": ["x"] * 100}, "stop must have at most 16 items, not 100"),
        ({"prompt": "x", "stop": 3}, "stop must be a string or an array of strings, not 3"),
        ({"prompt": "x", "temperature": "hot"}, 'temperature must be a number, not "hot"'),
    ],
)  # fmt: skip
def test_errors_say_what_is_wrong(body, words):
    with pytest.raises(ApiError, match=words.replace("(", r"\(")):
        openai.read_completion(body)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_the_smallest_numbers_are_greedy(dtype):
    logits = mx.array([[0.0, 4.0, 3.0, -2.0, -30.0]]).astype(dtype)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    tiny = [{"temperature": t} for t in (0, 1e-300, 1e-40, 1e-38, 1e-10, 1e-5, 2e-5, 1e-3)]
    tiny += [{"temperature": 1.0, "top_p": p} for p in (0.0, 1e-300, 1e-46, 1e-30, 1e-8, 1e-3)]
    for how in tiny:
        sampler = make_sampler(Draw(**how, seed=1))
        assert {int(sampler(logprobs).item()) for _ in range(20)} == {1}, how
    free = make_sampler(Draw(temperature=2.0, seed=1))
    assert len({int(free(logprobs).item()) for _ in range(100)}) > 1


def test_defaults_of_the_server_and_of_requests(folder):
    with serving(folder, temperature=1.5, top_k=1, names=("tiny",)) as server:
        greedy = [content(server.chat("roll", seed=s)) for s in range(3)]
        assert len(set(greedy)) == 1, "top_k: 1 from the server"
        free = [content(server.chat("roll", seed=s, top_k=200)) for s in range(3)]
        assert len(set(free)) > 1
        answered = server.client.post("/v1/messages", json={"messages": HI, "max_tokens": 12}).json()["content"]
        assert answered == server.client.post("/v1/messages", json={"messages": HI, "max_tokens": 12}).json()["content"]


@pytest.mark.parametrize("option", ["quantized-kv-start", "prompt-cache-size", "prompt-concurrency"])
def test_options_of_mlx_lms_server_are_refused_in_a_line(option):
    result = CliRunner().invoke(app, ["serve", "no/model", f"--{option}", "3"])
    assert isinstance(result.exception, UserError) and f"--{option} is an option of mlx-lm's" in str(result.exception)


def test_the_log_level_may_be_in_capitals():
    result = CliRunner().invoke(app, ["serve", "no/model", "--log-level", "WARNING", "--host", "0.0.0.0"])
    assert "api-key" in str(result.exception)
    assert "--log-level" in str(CliRunner().invoke(app, ["serve", "m", "--log-level", "LOUD"]).exception)


def test_the_context_of_the_repetition_penalty():
    how = openai.read_chat({"messages": HI, "repetition_penalty": 2, "repetition_context_size": 2}).sampling
    (processor,) = make_processors(how, 0)
    logits = mx.ones((1, 8))
    assert processor(mx.array([1, 2, 3]), logits)[0].tolist() == [1, 1, 0.5, 0.5, 1, 1, 1, 1]


def test_chunks_are_never_smaller_than_what_is_packed_together(monkeypatch):
    asked = []

    def model(x, cache):
        asked.append(x.shape[1])
        return x

    monkeypatch.setattr(pace, "make_prompt_cache", lambda _: [])
    ticks = iter(range(1000))
    monkeypatch.setattr(pace.time, "perf_counter", lambda: next(ticks) ** 3)  # a machine that is slower every time
    assert pace.choose_chunk(model) == 64 and max(asked) == 128


# ---- connections


def test_silent_and_slow_connections_are_closed(folder, monkeypatch, caplog):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.6)
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 8)
    with serving(folder) as server:
        address = ("127.0.0.1", server.port)
        asked = socket.create_connection(address)
        asked.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        answer = b""
        while b"}" not in answer:  # head and body may come apart
            answer += asked.recv(1000)
        assert b"200 OK" in answer
        silent = [socket.create_connection(address) for _ in range(3)]
        silent[1].sendall(b"GET /health HTTP/1.1\r\n")
        silent[2].sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx: ")
        server.client.close()
        for _ in range(20):  # a byte now and then does not buy time
            with suppress(OSError):
                silent[2].sendall(b"a")
            time.sleep(0.05)
        for s in (*silent, asked):
            s.settimeout(2)
            with suppress(ConnectionError):
                assert s.recv(1000) == b""
        many = [socket.create_connection(address) for _ in range(60)]

        def said():
            return sum("more than 8 are open" in r.message for r in caplog.records)

        wait_for(said)
        wait_for(lambda: not server.server.server_state.connections)
        assert said() == 1, "once a minute"
        assert httpx.get(f"{server.url}/health").status_code == 200
        steady = Streaming(server, "steady", max_tokens=150)  # an answer may take longer than headers
        time.sleep(0.8)
        assert len(steady.rest()) > 50
        for s in (*silent, *many, asked):
            s.close()


def test_few_files_are_said_in_a_line(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 64))
    with pytest.raises(UserError, match="64 files"):
        connections.allowed()
    limits = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 256))
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.append(pair))
    assert connections.allowed() == 256 - connections.BACKLOG - connections.RESERVE and limits == [(256, 256)]


def test_a_request_that_fails_at_its_start_leaves_those_that_came_with_it(server, monkeypatch):
    engine = server.service.engine
    inner, calls = engine.store.fetch, []

    def fetch(names):
        calls.append(names)
        if len(calls) == 2:
            raise RuntimeError("once")
        return inner(names)

    with Slow(engine, 0.5), ThreadPoolExecutor() as pool:
        reading = Streaming(server, LONG)
        wait_for(lambda: engine.reading)
        monkeypatch.setattr(engine.store, "fetch", fetch)
        answers = [pool.submit(server.chat, f"one of three {n}", max_tokens=2) for n in range(3)]
        assert sorted(a.result().status_code for a in answers) == [200, 200, 500]
        reading.close()
    wait_for(server.quiet)
