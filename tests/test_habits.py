"""One habit: every command takes the model, specs, formats and files in the same way. These tests walk all of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from opentq.bench import device, kernel
from opentq.cli import main as cli
from opentq.errors import UserError
from opentq.evaluate import contenders
from opentq.hosts.mlx_lm import load, names
from opentq.spec import text
from opentq.spec.kv import KVSpec, SpecError
from opentq.spec.recipe import Recipe
from opentq.spec.text import AUTO, asked, parse, specs, split

pytestmark = pytest.mark.usefixtures("all_extras")
LISTED = "int4:skip=first1,last1"


def walk(command: Any, path: tuple[str, ...] = ()):
    """(words, command) of every command there is."""
    if hasattr(command, "commands"):
        for name, sub in command.commands.items():
            yield from walk(sub, (*path, name))
    else:
        yield path, command


COMMANDS = dict(walk(typer.main.get_command(cli.app)))
NAMES = [" ".join(path) for path in COMMANDS]


def options(words: str) -> dict[str, Any]:
    command = COMMANDS[tuple(words.split())]
    return {opt: p for p in command.params for opt in (p.opts if p.param_type_name == "option" else [p.name])}


def taking(option: str) -> list[str]:
    return [name for name in NAMES if option in options(name)]


def test_the_walk_sees_all_commands():
    assert len(NAMES) >= 20 and {"generate", "eval fidelity", "bench model", "cache build"} <= set(NAMES)


# ---- the model


@pytest.mark.parametrize("name", [n for n in taking("--model") if n not in ("cache use", "launch")])
def test_the_model_is_an_argument_with_an_alias(name):
    first = next(p for p in COMMANDS[tuple(name.split())].params if p.param_type_name == "argument")
    assert (first.name, first.required) == ("model", False)


MODEL_REQUIRED = [n for n in taking("--model") if n not in ("demo", "cache use", "launch")]


@pytest.mark.parametrize("name", MODEL_REQUIRED)
def test_a_missing_and_a_doubled_model_are_named(run, name):
    code, _, err = run(*name.split())
    assert code == 2 and "no model given" in err and err.count("\n") == 1, err
    extra = ["prompt"] if name == "generate" else ["file"] if name == "cache build" else []
    code, _, err = run(*name.split(), "a", *extra, "--model", "b")
    assert code == 2 and "give one model" in err and err.count("\n") == 1, err


# ---- specs


class Stop(UserError):
    """Far enough."""


def stop(*_args, **_options):
    raise Stop("stopped by the test")


@pytest.fixture
def parsed(monkeypatch):
    """The texts that reach the reader of specs; commands without a model are stopped at their first work."""
    seen: list[str] = []

    def record(spec):
        if isinstance(spec, str):  # objects pass
            seen.append(spec)
        return parse(spec)

    monkeypatch.setattr(text, "parse", record)
    monkeypatch.setattr(contenders, "parse", record)
    monkeypatch.setattr(kernel, "bench", stop)
    monkeypatch.setattr(device, "examine", lambda plan: stop() if plan.specs == ("int8", LISTED) else iter(()))
    return seen


LISTS = ["plan", "eval fidelity", "eval needle", "eval generate", "eval layers", "eval use", "eval tasks"]
LISTS += ["eval harness", "bench kernel", "bench model", "bench long", "doctor"]
NO_RECIPES = ("bench kernel", "doctor")


def needs(name: str, missing: str) -> list[str]:
    more = {"generate": ["hello"], "cache build": ["f.cache", "--text", "hello"], "doctor": ["--bench"]}
    return [missing] * (name not in ("bench kernel", "doctor")) + more.get(name, [])


@pytest.mark.parametrize("name", [n for n in taking("--kv") if n != "launch"])  # hands it to serve
def test_specs_reach_the_reader_whole(run, parsed, tmp_path, monkeypatch, name):
    """Commas inside `skip` separate nothing, and the letters of a path are kept."""
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "Ann" / "R.toml"
    recipe.parent.mkdir()
    recipe.write_text('layers = ["int4", "int8"]\n')
    missing = str(tmp_path / "missing" / "model")
    given = [LISTED] if name not in LISTS else ["int8", LISTED]
    if name not in NO_RECIPES:
        given += [str(recipe)]
    for part in [",".join(given)] if name in LISTS else given:
        code, _, err = run(*name.split(), *needs(name, missing), "--kv", part)
        assert code == 2 and ("stopped by the test" in err or missing in err), err
    if name != "doctor":
        assert parsed == given


@pytest.mark.parametrize("name", [n for n in taking("--kv") if n not in (*LISTS, "launch")])
@pytest.mark.parametrize("word", ["off", "OFF", "auto", "int4"])
def test_off_and_auto_are_words_in_every_command(run, tmp_path, monkeypatch, name, word):
    monkeypatch.chdir(tmp_path)
    missing = str(tmp_path / "missing")
    code, _, err = run(*name.split(), *needs(name, missing), "--kv", word)
    refused = name in ("demo", "calibrate") and word.lower() == "off"
    assert code == 2 and (missing in err) != refused, err
    assert "unknown codec" not in err


def test_texts_become_objects():
    assert asked(None) == AUTO == asked("auto") and asked("off") is None and asked("native") is None
    assert asked("K8V4") == KVSpec("int8", "int4") and isinstance(asked("int4|int8"), Recipe)
    assert specs(f"off,{LISTED},k8v4") == [None, KVSpec(skip=(1, 1)), KVSpec("int8", "int4")]
    assert split(" int4 , int8:skip=last2,first1") == ["int4", "int8:skip=last2,first1"]
    assert not issubclass(Recipe, KVSpec)
    for bad in ("", "int4,", ",", "int4,int4", "off,native", "nonsense"):
        with pytest.raises(SpecError):
            specs(bad)


# ---- formats and files


@pytest.mark.parametrize("name", taking("--output"))
def test_o_is_a_file(name):
    found = options(name)
    assert found["--output"] is found["-o"] and found["-o"].type_descriptor.annotation is Path


@pytest.mark.parametrize("name", taking("--format"))
def test_an_unknown_format_is_refused_before_any_work(run, name):
    code, _, err = run(*name.split(), "model", "--format", "xml")
    if name == "bench kernel":  # has no model
        code, _, err = run(*name.split(), "--format", "xml")
    assert code == 2 and "xml" in err and "json" in err and err.count("\n") == 1, err


WRITES = [(n, o) for n in NAMES for o in ("--output", "--plot", "--records") if o in options(n)]


@pytest.mark.parametrize("name, option", WRITES)
def test_where_results_go_is_checked_before_any_work(run, monkeypatch, tmp_path, name, option):
    """A folder, a device and a missing folder, each refused before the model is even looked for."""
    monkeypatch.setattr(kernel, "bench", stop)
    monkeypatch.setattr(device, "examine", stop)
    missing = str(tmp_path / "no" / "model")
    ending = ".toml" if name in ("tune", "calibrate") else ".png" if option == "--plot" else ".jsonl"
    folder = tmp_path / f"folder{ending}"
    folder.mkdir()
    device_file = tmp_path / f"null{ending}"
    device_file.symlink_to("/dev/null")
    places = [folder, device_file] + ([tmp_path / "gone" / f"x{ending}"] if option != "--records" else [])
    extra = {"lab report": ["study.toml"], "bench report": ["r.jsonl"]}.get(name, needs(name, missing))
    for place in places:
        if name == "doctor" and place.parent != tmp_path:
            continue  # makes the folder
        code, _, err = run(*name.split(), *extra, option, str(place))
        assert code == 2 and str(place) in err and missing not in err and err.count("\n") == 1, err
        assert place.exists() == (place in places[:2])


# ---- Ctrl-C, and models that are not there


@pytest.mark.parametrize("name", [n for n in MODEL_REQUIRED if n not in ("plan", "bench model", "bench long")])
def test_ctrl_c_while_a_model_loads_is_one_line(run, monkeypatch, tmp_path, name):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    for module in (names, load):
        monkeypatch.setattr(module, "resolve", interrupted)
    code, _, err = run(*name.split(), *needs(name, "org/model"))
    assert (code, err) == (130, "opentq: stopped\n")


@pytest.mark.parametrize("module", ["opentq.cli.main", "mlx"])
def test_ctrl_c_while_a_module_loads_is_one_line(module):
    """Whatever is being imported, from the first module of the command line to MLX."""
    work = f"""
