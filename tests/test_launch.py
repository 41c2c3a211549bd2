"""`opentq launch`: what a client is told, and the server that is found or started for it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from opentq.cli import launch
from opentq.cli.clients import CLIENTS, Target
from opentq.errors import UserError
from opentq.kernels import build

CLIENT = """#!/usr/bin/env python3
import json, os, sys, urllib.request
body = {"model": os.environ["ANTHROPIC_MODEL"], "max_tokens": 3, "messages": [{"role": "user", "content": "hi"}]}
headers = {"content-type": "application/json", "x-api-key": os.environ["ANTHROPIC_AUTH_TOKEN"]}
url = os.environ["ANTHROPIC_BASE_URL"] + "/v1/messages"
request = urllib.request.Request(url, json.dumps(body).encode(), headers)
answer = json.load(urllib.request.urlopen(request))
print(sys.argv[1:], answer["type"], "ANTHROPIC_API_KEY" in os.environ)
sys.exit(7)
"""


@pytest.fixture
def installed(tmp_path):
    """A program in the place of Claude Code, and an environment that finds it."""
    program = tmp_path / "bin" / "claude"
    program.parent.mkdir()
    program.write_text(CLIENT)
    program.chmod(0o755)
    cache = tmp_path / "cache" / "opentq"
    cache.mkdir(parents=True)
    (cache / "kernels").symlink_to(build.cache_folder())  # a minute's work of the compiler, done before
    paths = {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}", "XDG_CACHE_HOME": str(cache.parent)}
    return os.environ | paths | {"ANTHROPIC_API_KEY": "the user's own", "PYTHONPATH": str(Path(__file__).parents[1])}


def run(environment, *args):
    command = [sys.executable, "-m", "opentq", "launch", *args]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_a_server_that_answers_is_used(server, installed):
    done = run(installed, "claude", "--port", str(server.port), "--", "-p", "say hi")
    assert done.returncode == 7, done.stderr
    assert done.stdout.strip() == "['-p', 'say hi'] message False"


def test_a_server_is_started_and_ended(folder, installed, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    args = ["--model", str(folder), "--port", port, "--serve", "--prefill-step-size 64 --memory 4GB"]
    done = run(installed, "claude", *args)
    assert done.returncode == 7 and "message" in done.stdout, done.stderr
    assert launch.find(f"http://127.0.0.1:{port}", "none") is None
    log = (tmp_path / "cache" / "opentq" / "serve.log").read_text()
    assert "remembered" in log and list((tmp_path / "cache" / "opentq" / "prompts").iterdir())


def test_what_cannot_be_launched_is_said_in_one_line(installed, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def refused(client, model=""):
        with pytest.raises(UserError) as caught:
            launch.launch(client, model=model, host="127.0.0.1", port=port, serve="", show=False)
        return str(caught.value)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(launch.signal, "signal", lambda *_: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refused("claude") == "claude is not installed: npm install -g @anthropic-ai/claude-code"
    monkeypatch.setenv("PATH", installed["PATH"])
    assert "claude, codex, opencode, aider" in refused("vim")
    assert "--model" in refused("claude")
    assert "did not start" in refused("claude", str(tmp_path / "none"))


def test_another_program_on_the_port_is_no_server(server):
    with pytest.raises(UserError, match=r"not `opentq serve`|does not list"):
        launch.find(f"{server.url}/health?", "none")


@pytest.mark.parametrize("client", CLIENTS)
def test_print_says_all_and_writes_nothing(client, capsys, tmp_path):
    target = Target("http://127.0.0.1:9", "small", 40_000, "key")
    setup = CLIENTS[client].setup(target, tmp_path)
    said = launch.describe(setup, client, ["-x"], ["serve"])
    assert "http://127.0.0.1:9" in said and "small" in said and said.startswith("serve &")
    assert said.splitlines()[-1].startswith(CLIENTS[client].command) and said.endswith("-x")
    assert not list(tmp_path.iterdir())
    for text in setup.files.values():
        json.loads(text)
