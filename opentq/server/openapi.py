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
GET = ("401", "403")
POST = ("400", "401", "403", "404", "408", "413", "415", "503", "507")
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


def document(version: str) -> Schema:
    """OpenAPI 3.1 of all routes."""
    forms: list[Any] = [(form, "validation") for _, form in POSTS.values()]
    _, schemas = models_json_schema(forms, ref_template="#/components/schemas/{model}")
    anything, text = {JSON: {"schema": {"type": "object"}}}, {"schema": {"type": "string"}}
    gets = {
        "/health": ("Whether the server works, and how loaded it is", anything),
        "/metrics": ("Prometheus metrics", {"text/plain": text}),
        "/v1/models": ("What is served", anything),
    }
    paths: Schema = {path: {"get": _route(summary, "OK", answer, GET)} for path, (summary, answer) in gets.items()}
    streamed = anything | {"text/event-stream": text}
    for path, (summary, form) in POSTS.items():
        words = "The answer; as server-sent events when `stream` is true"
        body = {JSON: {"schema": {"$ref": f"#/components/schemas/{form.__name__}"}}}
        asked = {"requestBody": {"required": True, "content": body}}
        paths[path] = {"post": _route(summary, words, streamed, POST) | asked}
    return {
        "openapi": "3.1.0",
        "info": {"title": "opentq", "version": version},
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _route(summary: str, words: str, answer: Schema, errors: tuple[str, ...]) -> Schema:
    wrong = {status: {"description": "An error", "content": {JSON: {"schema": ERROR}}} for status in errors}
    return {"summary": summary, "responses": {"200": {"description": words, "content": answer}, **wrong}}
