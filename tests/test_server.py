"""`opentq serve` over real HTTP: the clients that people use, and everything that may go wrong around them."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from opentq.caches import disk
from opentq.server import anthropic, schema
from opentq.server import openai as wire
from opentq.server.admission import Admission, shelf
from opentq.server.errors import ApiError
from opentq.server.launch import Options, Server, check, make_service
from opentq.server.output import Parser, StopText
from opentq.server.prefix import PrefixStore

from .tiny_model import write

LONG = "".join(random.Random(7).choices("abcdefghij \n", k=3000))
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look a word up.",
        "parameters": {
            "type": "object",
            "properties": {"word": {"enum": ["sun", "moon"]}, "exact": {"type": "boolean"}},
            "required": ["word", "exact"],
            "additionalProperties": False,
        },
    },
}
PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Alan"]}, "born": {"type": "integer", "minimum": 1800, "maximum": 1999}},
    "required": ["name", "born"],
    "additionalProperties": False,
}


# ---- a server in a thread


class Running:
    """A server that listens; `client` speaks HTTP to it."""

    def __init__(self, folder, **options):
        self.options = Options(
            str(folder), **{"kv": "int4", "memory": 4 << 30, "prefill_step": 64, "port": 0, **options}
        )
        self.service, self.prices = make_service(self.options)
        self.server = Server(self.service, self.options)
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self.socket.getsockname()[1]
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve([self.socket])))
        self.thread.start()
        key = {"authorization": f"Bearer {options['api_key']}".encode()} if options.get("api_key") else {}
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=60, headers=key)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key=options.get("api_key") or "none", max_retries=0)
        wait_for(lambda: self.server.started)

    def post(self, path="/v1/chat/completions", **body):
        return self.client.post(path, json=body)

    def chat(self, text, **body):
        return self.post(messages=[{"role": "user", "content": text}], **{"max_tokens": 12, **body})

    def quiet(self):
        """Nothing runs, waits or is held any more."""
        a, e = self.service.admission, self.service.engine
        return not (a.running or a.waiting or e.reading or e.shelves)

    def stop(self):
        self.client.close()
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


@contextmanager
def serving(folder, **options):
    running = Running(folder, **options)
    try:
        yield running
    finally:
        running.stop()


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("tiny-chat"))


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder, names=("tiny",), keep_alive=0.1) as running:
        yield running
        wait_for(running.quiet)


def content(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def events(response_lines):
    """The data of server-sent events."""
    return [line[6:] for line in response_lines if line.startswith("data: ")]


# ---- pure parts


def test_requests_are_read():
    ask = wire.read_chat(
        {
            "model": "m",
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": None, "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
                {"role": "tool", "tool_call_id": "1", "content": "2"},
            ],
            "stop": "END",
            "max_completion_tokens": 5.0,
            "max_tokens": 9,
            "logprobs": True,
            "top_logprobs": 2,
            "seed": -1,
            "unheard_of": 1,
        }
    )  # fmt: skip
    assert [m["role"] for m in ask.messages] == ["system", "user", "assistant", "tool"]
    assert ask.messages[1]["content"] == "ab" and ask.messages[2]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert (ask.max_tokens, ask.stop, ask.logprobs, ask.sampling.seed) == (5, ("END",), 2, 2**64 - 1)


HI = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]}]},
         "messages[0].content[0].type"),
        ({"messages": HI, "temperature": "hot"}, "temperature"),
        ({"messages": HI, "temperature": 3}, "temperature"),
        ({"messages": HI, "max_tokens": 0}, "max_tokens"),
        ({"messages": HI, "max_tokens": True}, "max_tokens"),
        ({"messages": HI, "n": 2}, "n"),
        ({"messages": HI, "audio": {}}, "audio"),
        ({"messages": HI, "modalities": ["audio"]}, "modalities"),
        ({"messages": HI, "prediction": {"type": "content"}}, "prediction"),
        ({"messages": HI, "functions": [{}]}, "functions"),
        ({"messages": HI, "store": True}, "store"),
        ({"messages": HI, "top_logprobs": 3}, "top_logprobs"),
        ({"messages": HI, "tool_choice": "required"}, "tool_choice"),
        ({"messages": HI, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
         "tool_choice"),
        ({"messages": HI, "logit_bias": {"x": 1}}, "logit_bias"),
        ({"messages": HI, "logit_bias": {"1": 1000}}, "logit_bias.1"),
        ({"messages": HI, "response_format": {"type": "xml"}}, "response_format.type"),
        ({"messages": HI, "response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"messages": HI, "chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs.chat_template"),
        ({"messages": HI, "stop": [1]}, "stop[0]"),
    ],
)  # fmt: skip
def test_wrong_requests_are_refused_by_name(body, param):
    with pytest.raises(ApiError) as caught:
        wire.read_chat(body)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_idle_values_of_unsupported_fields_pass():
    idle = {name: values[0] for name, values in wire.IDLE.items() if values}
    wire.read_chat({"messages": HI, **idle, **dict.fromkeys(wire.IDLE)} | idle)


def test_malformed_bodies_never_escape_the_parser():
    """5,000 damaged bodies: read or refused with a 4xx, nothing else."""
    rng = random.Random(1)
    good = json.dumps({"messages": HI, "stop": ["a"], "tools": [TOOL], "seed": 1, "logit_bias": {"3": 1}}).encode()
    refused = 0
    for _ in range(5000):
        body = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(body) or 1)
            what = rng.randrange(4)
            if not body:
                break
            if what == 0:
                body[at] = rng.randrange(256)
            elif what == 1:
                del body[at : at + rng.randrange(9)]
            elif what == 2:
                body[at:at] = rng.choice([b"null", b"[", b"{}", b"1e999", b"NaN", b'"\\ud800"', b"\xff", b"[" * 3000])
            else:
                body = body[: max(at, 1)]
        for read in (wire.read_chat, wire.read_completion, anthropic.read):
            try:
                read(schema.parse(bytes(body)))
            except ApiError as error:
                assert 400 <= error.status < 500 and error.body()["error"]["message"]
                refused += 1
    assert refused > 12000


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b"nul",
        b'"x"',
        b"[" * 100_000,
        b'{"a": NaN}',
        b'{"a": 1e999}',
        b'{"a": "\\ud83d"}',
        b"\xff\xfe",
    ],
)
def test_bodies_that_are_no_objects(body):
    with pytest.raises(ApiError, match="body"):
        schema.parse(body)


def test_stop_text_is_found_however_it_is_cut():
    text, rng = "one two END three", random.Random(3)
    for _ in range(200):
        stop, out, at = StopText(("END", "three", "wo E")), "", 0
        while at < len(text) and not stop.matched:
            n = rng.randint(1, 5)
            out += stop.feed(text[at : at + n])
            at += n
        assert (out, stop.matched) == ("one t", "wo E")
    stop = StopText(("abc",))
    assert stop.feed("xab") == "x" and stop.feed("d") == "abd" and stop.flush() == ""


@pytest.fixture(scope="module")
def tokenizer(folder):
    from mlx_lm.tokenizer_utils import load

    return load(folder)


def parse_text(tokenizer, text, **options):
    parser = Parser(tokenizer, tools=(TOOL,), **options)
    pieces = []
    for token in tokenizer.encode(text, add_special_tokens=False):
        pieces += [] if parser.stopped else parser.token(token)
    return parser, pieces + parser.finish()


def joined(pieces):
    text = {"content": "", "reasoning": ""}
    for p in pieces:
        if not p.call:
            text[p.kind] += p.text
    return text["content"], text["reasoning"], [(p.call.name, json.loads(p.call.arguments)) for p in pieces if p.call]


def test_output_is_text_reasoning_and_calls(tokenizer):
    call = '<tool_call>{"name": "look_up", "arguments": {"word": "sun"}}</tool_call>'
    _, pieces = parse_text(tokenizer, f"<think>hm</think>Äh {call} and {call}!")
    assert joined(pieces) == ("Äh  and !", "hm", [("look_up", {"word": "sun"})] * 2)
    _, pieces = parse_text(tokenizer, "so it is</think>Yes", initial="reasoning")
    assert joined(pieces) == ("Yes", "so it is", [])
    parser, pieces = parse_text(tokenizer, f"a{call}b{call}", parallel_calls=False)
    assert parser.stopped and joined(pieces) == ("a", "", [("look_up", {"word": "sun"})])


@pytest.mark.parametrize(
    "markup", ["<tool_call>{broken</tool_call>", '<tool_call>{"name": "look_up"', "<tool_call>[1]</tool_call>"]
)
def test_markup_that_does_not_parse_is_content(tokenizer, markup):
    _, pieces = parse_text(tokenizer, f"x{markup}")
    assert joined(pieces) == (f"x{markup}", "", [])


def test_half_a_character_before_a_special_token(tokenizer):
    parser = Parser(tokenizer)
    half = tokenizer.encode("é", add_special_tokens=False)[0]
    pieces = parser.token(half) + parser.token(tokenizer.convert_tokens_to_ids("<|user|>")) + parser.finish()
    assert "�" in joined(pieces)[0]


def test_admission_prices_the_rectangle():
    admission = Admission(price=lambda n: n, budget=10_000, slots=8, queue=2)
    assert [shelf(n) for n in (1, 4096, 4097, 16384, 16385)] == [0, 0, 1, 1, 2]
    assert admission.offer("a", 3000) == "run" and admission.offer("b", 100) == "run"
    assert admission.committed() == 6000
    assert admission.offer("c", 4000) == "wait"  # 3 * 4000
    assert admission.offer("d", 10) == "wait"  # would fit, but nobody overtakes
    assert admission.offer("e", 10) == "full"
    assert admission.release("b") == ["c"] and admission.committed() == 8000
    assert admission.release("d") == [] and not admission.waiting
    assert admission.release("c") == [] and admission.offer("f", 9000) == "wait"
    assert admission.release("a") == ["f"]
    assert admission.largest(20_000) == 10_000


class FakeCache:
    """Bytes in place of keys and values."""

    def __init__(self, nbytes):
        self.nbytes = nbytes


def test_prefixes_are_dropped_least_recently_used_first():
    store = PrefixStore(step=4, max_bytes=100)
    prompts = [list(range(n, n + 9)) for n in (0, 100, 200)]
    names = [store.names(p) for p in prompts]
    assert all(len(n) == 2 for n in names) and len(store.names(range(8))) == 1
    store.insert(names[0], [FakeCache(40)])
    store.insert(names[1], [FakeCache(40)])
    assert store.fetch(names[0]).tokens == 8
    store.insert(names[2], [FakeCache(40)])
    assert store.nbytes == 80 and store.fetch(names[1]).tokens == 0 and store.fetch(names[0]).tokens == 8
    store.insert(names[1], [FakeCache(101)])
    assert store.fetch(names[1]).tokens == 0
    store.give_way(30)
    store.insert(names[1], [FakeCache(40)])
    assert store.nbytes == 0 and not store._by_name
    store.give_way(1000)
    # A cache that can't be trimmed serves its whole length only, but says how far prompts agree.
    store.insert(names[0], [FakeCache(1)])
    hit = store.fetch(store.names([*prompts[0][:6], 77, 78, 79]))
    assert (hit.tokens, hit.shared) == (0, 4)


# ---- answers


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


# ---- prefixes


def test_reuse_equals_fresh_and_is_reported(server):
    def ask(turns, **body):
        roles = ["user", "assistant"]
        messages = [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]
        data = server.post(messages=messages, max_tokens=30, **body).json()
        return data["choices"][0]["message"]["content"], data["usage"]["prompt_tokens_details"]["cached_tokens"]

    store = server.service.engine.store
    turns = [LONG[:700], "first answer", LONG[100:300], "second answer", "and now?"]
    for n in (1, 3, 5):
        again, cached = ask(turns[:n])
        assert cached % 64 == 0
        if n > 1:
            assert cached >= 640
        store.shrink(0)
        fresh, nothing = ask(turns[:n])
        assert nothing == 0 and fresh == again
    # A prompt that parts in the middle reuses what is shared.
    _, cached = ask([LONG[:700], "another answer", "something else"])
    assert cached >= 640
    text, cached = ask([LONG[:500] + "different end"])
    store.shrink(0)
    assert cached == 448 and ask([LONG[:500] + "different end"]) == (text, 0)


@pytest.mark.parametrize(
    ("kind", "kv"),
    [("gemma3_text", "int4"), ("gemma3_text", "int4:window=compress"), ("llama", "int4:recent=70"), ("llama", None)],
)
def test_reuse_equals_fresh_for_every_kind_of_cache(tmp_path, kind, kv):
    """Windows and recent fp16 tokens can't be cut at any point: they are remembered where prompts end and part."""
    with serving(write(tmp_path / "model", kind), kv=kv, prompt_cache_dir=tmp_path / "kept") as server:
        store = server.service.engine.store
        prompts = [LONG[:700], LONG[:700] + "and more", LONG[:500] + "another end", LONG[:500] + "a third end"]
        answers = []
        for prompt in prompts:
            data = server.chat(prompt, max_tokens=16).json()
            answers.append(data["choices"][0]["message"]["content"])
            cached = data["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached == 448, "the third of its kind begins where the first two parted"
        for prompt, answer in zip(prompts, answers):
            store.shrink(0)
            store.shelf = None
            assert content(server.chat(prompt, max_tokens=16)) == answer


def test_prefix_budget_is_kept(folder):
    with serving(folder, prompt_cache_bytes=400_000) as server:
        store = server.service.engine.store
        for n in range(6):
            content(server.chat(LONG[n * 100 : n * 100 + 1000], max_tokens=2))
            assert store.nbytes <= 400_000
        assert 0 < len(store) < 6


# ---- admission


def test_context_limit_names_both_numbers(server):
    refused = server.chat("x" * 5000, max_tokens=100)
    error = refused.json()["error"]
    assert refused.status_code == 400 and error["code"] == "context_length_exceeded"
    assert "4096" in error["message"] and "5003" in error["message"]
    refused = server.chat("x", max_tokens=5000).json()["error"]
    assert refused["code"] == "context_length_exceeded" and refused["param"] == "max_tokens"


def test_memory_budget_queues_then_refuses(folder):
    with serving(folder, queue=1) as server:
        admission = server.service.admission
        admission.budget = int(1.5 * admission.price(2000))
        streams = [Streaming(server, "hold", max_tokens=1900) for _ in range(2)]
        wait_for(lambda: len(admission.waiting) == 1)
        refused = server.chat("third", max_tokens=1900)
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "overloaded"
        streams[0].close()
        wait_for(lambda: len(admission.running) == 1 and not admission.waiting)
        streams[1].close()
        wait_for(server.quiet)
        assert server.chat("after").status_code == 200


class Streaming:
    """A request whose answer is being streamed: `close` goes away."""

    def __init__(self, server, text, path="/v1/chat/completions", **body):
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 500, "logit_bias": NO_END, **body}
        self.client = httpx.Client(timeout=60)
        request = self.client.build_request("POST", server.url + path, json={**body, "stream": True})
        self.response = self.client.send(request, stream=True)
        self.lines = self.response.iter_lines()

    def until(self, text):
        return next(line for line in self.lines if text in line)

    def rest(self):
        return "".join(
            json.loads(e)["choices"][0]["delta"].get("content", "") for e in events(self.lines) if e != "[DONE]"
        )

    def close(self):
        self.response.close()
        self.client.close()


