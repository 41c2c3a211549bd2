"""Answers on the wire: server-sent events with a keep-alive on a wall clock, and the watch for clients that went away.

A client that closes its connection is noticed at once, in the middle of a prompt as well as of an answer, and its
request is cancelled: an ASGI server says so through `receive`, without anything having to be written.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Protocol, TypeVar

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ..dialogue.errors import ApiError
from ..dialogue.request import Done, Generated, Progress
from .job import Event
from .service import GONE


class Source(Protocol):
    """Events of one answer or several; the last `Done`, or an ApiError, ends them."""

    id: str
    events: asyncio.Queue[Event]

    def __aiter__(self) -> AsyncIterator[Progress | Generated | Done]: ...
    def cancel(self, error: ApiError = GONE) -> None: ...


T = TypeVar("T")


class Feed(Protocol):
    """One API's words for the events of a stream; every method returns whole frames."""

    ping: bytes

    def opening(self) -> bytes: ...
    def step(self, step: Generated) -> bytes: ...
    def done(self, done: Done) -> bytes: ...
    def error(self, error: ApiError) -> bytes: ...


class Gather(Protocol):
    """One API's whole response, for clients that don't stream."""

    def step(self, step: Generated) -> None: ...
    def done(self, done: Done) -> dict[str, Any]: ...


async def gone(receive: Receive) -> None:
    """Returns when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away before it is there."""
    watch = asyncio.ensure_future(gone(receive))
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({watch, task}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "the client went away", code="client_closed")
    finally:
        watch.cancel()
        task.cancel()


class EventStream(Response):
    """A streamed answer: an ASGI response that ends its request when the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, stream: Source, feed: Feed, keep_alive: float):
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no", "x-request-id": stream.id}
        super().__init__(None, 200, headers)
        del self.headers["content-length"]
        self.stream = stream
        self.feed = feed
        self.keep_alive = keep_alive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.ensure_future(gone(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await self._write(send, self.feed.opening())
            await self._pump(send, watch)
        finally:
            watch.cancel()
            self.stream.cancel()

    async def _pump(self, send: Send, watch: asyncio.Future[None]) -> None:
        events = self.stream.events
        due = time.monotonic() + self.keep_alive
        waiting: asyncio.Future[Any] | None = None
        while True:
            if waiting is None:
                waiting = asyncio.ensure_future(events.get())
            timeout = max(0.0, due - time.monotonic())
            await asyncio.wait({waiting, watch}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                waiting.cancel()
                return
            text = b""
            ended = False
            if waiting.done():
                batch = [waiting.result()]
                waiting = None
                while not events.empty():
                    batch.append(events.get_nowait())
                for event in batch:
                    if isinstance(event, Generated):
                        text += self.feed.step(event)
                    elif isinstance(event, Done):
                        text, ended = text + self.feed.done(event), event.last
                    elif isinstance(event, ApiError):
                        text, ended = text + self.feed.error(event), True
            elif time.monotonic() >= due:
                text = self.feed.ping
            if text:
                await self._write(send, text)
                due = time.monotonic() + self.keep_alive
            if ended:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                return

    async def _write(self, send: Send, body: bytes) -> None:
        if body:
            await send({"type": "http.response.body", "body": body, "more_body": True})


class WholeResponse(Response):
    """An answer in one piece: gathered while watching for a client that goes away."""

    def __init__(self, stream: Source, gather: Gather):
        super().__init__(None, 200)
        self.stream = stream
        self.gather = gather

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.ensure_future(gone(receive))
        work = asyncio.ensure_future(self._collect())
        try:
            await asyncio.wait({watch, work}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return
            response = JSONResponse(work.result(), headers={"x-request-id": self.stream.id})
        finally:
            watch.cancel()
            work.cancel()
            self.stream.cancel()
        await response(scope, receive, send)

    async def _collect(self) -> dict[str, Any]:
        async for event in self.stream:
            if isinstance(event, Generated):
                self.gather.step(event)
            elif isinstance(event, Done):
                answer = self.gather.done(event)
                if event.last:
                    return answer
        raise AssertionError("a stream ends with Done or an error")
