"""From generated tokens to what a client reads: text, reasoning and tool calls, the same streamed or not.

There is one parser, and both kinds of response take its deltas, so they can't disagree. Stop texts are matched on
text, not on tokens, so that it does not matter how the model cut them. Tool calls are parsed by mlx-lm's parsers;
markup that does not parse is given to the client as content, never dropped.
"""

from __future__ import annotations

import json
import logging
import re
import uuid
from typing import Any

from ..hosts.mlx_lm.private import TextStateMachine, make_text_state_machine
from .request import Delta, ToolCall

log = logging.getLogger("opentq.serve")


OPENED, CLOSED = (re.compile(rf"<{slash}(?:parameter|param|arg_value)\b") for slash in ("", "/"))
"""Tags around arguments in the forms of calls that are no JSON."""


class StopText:
    """Finds the first of some texts in a stream, holding back only what may be the beginning of one."""

    def __init__(self, stops: tuple[str, ...]):
        self.stops = stops
        self.held = ""
        self.matched = ""

    def feed(self, text: str) -> str:
        """Text that is safe to show; after a match, the text before it (`matched` says which)."""
        self.held += text
        found = [(i, s) for s in self.stops if (i := self.held.find(s)) >= 0]
        if found:
            at, self.matched = min(found, key=lambda f: (f[0], -len(f[1])))
            text, self.held = self.held[:at], ""
            return text
        keep = max((_overlap(self.held, s) for s in self.stops), default=0)
        cut = len(self.held) - keep
        text, self.held = self.held[:cut], self.held[cut:]
        return text

    def flush(self) -> str:
        text, self.held = self.held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` may be the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Parser:
    """One answer's tokens in, `Delta`s out."""

    def __init__(
        self,
        tokenizer: Any,
        initial: str = "normal",
        stops: tuple[str, ...] = (),
        tools: tuple[dict[str, Any], ...] = (),
        parallel_calls: bool = True,
        raw: bool = False,
    ):
        self.tokenizer = tokenizer
        self.detokenizer = tokenizer.detokenizer
        self.stop = StopText(stops)
        self.tools = list(tools)
        self.parallel_calls = parallel_calls
        self.machine = TextStateMachine() if raw else make_text_state_machine(tokenizer)
        self.state = self.machine.make_state("normal" if raw else initial)
        self.calls = 0
        self._tool_parts: list[str] | None = None  # of the call that is being written
        self._before = initial  # the state in which it was begun
        self._held = False  # whether an end marker was taken for part of an argument

    @property
    def stopped(self) -> bool:
        """Whether the answer is over before the model says so: a stop text, or one tool call where one was wanted."""
        return bool(self.stop.matched) or (self.calls > 0 and not self.parallel_calls)

    def token(self, token: int) -> list[Delta]:
        """The deltas that one more token completes."""
        self.detokenizer.add_token(token)
        return self._text(self.detokenizer.last_segment)

    def finish(self) -> list[Delta]:
        """The deltas that were held back, at the end of the answer."""
        if self.stopped:
            return []
        deltas = self._text(self._last_words())
        if self.stopped:
            return deltas
        deltas += self._split(self.stop.flush())
        deltas += self._flush()
        while self._held:
            deltas += [*self._let_go(), *self._flush()]
        if self._tool_parts is not None:
            deltas += self._end_tool(closed=not self.tokenizer.tool_call_end)
        return _join(deltas)

    def _last_words(self) -> str:
        try:
            self.detokenizer.finalize()
        except KeyError:
            # mlx-lm's byte-level detokenizer can't end on half a character followed by a special token.
            return "\ufffd"
        return self.detokenizer.last_segment

    def _text(self, text: str) -> list[Delta]:
        return _join(self._split(self.stop.feed(text)))

    def _split(self, text: str) -> list[Delta]:
        deltas: list[Delta] = []
        for character in text:  # one at a time: the state may be changed after any
            self.state, segments = TextStateMachine.split(self.state, character)
            deltas += self._deltas(segments)
            if self.stopped:
                break
        return deltas

    def _let_go(self) -> list[Delta]:
        """What was held because a call seemed to go on after its end marker, and did not: the call was damaged."""
        whole, self._tool_parts = "".join(self._tool_parts or ()), None
        call, end, rest = whole.partition(self.tokenizer.tool_call_end)
        self._held = False
        self.state = self.machine.make_state(self._before)
        return [Delta("content", f"{self.tokenizer.tool_call_start}{call}{end}"), *self._split(rest)]

    def _flush(self) -> list[Delta]:
        self.state, rest, name = TextStateMachine.flush(self.state)
        return self._deltas([(name, rest)])

    def _deltas(self, segments: list[tuple[str, str]]) -> list[Delta]:
        deltas: list[Delta] = []
        for name, text in segments:
            if self._tool_parts is not None and name != "tool":
                if _inside_argument("".join(self._tool_parts)):
                    self._tool_parts.append(self.tokenizer.tool_call_end)
                    self._held, self.state = True, self.machine.make_state("tool")
                    continue
                if self._before == "reasoning":  # the thought goes on
                    self.state, name = self.machine.make_state("reasoning"), "reasoning"
                deltas += self._end_tool()
                if self.stopped:
                    break
            if name == "tool":
                self._tool_parts = [] if self._tool_parts is None else self._tool_parts
                self._tool_parts.append(text)
                continue
            self._before = name
            if text:
                deltas.append(Delta("reasoning" if name == "reasoning" else "content", text))
        return deltas

    def _end_tool(self, closed: bool = True) -> list[Delta]:
        """The calls in the tool text; the markup itself, as content, when it does not parse or no tools were given."""
        text, self._tool_parts = "".join(self._tool_parts or ()), None
        held, self._held = self._held, False
        end = self.tokenizer.tool_call_end if closed else ""
        markup = [Delta("content", f"{self.tokenizer.tool_call_start}{text}{end or ''}")]
        if not self.tools:
            return markup
        try:
            parsed = self.tokenizer.tool_parser(text, self.tools)
            calls = [_call(c) for c in (parsed if isinstance(parsed, list) else [parsed])]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, SyntaxError, RecursionError) as error:
            if held:
                self._tool_parts = [text, end or ""]
                return self._let_go()
            log.warning(
                "a tool call of %d characters could not be parsed (%s); sent as content", len(text), _name(error)
            )
            return markup
        calls = calls if self.parallel_calls else calls[:1]
        self.calls += len(calls)
        return [Delta("call", call=c) for c in calls]


def _inside_argument(text: str) -> bool:
    """Whether the text of a call ends inside one of its arguments, so that an end marker there is part of it."""
    try:
        json.loads(text, strict=False)
    except json.JSONDecodeError as error:
        if error.msg.startswith("Unterminated string"):
            return True
    except RecursionError:
        return False
    return len(OPENED.findall(text)) > len(CLOSED.findall(text))


def _call(parsed: dict[str, Any]) -> ToolCall:
    arguments = parsed["arguments"]
    if isinstance(arguments, str):
        json.loads(arguments)  # ValueError for what no client could read
    else:
        arguments = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(str(parsed.get("id") or f"call_{uuid.uuid4().hex[:24]}"), str(parsed["name"]), arguments)


def _join(deltas: list[Delta]) -> list[Delta]:
    """Neighbouring deltas of text of one kind as one."""
    joined: list[Delta] = []
    for delta in deltas:
        if joined and not delta.call and not joined[-1].call and joined[-1].kind == delta.kind:
            joined[-1] = Delta(delta.kind, joined[-1].text + delta.text)
        elif delta.call or delta.text:
            joined.append(delta)
    return joined


def _name(error: BaseException) -> str:
    return type(error).__name__
