"""`opentq chat`: the conversation on one set of caches, and the console around it."""

from __future__ import annotations

import io
import json
import os
import signal
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.key_binding import KeyPress
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import DummyOutput

from opentq import compress
from opentq.chat import conversation
from opentq.chat.console import WORDS, Console, count
from opentq.chat.conversation import SPARE, Conversation, Settings
from opentq.chat.editor import Commands, Editor, History, Pipe
from opentq.chat.style import BOLD, CYAN, RESET, Styler
from opentq.dialogue.prompt import Prompter
from opentq.dialogue.request import Delta, Progress
from opentq.errors import UserError
from opentq.hosts.generation import human_bytes
from opentq.hosts.mlx_lm.load import load

from .architectures import build
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


class Reader:
    """Gives messages, then the end; `keys` is called whenever the terminal is looked at during an answer."""

    def __init__(self, lines, interactive=True, keys=lambda: None):
        self.lines, self.interactive, self.keys = list(lines), interactive, keys

    def read(self):
        line = self.lines.pop(0) if self.lines else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line

    def aside(self):
        return nullcontext(self.keys)


def console(talk, lines, tty=True, keys=lambda: None):
    """A console that reads `lines` and then ends; returns what it wrote."""
    out = Terminal() if tty else io.StringIO()
    Console(talk, "tiny", Reader(lines, tty, keys), out).run()
    return out.getvalue()


def said(talk, text):
    return "".join(d.text for d in talk.ask(text) if isinstance(d, Delta))


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


KINDS = ["llama", "gemma3_text", "gemma3_text:window=compress", "qwen3_next", "falcon_h1"]
"""Layers that can all be cut, windows that forget (the host's and packed ones), recurrent states, both in one cache."""


@pytest.fixture(scope="module", params=KINDS)
def kind(request, loaded):
    """A model of each kind, with the tokenizer and its chat template."""
    if request.param == "llama":
        return loaded
    name, _, option = request.param.partition(":")
    model = build(name, vocab_size=300, sliding_window=64)
    compress(model, f"int8:{option}".strip(":"))
    return model, loaded[1]


def chat(model_and_tokenizer, **options):
    return Conversation(*model_and_tokenizer, context=600, settings=Settings(max_tokens=6), **options)


def layers(talk):
    return [c for cache in talk.caches for c in getattr(cache, "caches", [cache])]


def offsets(talk):
    return {c.offset for c in layers(talk) if hasattr(c, "offset")}


LONG = "a message that is longer than the window and than a chunk of the prompt, " * 4


def test_a_stopped_answer_keeps_its_cache(kind):
    """A stop is heeded when a token is whole: every layer holds the same, and the next turn reads what is new."""
    talk = chat(kind)
    for n, _ in enumerate(talk.ask(LONG)):
        talk.stopping = n == 2
    kept, prompt = len(talk.held), talk.turn.read
    assert talk.turn.reason == "stopped" and talk.turn.written < 6 and kept == prompt + talk.turn.written
    assert offsets(talk) == {kept} and talk.messages[-1]["role"] == "assistant"
    answer = said(talk, "and then?")
    # Its template puts no more than a few tokens behind the answer; random bytes may be written as other tokens.
    assert talk.turn.again <= SPARE + 6 and talk.turn.read < 80 < prompt and offsets(talk) == {len(talk.held)}
    fresh = chat(kind)
    fresh.messages = list(talk.messages[:2])
    assert said(fresh, "and then?") == answer


def test_a_changed_answer_is_read_again_from_the_copy(kind):
    """What templates do to thoughts: the answer is not in the prompt as it was given. Only a changed beginning needs
    everything to be read again, where layers can't be cut, and the turn says so."""
    talk = chat(kind)
    said(talk, LONG)
    talk.messages[-1]["content"] = "something else"
    held, size = len(talk.held), talk.kv_bytes
    assert size >= sum(c.nbytes for c in talk.caches) and 0.4 < talk.ratio < 4
    answer = said(talk, "more")
    assert talk.turn.again <= SPARE and talk.turn.read < 60 < held
    fresh = chat(kind)
    fresh.messages = list(talk.messages[:2])
    assert said(fresh, "more") == answer
    talk.messages[1]["content"] = "not that"
    cuts = all(c.is_trimmable() for c in talk.caches)
    said(talk, "on")
    assert (talk.turn.again > 60) != cuts and offsets(talk) == {len(talk.held)}


