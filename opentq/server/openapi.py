"""The OpenAPI document: the schemas are those that requests are checked against."""

from __future__ import annotations

from typing import Any

from .schema import CHAT, COMPLETION, COUNT, MESSAGES, Schema

JSON = "application/json"
ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def document(version: str) -> dict[str, Any]:
    """OpenAPI 3.1 of all routes."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "opentq", "version": version},
        "paths": {
            "/health": {"get": _get("Whether the server works, and how loaded it is")},
            "/metrics": {"get": _get("Prometheus metrics", "text/plain", {"type": "string"})},
            "/v1/models": {"get": _get("What is served")},
            "/v1/chat/completions": {"post": _post("OpenAI chat completion", CHAT)},
            "/v1/completions": {"post": _post("OpenAI text completion", COMPLETION)},
            "/v1/messages": {"post": _post("Anthropic message", MESSAGES)},
            "/v1/messages/count_tokens": {"post": _post("Tokens of an Anthropic message", COUNT)},
        },
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _get(summary: str, kind: str = JSON, schema: Schema | None = None) -> dict[str, Any]:
    return {
        "summary": summary,
        "responses": {"200": _body("OK", kind, schema or {"type": "object"}), **_errors("401", "403")},
    }


def _post(summary: str, schema: Schema) -> dict[str, Any]:
    answer = _body("The answer; as server-sent events when `stream` is true", JSON, {"type": "object"})
    answer["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {JSON: {"schema": schema}}},
        "responses": {"200": answer, **_errors("400", "401", "403", "404", "408", "413", "415", "503", "507")},
    }


def _errors(*statuses: str) -> dict[str, Any]:
    return {status: _body("An error", JSON, ERROR) for status in statuses}


def _body(description: str, kind: str, schema: Schema) -> dict[str, Any]:
    return {"description": description, "content": {kind: {"schema": schema}}}
