"""What the models read: running text of a wanted length, and needles planted in it.

Unless a text is given, it is the source code of Python's standard library, which every machine that runs this has, and
of it the files whose name's checksum is 8 modulo 20: the models in `models/` have never seen those. What calibrates a
model is another twentieth (`CALIBRATION`), so that no model is judged on what it was calibrated on. Names and codes of
needles are drawn from the tenth that those models have not seen, either.
"""

from __future__ import annotations

import hashlib
import os
import random
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..records import Record
from ..text import read

CONSONANTS, VOWELS = "bcdfghjklmnprstvwz", "aeiou"
HELD_OUT, CALIBRATION = 8, 9
"""Which twentieth of the standard library is read to judge and to calibrate."""
KINDS = ("secret code", "phone number", "magic word")


@dataclass(frozen=True)
class Corpus:
    """Named texts. `name` goes into records; `digest` says which bytes they were."""

    name: str
    texts: tuple[tuple[str, str], ...]

    @property
    def digest(self) -> str:
        return hashlib.sha256("\0".join(f"{n}\0{t}" for n, t in self.texts).encode()).hexdigest()[:12]

    def tokens(self, tokenizer: Any, count: int, length: int, seed: int = 0) -> list[list[int]]:
        """`count` rows of exactly `length` token ids that share no file, each opened by the model's first token.

        Raises UserError when there is too little text.
        """
        order = list(self.texts)
        random.Random(seed).shuffle(order)
        rows: list[list[int]] = []
        bos = opening(tokenizer)
        row = list(bos)
        for name, text in order:
            row += encode(tokenizer, f"# {name}\n{text.rstrip()}\n\n")
            if len(row) >= length:
                rows.append(row[:length])
                row = list(bos)
                if len(rows) == count:
                    return rows
        raise UserError(
            f"the text {self.name!r} makes {len(rows)} sequences of {length} tokens, {count} were asked for; give more "
            "text with --text, fewer --sequences or smaller --depths"
        )


def load(path: Path | None) -> Corpus:
    """The text at `path` (a file, or a folder of .txt, .md and .py files), or the standard library's held-out files.

    `code` (also None) and `prose` are texts that come with Python. Raises UserError when there is nothing to read.
    """
    if path is None or (str(path) == "code" and not path.exists()):
        return standard_library()
    if str(path) == "prose" and not path.exists():
        return language_reference()
    if not path.exists():
        raise UserError(f"text {str(path)!r} does not exist")
    files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md", ".py")) if path.is_dir() else [path]
    names = [p.relative_to(path).as_posix() if path.is_dir() else p.name for p in files]
    texts = tuple(sorted((n, read(p, "the text")) for n, p in zip(names, files)))
    if not any(content.strip() for _, content in texts):
        raise UserError(f"text {str(path)!r} is empty")
    return Corpus(path.name, texts)


def standard_library(part: int = HELD_OUT) -> Corpus:
    """A twentieth of this Python's standard library; of `HELD_OUT` the models in `models/` have seen nothing."""
    root = sysconfig.get_paths()["stdlib"]
    found = []
    for folder, names, files in os.walk(root):
        names[:] = sorted(n for n in names if not n.endswith("-packages") and n not in ("encodings", "__pycache__"))
        for file in sorted(files):
            path = Path(folder, file)
            name = path.relative_to(root).as_posix()
            if file.endswith(".py") and zlib.crc32(name.encode()) % 20 == part:
                text = path.read_bytes().decode("utf-8", errors="ignore")
                if len(text) > 400:
                    found.append((name, text))
    return Corpus("python-stdlib" + ("" if part == HELD_OUT else f"-{part}"), tuple(sorted(found)))


def language_reference() -> Corpus:
    """Python's language reference, the prose that comes with every Python (`pydoc_data.topics`)."""
    from pydoc_data.topics import topics

    return Corpus("python-reference", tuple(sorted((name, text) for name, text in topics.items() if len(text) > 400)))


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text of any length, in chunks of whole lines: tokenizers warn of texts longer than the model's."""
    ids: list[int] = []
    lines = text.splitlines(keepends=True)
    for start in range(0, len(lines), 200):
        ids += tokenizer.encode("".join(lines[start : start + 200]), add_special_tokens=False)
    return ids


