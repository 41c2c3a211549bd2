"""A little Markdown for the terminal, as it streams: headings, bold, code in colour, thoughts dimmed."""

from __future__ import annotations

import os

RESET, BOLD, DIM, CYAN = "\033[0m", "\033[1m", "\033[2m", "\033[36m"


class Styler:
    """Turns pieces of an answer into text with escape codes; holds back at most the two characters of a marker."""

    def __init__(self, tty: bool):
        self.on = tty and not os.environ.get("NO_COLOR")
        self.kind = "content"
        self.held = ""
        self.fence = self.code = self.bold = self.heading = False
        self.line_start = True

    def feed(self, kind: str, text: str) -> str:
        """Styled text that is ready to be shown."""
        out = ""
        if kind != self.kind:
            out = self._flush() + ("\n" if self.kind == "reasoning" else "")
            self.kind = kind
            self.line_start = True
        if not self.on:
            return out + text
        if kind == "reasoning":
            return out + f"{DIM}{text}{RESET}"
        self.held += text
        while self.held:
            if self.held[0] in "*`#" and len(self.held) < 4 and self.held == self.held[0] * len(self.held):
                break  # may be the beginning of a longer marker
            out += self._next()
        return out

    def end(self) -> str:
        """What was held back, and back to plain text."""
        return self._flush() + (RESET if self.on else "")

    def _flush(self) -> str:
        out = ""
        while self.held:
            out += self._next()
        return out

    def _next(self) -> str:
        """Consume one marker or one character."""
        held, start = self.held, self.line_start
        self.line_start = False
        if start and held.startswith("```"):
            self.held, self.fence = held[3:], not self.fence
            return self._codes() + "```"
        if held[0] == "\n":
            self.held, self.line_start = held[1:], True
            self.heading = False
            return (RESET if self.on else "") + "\n" + self._codes()
        if not self.fence:
            if held.startswith("**") and not self.code:
                self.held, self.bold = held[2:], not self.bold
                return self._codes()
            if held[0] == "`":
                self.held, self.code = held[1:], not self.code
                return self._codes()
            if start and held[0] == "#":
                self.heading = True
                self.held = held[1:]
                return self._codes() + "#"
        self.held = held[1:]
        return held[0]

    def _codes(self) -> str:
        on = (BOLD if self.bold or self.heading else "") + (CYAN if self.code or self.fence else "")
        return RESET + on if self.on else ""
