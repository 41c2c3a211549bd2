"""Several processes that run one model together, started by `mlx.launch`: the first speaks HTTP, the others follow.

Every process runs the same engine on its own share of the model, and so takes the same steps in the same order, as long
as it knows what the first one alone can know: which requests came and went, where an answer ended, and whether there is
time to read. Those are told over a connection beside MLX's own, on which nobody spins while nothing is asked, and whose
end says at once that a process is gone. Chosen tokens are shared in the graph itself.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..dialogue.request import Delta
from ..errors import UserError


class Lost(UserError):
    """Another process of the model's is gone, or no longer does what this one does."""


class Alone:
    """One process: it decides, and tells nobody."""

    size = 1
    follows = False

    def agree(self, value: Any) -> Any:
        """What the first process says; it says `value`, which JSON can hold."""
        return value

    def check(self, value: Any, what: str) -> None:
        """Raise Lost unless all processes have found the same."""

    def share(self, tokens: mx.array) -> mx.array:
        """The tokens `[B]` that the first process chose."""
        return tokens

    def slowest(self, seconds: float) -> float:
        """The longest of what each process measured."""
        return seconds

    def least(self, nbytes: int) -> int:
        """The fewest bytes that any process has, in whole MiB where there are several."""
        return nbytes

    def watch(self, lost: Callable[[Lost], None]) -> None:
        """Have `lost` called, from another thread, when a process is gone."""


class Team(Alone):
    """This process among the `size` that MLX connected."""

    def __init__(self) -> None:
        """Connect all of them; returns when everybody is there. Raises Lost."""
        group = mx.distributed.init()
        self.size, self.rank = group.size(), group.rank()
        self.follows = self.rank > 0
        self._others: list[Connection] = []
        # The first one's port, and a key that nobody else on the network has, over the connection that there is.
        key, port = list(secrets.token_bytes(32)), 0
        if not self.follows:
            try:
                listener = Listener((_first_host(), 0), authkey=bytes(key))
            except OSError as error:
                raise Lost(f"can't listen for the other processes on {_first_host()!r}: {error}") from error
            port = listener.address[1]
        mine = mx.array([port, *key] if not self.follows else [0] * 33)
        port, *key = mx.distributed.all_sum(mine).tolist()  # type: ignore[misc, assignment]
        try:
            if self.follows:
                self._others = [Client((_first_host(), port), authkey=bytes(key))]
            else:
                with listener:
                    while len(self._others) < self.size - 1:
                        with suppress(AuthenticationError, EOFError, ConnectionError):  # a stranger
                            self._others.append(listener.accept())
        except (OSError, EOFError, AuthenticationError) as error:
            raise Lost(f"the processes of the model can't connect with one another: {error}") from error
        for connection in self._others:
            with socket.fromfd(connection.fileno(), socket.AF_INET, socket.SOCK_STREAM) as s:
                s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # short messages, nobody answers

    def agree(self, value: Any) -> Any:
        try:
            if self.follows:
                return json.loads(self._others[0].recv_bytes())
            message = json.dumps(value).encode()
            for connection in self._others:
                connection.send_bytes(message)
        except (OSError, EOFError) as error:
            raise gone() from error
        return value

    def check(self, value: Any, what: str) -> None:
        if (first := self.agree(value)) != value:
            raise Lost(f"the processes of the model disagree about {what}: {value} here, {first} at the first")

    def share(self, tokens: mx.array) -> mx.array:
        # Its own choice, times nothing: so that the model's sums come before this one here as well.
        return mx.distributed.all_sum(tokens * 0 if self.follows else tokens)

    def slowest(self, seconds: float) -> float:
        return float(mx.distributed.all_max(mx.array(seconds)).item())  # type: ignore[arg-type]

    def least(self, nbytes: int) -> int:
        return int(mx.distributed.all_min(mx.array(nbytes >> 20)).item()) << 20  # type: ignore[arg-type]

    def watch(self, lost: Callable[[Lost], None]) -> None:
        def wait(connection: Connection) -> None:
            try:
                connection.recv_bytes()  # nobody answers: this ends with the other process
            except (OSError, EOFError):
                lost(gone())

        for connection in () if self.follows else self._others:
            threading.Thread(target=wait, args=(connection,), daemon=True).start()


def gone(error: BaseException | None = None) -> Lost:
    said = str(error).strip().splitlines() if error else []
    why = f" ({said[0][:200]})" if said else ""
    return Lost(
        f"another process of the model ended, or its machine or the network did{why}: "
        "the model can't run without its part; see what it said, and start all of them again"
    )


def _first_host() -> str:
    """The address of the first process, as `mlx.launch` gave it to all of them."""
    if hosts := os.environ.get("MLX_HOSTFILE"):
        return str(json.loads(Path(hosts).read_text())[0][0]).rpartition(":")[0]
    if coordinator := os.environ.get("MLX_JACCL_COORDINATOR"):
        return coordinator.rpartition(":")[0]
    return os.environ.get("NCCL_HOST_IP") or socket.gethostname()


class Mute:
    """In the place of a parser, where the answer is written by the first process."""

    stopped, calls = False, 0

    class stop:
        matched = ""

    def token(self, token: int) -> list[Delta]:
        return []

    def finish(self) -> list[Delta]:
        return []
