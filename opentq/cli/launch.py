"""`opentq launch CLIENT`: a coding assistant on a model of one's own, with nothing to set up."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from .clients import CLIENTS, Setup, Target

if TYPE_CHECKING:
    from collections.abc import Iterator

START_SECONDS = 900.0


def launch(
    client: Annotated[str, typer.Argument(metavar="CLIENT", help=f"{', '.join(CLIENTS)}.")],
    args: Annotated[
        list[str] | None, typer.Argument(metavar="ARGS", help="The client's own arguments, after --.")
    ] = None,
    model: Annotated[
        str,
        typer.Option("--model", help="Model to serve when no server answers: a folder, a .gguf file, or a repository."),
    ] = "",
    host: Annotated[str, typer.Option(help="Where a server is looked for, or started.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Its port.", min=1, max=65535)] = 8080,
    serve: Annotated[str, typer.Option(help="More options for `opentq serve`, as one text.")] = "",
    max_context: Annotated[int | None, typer.Option(help="Given to `opentq serve`.", min=1)] = None,
    kv: Annotated[str | None, typer.Option(help="Given to `opentq serve`.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", "-m", help="Longest answer; default: a quarter of the context.", min=1),
    ] = None,
    show: Annotated[bool, typer.Option("--print", help="Say what would be set and run, and run nothing.")] = False,
) -> None:
    """Run a coding assistant on a model of your own: finds the server or starts it, and touches none of your files."""
    if client not in CLIENTS:
        raise UserError(f"{client!r} is not a client that can be launched: {', '.join(CLIENTS)}")
    chosen = CLIENTS[client]
    program = shutil.which(chosen.command)
    if program is None and not show:
        raise UserError(f"{client} is not installed: {chosen.install}")
    url = f"http://{host}:{port}"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # client and server must not be left behind
    key = os.environ.get("OPENTQ_API_KEY", "none")
    # Some clients say how long an answer may be, the others leave it to the server.
    limits = {"--max-context": max_context, "--kv": kv, "--max-tokens": max_tokens}
    command = _serve_command(model, host, port, serve, {k: v for k, v in limits.items() if v is not None})
    with tempfile.TemporaryDirectory(prefix="opentq-launch-") as folder:
        found = find(url, key)

        def setup(target: Target) -> Setup:
            return chosen.setup(replace(target, longest=max_tokens), Path(folder))

        if show:
            target = found or Target(url, Path(model).name or "MODEL", max_context or 32768, key)
            print(describe(setup(target), client, args or [], None if found else command))
            return
        if found is None and not model:
            raise UserError(f"no server answers at {url}: give --model FOLDER to start one, or start `opentq serve`")
        if found:
            raise typer.Exit(run(setup(found), program or "", args or [], Path(folder)))
        with started(command, url, key) as target:
            raise typer.Exit(run(setup(target), program or "", args or [], Path(folder)))


def _serve_command(model: str, host: str, port: int, more: str, given: dict[str, object]) -> list[str]:
    # Prefixes are kept on disk: the next run, with a server of its own, need not read the same prompt again.
    command = [sys.executable, "-m", "opentq", "serve", model or "MODEL", "--host", host, "--port", str(port)]
    command += ["--any-model", "--prompt-cache-dir", str(_folder() / "prompts")]
    return command + [word for option in given.items() for word in map(str, option)] + shlex.split(more)


def _folder() -> Path:
    import platformdirs

    return platformdirs.user_cache_path("opentq")


def find(url: str, key: str) -> Target | None:
    """The server at `url`, or None when nothing listens. Raises UserError for one that is not opentq's or refuses."""
    import urllib.error
    import urllib.request

    request = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            first = json.load(response)["data"][0]
        return Target(url, str(first["id"]), int(first["max_model_len"]), key)
    except urllib.error.HTTPError as error:
        words = "it wants another key: set OPENTQ_API_KEY" if error.code == 401 else f"status {error.code}"
        raise UserError(f"the server at {url} does not list its models ({words})") from error
    except urllib.error.URLError:
        return None
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"what answers at {url} is not `opentq serve`: give another --port") from error


@contextmanager
def started(command: list[str], url: str, key: str) -> Iterator[Target]:
    """A server for as long as the client runs. Its log is a file, because the terminal is the client's."""
    folder = _folder()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "serve.log"
    print(f"opentq: starting the server; its log is {path}", file=sys.stderr, flush=True)
    with path.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + START_SECONDS
        while (target := find(url, key)) is None:
            if process.poll() is not None:
                raise UserError(f"the server did not start: {_last_line(path)}")
            if time.monotonic() > deadline:
                raise UserError(f"the server did not start within {START_SECONDS:g} s; see {path}")
            time.sleep(0.2)
        yield target
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"it said nothing; see {path}"


def run(setup: Setup, program: str, args: list[str], folder: Path) -> int:
    """Run the client in the user's terminal; returns its exit code."""
    for name, text in setup.files.items():
        (folder / name).write_text(text)
    taken = {name for name, value in setup.variables.items() if value is None}
    environment = {k: v for k, v in os.environ.items() if k not in taken}
    environment |= {k: v for k, v in setup.variables.items() if v is not None}
    process = subprocess.Popen([program, *setup.arguments, *args], env=environment)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the client's; it decides whether to end
    try:
        return process.wait()
    finally:
        signal.signal(signal.SIGINT, before)
        if process.poll() is None:
            process.terminate()


def describe(setup: Setup, client: str, args: list[str], command: list[str] | None) -> str:
    """What is set and run, as lines for a shell."""
    lines = [shlex.join(command) + " &"] if command else []
    for name, text in setup.files.items():
        lines += [f"# {name}, in a temporary folder:", text]
    for name, value in setup.variables.items():
        lines.append(f"unset {name}" if value is None else f"export {name}={shlex.quote(value)}")
    return "\n".join([*lines, shlex.join([CLIENTS[client].command, *setup.arguments, *args])])
