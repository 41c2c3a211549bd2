"""Answers on the wire: server-sent events with a keep-alive on a wall clock, and the watch for clients that went away.

A client that closes its connection is noticed at once, in the middle of a prompt as well as of an answer, and its
request is cancelled: an ASGI server says so through `receive`, without anything having to be written.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ..dialogue.errors import ApiError, Gone
from ..dialogue.request import Done, Generated
from .job import Event
from .service import Stream

T = TypeVar("T")


class Writer(Protocol):
    """One API's words for an answer as it grows: events, and the `whole` of it for clients that don't stream."""

    ping: bytes

    def opening(self) -> list[Any]: ...
    def step(self, step: Generated) -> list[Any]: ...
    def done(self, done: Done) -> list[Any]: ...
    def error(self, error: ApiError) -> list[Any]: ...
    def whole(self) -> dict[str, Any]: ...


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
        raise Gone
    finally:
        watch.cancel()
        task.cancel()


def frame(event: Any) -> bytes:
    """One server-sent event: JSON, with its type as its name if it has one; text as it is."""
    if isinstance(event, str):
        return f"data: {event}\n\n".encode()
    name = f"event: {event['type']}\n" if "type" in event else ""
    return f"{name}data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()


class Answer(Response):
    """An answer in one piece or as events; it ends its request when the client goes away."""

    writer: Writer

    def __init__(self, stream: Stream, words: Callable[[], Writer], streamed: bool, keep_alive: float):
        """`words` makes the writer."""
        super().__init__()
        self.stream = stream
        self.words = words
        self.streamed = streamed
        self.keep_alive = keep_alive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self.writer = self.words()
            await unless_gone(receive, self._send(send) if self.streamed else self._gather(scope, receive, send))
        except Gone:
            pass
        finally:
            self.stream.cancel()

    async def _gather(self, scope: Scope, receive: Receive, send: Send) -> None:
        async for event in self.stream:
            if isinstance(event, Generated):
                self.writer.step(event)
            elif isinstance(event, Done):
                self.writer.done(event)
        response = JSONResponse(self.writer.whole(), headers={"x-request-id": self.stream.id})
        await response(scope, receive, send)

    async def _send(self, send: Send) -> None:
        """Server-sent events, several in one piece where several are there, and a ping after a silence."""

        async def write(body: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": more})

        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        headers |= {"x-accel-buffering": "no", "x-request-id": self.stream.id}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        events, said = self.stream.events, b"".join(map(frame, self.writer.opening()))
        due = time.monotonic() + self.keep_alive
        while True:
            if said:
                await write(said)
                due = time.monotonic() + self.keep_alive
            try:
                arrived = [await asyncio.wait_for(events.get(), due - time.monotonic())]
            except TimeoutError:
                said = self.writer.ping
                continue
            while not events.empty():
                arrived.append(events.get_nowait())
            # Each is framed before the next is heard of: a writer may go on with what it has said.
            said = b"".join(frame(words) for event in arrived for words in self._words(event))
            if any(isinstance(e, ApiError) or (isinstance(e, Done) and e.last) for e in arrived):
                return await write(said, more=False)

    def _words(self, event: Event) -> list[Any]:
        if isinstance(event, Generated):
            return self.writer.step(event)
        if isinstance(event, Done):
            return self.writer.done(event)
        return self.writer.error(event) if isinstance(event, ApiError) else []
