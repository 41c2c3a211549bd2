"""The engine's thread: one for the life of the process, because models, caches and streams belong to their thread.

It is never ended. MLX keeps compiled functions per thread and drops them when the thread ends, which needs Python; at
the end of a process Python may be gone by then, and the process would abort. A daemon thread that waits is left alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any


class Worker:
    """Calls what is submitted, in order, in a thread of its own."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Callable[[], None]] = SimpleQueue()
        threading.Thread(target=self._loop, name="engine", daemon=True).start()

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Call `function(*args)` after all that was submitted before."""
        future: Future[Any] = Future()

        def call() -> None:
            try:
                result = function(*args)
            except BaseException as error:  # noqa: BLE001 (it is raised where the result is asked for)
                future.set_exception(error)
            else:
                future.set_result(result)

        self._queue.put(call)
        return future

    def _loop(self) -> None:
        while True:
            self._queue.get()()  # in no variable: what was called may hold a model
