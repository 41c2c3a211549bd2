"""Limits on connections: how many there are at once, and how long one may be open without a whole request.

uvicorn has neither. A client that opens connections and says nothing would use up the process's files; then `accept`
fails for everybody, and asyncio logs each failure with a traceback, thousands a minute.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import UserError

log = logging.getLogger("opentq.serve")

MAX_CONNECTIONS = 1024
HEADER_SECONDS = 20.0
BACKLOG = 64
"""Connections that are accepted in one go; those above the limit are open until all of them were looked at."""
RESERVE = 96
"""Files that the process needs for other things: libraries, weights, prefixes, threads."""


def allowed() -> int:
    """Connections that this process has files for, after the limit was raised as far as it goes. Raises UserError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + BACKLOG + RESERVE
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < min(wanted, RESERVE + BACKLOG + 16):
        raise UserError(f"this process may have {most} files open, too few for a server: raise it with ulimit -n")
    return most - BACKLOG - RESERVE


class Once:
    """A line in the log at most once a minute, with how often it would have been written."""

    def __init__(self, text: str):
        self.text, self.count, self.due = text, 0, 0.0

    def __call__(self) -> None:
        self.count += 1
        if time.monotonic() >= self.due:
            log.warning("%s (%d times)", self.text, self.count)
            self.count, self.due = 0, time.monotonic() + 60.0


def limited(most: int) -> type[H11Protocol]:
    """uvicorn's HTTP, for `most` connections at once and `HEADER_SECONDS` without a request."""
    too_many = Once(f"connections were closed at once: more than {most} are open")

    class Limited(H11Protocol):
        deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > most:
                too_many()
                transport.abort()
            else:
                self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unwatch()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def _watch(self) -> None:
            """Have the connection closed in a while, unless a request is being served."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._unwatch()
            elif self.deadline is None and not self.transport.is_closing():
                self.deadline = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

        def _unwatch(self) -> None:
            if self.deadline is not None:
                self.deadline.cancel()
                self.deadline = None

    return Limited


def quiet_accept(loop: asyncio.AbstractEventLoop) -> None:
    """Have failures of `accept` logged in a line."""
    no_files = Once("connections could not be accepted: no files are left")

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "accept()" in context.get("message", ""):
            no_files()
        else:
            loop.default_exception_handler(context)

    loop.set_exception_handler(handle)
