"""Responses that a later request may go on from (`previous_response_id`): in memory, within bounds, oldest out first.

What they were computed from stays in the prefix store as any prompt does; here are only their items.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass

from ..dialogue.errors import ApiError
from .responses import Item

MOST = 1024
MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class Kept:
    """A response, and all items of the conversation up to its end."""

    response: Item
    items: list[Item]
    nbytes: int


class Responses:
    """The kept responses, by id. Used in the event loop."""

    def __init__(self, most: int = MOST, most_bytes: int = MOST_BYTES):
        self.most, self.most_bytes, self.nbytes = most, most_bytes, 0
        self._kept: OrderedDict[str, Kept] = OrderedDict()

    def keep(self, response: Item, items: list[Item]) -> None:
        """Keep a response with the items that led to it; items of earlier responses are shared, not copied."""
        kept = Kept(response, [*items, *response["output"]], len(json.dumps([response, items])))
        self._kept[response["id"]] = kept
        self.nbytes += kept.nbytes
        while len(self._kept) > self.most or (self.nbytes > self.most_bytes and len(self._kept) > 1):
            _, old = self._kept.popitem(last=False)
            self.nbytes -= old.nbytes

    def get(self, id: str, param: str = "") -> Kept:
        """Raises ApiError for one that was never kept, or is no longer."""
        if id not in self._kept:
            text = f"response {id[:100]!r} is not kept here: it was not stored, or newer ones took its place"
            code = "previous_response_not_found" if param else "not_found"
            raise ApiError(400 if param else 404, text, param, code)
        self._kept.move_to_end(id)
        return self._kept[id]

    def forget(self, id: str) -> None:
        """Raises ApiError for one that is not kept."""
        self.nbytes -= self.get(id).nbytes
        del self._kept[id]
