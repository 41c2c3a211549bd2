"""Drafts without a second model: agents repeat code that stands in their prompt, so what followed the same few tokens
before is likely to follow them again (prompt lookup: Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

GRAM = 3
PLACES = 8
"""The latest places of a run of tokens that are looked at, for the one with the most in common before it."""
COMMON = 32
LONGEST = 15
PATIENCE = 3
REST = 8


class Lookup:
    """The tokens of one sequence so far, and guesses at the next ones.

    How many are guessed follows the luck: more after all of them were right, fewer after none was, and after several
    such misses none for a while, longer each time. A guess that is wrong costs the difference between a step of several
    tokens and a step of one.
    """

    def __init__(self, tokens: Sequence[int]):
        self.tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # where the latest of every run of GRAM tokens ends
        self._before = [0]  # where the one before ends, of the same tokens as the run that ends here
        self._strange = 0  # steps since something like the last few tokens was seen
        self.length = (LONGEST + 1) // 4
        self.misses = self.resting = 0
        self._rest = REST
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """One more token of the sequence."""
        self.tokens.append(token)
        self.resting = max(self.resting - 1, 0)
        run = tuple(self.tokens[-GRAM:])
        self._before.append(self._ends.get(run, 0))
        if len(run) == GRAM:
            self._ends[run] = len(self.tokens)

    @property
    def wanted(self) -> bool:
        """Whether it is worth knowing the newest token, which means waiting for it. In new text, at every fourth."""
        return not self.resting and (self._strange < 32 or not len(self.tokens) % 4)

    def guess(self, newest: int, most: int) -> list[int]:
        """Up to `most` tokens that may follow the `newest`, which was not added; none where it is all new."""
        places = [self._ends.get((*self.tokens[1 - GRAM :], newest), 0)]
        while len(places) < PLACES and places[-1]:
            places.append(self._before[places[-1]])
        at = max(places, key=self._common)
        self._strange = 0 if at else self._strange + 1
        return self.tokens[at : at + min(self.length, most)] if at else []

    def _common(self, end: int) -> int:
        """How many tokens before a run that ends at `end` are those before the newest run."""
        there, here = end - GRAM, len(self.tokens) + 1 - GRAM
        ours, theirs = (reversed(self.tokens[max(place - COMMON, 0) : max(place, 0)]) for place in (here, there))
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs)))

    def outcome(self, guessed: int, right: int) -> None:
        """How a guess turned out."""
        if right == guessed:
            self.length = min(2 * self.length, LONGEST)
        elif right < guessed / 2:
            self.length = max(self.length // 2, 2)
        if right:
            self.misses, self._rest = 0, REST
            return
        self.misses += 1
        if self.misses >= PATIENCE:
            self.misses, self.resting, self._rest = 0, self._rest, min(2 * self._rest, 64 * REST)
