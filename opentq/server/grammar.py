"""Answers that must fit a JSON Schema, or be a tool call: masks over the next token, by llguidance.

The extra `opentq[schema]` brings llguidance. Without it a request for json_schema is refused with a 400 that says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from ..dialogue.errors import ApiError, bad, unsupported
from ..dialogue.request import GenerationRequest

# What json.dumps writes, which is what models have read: no free white space for them to get lost in.
STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
PROBE_STEPS = 8
JSON_CALLS = "mlx_lm.tool_parsers.json_tools"


def available() -> bool:
    try:
        import llguidance  # noqa: F401
    except ImportError:
        return False
    return True


class Grammars:
    """Grammars over one tokenizer; its tables are built once."""

    def __init__(self, tokenizer: Any, vocab: int):
        self.tokenizer = tokenizer
        self.vocab = vocab
        self._tables: Any = None

    def constraint(self, request: GenerationRequest, state: str) -> Constraint | None:
        """What holds the answer to `request` in its form, or None. Raises ApiError for a form that can't be held."""
        limited = request.tool_choice == "none" or request.tool_names
        if request.tools and request.tool_choice == "required":
            return self._make(self._calls(request, "start: call"), "tool_choice", state)
        if request.schema is not None:
            return self._make(self._schema(request.schema), "response_format", state)
        if not (request.tools and limited and self.tokenizer.tool_call_start):
            return None
        if request.tool_choice == "none":
            return self._make(f"start: free\n{self._free()}", "tool_choice", state)
        return self._make(self._calls(request, f"start: free (call free)*\n{self._free()}"), "tool_choice", state)

    def fitted(self, request: GenerationRequest) -> GenerationRequest:
        """`request`, without the tools that must not be called where no grammar can forbid that."""
        if request.tool_choice == "none":
            held = available() or not self.tokenizer.tool_call_start
            return request if held else replace(request, tools=())
        if request.tool_choice == "required" or not request.tool_names:
            return request
        if available() and self._form == JSON_CALLS and isinstance(self._start, int):
            return request
        named = tuple(t for t in request.tools if t["function"]["name"] in request.tool_names)
        return replace(request, tools=named, tool_names=frozenset())

    def _make(self, grammar: str, param: str, state: str) -> Constraint:
        import llguidance

        error = llguidance.LLMatcher.validate_grammar(grammar, self.tables)
        matcher = llguidance.LLMatcher(self.tables, grammar, log_level=0)
        if error := error or _probe(matcher.deep_copy()):
            raise bad(f"{param} can't be turned into a grammar: {_first_line(error)}", param)
        wait = tuple(self.tokenizer.think_end_tokens) if state == "reasoning" else ()
        return Constraint(matcher, self.vocab, self.tokenizer.eos_token_ids, param, wait)

    def _schema(self, schema: dict[str, Any]) -> str:
        self._require("response_format")
        import llguidance

        try:
            return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=STYLE)
        except ValueError as error:
            raise bad(
                f"response_format: the schema can't be used: {_first_line(str(error))}", "response_format"
            ) from error

    def _calls(self, request: GenerationRequest, start: str) -> str:
        """A grammar that begins with the rule `start`; `call` is the markup of one call in the model's form."""
        self._require("tool_choice")
        if self._form != JSON_CALLS:
            raise unsupported(
                "tool_choice", f"this model writes calls in the form of {self._form}; only 'auto' and 'none' work"
            )
        functions = [t["function"] for t in request.tools]
        named = [f for f in functions if f["name"] in (request.tool_names or {f["name"]})]
        options = [_call_schema(f, i) for i, f in enumerate(named)]
        schema = {"x-guidance": STYLE, **(options[0] if len(options) == 1 else {"anyOf": options})}
        begin, end = (_quoted(self._marker(t)) for t in (self.tokenizer.tool_call_start, self.tokenizer.tool_call_end))
        return f"{start}\ncall: {begin} gap json gap {end}\ngap: /\\n?/\njson: %json {json.dumps(schema)}\n"

    def _free(self) -> str:
        """The rule `free`: any text, and no marker at which a call begins."""
        if isinstance(self._start, int):
            return f"free: <[^{self._start}]>*\n"
        # Tokens with a name of their own are in no text: a thought may still be opened and closed.
        ends: list[list[int]] = [
            list(t or ()) for t in (self.tokenizer.think_start_tokens, self.tokenizer.think_end_tokens)
        ]
        thoughts = [ids[0] for ids in ends if len(ids) == 1]
        more = f" (<[{','.join(map(str, sorted(set(thoughts))))}]> TEXT)*" if thoughts else ""
        return f"free: TEXT{more}\nTEXT: /(?s:.*)/ & ~/(?s:.*){_pattern(self._start)}(?s:.*)/\n"

    @property
    def _form(self) -> str:
        return getattr(self.tokenizer.tool_parser, "__module__", "")

    @property
    def _start(self) -> int | str:
        return self._marker(self.tokenizer.tool_call_start)

    def _marker(self, text: str) -> int | str:
        """A marker as its own token, where it has one, else as its characters."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return ids[0] if len(ids) == 1 else text

    def _require(self, param: str) -> None:
        if not available():
            raise ApiError(
                400, f"{param} needs the extra: pip install 'opentq[schema]'", param, "unsupported_parameter"
            )

    @property
    def tables(self) -> Any:
        if self._tables is None:
            import llguidance.hf

            inner = self.tokenizer._tokenizer
            self._tables = llguidance.hf.from_tokenizer(
                inner, n_vocab=max(self.vocab, len(inner)), eos_token=sorted(self.tokenizer.eos_token_ids)
            )
        return self._tables


def _probe(matcher: Any) -> str:
    """The error that a grammar runs into in its first steps, or "": some fail only when they are used."""
    for _ in range(PROBE_STEPS):
        mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        if matcher.is_stopped():
            break
        matcher.consume_token(int(mask.argmax()))
    return matcher.get_error()


class Constraint:
    """A logits processor: only tokens that keep the answer in its form. It begins after the model's thought, if any.

    Attributes:
        failed: why the form can't be held any longer, "" while it can. The answer is to be ended with `error` then.
    """

    def __init__(self, matcher: Any, vocab: int, ends: Iterable[int], param: str, wait: tuple[int, ...] = ()):
        self.matcher = matcher
        self.vocab = vocab
        self.param = param
        self.wait = wait
        self.ends = mx.array(np.isin(np.arange(vocab), list(ends)))
        self.begun = False
        self.failed = ""

    def error(self) -> ApiError:
        """400: the form that was asked for is more than the grammar can follow."""
        return bad(f"{self.param}: the grammar failed while the answer was written: {self.failed}", self.param)

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        # The first call sees the prompt; every later one has one more token of the answer.
        if self.begun:
            self._take(tokens)
        self.begun = True
        if self.wait:
            return logits
        allowed = self.matcher.compute_bitmask()
        if self.matcher.is_error():
            self.failed = self.failed or _first_line(self.matcher.get_error())
        if self.matcher.is_stopped():
            return mx.where(self.ends, logits, -mx.inf)
        bits = np.unpackbits(np.frombuffer(allowed, np.uint8), bitorder="little")[: self.vocab].astype(bool)
        return mx.where(mx.array(bits), logits, -mx.inf)

    def _take(self, tokens: mx.array) -> None:
        """Take in the newest token: as part of the thought, while there is one, else of the form."""
        if self.wait:
            if tuple(tokens[-len(self.wait) :].tolist()) == self.wait:  # type: ignore[arg-type]
                self.wait = ()
        elif not self.matcher.is_stopped():
            self.matcher.consume_token(int(tokens[-1].item()))  # type: ignore[arg-type]


def _call_schema(function: dict[str, Any], index: int) -> dict[str, Any]:
    # A schema of its own, by its `$id`: references in it count from there, not from the wrapper.
    arguments = {"$id": f"tool:{index}"} | (function.get("parameters") or {"type": "object"})
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _quoted(marker: int | str) -> str:
    return f"<[{marker}]>" if isinstance(marker, int) else json.dumps(marker)


def _pattern(text: str) -> str:
    """A regular expression for `text`; the slash ends expressions in the grammar's syntax."""
    return re.escape(text).replace("/", "\\/")


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:300] if text.strip() else "unknown reason"
