"""`opentq generate --image`: images and models that only mlx-vlm knows, and what is refused in a line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("mlx_vlm")

from PIL import Image

from opentq.cli.main import app
from opentq.hosts.mlx_vlm import images
from opentq.hosts.mlx_vlm.load import only_here

from . import vlm_tiny

PROMPT = "What is this?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(vlm_tiny.folder(tmp_path_factory.mktemp("vlm") / "tiny"))


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "red.png"
    Image.new("RGB", (112, 84), (200, 30, 40)).save(path)
    return str(path)


def generate(*arguments: str):
    return CliRunner().invoke(app, ["generate", PROMPT, "--max-tokens", "4", *arguments])


def test_an_image_is_part_of_the_prompt(folder, picture):
    one, two = (
        json.loads(generate("--model", folder, "--kv", "int4", "--json", *more).stdout.splitlines()[-1])
        for more in (("--image", picture), ("--image", picture) * 2)
    )
    assert (one["images"], two["images"]) == (1, 2)
    assert two["prompt_tokens"] > one["prompt_tokens"] + 12, "an image of 8 x 6 patches is 12 tokens"
    assert one["generation_tokens"] == 4 and one["kv"] == "int4" and one["kv_bytes"] > 0


def test_a_model_that_only_mlx_vlm_knows_is_recognised_without_it(folder, tmp_path):
    assert not only_here(folder), "mlx-lm reads the text of Qwen2-VL, too"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "glm4v"}))
    assert only_here(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "../x"}))
    assert not only_here(str(tmp_path)) and not only_here("org/name")


def refused(words: str, *arguments: str) -> None:
    result = generate(*arguments)
    assert result.exit_code != 0
    said = str(result.exception or result.stderr)
    assert words in said and "\n" not in said.strip(), said


def test_bad_images_are_refused_in_a_line(folder, picture, tmp_path, monkeypatch):
    text, broken, empty = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.png"
    text.write_text("not an image")
    data = Path(picture).read_bytes()
    broken.write_bytes(data[: len(data) // 2])
    empty.write_bytes(b"")
    refused("can't read the image", "--model", folder, "--image", str(tmp_path / "none.png"))
    refused("not an image of a known type", "--model", folder, "--image", str(text))
    refused("not an image of a known type", "--model", folder, "--image", str(empty))
    refused("is broken", "--model", folder, "--image", str(broken))
    monkeypatch.setattr(images, "PIXELS", 1000)
    refused("112 x 84 pixels, more than 1,000", "--model", folder, "--image", picture)
    monkeypatch.setattr(images, "BYTES", 100)
    refused("MB, more than", "--model", folder, "--image", picture)


def test_an_image_for_a_text_model_is_refused(picture):
    refused("takes text only", "--model", "models/tiny-llama", "--image", picture)


def test_what_images_exclude_is_refused(folder, picture):
    refused("can't be used with images", "--model", folder, "--image", picture, "--ignore-chat-template")


def test_a_system_prompt_a_limit_and_a_file_go_with_images(folder, picture, tmp_path):
    out = tmp_path / "answer.txt"
    result = generate("--model", folder, "--image", picture, "--system-prompt", "Be short.", "--output", str(out))
    assert result.exit_code == 0 and out.read_text().strip() == result.stdout.strip()
    refused("together more than --max-context 20", "--model", folder, "--image", picture, "--max-context", "20")


# ---- opentq chat


@pytest.fixture(scope="module")
def seeing(folder):
    from opentq.hosts.mlx_lm.load import load

    return load(folder, kv="int8", images=True)


def talk(seeing, *lines):
    """A conversation through the console, and what it wrote."""
    from opentq.chat.console import Console
    from opentq.chat.conversation import Conversation, Settings

    from .test_chat import Reader, Terminal

    chat, out = Conversation(*seeing, context=2000, settings=Settings(max_tokens=6)), Terminal()
    Console(chat, "tiny", Reader(lines), out).run()
    return chat, out.getvalue()


def test_a_conversation_about_an_image_reads_it_once(seeing, picture, tmp_path):
    """The image is part of the first message only, of what is saved, and another image is another conversation."""
    file = tmp_path / "talk.json"
    chat, out = talk(seeing, f"/image {picture}", PROMPT, "and the colour?", f"/save {file}")
    assert f"{picture} goes before" in out and chat.turn.again < 64 and chat.turn.read < 80
    assert [type(m["content"]) for m in chat.messages] == [list, str, str, str]
    assert chat.caches[0].offset == len(chat.held) > 12
    again, _ = talk(seeing, f"/load {file}", "what else?")
    assert [m["content"] for m in again.messages[1:4]] == [m["content"] for m in chat.messages[1:4]]
    alone, _ = talk(seeing, f"/image {picture}", PROMPT)
    assert alone.messages[1] == chat.messages[1]
    # The same words about another picture: what is behind its first place is read again.
    other = tmp_path / "blue.png"
    Image.new("RGB", (112, 84), (20, 30, 240)).save(other)
    blue, _ = talk(seeing, f"/image {other}", PROMPT)
    del chat.messages[:]
    assert list(chat.ask(blue.messages[0]["content"])) and chat.messages[1] == blue.messages[1]
    assert chat.turn.read > 12


def test_chat_refuses_images_in_a_line(folder, picture, tmp_path):
    model = str(Path(__file__).parents[1] / "models" / "tiny-llama")
    (tmp_path / "broken.png").write_bytes(b"no image")
    for path, file, words in (
        (model, picture, "takes text only"),
        (folder, str(tmp_path / "broken.png"), "not an image"),
    ):
        result = CliRunner().invoke(app, ["chat", path, "--image", file])
        assert result.exit_code != 0 and words in str(result.exception)
    result = CliRunner().invoke(app, ["chat", folder, "--image", picture, "-m", "3"], input="What is this?\nand?\n")
    assert result.exit_code == 0 and result.stdout.count("\n") >= 2
