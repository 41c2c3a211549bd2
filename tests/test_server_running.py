"""`opentq serve` over time: prefixes, admission, people who go away, long prompts, the end and the next start."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import httpx
import pytest
from typer.testing import CliRunner

from opentq.caches import disk
from opentq.cli.main import app
from opentq.errors import UserError
from opentq.server.launch import Server, bind
from opentq.server.options import ServeOptions

from .server_support import LONG, NO_END, Running, Slow, Streaming, content, reachable, serving, wait_for
from .tiny_model import write

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
            store.files = None
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
    assert "4096" in error["message"] and "5003" in error["message"] and error["param"] == "messages"
    # An answer longer than what is left is cut there: agents send their model's maximum.
    cut = server.chat("x" * 4000, max_tokens=5000, logit_bias=NO_END).json()
    assert cut["usage"]["total_tokens"] == 4096 and cut["choices"][0]["finish_reason"] == "length"


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


# ---- cancels


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
    assert len(alone) > 100 and steady.rest() == alone and len(server.service.engine.batches) <= 1
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
    # What was read is remembered: clients that lost patience try again.
    again = server.chat(LONG[::-1], max_tokens=1).json()["usage"]
    assert 64 <= again["prompt_tokens_details"]["cached_tokens"] < again["prompt_tokens"] - 200
    # A client that does not stream is noticed, too.
    with slow:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json={"prompt": LONG[5:]}, timeout=0.3)
        wait_for(server.quiet)


# ---- fairness


def test_keep_alive_while_a_prompt_is_read(server):
    with Slow(server.service.engine):
        stream = Streaming(server, LONG[1000:2500], max_tokens=3)
        assert stream.until("keep-alive") == ": keep-alive"
        assert stream.rest()
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
    job = next(iter(engine.batches.values()))[1][0]
    tokens, read = job.generated, engine.reading[0].read
    wait_for(lambda: not engine.reading)
    # One chunk of 64 tokens per step of the running answer.
    assert job.generated - tokens >= (len(LONG) - read) // 64 - 1
    steady.close()
    other.close()
    wait_for(server.quiet)


def test_one_bad_request_fails_alone(server, monkeypatch):
    alone = Streaming(server, "steady", max_tokens=200).rest()
    steady = Streaming(server, "steady", max_tokens=200)
    steady.until("content")
    engine = server.service.engine
    inner = engine._read_chunk

    def fail(job):
        engine.at_work = job
        if len(job.tokens) == 21:
            raise RuntimeError("out of luck")
        inner(job)

    monkeypatch.setattr(engine, "_read_chunk", fail)
    failed = server.chat("x" * 18)
    assert failed.status_code == 500 and failed.json()["error"]["code"] == "engine_error"
    assert "luck" not in failed.text
    assert len(alone) > 20 and steady.rest() == alone
    assert server.chat("again").status_code == 200
    wait_for(server.quiet)


# ---- the end


def test_drain_lets_answers_end_and_cancels_the_rest(folder):
    server = Running(folder, drain=5.0)
    short = Streaming(server, "short", max_tokens=20)
    endless = Streaming(server, "endless", max_tokens=4000)
    endless.until("content")
    with Slow(server.service.engine, 0):
        loop_call = server.service.call_soon
        inner = server.service.engine._decode
        server.service.engine._decode = lambda key: (time.sleep(0.02), inner(key))[1]
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


def launched(*arguments):
    """`opentq serve` as a process."""
    # OpenBLAS's threads spin: beside other work on the machine one is faster than several.
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "opentq", "serve", *map(str, arguments), "--memory", "4GB"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def test_a_process_stops_cleanly_and_a_killed_one_leaves_whole_files(folder, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    url = f"http://127.0.0.1:{port}"

    def start():
        process = launched(folder, "--prefill-step-size", 64, "--port", port, "--prompt-cache-dir", tmp_path)
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
    for file in tmp_path.rglob("*.safetensors"):
        disk.load(file)
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


def test_nobody_is_let_in_while_the_model_loads_and_a_signal_ends_it(folder, tmp_path):
    pipe = tmp_path / "slow"
    shutil.copytree(folder, pipe)
    weights = pipe / "model.safetensors"
    weights.unlink()
    os.mkfifo(weights)  # reading the weights takes until somebody writes them
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    process = launched(pipe, "--port", port)
    with weights.open("wb"):  # the model is being loaded
        assert not reachable(f"http://127.0.0.1:{port}")
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=10)[0] == "" and process.returncode == -signal.SIGTERM


def test_a_taken_port_is_said_before_the_model_is_loaded(folder):
    with socket.create_server(("127.0.0.1", 0)) as s:
        process = launched("no/model", "--port", s.getsockname()[1])
        assert "can't listen on 127.0.0.1" in process.communicate(timeout=30)[0] and process.returncode == 2


def test_two_servers_that_load_at_once_and_one_port(server):
    first = bind(ServeOptions("m", port=0))
    options = ServeOptions("m", port=first.getsockname()[1])
    with first, bind(options) as second:
        first.listen()
        late = Server(server.service, options)
        late.config.load()
        late.lifespan = late.config.lifespan_class(late.config)
        with pytest.raises(UserError, match="can't listen"):
            asyncio.run(late.startup([second]))


@pytest.mark.parametrize("option", ["--decode-concurrency=0", "--queue=-1", "--port=65536", "--keep-alive=0"])
def test_numbers_that_make_no_sense_are_refused(option):
    assert CliRunner().invoke(app, ["serve", "no/model", option]).exit_code == 2


# ---- several models


def test_a_listed_model_is_loaded_by_name(folder, tmp_path):
    other, broken = write(tmp_path / "other", seed=1), write(tmp_path / "broken", seed=2)
    with serving(other) as alone:
        expected = content(alone.chat("who are you"))
    with serving(folder, names=("tiny",), loadable=(str(other), str(broken))) as server:
        first = content(server.chat("who are you", model="tiny"))
        names = [m["id"] for m in server.client.get("/v1/models").json()["data"]]
        assert names[0] == "tiny" and {"other", "broken"} < set(names)
        steady = Streaming(server, "steady", max_tokens=300)
        steady.until("content")
        refused = server.chat("x", model="other")
        assert refused.status_code == 503 and refused.headers["retry-after"]
        steady.close()
        wait_for(lambda: not server.service.busy)
        assert content(server.chat("who are you", model="other")) == expected != first
        assert server.chat("x", model="other").json()["model"] == "other"
        # Weights that don't fit their config: the model before comes back.
        config = json.loads((broken / "config.json").read_text())
        (broken / "config.json").write_text(json.dumps(config | {"intermediate_size": 320}))
        failed = server.chat("x", model="broken")
        assert failed.status_code == 507 and failed.json()["error"]["code"] == "model_error"
        assert content(server.chat("who are you", model="other")) == expected
        assert server.chat("x", model=str(tmp_path / "nowhere")).status_code == 404
        assert content(server.chat("who are you", model="tiny")) == first


def test_a_model_that_does_not_fit_is_refused_before_the_old_one_goes(folder, tmp_path):
    other = write(tmp_path / "other", seed=1)
    with serving(folder, names=("tiny",), loadable=(str(other),)) as server:
        known = server.server.roster._known
        known["other"] = replace(known["other"], memory=1 << 20)
        service = server.service
        refused = server.chat("x", model="other")
        assert refused.status_code == 507 and refused.json()["error"]["code"] == "model_too_large"
        assert server.service is service and server.chat("x").status_code == 200
