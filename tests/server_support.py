"""A server in a thread, clients that stream and go away, and what the server's tests say to it."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai

from opentq.server.launch import Server, make_service
from opentq.server.options import ServeOptions
from opentq.spec.kv import KVSpec

RECORDED = Path(__file__).parent / "clients"
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
HI = [{"role": "user", "content": "hi"}]
NO_END = {"256": -100}  # <|end|>


class Running:
    """A server that listens; `client` speaks HTTP to it."""

    def __init__(self, folder, **options):
        self.options = ServeOptions(
            str(folder), **{"kv": KVSpec(), "memory": 4 << 30, "prefill_step": 64, "port": 0, **options}
        )
        service, self.prices = make_service(self.options)
        self.server = Server(service, self.options)
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self.socket.getsockname()[1]
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve([self.socket])))
        self.thread.start()
        key = {"authorization": f"Bearer {options['api_key']}".encode()} if options.get("api_key") else {}
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=60, headers=key)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key=options.get("api_key") or "none", max_retries=0)
        wait_for(lambda: self.server.started)

    @property
    def service(self):
        return self.server.service

    def post(self, path="/v1/chat/completions", **body):
        return self.client.post(path, json=body)

    def chat(self, text, **body):
        return self.post(messages=[{"role": "user", "content": text}], **{"max_tokens": 12, **body})

    def quiet(self):
        """Nothing runs, waits or is held any more."""
        a, e = self.service.admission, self.service.engine
        return not (a.running or a.waiting or e.reading or e.batches)

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


def content(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def events(response_lines):
    """The data of server-sent events."""
    return [line[6:] for line in response_lines if line.startswith("data: ")]


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


class Slow:
    """Makes every chunk of a prompt take a while."""

    def __init__(self, engine, seconds=0.05):
        self.engine, self.seconds = engine, seconds

    def __enter__(self):
        self.inner = self.engine._read_chunk
        self.engine._read_chunk = lambda job: (time.sleep(self.seconds), self.inner(job))

    def __exit__(self, *_):
        self.engine._read_chunk = self.inner


def reachable(url):
    try:
        return httpx.get(url + "/health").status_code == 200
    except httpx.TransportError:
        return False


def recorded(name, **changes):
    requests = json.loads((RECORDED / f"{name}.json").read_text())["requests"]
    for request in requests:
        request["body"] |= changes
    return requests


def send(server, request):
    response = server.client.request(
        request["method"], request["path"], headers=request["headers"], json=request["body"]
    )
    assert response.status_code == 200, response.text
    return [json.loads(e) for e in events(response.text.splitlines()) if e != "[DONE]"]


def cached(data):
    """Tokens remembered and in all, of an Anthropic stream."""
    usage = next(d["usage"] for d in data if d["type"] == "message_delta")
    return usage["cache_read_input_tokens"], usage["cache_read_input_tokens"] + usage["input_tokens"]
