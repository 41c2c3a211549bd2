"""A form of tool calls for tokenizers whose chat template has none."""

from __future__ import annotations

from typing import Any

from mlx_lm.tool_parsers import json_tools


def lend(tokenizer: Any) -> bool:
    """Let `tokenizer` read calls written as JSON between Hermes' markers, if it reads none yet. Returns whether it was
    lent: the template then says nothing of tools, and whoever renders prompts must (`dialogue.roles`)."""
    if tokenizer.has_tool_calling or not tokenizer.has_chat_template:
        return getattr(tokenizer, "_opentq_plain_tools", False)
    start, end = json_tools.tool_call_start, json_tools.tool_call_end
    tokenizer._tool_parser = json_tools.parse_tool_call
    tokenizer._tool_call_start, tokenizer._tool_call_end = start, end
    tokenizer._tool_call_start_tokens = tuple(tokenizer.encode(start, add_special_tokens=False))
    tokenizer._tool_call_end_tokens = tuple(tokenizer.encode(end, add_special_tokens=False))
    tokenizer._opentq_plain_tools = True
    return True