def test_a_stop_while_the_prompt_is_read_takes_the_message_back(kind, monkeypatch):
    monkeypatch.setattr(conversation, "CHUNKS", {"cpu": 64, "gpu": 64})
    talk = chat(kind)
    seen = []
    for event in talk.ask(LONG):
        seen.append(event)
        talk.stopping = len(seen) == 2
    assert [(e.done, type(e)) for e in seen] == [(64, Progress), (128, Progress)] and talk.messages == []
    assert offsets(talk) == {128} == {len(talk.held)} and talk.turn.reason == "stopped"
    said(talk, LONG)
    assert talk.turn.again == 0 and talk.turn.read == len(talk.held) - talk.turn.written - 128


def test_what_breaks_off_within_a_step_begins_anew(kind, monkeypatch):
    """Layers that stopped at different lengths are never gone on with."""
    talk = chat(kind)
    pieces = talk.ask(LONG)
    next(p for p in pieces if isinstance(p, Delta))
    last = layers(talk)[-1]

    def broken(*_, **__):
        raise KeyboardInterrupt

    cls = type(talk.model.layers[-1])
    monkeypatch.setattr(cls, "__call__", broken)
    with pytest.raises(KeyboardInterrupt):
        list(pieces)
    monkeypatch.undo()
    assert talk.held == [] and last not in layers(talk) and talk.messages[-1]["role"] == "assistant"
    assert said(talk, "and then?")


def test_an_iterator_that_is_closed_keeps_what_was_said(talk):
    pieces = talk.ask("go on and on")
    text = "".join(next(pieces).text for _ in range(3))
    pieces.close()
    assert talk.messages[-1] == {"role": "assistant", "content": text} and talk.turn.reason == "stopped"
    assert talk.caches[0].offset == len(talk.held)
    assert said(talk, "and then?")


def test_what_a_template_refuses_is_said(talk, monkeypatch):
    """Whatever it fails with, as the server does."""
    from jinja2 import TemplateError

    for error, words in ((TemplateError("roles must alternate"), "roles must"), (TypeError("x"), "can't render")):
        monkeypatch.setattr(
            type(talk.tokenizer), "apply_chat_template", lambda *_, e=error, **__: (_ for _ in ()).throw(e)
        )
        talk.prompter = Prompter(talk.tokenizer, 300)
        with pytest.raises(UserError, match=words):
            said(talk, "hello")
        assert talk.messages == []


def test_a_message_that_does_not_fit_is_not_kept(talk):
    with pytest.raises(UserError, match="600"):
        said(talk, "x" * 700)
    assert talk.messages == [] and said(talk, "short")


def test_console_session(talk, tmp_path):
    file = tmp_path / "talk.json"
    out = console(
        talk,
        [
            "/system Be kind.", '"""one\ntwo"""', "/set temperature 0.5", "/set parameter top_k 5",
            "/set system Be brief.", "/set temperature hot", "/set temperature 9", "/set nothing 1", "/set top_k",
            "/set", "/set num_predict 9", "/show", "/stats", f"/save {file}", "/clear",
            "/save", f"/load {file}", "/load nowhere", "/dance", "", "/system", "/?", "/bye", "never read",
        ],
    )  # fmt: skip
    assert talk.messages[0]["content"] == "one\ntwo" and "never read" not in out
    assert talk.settings.temperature == 0.5 and talk.settings.top_k == 5 and talk.system == "Be brief."
    assert out.count("top_k: 5\n") == 3 and talk.settings.max_tokens == 9
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


def test_ctrl_c_stops_the_answer_and_not_the_program(talk):
    out = console(talk, ["hello", KeyboardInterrupt(), "/stats"], keys=lambda: os.kill(os.getpid(), signal.SIGINT))
    assert "(stopped)" in out and "/bye leaves" in out and "context" in out
    assert len(talk.messages) == 2 and talk.turn.written < 12
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt):
        console(talk, ["hello"], tty=False, keys=lambda: os.kill(os.getpid(), signal.SIGINT))