NO_END = {"256": -100}  # <|end|>


def test_cancel_touches_nobody_else(server):
    alone = Streaming(server, "steady", max_tokens=300).rest()
    steady = Streaming(server, "steady", max_tokens=300)
    steady.until("content")
    for n in range(4):
        victim = Streaming(server, f"victim {n}" + LONG[: 900 * (n % 2)], max_tokens=2000)
        if n < 2:
            victim.until("content")
        victim.close()
    wait_for(lambda: len(server.service.admission.running) == 1)
    assert steady.rest() in alone[-len(alone) :] and len(server.service.engine.shelves) <= 1
    wait_for(server.quiet)


def test_cancel_in_the_middle_of_a_prompt(server):
    engine = server.service.engine
    slow = Slow(engine)
    with slow:
        stream = Streaming(server, LONG[::-1], max_tokens=10)
        wait_for(lambda: any(0 < j.read < len(j.tokens) - 200 for j in engine.reading))
        stream.close()
        wait_for(lambda: not engine.reading)
    wait_for(server.quiet)
    # A client that does not stream is noticed, too.
    with slow:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json={"prompt": LONG[5:]}, timeout=0.3)
        wait_for(server.quiet)


class Slow:
    """Makes every piece of a prompt take a while."""

    def __init__(self, engine, seconds=0.05):
        self.engine, self.seconds = engine, seconds

    def __enter__(self):
        self.inner = self.engine._read_piece
        self.engine._read_piece = lambda job: (time.sleep(self.seconds), self.inner(job))

    def __exit__(self, *_):
        self.engine._read_piece = self.inner


