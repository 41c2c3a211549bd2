"""Text to tokens, with a limit that is found out without tokenizing a text that is far longer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

SLICE = 1 << 16
"""Characters that are tokenized between two looks at the limit, and at whether anybody still waits for the prompt."""


class TooLong(Exception):
    """A text has more tokens than the limit; says how much it has, in words."""


class Encoder:
    """Encodes texts with one tokenizer (as mlx-lm wraps it)."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    @cached_property
    def longest(self) -> int:
        """Characters of the longest token: no text of more than `n * longest` has only `n` tokens."""
        return max((len(t) for t in self.tokenizer.get_vocab()), default=1)

    def bound(self, characters: int, limit: int | None) -> None:
        """Raise TooLong for so many characters that they can't be only `limit` tokens."""
        if limit is not None and characters > limit * self.longest:
            raise TooLong(f"{characters:,} characters")

    def encode(
        self, text: str, limit: int | None = None, special: bool = False, look: Callable[[], None] = lambda: None
    ) -> list[int]:
        """`text` as tokens. A long text is counted in slices first, so that one far too long is left early.

        Args:
            special: whether the tokenizer's own first and last tokens are added.
            look: called before every slice; may raise.

        Raises TooLong where the text is known to have more than `limit` tokens before all of it is tokenized.
        """
        self.bound(len(text), limit)
        if len(text) > SLICE:
            count = 0
            for start in range(0, len(text), SLICE):
                look()
                if limit is not None and count > 1.1 * limit:  # cuts between slices may add a few
                    raise TooLong(f"more than {limit:,} tokens")
                count += len(self.tokenizer.encode(text[start : start + SLICE], add_special_tokens=False))
        return list(self.tokenizer.encode(text, add_special_tokens=special))
