"""The OpenAPI document, from the models that requests are checked against."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from .responses import ResponsesRequest
from .schema import ChatRequest, CompletionRequest, CountRequest, Form, MessagesRequest

Schema = dict[str, Any]
POSTS: dict[str, tuple[str, type[Form]]] = {
    "/v1/chat/completions": ("OpenAI chat completion", ChatRequest),
    "/v1/completions": ("OpenAI text completion", CompletionRequest),
    "/v1/responses": ("OpenAI response", ResponsesRequest),
    "/v1/messages": ("Anthropic message", MessagesRequest),
    "/v1/messages/count_tokens": ("Tokens of an Anthropic message", CountRequest),
}

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
    forms: list[Any] = [(form, "validation") for _, form in POSTS.values()]
    _, schemas = models_json_schema(forms, ref_template="#/components/schemas/{model}")
    return {
        "openapi": "3.1.0",
        "info": {"title": "opentq", "version": version},
        "paths": {
            "/health": {"get": _get("Whether the server works, and how loaded it is")},
            "/metrics": {"get": _get("Prometheus metrics", "text/plain", {"type": "string"})},
            "/v1/models": {"get": _get("What is served")},
            **{path: {"post": _post(summary, form.__name__)} for path, (summary, form) in POSTS.items()},
        },
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _get(summary: str, kind: str = JSON, schema: Schema | None = None) -> dict[str, Any]:
    return {
        "summary": summary,
        "responses": {"200": _body("OK", kind, schema or {"type": "object"}), **_errors("401", "403")},
    }


def _post(summary: str, form: str) -> dict[str, Any]:
    answer = _body("The answer; as server-sent events when `stream` is true", JSON, {"type": "object"})
    answer["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {JSON: {"schema": {"$ref": f"#/components/schemas/{form}"}}}},
        "responses": {"200": answer, **_errors("400", "401", "403", "404", "408", "413", "415", "503", "507")},
    }


def _errors(*statuses: str) -> dict[str, Any]:
    return {status: _body("An error", JSON, ERROR) for status in statuses}


def _body(description: str, kind: str, schema: Schema) -> dict[str, Any]:
    return {"description": description, "content": {kind: {"schema": schema}}}