def test_keep_alive_while_a_prompt_is_read(server):
    with Slow(server.service.engine):
        stream = Streaming(server, LONG[1000:2500], max_tokens=3)
        assert stream.until("keep-alive") == ": keep-alive"
        assert stream.rest() is not None
        lines = Streaming(server, LONG[900:2500], "/v1/messages", max_tokens=3, logit_bias=None).lines
        assert sum(line == "event: ping" for line in lines) > 1


def test_a_short_prompt_passes_a_long_one(server):
    with Slow(server.service.engine):
        long = Streaming(server, LONG[7:] + "the end", max_tokens=2)
        wait_for(lambda: server.service.engine.reading)
        assert server.chat("short", max_tokens=2).status_code == 200
        assert server.service.engine.reading, "the long prompt is still being read"
        long.close()
    wait_for(server.quiet)


def test_running_answers_go_on_while_a_prompt_is_read(server):
    engine = server.service.engine
    steady = Streaming(server, "steady", max_tokens=400)
    steady.until("content")
    other = Streaming(server, LONG[3:], max_tokens=2)
    wait_for(lambda: engine.reading)
    job = next(iter(engine.shelves.values()))[1][0]
    tokens, read = job.generated, engine.reading[0].read
    wait_for(lambda: not engine.reading)
    # One piece of 64 tokens per step of the running answer.
    assert job.generated - tokens >= (len(LONG) - read) // 64 - 1
    steady.close()
    other.close()
    wait_for(server.quiet)