def opening(tokenizer: Any) -> list[int]:
    """The token that opens a text for this model, as a list; empty when it has none."""
    first = tokenizer.encode("a")[:1]
    return first if first and first[0] == getattr(tokenizer, "bos_token_id", None) else []


@dataclass(frozen=True)
class Needle:
    """One prompt with a planted fact: the ids of the text with its fact, of the question, and the answer as text.

    Where two facts are asked for, `answer` has both values with a space between them (`found`).
    """

    text: list[int]
    question: list[int]
    answer: str

    def found(self, text: str) -> bool:
        """Whether an answer has all that was asked for."""
        return all(value in text for value in self.answer.split())


def needle(
    tokenizer: Any,
    corpus: Corpus,
    length: int,
    depth: float,
    seed: int,
    kind: str = KINDS[0],
    distractors: int = 0,
    asked: int = 1,
) -> Needle:
    """A prompt of exactly `length` tokens with a fact at `depth` (0 is its start, 1 its end) and a question at its end.

    `distractors` facts of the same kind about other names stand at random depths; with `asked` 2 the question is for
    the first of them, too. The haystack is whole lines but for its end. Raises UserError when `length` is too short for
    the facts and the question.
    """
    rng = random.Random(f"{seed} {length} {depth} {kind} {distractors}")
    facts = [_fact(rng, kind) for _ in range(1 + distractors)]
    before, after = template(tokenizer)
    lines = [tokenizer.encode(f"# {_sentence(kind, n, v)}\n", add_special_tokens=False) for n, v in facts]
    names = f" and the {kind} of ".join(name for name, _ in facts[:asked])
    question = tokenizer.encode(f"\n\nWhat is the {kind} of {names}?", add_special_tokens=False) + after
    room = length - len(before) - len(question) - sum(map(len, lines))
    if room < 16:
        raise UserError(f"a needle prompt of {length} tokens is too short: use at least {length - room + 16}")
    hay = corpus.tokens(tokenizer, 1, room + len(opening(tokenizer)), seed)[0][len(opening(tokenizer)) :]
    breaks = {t for t in set(hay) if "\n" in tokenizer.decode([t])}
    ends = [0] + [i + 1 for i, t in enumerate(hay) if t in breaks]
    depths = [depth] + [rng.random() for _ in range(distractors)]
    cuts = sorted((min(ends, key=lambda end: abs(end - d * len(hay))), i) for i, d in enumerate(depths))
    text, last = list(before), 0
    for at, i in cuts:
        text += hay[last:at] + lines[i]
        last = at
    return Needle(text + hay[last:], question, " ".join(value for _, value in facts[:asked]))


def _fact(rng: random.Random, kind: str) -> tuple[str, str]:
    def draw(make: Any) -> str:
        while zlib.crc32((text := make()).encode()) % 10:
            pass
        return text

    def syllables(n: int) -> str:
        return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(n))

    digits = {"secret code": 5, "phone number": 7}.get(kind)
    value = draw(lambda: "".join(rng.choice("0123456789") for _ in range(digits)) if digits else syllables(3))
    return draw(lambda: syllables(3).capitalize()), value


def _sentence(kind: str, name: str, value: str) -> str:
    return f"The {kind} of {name} is " + (f'"{value}".' if kind == "magic word" else f"{value}.")


def template(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids before and after the user's message in the model's chat template."""
    if not getattr(tokenizer, "chat_template", None):
        return opening(tokenizer), tokenizer.encode("\nAnswer:", add_special_tokens=False)
    mark = "\u2042needle\u2042"
    messages = [{"role": "user", "content": mark}]
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    before, _, after = whole.partition(mark)
    return tokenizer.encode(before, add_special_tokens=False), tokenizer.encode(after, add_special_tokens=False)


def about(kind: str, model: Record, corpus: Corpus, **more: Any) -> Record:
    """What identifies a result of `kind`: the model, the text that it read, and the task's own settings."""
    return {"kind": kind, "model": model, "text": {"name": corpus.name, "digest": corpus.digest}, **more}