import os, signal, sys
class Ctrl:
    def find_spec(self, name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
import opentq.__main__ as program
sys.meta_path.insert(0, Ctrl())
sys.argv = ["opentq", "generate", "models/tiny-llama", "hello"]
program.main()
"""
    done = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (130, "opentq: stopped\n", "")


def test_a_missing_model_is_noticed_before_mlx_is_imported(tmp_path):
    """Its first import compiles, and takes a second on any day."""
    work = f"""
import sys
from opentq.cli import main
for name, more in (("generate", ["hi"]), ("chat", []), ("cache build", ["f.cache", "--text", "hi"]), ("serve", [])):
    sys.argv = ["opentq", *name.split(), {str(tmp_path / "gone")!r}, *more]
    try:
        main.main()
    except SystemExit as stop:
        print(name, stop.code, "mlx.core" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True)
    assert done.stdout == "generate 2 False\nchat 2 False\ncache build 2 False\nserve 2 False\n", done.stderr
    assert done.stderr.count("does not exist") == 4 == done.stderr.count("\n")


@pytest.mark.parametrize("name", taking("--system-prompt"))
def test_bytes_that_are_no_text_are_refused(run, tmp_path, name):
    bad = "caf\udcff"
    code, _, err = run(*name.split(), *needs(name, str(tmp_path / "missing")), "--system-prompt", bad)
    assert (code, err) == (2, "opentq: --system-prompt is not UTF-8 text (byte 3 is 0xff); convert it\n")