def test_one_bad_request_fails_alone(server, monkeypatch):
    steady = Streaming(server, "steady", max_tokens=200)
    steady.until("content")
    engine = server.service.engine
    inner = engine._read_piece

    def fail(job):
        engine.at_work = job
        if len(job.tokens) == 21:
            raise RuntimeError("out of luck")
        inner(job)

    monkeypatch.setattr(engine, "_read_piece", fail)
    failed = server.chat("x" * 18)
    assert failed.status_code == 500 and failed.json()["error"]["code"] == "engine_error"
    assert "luck" not in failed.text
    assert len(steady.rest()) > 20
    assert server.chat("again").status_code == 200
    wait_for(server.quiet)


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
        (server.post(messages=[{"role": "user", "content": "x"}], n=3), 400),
    ]
    for response, status in cases:
        error = response.json()["error"]
        assert response.status_code == status and set(error) == {"message", "type", "param", "code"}
    with pytest.raises(openai.BadRequestError, match="n is not supported"):
        server.openai.chat.completions.create(model="tiny", messages=HI, n=2)
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
    with pytest.raises(Exception, match="api-key"):
        check(Options("m", host="0.0.0.0"))
    check(Options("m", host="0.0.0.0", insecure=True))
    check(Options("m", host="0.0.0.0", api_key="k"))


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
    posted = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert posted == schema.CHAT


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


