"""What the engine is told by others, in order: requests that were admitted, and those that nobody waits for any more.

Where several processes run the model, the first is told, and the others hear of it in the same turn.
"""

from __future__ import annotations

import queue
from typing import Any
from weakref import WeakValueDictionary

from ..dialogue.errors import Gone
from ..dialogue.prompt import Prompt
from ..dialogue.request import SamplingParams
from .job import Job
from .team import Alone, Mute

Order = tuple[str, Any]
"""submit with (job, room), cancel with (job, error), or close with None."""


class Orders:
    """`put` may be called from any thread, all else from the engine's."""

    def __init__(self, team: Alone):
        self.team = team
        self._inbox: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self._given = 0
        self._jobs: WeakValueDictionary[int, Job] = WeakValueDictionary()  # that another process was given, by number

    def put(self, kind: str, *value: Any) -> None:
        self._inbox.put((kind, value))

    def empty(self) -> bool:
        return self._inbox.empty()

    def hear(self, wait: bool) -> list[Order]:
        """What came in since the last turn; with `wait`, at least one."""
        if self.team.follows:
            return [self._understood(*words) for words in self.team.agree(None)]
        orders: list[Order] = []
        while not (orders and orders[-1][0] == "close"):
            try:
                orders.append(self._inbox.get(wait and not orders))
            except queue.Empty:
                break
        self.team.agree([self._words(*order) for order in orders])
        return orders

    def job(self, number: int) -> Job | None:
        """A job that the first process was given; None when it is over here."""
        return self._jobs.get(number)

    def _words(self, kind: str, value: Any) -> list[Any]:
        """An order as other processes are told of it."""
        if kind == "close":
            return [kind]
        job, detail = value
        if kind == "cancel":
            return [kind, job.number]
        self._given += 1
        job.number = self._given
        return [kind, job.number, job.tokens, job.max_tokens, job.leader.number if job.leader else 0, detail]

    def _understood(self, kind: str, number: int = 0, *words: Any) -> Order:
        """An order to the first process. Its answer is made here, too, and told to nobody."""
        if kind != "submit":
            return kind, (self.job(number), Gone())
        tokens, max_tokens, leader, room = words
        silent: Any = Mute()
        job = Job(Prompt(tokens), max_tokens, SamplingParams(), silent, lambda *_: None, number=number)
        # One that is over already is not waited for; that there was one still counts.
        job.leader = self._jobs.get(leader, job) if leader else None
        self._jobs[number] = job
        return kind, (job, room)
