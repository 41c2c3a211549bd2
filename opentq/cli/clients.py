"""How each coding assistant is told of a server of one's own: by variables, arguments, or a file of ours for one run.

Only what the client documents, and never a file of the user's: what is written goes to a temporary folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Target:
    """The server that a client is to use; `longest` is how many tokens an answer may have, if the user said so."""

    url: str
    model: str
    context: int
    key: str = "none"
    longest: int | None = None

    @property
    def answer(self) -> int:
        """Tokens for one answer: what the user said, or what leaves most of the context to the prompt."""
        return self.longest or max(min(self.context // 4, 32_000), 1)


@dataclass
class Setup:
    """What is set for one run: variables (None: taken away), files by name, and arguments put in front."""

    variables: dict[str, str | None] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Client:
    """A coding assistant.

    Attributes:
        command: its program.
        install: the command that installs it.
        setup: from the server and the folder for its files to what is set.
    """

    command: str
    install: str
    setup: Callable[[Target, Path], Setup]


def _claude(target: Target, folder: Path) -> Setup:
    # https://code.claude.com/docs/en/llm-gateway and .../env-vars
    kinds = ("ANTHROPIC_MODEL", "ANTHROPIC_DEFAULT_OPUS_MODEL", "ANTHROPIC_DEFAULT_SONNET_MODEL")
    names = (*kinds, "ANTHROPIC_DEFAULT_HAIKU_MODEL", "CLAUDE_CODE_SUBAGENT_MODEL")
    return Setup(
        {
            "ANTHROPIC_BASE_URL": target.url,
            "ANTHROPIC_AUTH_TOKEN": target.key,
            "ANTHROPIC_API_KEY": None,
            **dict.fromkeys(names, target.model),
            "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(target.answer),
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            # A long prompt takes minutes to read the first time, and the client counts no pings.
            "API_TIMEOUT_MS": "3600000",
            "CLAUDE_STREAM_IDLE_TIMEOUT_MS": "3600000",
        }
    )


def _codex(target: Target, folder: Path) -> Setup:
    # https://developers.openai.com/codex/config-advanced: -c overrides ~/.codex/config.toml for one run
    provider = {
        "name": "opentq",
        "base_url": f"{target.url}/v1",
        "wire_api": "responses",
        "env_key": "OPENTQ_API_KEY",
    }
    table = ", ".join(f"{k} = {json.dumps(v)}" for k, v in provider.items())
    settings = [
        f"model_providers.opentq={{ {table}, stream_idle_timeout_ms = 3600000 }}",
        'model_provider="opentq"',
        f"model={json.dumps(target.model)}",
        f"model_context_window={target.context}",
    ]
    return Setup({"OPENTQ_API_KEY": target.key}, arguments=[a for s in settings for a in ("-c", s)])


def _opencode(target: Target, folder: Path) -> Setup:
    # https://opencode.ai/docs/config: OPENCODE_CONFIG is read beside the user's own
    limit = {"context": target.context, "output": target.answer}
    config = {
        "$schema": "https://opencode.ai/config.json",
        "provider": {
            "opentq": {
                "npm": "@ai-sdk/openai-compatible",
                "name": "opentq",
                "options": {"baseURL": f"{target.url}/v1", "apiKey": target.key},
                "models": {target.model: {"name": target.model, "limit": limit}},
            }
        },
        "model": f"opentq/{target.model}",
        "small_model": f"opentq/{target.model}",
    }
    return Setup({"OPENCODE_CONFIG": str(folder / "opencode.json")}, {"opencode.json": json.dumps(config, indent=2)})


def _aider(target: Target, folder: Path) -> Setup:
    # https://aider.chat/docs/llms/openai-compat.html and .../config/adv-model-settings.html
    name = f"openai/{target.model}"
    limits = {"max_input_tokens": target.context, "max_output_tokens": target.answer}
    metadata = {name: limits | {"litellm_provider": "openai", "mode": "chat"}}
    return Setup(
        {"OPENAI_API_BASE": f"{target.url}/v1", "OPENAI_API_KEY": target.key},
        {"models.json": json.dumps(metadata, indent=2)},
        ["--model", name, "--model-metadata-file", str(folder / "models.json")],
    )


CLIENTS = {
    "claude": Client("claude", "npm install -g @anthropic-ai/claude-code", _claude),
    "codex": Client("codex", "npm install -g @openai/codex", _codex),
    "opencode": Client("opencode", "npm install -g opencode-ai", _opencode),
    "aider": Client("aider", "uv tool install aider-chat", _aider),
}