def test_documents_and_second_answers(talk, tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfA document.")
    out = console(talk, [f"/read {file}", "What is it?", "and?", "/regen", f"/read {tmp_path}", "/clear", "/regen"])
    assert f"{file} goes before" in out and "Is a directory" in out and "no answer yet" in out
    talk.settings = Settings(max_tokens=3)
    console(talk, [f"/read {file}", "What?", "and?", "/regen"])
    assert [m["content"] for m in talk.messages[::2]] == ["A document.\n\nWhat?", "and?"]


BAD = [b"\xff\xfe{\0", b'\xef\xbb\xbf{"messages": []', b"[1]", b"[" * 10000]
BAD += [b'{"system": "", "settings": {}, "messages": [{"role": "user", "content": "\\ud800"}]}']


@pytest.mark.parametrize("content", BAD)
def test_a_file_that_is_no_conversation_is_refused(talk, tmp_path, content):
    file = tmp_path / "talk.json"
    file.write_bytes(content)
    said = console(talk, [f"/load {file}"]).splitlines()
    assert len(said) == 2 and ("is not a saved conversation" in said[1] or "UTF-16" in said[1])
    assert talk.messages == []


def test_what_is_typed_comes_from_the_editor(tmp_path):
    """Keys as a terminal sends them during an answer; the history that readline of two kinds left."""
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        editor = Editor(WORDS, tmp_path / "new" / "history")
        for sent in ("tyx\x7fped\r", "\033[200~a\r\nb\rc\033[201~", "\033[A", "\004"):
            keys.send_text(sent)
            editor._keep(keys.read_keys())
        assert editor.typed == "typed\na\nb\nc" and not editor.ended
        keys.send_text("!\r")
        assert editor.read() == "typed\na\nb\nc!" and editor.typed == ""
        editor._keep([KeyPress(Keys.ControlD)])
        with pytest.raises(EOFError):
            editor.read()
    ours = (tmp_path / "new" / "history").read_text()
    assert "+typed\n+a\n+b\n+c!\n" in ours and (tmp_path / "new" / "history").stat().st_mode & 0o777 == 0o600
    for old in ("one\ntwo words\n", "_HiStOrY_V2_\none\ntwo\\040words\n"):
        (tmp_path / "new" / "history").write_text(old + ours)
        found = list(History(tmp_path / "new" / "history").load_history_strings())
        assert found == ["typed\na\nb\nc!", "two words", "one"]
    History("/dev/null/x").store_string("not a folder")
    assert list(History("/dev/null/x").load_history_strings()) == []


@pytest.mark.parametrize("text, ends", [("/set te", ["/set temperature "]), ("hello", []), ("say /set te", [])])
def test_commands_complete(text, ends):
    found = Commands(WORDS).get_completions(Document(text), CompleteEvent())
    assert [text[: len(text) + c.start_position] + c.text for c in found] == ends


def test_all_commands_and_settings_complete(talk):
    known = Console(talk, "tiny", Reader([])).commands
    assert {w.strip("/ ").partition(" ")[0] for w in WORDS} == set(known)
    assert {w for w in WORDS if w.startswith("/set ")} == {f"/set {n} " for n in (*asdict(Settings()), "system")}
    page = Path("docs/chat.md").read_text()
    assert all(f"`/{name}" in page for name in known)


def test_pipes_get_the_answer_alone(talk):
    out = console(talk, ["hello"], tty=False)
    assert out == talk.messages[-1]["content"] + "\n" and "\033" not in out


def test_a_pipe_is_a_message_a_line(talk, monkeypatch):
    """A mark at the start is no text, several lines may be one message, and what is wrong ends it."""
    sent = b'\xef\xbb\xbfone\r\n"""two\nlines"""\n\n/set max_tokens 1\n"""without\nend'
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(sent)))
    out = io.StringIO()
    Console(talk, "tiny", Pipe(), out).run()
    assert [m["content"] for m in talk.messages[::2]] == ["one", "two\nlines", "without\nend"]
    assert all(m["content"] in out.getvalue() for m in talk.messages[3::2]) and "tok/s" not in out.getvalue()
    for sent, words in ((b"caf\xff\nnever\n", "byte 3 is 0xff"), (b"/dance\nnever\n", "no command")):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(sent)))
        with pytest.raises(UserError, match=words):
            Console(talk, "tiny", Pipe(), out).run()
    assert len(talk.messages) == 6


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
    assert [human_bytes(n) for n in (500, 2_500_000, 1_900_000_000)] == ["500 B", "2.5 MB", "1.90 GB"]
