"""Which tools an answer may call, in the one form that all APIs' `tool_choice` comes down to.

All tools stay in the prompt, whatever is chosen: it is the grammar that forces or forbids, so that what is remembered
of the prompt stays of use (`Grammars.fitted` says where that is not possible).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..dialogue.errors import bad


def choose(tools: Iterable[dict[str, Any]], mode: str, names: Iterable[Any] | None = None) -> dict[str, Any]:
    """The fields of a request: `mode` is none, auto or required, `names` those that may be called (None: any).

    Raises ApiError for a call that is required of no tool, and for a name that no tool has.
    """
    tools, named = tuple(tools), None if names is None else [str(n) for n in names]
    known = [t["function"]["name"] for t in tools]
    if unknown := [n for n in named or () if n not in known]:
        raise bad(f"tool_choice names {unknown[0]!r}, which is not in tools", "tool_choice")
    if mode == "required" and not (known if named is None else named):
        raise bad("tool_choice requires a call, but names no tool that is given in tools", "tool_choice")
    if named == []:
        mode = "none"
    return {"tools": tools, "tool_choice": mode, "tool_names": frozenset(named or ())}
