"""Where messages come from: the terminal, through prompt_toolkit's line editor, or a pipe, line by line."""

from __future__ import annotations

import contextlib
import re
import sys
import termios
import tty
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter, WordCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory
from prompt_toolkit.input.typeahead import get_typeahead
from prompt_toolkit.key_binding import KeyBindings, KeyPress
from prompt_toolkit.keys import Keys
from prompt_toolkit.shortcuts import CompleteStyle

from ..text import decode

HISTORY = Path("~/.cache/opentq/chat_history")
QUOTES = '"""'


def unfinished(text: str) -> bool:
    '''Whether a message that begins with """ still waits for its end.'''
    return text.startswith(QUOTES) and QUOTES not in text[3:]


class Pipe:
    '''Messages from standard input where it is no terminal: a line each, or the lines between two """.'''

    interactive = False

    def read(self) -> str:
        """The next message. Raises EOFError, and UserError for bytes that are no text."""
        text = ""
        while line := sys.stdin.buffer.readline():
            text += decode(line, "the message")
            if not unfinished(text):
                break
        if not text:
            raise EOFError
        return text.rstrip("\r\n")

    def aside(self) -> contextlib.AbstractContextManager[Callable[[], None]]:
        """As the editor's: what waits in a pipe is left there."""
        return contextlib.nullcontext(lambda: None)


class Editor:
    """Messages from the terminal. A paste is one message, Tab completes, Alt-Enter begins another line.

    Args:
        words: what Tab completes at the beginning of a message, and whether a file's name comes after it.
        history: the file that keeps what was typed.
    """

    interactive = True

    def __init__(self, words: Mapping[str, bool], history: Path = HISTORY):
        self.typed = ""  # while nobody asked
        self.ended = False  # by Ctrl-D, then
        keys = KeyBindings()
        keys.add(Keys.Escape, Keys.ControlM)(lambda event: event.current_buffer.insert_text("\n"))
        self.session: PromptSession[str] = PromptSession(
            ">>> ",
            prompt_continuation="... ",
            multiline=Condition(lambda: unfinished(self.session.default_buffer.text)),
            history=History(history.expanduser()),
            completer=Commands(words),
            complete_style=CompleteStyle.READLINE_LIKE,
            key_bindings=keys,
            enable_suspend=True,
        )

    def read(self) -> str:
        """The next message, begun with what was typed meanwhile. Raises EOFError, KeyboardInterrupt."""
        text, self.typed = self.typed.rstrip("\n"), ""
        if self.ended:
            raise EOFError
        return self.session.prompt(default=text)

    @contextlib.contextmanager
    def aside(self) -> Iterator[Callable[[], None]]:
        """While something else is written: what is typed is neither shown nor sent, but kept for the next line.

        Gives a function that looks for it; a terminal holds a few kB. Ctrl-C stays a signal.
        """
        source, output = self.session.app.input, self.session.app.output

        def look() -> None:
            while keys := source.read_keys():
                self._keep(keys)

        before = termios.tcgetattr(source.fileno())
        tty.setcbreak(source.fileno(), termios.TCSANOW)
        output.enable_bracketed_paste()
        output.flush()
        self._keep(get_typeahead(source))
        try:
            yield look
        finally:
            look()
            output.disable_bracketed_paste()
            output.flush()
            termios.tcsetattr(source.fileno(), termios.TCSANOW, before)

    def _keep(self, presses: Iterable[KeyPress]) -> None:
        for press in presses:
            if press.key in (Keys.ControlM, Keys.ControlJ):
                self.typed += "\n"
            elif press.key == Keys.ControlH:
                self.typed = self.typed[:-1]
            elif press.key == Keys.ControlD:
                self.ended |= not self.typed or self.typed.endswith("\n")
            elif press.key == Keys.BracketedPaste:
                self.typed += re.sub(r"\r\n?", "\n", press.data)
            elif not isinstance(press.key, Keys):
                self.typed += press.data


class Commands(Completer):
    """Completes commands and their words at the beginning of a message, and the names of files after some."""

    def __init__(self, words: Mapping[str, bool]):
        self.words = WordCompleter(list(words), sentence=True)
        self.files = tuple(f"{word} " for word, file in words.items() if file)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if text.startswith(self.files):
            rest = Document(text.partition(" ")[2])
            return PathCompleter(expanduser=True).get_completions(rest, event)
        return self.words.get_completions(document, event) if text.startswith("/") else ()


class History(FileHistory):
    """prompt_toolkit's history; lines that readline left in the same file are read, too. What fails is left out."""

    def load_history_strings(self) -> Iterable[str]:
        with contextlib.suppress(OSError):
            yield from super().load_history_strings()
            lines = Path(self.filename).read_text(errors="replace").splitlines()  # type: ignore[arg-type]
            if lines and lines[0] == "_HiStOrY_V2_":  # of libedit, which writes a space as \040
                lines = [re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), line) for line in lines[1:]]
            yield from (line for line in reversed(lines) if line and line[0] not in "+#")

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            path = Path(self.filename)  # type: ignore[arg-type]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            super().store_string(string)
