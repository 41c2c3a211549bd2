"""The workflows say what exists: make targets, test files, commands and options. `make lint` checks their syntax."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from opentq.cli.main import app

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PINNED = re.compile(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}")


def steps(file: Path) -> list[dict]:
    jobs = yaml.safe_load(file.read_text())["jobs"].values()
    return [step for job in jobs for step in job["steps"]]


def scripts() -> list[str]:
    return [step["run"] for file in FILES for step in steps(file) if "run" in step]


def test_the_workflows_are_there():
    assert [f.stem for f in FILES] == ["canary", "linux", "mac", "release"]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_action_is_pinned_by_its_commit(file):
    used = [step["uses"] for step in steps(file) if "uses" in step]
    assert used and all(PINNED.fullmatch(name) for name in used), used


def test_make_targets_and_test_files_exist():
    text = "".join(f.read_text() for f in FILES)
    targets = set(re.findall(r"\bmake ([a-z-]+)", text))
    assert targets >= {"test", "install", "demo"}
    assert targets <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"\btests/[\w*]+(?:\.py)?", text))
    assert named and all(any(ROOT.glob(name)) for name in named), named


def test_commands_have_the_options_that_are_used():
    text = "\n".join(scripts()).replace("\\\n", " ")
    calls = re.findall(r"bin/opentq (.+?)(?: >|\n|$)", text)
    assert len(calls) >= 4
    for call in calls:
        command, (name, *rest) = get_command(app), shlex.split(call)
        command = command.commands[name]
        if hasattr(command, "commands"):
            command, rest = command.commands[rest[0]], rest[1:]
        command.make_context(name, rest)  # raises for what it does not know


def test_every_script_is_a_script():
    for script in scripts():
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("tag, code", [("v{}", 0), ("v9.9.9", 1), ("{}", 1)])
def test_only_the_tag_of_the_version_is_released(tag, code):
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    (script,) = [s for s in scripts() if "GITHUB_REF_NAME" in s]
    env = {"GITHUB_REF_NAME": tag.format(version), "PATH": "/usr/bin:/bin"}
    assert subprocess.run(["bash", "-e"], input=script, text=True, cwd=ROOT, env=env).returncode == code
