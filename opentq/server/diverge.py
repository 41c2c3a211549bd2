"""Prompts that part early and go on alike: the sign of text that changes by request and costs the remembered prefix.

Such text should be found and listed in `dialogue/volatile.py`. Only positions are told, never tokens or text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

RECENT = 8
GRAM = 16
SHORTEST = 1024
"""Prompts with fewer tokens are not worth a line."""


class Watch:
    """Compares each prompt with the latest few."""

    def __init__(self) -> None:
        self._recent: deque[tuple[np.ndarray, np.ndarray]] = deque(maxlen=RECENT)

    def see(self, tokens: Sequence[int]) -> str:
        """What to say of a prompt: nothing, unless it parts from the nearest one in its first half and most of what
        follows was in that one as well."""
        if len(tokens) < SHORTEST:
            return ""
        ids = np.asarray(tokens, dtype=np.int64)
        grams = _grams(ids)
        said = ""
        if self._recent:
            common, other = max(((_common(ids, old), known) for old, known in self._recent), key=lambda x: x[0])
            if common < len(ids) // 2:
                alike = float(np.isin(grams[common:], other).mean())
                if alike > 0.5:
                    said = (
                        f"prefix diverges at token {common}: of the {len(ids) - common} that follow, {alike:.0%} were "
                        "in an earlier prompt; text that changes by request stands there"
                    )
        self._recent.append((ids, np.unique(grams)))
        return said


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many first tokens are equal."""
    n = min(len(a), len(b))
    unequal = np.flatnonzero(a[:n] != b[:n])
    return int(unequal[0]) if len(unequal) else n


def _grams(ids: np.ndarray) -> np.ndarray:
    """A number for each run of `GRAM` tokens, `[T - GRAM + 1]`."""
    powers = np.array([pow(1_000_003, i, 1 << 61) for i in range(GRAM)], dtype=np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(ids.astype(np.uint64), GRAM)
    return (windows * powers).sum(axis=1, dtype=np.uint64)
