"""The loop of `opentq chat`: commands, answers as they come, and an end line with what they cost."""

from __future__ import annotations

import json
import signal
import sys
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TextIO

import mlx.core as mx

from .. import text as texts
from ..dialogue.errors import ApiError
from ..dialogue.pictures import Content, Picture, content, from_url, parts
from ..dialogue.request import Progress
from ..errors import UserError
from ..hosts import hooks
from ..hosts.generation import human_bytes
from .conversation import Conversation, Settings
from .editor import QUOTES, Editor, Pipe
from .style import Styler

NAMES = (*(f.name for f in fields(Settings)), "system")
ALIASES = {"temp": "temperature", "num_predict": "max_tokens", "n_predict": "max_tokens"}
WORDS = dict.fromkeys(("/help", "/clear", "/stats", "/show", "/regen", "/bye", "/system "), False)
WORDS |= dict.fromkeys(("/save", "/load", "/read", "/image"), True) | {f"/set {name} ": False for name in NAMES}


class Leave(Exception):
    """/bye."""


class Console:
    """The loop in the terminal, or over a pipe: messages from `reader`, everything written to `out`."""

    def __init__(self, talk: Conversation, name: str, reader: Editor | Pipe, out: TextIO | None = None):
        self.talk = talk
        self.name = name
        self.reader = reader
        self.out = out or sys.stdout
        self.tty = reader.interactive
        self.before: list[str | Picture] = []  # go before the next message
        self.commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "help": ("this list", self.help),
            "set": (f"NAME VALUE: {', '.join(NAMES)}; without a value, show it", self.set),
            "show": ("the settings and what the KV cache is made of", self.show),
            "system": ("TEXT: set the system message; without a text, show it", self.system),
            "save": ("FILE: save the conversation", self.save),
            "load": ("FILE: load a conversation", self.load),
            "read": ("FILE: put a text file before the next message", self.read),
            "image": ("FILE: put an image before the next message", self.image),
            "regen": ("answer the last message again", self.regen),
            "clear": ("forget the conversation", self.clear),
            "stats": ("speed, context and memory", self.stats),
            "bye": ("leave (also Ctrl-D)", self.bye),
        }

    def run(self, images: Sequence[Picture] = ()) -> None:
        """Until /bye or the end of the input. Ctrl-C stops an answer, or drops the line that is being typed.

        `images` go before the first message. Raises UserError for a model without eyes.
        """
        if images and not self.talk.prompter.vision:
            raise UserError(f"{self.name} takes text only: leave --image out")
        self.before += images
        self.tell(f"{self.name}, context {count(self.talk.context)}, KV {self.talk.spec}. /help lists the commands.")
        while True:
            try:
                text = texts.check(self.reader.read(), "the message")
                if text.startswith(QUOTES):
                    text = text[3:].partition(QUOTES)[0].strip("\n")
                elif text.startswith("/"):
                    self.command(text)
                    continue
                if text.strip() and self.answer(content([*self.before, text], "\n\n")):
                    self.before = []
            except (EOFError, Leave):
                return
            except KeyboardInterrupt:
                if not self.tty:
                    raise
                self.say("(Ctrl-D or /bye leaves)")
            except UserError as error:
                if not self.tty:
                    raise
                self.say(str(error))

    def answer(self, message: Content) -> bool:
        """Stream the answer; in a terminal Ctrl-C stops it. Returns whether anything was said, and so is kept."""
        known = len(self.talk.messages)
        styler, line, before = Styler(self.out.isatty()), "", signal.getsignal(signal.SIGINT)
        if self.tty:
            signal.signal(signal.SIGINT, lambda *_: setattr(self.talk, "stopping", True))
        try:
            with self.reader.aside() as look:
                for event in self.talk.ask(message):
                    look()
                    if not isinstance(event, Progress):
                        self.write(line + styler.feed(event.kind, event.text))
                        line = ""
                    elif self.tty:
                        line = "\r\033[K"
                        self.write(f"{line}reading {event.done} of {event.total} tokens")
        finally:
            signal.signal(signal.SIGINT, before)
        self.write(line + styler.end() + "\n")
        kept = len(self.talk.messages) > known
        if self.talk.turn.reason == "stopped":
            self.tell("(stopped)" if kept else "(stopped: the message is taken back)")
        self.tell(self.end_line())
        return kept

    def end_line(self) -> str:
        """`N tokens · tok/s · ctx 41k/128k · KV 1.9 GB (int4, 3.2x)`."""
        t, turn = self.talk, self.talk.turn
        ratio = f", {t.ratio:.1f}x" if t.ratio else ""
        again = f" · {count(turn.again)} tokens read again" if turn.again > 64 else ""
        return (
            f"{turn.written} tokens · {turn.write_rate:.1f} tok/s · ctx {count(len(t.held))}/{count(t.context)} · "
            f"KV {human_bytes(t.kv_bytes)} ({t.spec}{ratio}){again}"
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
        self.say('''  """      begins and ends a message of several lines; so does a paste, and Alt-Enter''')

    def set(self, rest: str) -> None:
        name, _, value = rest.removeprefix("parameter").strip().partition(" ")
        name, value = ALIASES.get(name, name), value.strip()
        if name == "system":
            self.system(value)
        elif name and name not in NAMES:
            raise UserError(f"/set {rest}: give one of {', '.join(NAMES)}, and a value")
        elif value:
            self.talk.settings = replace(self.talk.settings, **{name: setting(name, value)})
        else:
            for key, now in asdict(self.talk.settings).items():
                if name in ("", key):
                    self.say(f"{key}: {'none' if now is None else now}")

    def show(self, _: str) -> None:
        self.say(f"model: {self.name}")
        self.set("")
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
        messages = [m | {"content": _kept(m["content"])} for m in t.messages]
        data = {"model": self.name, "system": t.system, "settings": asdict(t.settings), "messages": messages}
        path = self._path(rest, "/save")
        try:
            path.write_text(json.dumps(data, indent=1, ensure_ascii=False), "utf-8")
        except OSError as error:
            raise UserError(f"can't write {str(path)!r}: {error.strerror}") from error
        self.tell(f"saved {len(t.messages)} messages to {path}")

    def load(self, rest: str) -> None:
        path = self._path(rest, "/load")
        text = texts.read(path, "the conversation")
        try:
            data = json.loads(text)
            messages = [{"role": str(m["role"]), "content": _content(m["content"])} for m in data["messages"]]
            settings = Settings(**{k: setting(k, str(v).lower()) for k, v in data["settings"].items()})
            system = texts.check(str(data["system"]), "the system message")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ApiError) as error:
            raise UserError(f"{str(path)!r} is not a saved conversation") from error
        self.talk.clear()
        self.talk.messages, self.talk.settings, self.talk.system = messages, settings, system
        self.tell(f"loaded {len(messages)} messages from {path}; they are read with your next one")

    def _path(self, rest: str, command: str) -> Path:
        if not rest:
            raise UserError(f"{command} needs a file name")
        return Path(rest).expanduser()

    def read(self, rest: str) -> None:
        path = self._path(rest, "/read")
        self.before.append(texts.read(path, "the file"))
        self.tell(f"{path} goes before your next message")

    def image(self, rest: str) -> None:
        if not self.talk.prompter.vision:
            raise UserError("this model takes text only, no images")
        from ..hosts.mlx_vlm.images import read

        path = self._path(rest, "/image")
        self.before.append(Picture(read(path), repr(str(path))))
        self.tell(f"{path} goes before your next message")

    def regen(self, _: str) -> None:
        if len(self.talk.messages) < 2:
            raise UserError("there is no answer yet")
        *self.talk.messages, question, _answer = self.talk.messages
        self.answer(question["content"])

    def clear(self, _: str) -> None:
        self.talk.clear()
        self.before = []
        self.tell("forgotten")

    def stats(self, _: str) -> None:
        t, turn = self.talk, self.talk.turn
        share = len(t.held) / t.context
        bar = "█" * round(30 * share) + "░" * (30 - round(30 * share))
        self.say(f"context  {bar} {len(t.held)} of {t.context} tokens ({share:.0%})")
        ratio = f", {t.ratio:.2f}x smaller than fp16" if t.ratio else ""
        self.say(f"KV cache {human_bytes(t.kv_bytes)} ({t.spec}{ratio})")
        self.say(f"memory   {human_bytes(mx.get_active_memory())} now, {human_bytes(mx.get_peak_memory())} at most")
        rates = f"at {turn.read_rate:.0f}/s, wrote {turn.written} at {turn.write_rate:.1f}/s"
        self.say(f"last     read {turn.read} tokens {rates}")

    def bye(self, _: str) -> None:
        raise Leave

    def tell(self, text: str) -> None:
        """What a person wants to know, and a pipe does not."""
        if self.tty:
            self.say(text)

    def say(self, text: str) -> None:
        self.write(text + "\n")

    def write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()


def _kept(message: Content) -> str | list[dict[str, Any]]:
    """What a message holds as JSON, images in OpenAI's form."""
    if isinstance(message, str):
        return message
    return [
        {"type": "text", "text": p}
        if isinstance(p, str)
        else {"type": "image_url", "image_url": {"url": f"data:image;base64,{b64encode(p.data).decode()}"}}
        for p in parts(message)
    ]


def _content(kept: Any) -> Content:
    """What `_kept` made, again. Raises what JSON of another form leads to."""
    if isinstance(kept, str):
        return texts.check(kept, "a message")
    found = [from_url(p["image_url"]["url"], "an image") if "image_url" in p else str(p["text"]) for p in kept]
    return content(found, "\n\n")


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