# ---- the end


def test_drain_lets_answers_end_and_cancels_the_rest(folder):
    server = Running(folder, drain=1.5)
    short = Streaming(server, "short", max_tokens=20)
    endless = Streaming(server, "endless", max_tokens=4000)
    endless.until("content")
    with Slow(server.service.engine, 0):
        loop_call = server.service.call_soon
        inner = server.service.engine._decode
        server.service.engine._decode = lambda key: (time.sleep(0.01), inner(key))
        loop_call(server.server.begin_drain)
        wait_for(lambda: server.service.draining)
        refused = server.chat("too late")
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
        assert len(short.rest()) > 0
        assert "shutting_down" in endless.until("error")
    server.thread.join(10)
    assert not server.thread.is_alive()


# ---- prefixes on disk


def test_prefixes_survive_a_restart_whole(folder, tmp_path):
    ask = {"max_tokens": 30}
    with serving(folder, prompt_cache_dir=tmp_path) as server:
        fresh = content(server.chat(LONG[:900], **ask))
        content(server.chat(LONG[:900] + "more of it", **ask))
    files = list(tmp_path.rglob("*.safetensors"))
    assert len(files) == 1, "the longer prefix stands for the shorter one"
    with serving(folder, prompt_cache_dir=tmp_path) as server:
        again = server.chat(LONG[:900], **ask)
        assert content(again) == fresh and again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 896
    # A file that was damaged is dropped, and the prompt is read again.
    data = bytearray(files[0].read_bytes())
    data[-100] ^= 1
    files[0].write_bytes(data)
    with serving(folder, prompt_cache_dir=tmp_path) as server:
        again = server.chat(LONG[:900], **ask)
        assert content(again) == fresh and again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    # Prefixes of another spec are others; a budget of nothing keeps nothing.
    with serving(folder, prompt_cache_dir=tmp_path, kv="int8", prompt_cache_dir_bytes=0) as server:
        again = server.chat(LONG[:900], **ask)
        assert again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_a_process_stops_cleanly_and_a_killed_one_leaves_whole_files(folder, tmp_path):
    command = [sys.executable, "-m", "opentq", "serve", str(folder), "--memory", "4GB", "--prefill-step-size", "64"]
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    command += ["--port", str(port), "--prompt-cache-dir", str(tmp_path)]
    url = f"http://127.0.0.1:{port}"

    def start():
        # OpenBLAS's threads spin: beside other work on the machine one is faster than several.
        env = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
        for line in process.stdout:
            if "serving" in line:
                break
        wait_for(lambda: reachable(url))
        return process

    def ask(n):
        body = {"messages": [{"role": "user", "content": LONG[n * 50 : n * 50 + 900]}], "max_tokens": 4}
        return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()

    process = start()
    for n in range(6):
        ask(n)
    process.kill()  # most likely while the sixth prefix is being written
    process.communicate()
    for index in tmp_path.rglob("*.json"):
        disk.load(index.with_suffix(".safetensors"))
    process = start()
    assert ask(0)["usage"]["prompt_tokens_details"]["cached_tokens"] == 896
    assert not list(tmp_path.rglob(".*.tmp*"))
    with httpx.stream(
        "POST", f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 300, "stream": True, "logit_bias": NO_END}
    ) as r:
        lines = r.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    out = process.communicate(timeout=30)[0]
    assert process.returncode == 0 and "Traceback" not in out, out


def reachable(url):
    try:
        return httpx.get(url + "/health").status_code == 200
    except httpx.TransportError:
        return False


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
        litellm.completion(**base, max_tokens=99_999)


@pytest.mark.slow
def test_schemathesis(server):
    command = shutil.which("schemathesis", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if command is None:
        pytest.skip("schemathesis is not installed")
    checks = "not_a_server_error,status_code_conformance,response_schema_conformance,negative_data_rejection"
    run = subprocess.run(
        [command, "run", f"{server.url}/openapi.json", "--checks", checks, "-n", "40", "--request-timeout", "60"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
