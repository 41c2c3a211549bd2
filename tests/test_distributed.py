"""Several machines: a model cut by heads or by layers over two ranks gives the tokens of one process, caches packed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from opentq.errors import UserError
from opentq.server import launch, options

from .server_support import HI, LONG, NO_END, TOOL, Streaming, reachable, serving, wait_for
from .tiny_model import write

ROOT = Path(__file__).parents[1]

SCRIPT = Path(__file__).parent / "distributed_run.py"
LAUNCH = Path(sys.executable).parent / "mlx.launch"


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, list[dict]]:
    """What one process and both of two ranks find, by the way of cutting: one launch for all ways."""
    files: dict[str, list[dict]] = {"tensor": [], "pipeline": []}
    for launcher in ([], [str(LAUNCH), "-n", "2", "--backend", "ring"]):
        folder = tmp_path_factory.mktemp("ranks")
        command = [*launcher, sys.executable, str(SCRIPT), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        for mode, ranks in files.items():
            read = [json.loads(file.read_text()) for file in sorted(folder.glob(f"{mode}-*.json"))]
            assert read, done.stderr
            ranks += read
    return files


@pytest.mark.parametrize("mode", ["tensor", "pipeline"])
def test_two_ranks_give_the_tokens_of_one_process(mode, found):
    alone, *ranks = found[mode]
    assert len(ranks) == 2
    for rank in ranks:
        assert rank["tokens"] == alone["tokens"]
        assert rank["scores"] == pytest.approx(alone["scores"], abs=1e-3)
        assert rank["kv_heads"] == alone["kv_heads"] // (2 if mode == "tensor" else 1), "own heads, or all of them"
        assert rank["packed"] == [128] * (4 if mode == "tensor" else 2), "all layers, or its own ones, and packed"
        assert min(rank["calls"]) > 12


# ---- the server


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("model"))


class Launched:
    """`mlx.launch -n 2 opentq serve`, and a client of it."""

    def __init__(self, folder: Path, log: Path):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        serve = ["-m", "opentq", "serve", str(folder), "--port", port, "--kv", "int4", "--memory", "4GB"]
        command = [LAUNCH, "-n", "2", "--backend", "ring", sys.executable, *serve, "--prefill-step-size", "64"]
        self.log = log
        with log.open("w") as out:
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, cwd=ROOT
            )
        self.url = f"http://127.0.0.1:{port}"
        wait_for(lambda: reachable(self.url) or self.process.poll() is not None, 120)
        assert self.process.poll() is None, log.read_text()

    def post(self, **body: Any) -> httpx.Response:
        return httpx.post(self.url + "/v1/chat/completions", json=body, timeout=120)

    def rank(self, number: int) -> int:
        """The process of a rank."""
        for child in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            for pid in child.read_text().split():
                if f"MLX_RANK={number}\0" in Path(f"/proc/{pid}/environ").read_text():
                    return int(pid)
        raise AssertionError("no such rank")


BODIES: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": LONG[:300]}], "max_tokens": 20, "logit_bias": NO_END},
    {"messages": HI, "max_tokens": 10, "temperature": 1.0, "seed": 4, "logit_bias": NO_END, "n": 2},
    {"messages": HI, "max_tokens": 15, "logit_bias": NO_END, "stop": ["a", "b", "c"], "frequency_penalty": 0.5},
    {"messages": HI, "max_tokens": 120, "tools": [TOOL], "tool_choice": "required", "temperature": 1, "seed": 2},
]


def said(answer: httpx.Response) -> list[Any]:
    assert answer.status_code == 200, answer.text
    choices = answer.json()["choices"]
    calls = [[c["function"] for c in choice["message"].get("tool_calls") or ()] for choice in choices]
    return [*((choice["message"]["content"], choice["finish_reason"]) for choice in choices), calls]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds ranks in /proc")
def test_two_ranks_serve_what_one_does_and_end_together(folder, tmp_path):
    with serving(folder) as alone:
        wanted = [said(alone.post(**body)) for body in BODIES]
    both = Launched(folder, tmp_path / "log")
    assert [said(both.post(**body)) for body in BODIES] == wanted
    # Side by side, one of them leaving, and again from what is remembered.
    with ThreadPoolExecutor() as pool:
        leaving = Streaming(both, LONG)
        answers = [pool.submit(both.post, **body) for body in BODIES[:3]]
        leaving.until("data")
        leaving.close()
        assert [said(a.result()) for a in answers] == wanted[:3]
        again = both.post(**BODIES[0]).json()
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 256
        assert again["choices"][0]["message"]["content"] == wanted[0][0][0]
        # A rank that dies ends all of it, and says so.
        running = pool.submit(both.post, messages=HI, max_tokens=3000, logit_bias=NO_END)
        wait_for(lambda: httpx.get(both.url + "/health").json()["running"], 60)
        os.kill(both.rank(1), signal.SIGKILL)
        assert (running.result().status_code, running.result().json()["error"]["code"]) == (500, "model_lost")
    both.process.wait(60)
    assert "another process of the model ended" in both.log.read_text() and "Traceback" not in both.log.read_text()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds ranks in /proc")
def test_ranks_stop_together_on_a_signal(folder, tmp_path):
    both = Launched(folder, tmp_path / "log")
    assert said(both.post(messages=HI, max_tokens=3))
    os.kill(both.rank(0), signal.SIGTERM)
    both.process.wait(60)
    assert "exited with code" not in both.log.read_text() and "Traceback" not in both.log.read_text()


def test_what_can_not_be_cut_is_refused_by_name(folder, monkeypatch, tmp_path):
    for module in (launch, options):
        monkeypatch.setattr(module, "ranks", lambda: 2)
    gemma = write(tmp_path / "gemma", "gemma3_text")
    with pytest.raises(UserError, match=r"gemma.*gemma3_text can't be cut by heads"):
        launch.make_service(options.ServeOptions(str(gemma)))
    for option in ({"draft": "x"}, {"prompt_cache_dir": tmp_path}, {"loadable": ("x",)}):
        with pytest.raises(UserError, match="several processes"):
            options.check(options.ServeOptions(str(folder), **option))
