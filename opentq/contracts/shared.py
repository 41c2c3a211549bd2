"""Objects of which there is one, however often the caches that point to it are copied."""

from __future__ import annotations

from typing import Self


class Shared:
    """A copy of what holds this holds the very same object."""

    __slots__ = ()

    def __deepcopy__(self, memo: dict) -> Self:
        return self
