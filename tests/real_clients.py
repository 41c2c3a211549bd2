"""The assistants and libraries themselves, against a server on loopback: `make test-clients`, which installs them.

The model is a small random one that is held to a script: to the first request that brings the wanted tool it answers
with a call, to any other with a sentence. Everything else is as always: templates, parser, caches, HTTP. Clients get a
clean home, keys that open nothing, and no network beyond this machine is needed.

With OPENTQ_RECORD=FOLDER what each client sent is written there, in the form of `tests/clients/`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from opentq.cli.clients import CLIENTS, Target

from .client_recorder import Recorder
from .server_support import serving
from .tiny_model import write

ROOT = Path(__file__).parents[1]
TOOLS = Path(os.environ.get("OPENTQ_CLIENTS", ROOT / ".venv" / "clients"))
SAID = "The answer is 42."


class Script:
    """In the place of `Grammars.constraint`: what the model says next."""

    def __init__(self, grammars):
        self.grammars, self.inner = grammars, grammars.constraint
        self.tool, self.arguments = "", {}
        self.seen = []

    def __call__(self, request, state):
        self.seen.append(request)
        if request.schema or request.tool_choice == "required":
            return self.inner(request, state)
        names = [t["function"]["name"] for t in request.tools]
        called = any(m["role"] == "tool" for m in request.messages or ())
        text = SAID
        if self.tool in names and not called:
            call = json.dumps({"name": self.tool, "arguments": self.arguments})
            text = f"<tool_call>\n{call}\n</tool_call>"
        return self.grammars._make(f"start: {json.dumps(text)}\n", "script", state)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A one-layer model with the tokenizer of tiny-llama: prompts of 30,000 tokens are read in seconds."""
    folder = write(tmp_path_factory.mktemp("agent-model"), layers=1, vocabulary=4096)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "models" / "tiny-llama" / name, folder / name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 1, "bos_token_id": 0}))
    with serving(folder, names=("small",), max_context=60_000, any_model=True, prefill_step=512) as running:
        running.service.grammars.constraint = running.script = Script(running.service.grammars)
        running.recorder = Recorder(os.environ.get("OPENTQ_RECORD"))
        app = running.server.config.loaded_app
        running.server.config.loaded_app = running.recorder.around(app)
        yield running


@pytest.fixture(autouse=True)
def recorded(served, request):
    yield
    asked = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    client = asked.get("client") or asked.get("library") or "aider"
    served.recorder.write(client, version(client) if served.recorder.folder else "")


