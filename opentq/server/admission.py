"""Who may run, who waits and who is sent away: every request is priced in bytes before any work is done for it.

The price is the memory planner's (`memory/plan.py`), for prompt and longest answer together. A batch is stored as a
rectangle, as long as its longest member, and it is priced so; sequences of similar length share a batch (`bucket`).
Pure bookkeeping: no threads, no arrays.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable

FIRST_BUCKET = 4096


def bucket(tokens: int) -> int:
    """Which batch a sequence of `tokens` (prompt and longest answer) belongs to: up to 4K, 16K, 64K, 256K, ..."""
    index, top = 0, FIRST_BUCKET
    while tokens > top:
        index, top = index + 1, top * 4
    return index


class Admission:
    """Keeps what runs within `budget` bytes and `slots` sequences; up to `queue` requests wait, in their order."""

    def __init__(self, price: Callable[[int], int], budget: int, slots: int, queue: int):
        self.price = price
        self.budget = budget
        self.slots = slots
        self.queue = queue
        self.running: dict[Hashable, int] = {}
        self.waiting: deque[tuple[Hashable, int]] = deque()

    def committed(self, more: int = 0) -> int:
        """Bytes that running requests may come to hold, with one of `more` tokens if given."""
        buckets: dict[int, list[int]] = {}
        for tokens in [*self.running.values(), *([more] if more else [])]:
            buckets.setdefault(bucket(tokens), []).append(tokens)
        return sum(len(group) * self.price(max(group)) for group in buckets.values())

    def fits(self, tokens: int) -> bool:
        return len(self.running) < self.slots and self.committed(tokens) <= self.budget

    def offer(self, job: Hashable, tokens: int) -> str:
        """`run`, `wait` or `full`. Nobody overtakes a waiting request."""
        if not self.waiting and self.fits(tokens):
            self.running[job] = tokens
            return "run"
        if len(self.waiting) >= self.queue:
            return "full"
        self.waiting.append((job, tokens))
        return "wait"

    def release(self, job: Hashable) -> list[Hashable]:
        """`job` is over, running or waiting; returns those that may run now."""
        if self.running.pop(job, None) is None:
            self.waiting = deque(entry for entry in self.waiting if entry[0] is not job)
        started = []
        while self.waiting and self.fits(self.waiting[0][1]):
            waiting, tokens = self.waiting.popleft()
            self.running[waiting] = tokens
            started.append(waiting)
        return started

    def largest(self, limit: int) -> int:
        """The longest sequence, up to `limit` tokens, that fits when nothing else runs."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.price(middle) <= self.budget else (low, middle - 1)
        return low
