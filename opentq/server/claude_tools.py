"""Anthropic's tools that have a type instead of a schema: those the client runs become ordinary functions.

Their fields are those of Anthropic's documentation of each tool. Tools that run on Anthropic's servers can't be served.
"""

from __future__ import annotations

from typing import Any

from ..dialogue.errors import missing, unsupported

STRING = {"type": "string"}
INTEGER = {"type": "integer"}
RANGE = {"type": "array", "items": INTEGER, "minItems": 2, "maxItems": 2, "description": "First and last line."}

BASH = (
    "Run a command in a persistent bash session. `restart` begins a new session.",
    {"command": STRING, "restart": {"type": "boolean"}},
    (),
)


def _editor(commands: list[str], inserted: str) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    text = "View, create and edit text files. `view` shows a file (a range of its lines) or a folder; `create` writes "
    text += "`file_text`; `str_replace` puts `new_str` in the place of `old_str`, which must occur exactly once; "
    text += f"`insert` puts `{inserted}` after the line `insert_line`."
    fields = {"command": {"type": "string", "enum": commands}, "path": STRING, "view_range": RANGE}
    fields |= {"file_text": STRING, "old_str": STRING, "new_str": STRING, "insert_line": INTEGER, inserted: STRING}
    return text, fields, ("command", "path")


VIEW = ["view", "create", "str_replace", "insert"]
MEMORY_TEXT, MEMORY_FIELDS, _ = _editor([*VIEW, "delete", "rename"], "insert_text")
MEMORY = (
    MEMORY_TEXT.replace("View, create and edit text files.", "Notes kept between conversations, as files.")
    + " `delete` removes `path`; `rename` moves `old_path` to `new_path`.",
    MEMORY_FIELDS | {"old_path": STRING, "new_path": STRING},
    ("command",),
)

CLIENT_RUN = {
    "bash_20241022": BASH,
    "bash_20250124": BASH,
    "text_editor_20241022": _editor([*VIEW, "undo_edit"], "new_str"),
    "text_editor_20250124": _editor([*VIEW, "undo_edit"], "new_str"),
    "text_editor_20250429": _editor(VIEW, "insert_text"),
    "text_editor_20250728": _editor(VIEW, "insert_text"),
    "memory_20250818": MEMORY,
}


def function(tool: dict[str, Any], path: str) -> dict[str, Any]:
    """An OpenAI function for a tool of a /v1/messages body. Raises ApiError for one that can't be called here."""
    kind = tool.get("type") or "custom"
    if kind == "custom":
        if tool.get("input_schema") is None:
            raise missing(f"{path}.input_schema")
        return _function(tool["name"], tool.get("description") or "", tool["input_schema"])
    if kind in CLIENT_RUN:
        text, fields, required = CLIENT_RUN[kind]
        return _function(tool["name"], text, {"type": "object", "properties": fields, "required": list(required)})
    if kind.startswith("computer_"):
        raise unsupported(f"{path}.type", f"{kind!r} answers with screenshots, and only text can be read")
    raise unsupported(
        f"{path}.type",
        f"{kind!r} is no tool that the client runs; those are custom, {', '.join(CLIENT_RUN)}",
    )


def _function(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}
