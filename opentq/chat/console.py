"""The loop of `opentq chat`: commands, line editing, answers as they come, and an end line with what they cost."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TextIO

import mlx.core as mx

from ..errors import UserError
from ..hosts import hooks
from .conversation import Conversation, Settings
from .style import Styler

HISTORY = Path("~/.cache/opentq/chat_history")


class Leave(Exception):
    """/bye."""


class Console:
    """The loop in the terminal. `read(prompt)` gives a line; everything is written to `out`."""

    def __init__(self, talk: Conversation, name: str, read: Callable[[str], str] = input, out: TextIO | None = None):
        self.talk = talk
        self.name = name
        self.read = read
        self.out = out or sys.stdout
        self.tty = self.out.isatty()
        self.commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "help": ("this list", self.help),
            "set": ("NAME VALUE: temperature, top_p, top_k, min_p, seed, max_tokens or system", self.set),
            "show": ("the settings and what the KV cache is made of", self.show),
            "system": ("TEXT: set the system message; without a text, show it", self.system),
            "save": ("FILE: save the conversation", self.save),
            "load": ("FILE: load a conversation", self.load),
            "clear": ("forget the conversation", self.clear),
            "stats": ("speed, context and memory", self.stats),
            "bye": ("leave (also Ctrl-D)", self.bye),
        }

    def run(self) -> None:
        """Until /bye or the end of the input. Ctrl-C stops an answer, or drops the line that is being typed."""
        if self.tty:
            self.say(f"{self.name}, context {count(self.talk.context)}, KV {self.talk.spec}. /help lists the commands.")
        while True:
            try:
                text = self.read_message()
            except EOFError:
                return
            except KeyboardInterrupt:
                self.say("\n(Ctrl-D or /bye leaves)")
                continue
            if not text.strip():
                continue
            try:
                if text.startswith("/"):
                    self.command(text)
                else:
                    self.answer(text)
            except UserError as error:
                self.say(str(error))
            except Leave:
                return

    def read_message(self) -> str:
        '''A line, or several between two lines of """.'''
        quotes = '"""'
        prompt = ">>> " if self.tty else ""
        text = self.read(prompt)
        if not text.startswith(quotes):
            return text
        text = text[3:]
        while quotes not in text:
            text += "\n" + self.read("... " if self.tty else "")
        return text.partition(quotes)[0].strip("\n")

    def answer(self, text: str) -> None:
        """Stream the answer; Ctrl-C stops it and keeps what was said."""
        styler = Styler(self.tty)
        pieces = self.talk.ask(text)
        try:
            for delta in pieces:
                self.write(styler.feed(delta.kind, delta.text))
        except KeyboardInterrupt:
            pieces.close()  # type: ignore[attr-defined]
            self.write(styler.end() + "\n(stopped)")
        self.write(styler.end() + "\n")
        if self.tty:
            self.say(self.end_line())

    def end_line(self) -> str:
        """`N tokens · tok/s · ctx 41k/128k · KV 1.9 GB (int4, 3.2x)`."""
        t, turn = self.talk, self.talk.turn
        ratio = f", {t.ratio:.1f}x" if t.ratio else ""
        return (
            f"{turn.written} tokens · {turn.write_rate:.1f} tok/s · ctx {count(len(t.held))}/{count(t.context)} · "
            f"KV {size(t.kv_bytes)} ({t.spec}{ratio})"
        )

    def command(self, text: str) -> None:
        name, _, rest = text[1:].partition(" ")
        name = {"?": "help", "exit": "bye", "quit": "bye"}.get(name, name)
        if name not in self.commands:
            raise UserError(f"there is no command /{name}; /help lists them")
        self.commands[name][1](rest.strip())

    def help(self, _: str) -> None:
        for name, (meaning, _call) in self.commands.items():
            self.say(f"  /{name:<8}{meaning}")
        self.say('  """       begins and ends a message of several lines')

    def set(self, rest: str) -> None:
        name, _, value = rest.removeprefix("parameter ").partition(" ")
        if name == "system":
            self.system(value)
            return
        known = [f.name for f in fields(Settings)]
        if name not in known or not value:
            raise UserError(f"/set {rest}: give one of {', '.join(known)} or system, and a value")
        self.talk.settings = replace(self.talk.settings, **{name: setting(name, value)})

    def show(self, _: str) -> None:
        self.say(f"model: {self.name}")
        for name, value in asdict(self.talk.settings).items():
            self.say(f"{name}: {'none' if value is None else value}")
        self.say(f"system: {self.talk.system or 'none'}")
        if hooks.installed(self.talk.model):
            from ..hosts.report import report

            self.say(str(report(self.talk.model)))

    def system(self, text: str) -> None:
        if text:
            self.talk.system = text
        else:
            self.say(self.talk.system or "there is no system message")

    def save(self, rest: str) -> None:
        t = self.talk
        data = {"model": self.name, "system": t.system, "settings": asdict(t.settings), "messages": t.messages}
        path = self._path(rest, "/save")
        try:
            path.write_text(json.dumps(data, indent=1, ensure_ascii=False))
        except OSError as error:
            raise UserError(f"can't write {str(path)!r}: {error.strerror}") from error
        self.say(f"saved {len(t.messages)} messages to {path}")

    def load(self, rest: str) -> None:
        path = self._path(rest, "/load")
        try:
            data = json.loads(path.read_text())
            messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in data["messages"]]
            settings = Settings(**{k: setting(k, str(v).lower()) for k, v in data["settings"].items()})
            system = str(data["system"])
        except OSError as error:
            raise UserError(f"can't read {str(path)!r}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{str(path)!r} is not a saved conversation") from error
        self.talk.clear()
        self.talk.messages, self.talk.settings, self.talk.system = messages, settings, system
        self.say(f"loaded {len(messages)} messages from {path}; they are read with your next one")

    def _path(self, rest: str, command: str) -> Path:
        if not rest:
            raise UserError(f"{command} needs a file name")
        return Path(rest).expanduser()

    def clear(self, _: str) -> None:
        self.talk.clear()
        self.say("forgotten")

    def stats(self, _: str) -> None:
        t, turn = self.talk, self.talk.turn
        share = len(t.held) / t.context
        bar = "█" * round(30 * share) + "░" * (30 - round(30 * share))
        self.say(f"context  {bar} {len(t.held)} of {t.context} tokens ({share:.0%})")
        ratio = f", {t.ratio:.2f}x smaller than fp16" if t.ratio else ""
        self.say(f"KV cache {size(t.kv_bytes)} ({t.spec}{ratio})")
        self.say(f"memory   {size(mx.get_active_memory())} now, {size(mx.get_peak_memory())} at most")
        rates = f"at {turn.read_rate:.0f}/s, wrote {turn.written} at {turn.write_rate:.1f}/s"
        self.say(f"last     read {turn.read} tokens {rates}")

    def bye(self, _: str) -> None:
        raise Leave

    def say(self, text: str) -> None:
        self.write(text + "\n")

    def write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()


def setting(name: str, text: str) -> Any:
    """The value of a setting. Raises UserError for what it can't be."""
    if text == "none" and name == "seed":
        return None
    try:
        value = int(text) if name in ("top_k", "seed", "max_tokens") else float(text)
    except ValueError as error:
        raise UserError(f"/set {name}: {text!r} is not a number") from error
    limit = {"temperature": 2, "top_p": 1, "min_p": 1}.get(name)
    # not, because nan is neither
    if not (value >= 0 and (limit is None or value <= limit)):
        raise UserError(f"/set {name}: {text} is not from 0{f' to {limit}' if limit else ''}")
    return value


def count(tokens: int) -> str:
    """41234 as 41k."""
    return str(tokens) if tokens < 1000 else f"{tokens / 1000:.1f}k" if tokens < 10_000 else f"{tokens / 1000:.0f}k"


def size(nbytes: int) -> str:
    """Bytes for people, in powers of 1000 as memory use is reported elsewhere."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= 0.95 * scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes / 1e3:.0f} kB"


def use_history(path: Path = HISTORY) -> None:
    """Line editing and a history that outlives the session, where Python has readline."""
    try:
        import atexit
        import readline
    except ImportError:
        return
    path = path.expanduser()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        readline.read_history_file(path)
    readline.set_history_length(1000)

    def write() -> None:
        with suppress(OSError):
            readline.write_history_file(path)

    atexit.register(write)