def version(client):
    """What the client says of itself, or what its package does."""
    python = TOOLS / "python" / "bin" / "python"
    name = {"langchain": "langchain-openai"}.get(client, client)
    command = [python, "-c", f"import importlib.metadata as m; print(m.version({name!r}))"]
    if client in CLIENTS:
        command = [program(client), "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return next(word for word in said if word[:1].isdigit())


def program(client):
    """Where a client was installed."""
    places = (TOOLS / "node_modules" / ".bin" / client, TOOLS / client / "bin" / client)
    return next((p for p in places if p.exists()), None) or missing(client)


def missing(what):
    """Skips the test; where `make test-clients` was to install everything, fails it."""
    end = pytest.fail if "OPENTQ_CLIENTS" in os.environ else pytest.skip
    end(f"{what} is not installed: make test-clients")


@pytest.fixture
def home(tmp_path):
    (tmp_path / "work").mkdir()
    keep = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG", "TMPDIR")}
    return keep | {"HOME": str(tmp_path), "CI": "1", "NO_COLOR": "1"}


def run(served, home, client, *args, tool="", arguments=None):
    """A client as `opentq launch` runs it; returns what it printed."""
    served.script.tool, served.script.arguments, served.script.seen = tool, arguments or {}, []
    folder = Path(home["HOME"])
    setup = CLIENTS[client].setup(Target(served.url, "small", 60_000), folder)
    for name, text in setup.files.items():
        (folder / name).write_text(text)
    environment = home | {k: v for k, v in setup.variables.items() if v is not None}
    command = [str(program(client)), *setup.arguments, *args]
    done = subprocess.run(
        command,
        cwd=folder / "work",
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


PROOF = "echo proof > proof.txt"


@pytest.mark.parametrize(
    ("client", "args", "tool", "arguments"),
    [
        ("claude", ["-p", "Make a proof", "--allowedTools", "Bash"], "Bash", {"command": PROOF}),
        ("codex", ["exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", "Make a proof"],
         "exec_command", {"cmd": PROOF}),
        ("opencode", ["run", "Make a proof"], "bash", {"command": PROOF, "description": "Make a proof"}),
    ],
)  # fmt: skip
def test_assistants_from_a_request_to_a_tool_to_an_answer(served, home, client, args, tool, arguments):
    printed = run(served, home, client, *args, tool=tool, arguments=arguments)
    assert SAID in printed
    assert (Path(home["HOME"]) / "work" / "proof.txt").read_text() == "proof\n"
    results = [m for r in served.script.seen for m in r.messages if m["role"] == "tool"]
    assert results
    # Another session in the same folder finds almost all of it read.
    before = served.service.engine.tokens_read
    run(served, home, client, *args)
    total = sum(len(served.service.prompter.encode(r).tokens) for r in served.script.seen)
    assert served.service.engine.tokens_read - before <= 0.1 * total + 1024


def test_aider_edits_with_a_model_of_ones_own(served, home):
    quiet = ["--no-git", "--yes-always", "--no-check-update", "--no-show-model-warnings", "--no-analytics"]
    assert SAID in run(served, home, "aider", *quiet, "--no-detect-urls", "--message", "What is the answer?")


LIBRARIES = {
    "openai": """
from openai import OpenAI
c = OpenAI(base_url=url + "/v1", api_key="none")
print(c.chat.completions.create(model="any", messages=hi).choices[0].message.content)
print(c.responses.create(model="any", input="hi").output_text)
tool = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
with c.responses.stream(model="any", input="hi", tools=[tool], tool_choice="required", max_output_tokens=300) as s:
    assert [e for e in s][-1].type in ("response.completed", "response.incomplete")
first = c.responses.create(model="any", input=hi, tools=[tool])
(call,) = [i for i in first.output if i.type == "function_call"]
result = {"type": "function_call_output", "call_id": call.call_id, "output": "42"}
print(c.responses.create(model="any", input=[*hi, *first.output, result], tools=[tool]).output_text)
print(c.responses.create(model="any", input=[result], previous_response_id=first.id, tools=[tool]).output_text)
chat = {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
said = c.chat.completions.create(model="any", messages=hi, tools=[chat]).choices[0].message
result = {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "42"}
print(c.chat.completions.create(model="any", messages=[*hi, said, result], tools=[chat]).choices[0].message.content)
""",
    "anthropic": """
import anthropic
c = anthropic.Anthropic(base_url=url, api_key="none")
print(c.messages.create(model="any", max_tokens=100, messages=hi).content[0].text)
with c.messages.stream(model="any", max_tokens=100, messages=hi) as s:
    print(s.get_final_text())
assert c.messages.count_tokens(model="any", messages=hi).input_tokens
tool = {"name": "look", "input_schema": {"type": "object", "properties": {"x": {"type": "integer"}}}}
k = dict(model="any", max_tokens=100, tools=[tool])
first = c.messages.create(messages=hi, **k)
(call,) = [b for b in first.content if b.type == "tool_use"]
result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "42"}]}
turns = [*hi, {"role": "assistant", "content": first.content}, result]
print(c.messages.create(messages=turns, **k).content[0].text)
print(c.messages.create(messages=turns, tool_choice={"type": "none"}, **k).content[0].text)
print(c.messages.create(messages=[*hi, {"role": "assistant", "content": "Well,"}], model="any", max_tokens=9).content)
""",
    "litellm": """
import litellm
k = dict(model="openai/any", api_base=url + "/v1", api_key="none")
print(litellm.completion(messages=hi, **k).choices[0].message.content)
print(litellm.responses(input="hi", **k).output[0].content[0].text)
function = {"name": "look", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
k["tools"] = [{"type": "function", "function": function}]
said = litellm.completion(messages=hi, **k).choices[0].message
result = {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "42"}
print(litellm.completion(messages=[*hi, said, result], **k).choices[0].message.content)
""",
    "langchain": """
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
class Point(BaseModel):
    x: bool
class Line(BaseModel):
    start: Point
m = ChatOpenAI(model="any", base_url=url + "/v1", api_key="none")
print(m.invoke("hi").content)
print(ChatOpenAI(model="any", base_url=url + "/v1", api_key="none", use_responses_api=True).invoke("hi").text)
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
@tool
def look(x: int) -> str:
    "Look."
    return "42"
for way in (m, ChatOpenAI(model="any", base_url=url + "/v1", api_key="none", use_responses_api=True)):
    able, turns = way.bind_tools([look]), [HumanMessage("hi")]
    turns.append(able.invoke(turns))
    turns.append(look.invoke(turns[-1].tool_calls[0]))
    assert isinstance(turns[-1], ToolMessage)
    print(able.invoke(turns).text)
for method in ("json_schema", "function_calling"):
    assert isinstance(m.with_structured_output(Line, method=method).invoke("a line"), Line)
""",
    "instructor": """
import instructor
from openai import OpenAI
from pydantic import BaseModel
class Point(BaseModel):
    x: bool
class Line(BaseModel):
    start: Point
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    c = instructor.from_openai(OpenAI(base_url=url + "/v1", api_key="none"), mode=mode)
    assert isinstance(c.chat.completions.create(model="any", messages=hi, response_model=Line), Line)
print("The answer is 42.")
""",
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries(served, home, library):
    python = TOOLS / "python" / "bin" / "python"
    if not python.exists():
        missing(library)
    served.script.tool, served.script.arguments = "look", {"x": 42}
    code = f"url = {served.url!r}; hi = [{{'role': 'user', 'content': 'hi'}}]\n{LIBRARIES[library]}"
    done = subprocess.run([python, "-c", code], env=home, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and SAID in done.stdout, done.stdout[-2000:] + done.stderr[-3000:]
