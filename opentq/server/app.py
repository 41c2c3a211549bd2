"""The routes, and what stands before them: keys, hosts, limits. No path in a request ever reaches the file system."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from .. import __version__
from ..dialogue.errors import ApiError, bad
from ..dialogue.request import GenerationRequest
from . import anthropic, openai, openai_out, responses, responses_out
from .openapi import document
from .options import ServeOptions
from .responses_store import Responses
from .roster import Roster
from .schema import parse
from .service import Service, Stream
from .stream import Answer, Writer, unless_gone

log = logging.getLogger("opentq.serve")

T = TypeVar("T")

BODY_SECONDS = 60.0
MAX_HEADERS = 32 << 10
INLINE = 1 << 18  # bodies up to this size are parsed in the event loop


def build(roster: Roster, options: ServeOptions) -> Starlette:
    """The ASGI application."""
    routes = Routes(roster, options.max_body)
    middleware = [Middleware(Guard, options=options)]
    if options.origins:
        cors = Middleware(CORSMiddleware, allow_origins=options.origins, allow_methods=["*"], allow_headers=["*"])
        middleware.insert(0, cors)
    gets = {"/models": routes.models, "/models/{name:path}": routes.model}
    posts = {
        "/chat/completions": routes.chat,
        "/completions": routes.completions,
        "/responses": routes.responses,
        "/messages": routes.messages,
        "/messages/count_tokens": routes.count_tokens,
    }
    return Starlette(
        routes=[
            Route("/health", routes.health),
            Route("/metrics", routes.metrics),
            Route("/openapi.json", routes.openapi),
            # Clients of mlx-lm's server leave the /v1 out.
            *(Route(prefix + path, call) for prefix in ("/v1", "") for path, call in gets.items()),
            *(Route(prefix + path, call, methods=["POST"]) for prefix in ("/v1", "") for path, call in posts.items()),
            Route("/v1/responses/{id}", routes.kept_response, methods=["GET", "DELETE"]),
        ],
        middleware=middleware,
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, 500: _server_error},
    )


class Guard:
    """Hosts and keys, before anything else looks at a request. /health needs no key."""

    def __init__(self, app: ASGIApp, options: ServeOptions):
        self.app = app
        self.key = options.api_key
        self.hosts = options.allowed_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._refusal(scope)):
            return await _error_response(scope["path"], error)(scope, receive, send)
        return await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers: dict[bytes, bytes] = dict(reversed(scope["headers"]))  # the first of a name counts
        if sum(len(k) + len(v) for k, v in scope["headers"]) > MAX_HEADERS:
            return ApiError(431, f"the headers are larger than {MAX_HEADERS} bytes", code="headers_too_large")
        host = _host_name(headers.get(b"host", b"").decode("latin-1"))
        if self.hosts is not None and host not in self.hosts:
            return ApiError(
                403, "this Host is not served here; use localhost, or --allowed-host", code="host_not_allowed"
            )
        if self.key is None or scope["path"] == "/health":
            return None
        scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        given = bearer.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        if not hmac.compare_digest(given, self.key.encode()):
            return ApiError(
                401, "the API key is missing or wrong; send 'Authorization: Bearer KEY'", code="invalid_api_key"
            )
        return None


def _host_name(host: str) -> str:
    """The name in a Host header, without its port."""
    if host.startswith("["):
        return host[: host.find("]") + 1].lower()
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()


class Routes:
    """One method per route."""

    def __init__(self, roster: Roster, max_body: int):
        self.roster = roster
        self.max_body = max_body
        self.kept = Responses()

    @property
    def service(self) -> Service:
        """What runs the model that is loaded."""
        return self.roster.service

    async def health(self, request: Request) -> Response:
        return JSONResponse(self.service.health())

    async def metrics(self, request: Request) -> Response:
        return Response(self.service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(document(__version__))

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model(n) for n in self.roster.names]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self.roster.names:
            raise ApiError(404, f"model {name[:100]!r} is not served here", "model", "model_not_found")
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        context = self.service.max_context
        created = int(self.service.started)
        return {"id": name, "object": "model", "created": created, "owned_by": "opentq", "max_model_len": context}

    async def chat(self, request: Request) -> Response:
        asked = await self._read(request, openai.read_chat)
        return await self._answer(
            request, asked, lambda stream, model: openai_out.Writer(stream.id, model, asked, chat=True)
        )

    async def completions(self, request: Request) -> Response:
        asked = await self._read(request, openai.read_completion)

        def writer(stream: Stream, model: str) -> openai_out.Writer:
            decode = stream.service.engine.tokenizer.decode
            texts = [p if isinstance(p, str) else decode(p) for p in asked.prompts] if asked.echo else []
            echo = tuple(text for text in texts for _ in range(asked.n))
            return openai_out.Writer(stream.id, model, asked, chat=False, echo=echo)

        return await self._answer(request, asked, writer)

    async def responses(self, request: Request) -> Response:
        def read(body: dict[str, Any]) -> responses.Asked:
            before = body.get("previous_response_id")
            earlier = self.kept.get(before, "previous_response_id").items if isinstance(before, str) else []
            return responses.read(body, earlier)

        asked = await self._read(request, read)
        return await self._answer(
            request, asked.request, lambda stream, model: responses_out.Writer(stream.id, model, asked, self.kept)
        )

    async def messages(self, request: Request) -> Response:
        asked = await self._read(request, anthropic.read)
        return await self._answer(
            request, asked, lambda stream, model: anthropic.Writer(stream.id, model, len(stream.jobs[0].tokens))
        )

    async def _answer(
        self, request: Request, asked: GenerationRequest, writer: Callable[[Stream, str], Writer]
    ) -> Response:
        """Have a request admitted by the service of its model, unless its client goes away, and answer it."""

        async def admitted() -> tuple[Service, Stream]:
            service = await self.roster.find(asked)
            return service, await service.open(asked)

        service, stream = await unless_gone(request.receive, admitted())
        words = partial(writer, stream, asked.model or service.shown[0])
        return Answer(stream, words, asked.stream, service.options.keep_alive)

    async def kept_response(self, request: Request) -> Response:
        id = request.path_params["id"]
        if request.method == "DELETE":
            self.kept.forget(id)
            return JSONResponse({"id": id, "object": "response", "deleted": True})
        return JSONResponse(self.kept.get(id).response)

    async def count_tokens(self, request: Request) -> Response:
        asked = await self._read(request, lambda body: anthropic.read(body, count_only=True))
        service = await self.roster.find(asked)
        count = await unless_gone(request.receive, service.count(asked))
        return JSONResponse({"input_tokens": count})

    async def _read(self, request: Request, read: Callable[[dict[str, Any]], T]) -> T:
        body = await self._body(request)
        if len(body) <= INLINE:
            return read(parse(body))
        return await asyncio.get_running_loop().run_in_executor(None, lambda: read(parse(body)))

    async def _body(self, request: Request) -> bytes:
        """The body, within its limits of type, size and time."""
        _check_type(request)
        limit = min(self.max_body, self.service.max_body)
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > limit:
            raise _too_large(limit)
        try:
            return await asyncio.wait_for(_collect(request, limit), BODY_SECONDS)
        except TimeoutError as error:
            raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} s", code="timeout") from error
        except ClientDisconnect as error:
            raise bad("the client went away before its body was complete") from error


def _check_type(request: Request) -> None:
    headers = request.headers
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    # Browsers send other types across origins without asking; JSON they must ask for. `curl -d` says "form" for
    # everything, and no browser does without naming an origin.
    browser = "origin" in headers or "sec-fetch-site" in headers
    if kind != "application/json" and (kind != "application/x-www-form-urlencoded" or browser):
        raise ApiError(415, f"Content-Type must be application/json, not {kind[:80]!r}", code="unsupported_media_type")
    coding = headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise ApiError(
            415, f"Content-Encoding {coding[:40]!r} is not taken: send the body as it is", code="unsupported_media_type"
        )


async def _collect(request: Request, limit: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)
    return b"".join(parts)


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413, f"the body is larger than {limit} bytes, by --max-body or by the context", code="request_too_large"
    )


def _error_response(path: str, error: ApiError) -> Response:
    body = anthropic.error_body(error) if path.removeprefix("/v1").startswith("/messages") else error.body()
    return JSONResponse(body, error.status, error.headers())


def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error_response(request.url.path, error)


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    words = {404: f"there is no {path[:100]!r} here", 405: f"{path} does not take {request.method}"}
    wrapped = ApiError(error.status_code, words.get(error.status_code, str(error.detail)), code="http_error")
    response = _error_response(path, wrapped)
    response.headers.update(error.headers or {})
    return response


def _server_error(request: Request, error: Exception) -> Response:
    # Starlette logs the traceback; the client learns only that it was not its fault.
    return _error_response(request.url.path, ApiError(500, "the server failed on this request", code="internal_error"))
