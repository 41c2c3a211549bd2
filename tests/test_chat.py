"""`opentq chat`: the conversation on one set of caches, and the console around it."""

from __future__ import annotations

import io
import json

import pytest

from opentq.chat.console import Console, count, size
from opentq.chat.conversation import Conversation, Settings
from opentq.chat.style import BOLD, CYAN, RESET, Styler
from opentq.errors import UserError
from opentq.hosts.mlx_lm.load import load

from .tiny_model import write


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("tiny-chat"), context=600)
    return load(str(folder), kv="int4")


@pytest.fixture
def talk(loaded):
    return Conversation(*loaded, context=600, settings=Settings(max_tokens=12))


class Terminal(io.StringIO):
    """An output that says it is a terminal."""

    def isatty(self):
        return True


def console(talk, lines, tty=True):
    """A console that reads `lines` and then ends; returns what it wrote."""
    pending = iter(lines)

    def read(prompt):
        line = next(pending, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    out = Terminal() if tty else io.StringIO()
    Console(talk, "tiny", read, out).run()
    return out.getvalue()


def said(talk, text):
    return "".join(d.text for d in talk.ask(text))


def test_turns_read_only_what_is_new(talk):
    said(talk, "a first message that is rather long, so that it is worth keeping")
    before = len(talk.held)
    said(talk, "more")
    assert talk.turn.read < before and len(talk.held) > before
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 2
    assert talk.caches[0].offset == len(talk.held)


def test_a_changed_past_is_trimmed(talk, loaded):
    said(talk, "hello")
    talk.system = "Be short."
    again = said(talk, "and again")
    fresh = Conversation(*loaded, context=600, system="Be short.", settings=Settings(max_tokens=12))
    fresh.messages = list(talk.messages[:2])
    assert said(fresh, "and again") == again


def test_an_interrupt_keeps_what_was_said(talk):
    pieces = talk.ask("go on and on")
    text = "".join(next(pieces).text for _ in range(3))
    pieces.close()
    assert talk.messages[-1] == {"role": "assistant", "content": text} and talk.turn.reason == "stopped"
    assert talk.caches[0].offset == len(talk.held)
    assert said(talk, "and then?")


def test_a_message_that_does_not_fit_is_not_kept(talk):
    with pytest.raises(UserError, match="600"):
        said(talk, "x" * 700)
    assert talk.messages == [] and said(talk, "short")


def test_console_session(talk, tmp_path):
    file = tmp_path / "talk.json"
    out = console(
        talk,
        [
            "/system Be kind.", '"""one', 'two"""', "/set temperature 0.5", "/set parameter top_k 5",
            "/set system Be brief.", "/set temperature hot", "/set temperature 9", "/set nothing 1", "/show", "/stats",
            f"/save {file}", "/clear",
            "/save", f"/load {file}", "/load nowhere", "/dance", "", "/system", "/?", "/bye", "never read",
        ],
    )  # fmt: skip
    assert talk.messages[0]["content"] == "one\ntwo" and "never read" not in out
    assert talk.settings.temperature == 0.5 and talk.settings.top_k == 5 and talk.system == "Be brief."
    assert " tokens · " in out and "tok/s · ctx " in out and "KV " in out and "(int4, " in out
    refusals = ["'hot' is not a number", "not from 0 to 2", "give one of temperature", "needs a file", "can't read"]
    for text in [*refusals, "no command /dance", "layers", "░", "saved 2", "loaded 2", "Be brief.", "/stats"]:
        assert text in out, text
    saved = json.loads(file.read_text())
    assert saved["messages"] == talk.messages
    file.write_text(json.dumps(saved | {"settings": {"temperature": "hot"}}))
    assert "is not a saved conversation" in console(talk, [f"/load {file}"]) and talk.settings.temperature == 0.5
    console(talk, ["/set top_k 99999", "more than there are"])
    assert talk.turn.written


def test_ctrl_c_stops_the_answer_and_not_the_program(talk, monkeypatch):
    inner = talk._generate

    def interrupted(tokens, state):
        for n, delta in enumerate(inner(tokens, state)):
            yield delta
            if n == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(talk, "_generate", interrupted)
    out = console(talk, ["hello", KeyboardInterrupt(), "/stats"])
    assert "(stopped)" in out and "/bye leaves" in out and "context" in out
    assert len(talk.messages) == 2


def test_pipes_get_the_answer_alone(talk):
    out = console(talk, ["hello"], tty=False)
    assert out == talk.messages[-1]["content"] + "\n" and "\033" not in out


@pytest.mark.parametrize("cut", [1, 2, 3, 100])
def test_style(cut, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = "# Title\nsome **bold** and `code` 2*3\n```py\n**x**\n```\nend"
    styler = Styler(tty=True)
    out = "".join(styler.feed("content", text[i : i + cut]) for i in range(0, len(text), cut)) + styler.end()
    assert f"{BOLD}bold{RESET}" in out and f"{CYAN}code{RESET}" in out and "2*3" in out
    assert f"{BOLD}# Title" in out and "**x**" in out
    plain = Styler(tty=False)
    assert plain.feed("content", text) + plain.end() == text
    monkeypatch.setenv("NO_COLOR", "1")
    assert Styler(tty=True).feed("content", text) == text


def test_numbers():
    assert [count(n) for n in (999, 1500, 41_234)] == ["999", "1.5k", "41k"]
    assert [size(n) for n in (500, 2_500_000, 1_900_000_000)] == ["0 kB", "2.5 MB", "1.9 GB"]
