"""Documentation to ask about: names and their descriptions (`entries.tsv`, made by `dev/entries.py`)."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .corpus import Corpus, opening

FILE = Path(__file__).with_name("entries.tsv")


@dataclass(frozen=True)
class Entry:
    """One name, its description, and whose documentation it is from."""

    source: str
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.name}: {self.text}.\n"


@functools.cache
def entries() -> tuple[Entry, ...]:
    return tuple(Entry(*line.split("\t")) for line in FILE.read_text().splitlines())


def documentation() -> Corpus:
    """The entries as a text, for the records."""
    return Corpus("documentation", tuple((e.name, str(e)) for e in entries()))


def reference(
    tokenizer: Any,
    length: int,
    rng: random.Random,
    without: Sequence[Entry] = (),
    around: Entry | None = None,
    opens: bool = True,
) -> list[int]:
    """Exactly `length` token ids of entries, `without` some; `around` stands among them, never cut.

    The first entry may lack its beginning; where it `opens` a text, the model's first token stands before it. Raises
    UserError when there are too few entries.
    """
    first = opening(tokenizer) if opens else []
    others = [e for e in entries() if e not in without and e != around]
    rng.shuffle(others)
    lines: list[list[int]] = []
    room = length - len(first) - (len(_line(tokenizer, around)) if around else 0)
    while sum(map(len, lines)) < room:
        if not others:
            raise UserError(f"the documentation has too few entries for {length} tokens; ask for shorter prompts")
        lines.insert(0, _line(tokenizer, others.pop()))
    if not lines:
        raise UserError(f"prompts of {length} tokens are too short")
    lines[0] = lines[0][sum(map(len, lines)) - room :]
    if around:
        lines.insert(rng.randint(1, len(lines)), _line(tokenizer, around))
    return first + [token for line in lines for token in line]


def _line(tokenizer: Any, entry: Entry) -> list[int]:
    return tokenizer.encode(str(entry), add_special_tokens=False)
