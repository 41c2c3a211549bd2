"""What the small models read: source text of Python's standard library and generated prose, with facts planted in it.

A fact is one sentence on a line of its own ("The secret code of Babilu is 48213."); a question asks for its value later
("What is the secret code of Babilu?"), and the answer is the bare value. Every question can be answered from the text
that stands before it in the same sequence: documents are cut to length *before* facts are planted, never after. Names,
values and files fall into a training and a held-out part by a checksum, so that a held-out needle shares none with
training. Pure Python; a tokenizer is handed in where lengths in tokens matter.
"""

import keyword
import random
import re
import zlib
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

BOS, EOS, USER, ASSISTANT = SPECIAL = ("<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>")

# As Jinja: a system message is plain text before the first turn, as documents are in part of the training data.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}{{ eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] }}\n"
    "{% else %}{{ raise_exception('roles are system, user and assistant, not ' + message['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

CONSONANTS, VOWELS, DIGITS = "bcdfghjklmnprstvwz", "aeiou", "0123456789"
FACTS = (
    "The {what} of {name} is {value}.",
    "Remember: the {what} of {name} is {value}.",
    "By the way, the {what} of {name} is {value}.",
    "Note that {name} has the {what} {value}.",
    "If anyone asks for the {what} of {name}, it is {value}.",
)
QUESTIONS = (
    "What is the {what} of {name}?",
    "Which {what} does {name} have?",
    "Tell me the {what} of {name}.",
)
KINDS = ("secret code", "phone number", "magic word")  # 5 digits, 7 digits, three syllables
MARKS = ("# ", "", "- ", "> ")  # what may open the line of a fact

NOUNS = """river harbour engine garden window letter captain teacher bridge market winter summer village mountain forest
doctor machine signal station library history painter island journey kitchen morning evening number question answer
paper stone horse train road city house field school friend child song story king queen"""
VERBS = "saw found carried followed kept left watched painted repaired described crossed opened closed built"
ADJECTIVES = "old quiet bright narrow heavy early distant green broken famous gentle hidden long northern empty"
TRAIL = ("on the way", "in the end", "for the third time", "with great care", "near the water", "as usual")


def held_out(text: str) -> bool:
    """Whether a name or a value belongs to the held-out tenth."""
    return zlib.crc32(text.encode()) % 10 == 0


def read_library(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The `.py` files of a standard library, as (training, held-out) mappings from relative path to text.

    Left out: installed packages and the character tables of `encodings`. One path in twenty is held out.
    """
    train: dict[str, str] = {}
    held: dict[str, str] = {}
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        if "-packages/" in name or name.startswith("encodings/"):
            continue
        text = path.read_bytes().decode("utf-8", errors="ignore")
        if len(text) > 400 and not any(s in text for s in SPECIAL):
            (held if zlib.crc32(name.encode()) % 20 == 8 else train)[name] = text
    return train, held


def syllables(rng: random.Random, count: int) -> str:
    return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(count))


def draw(rng: random.Random, make, held: bool) -> str:
    """Draw from `make()` until the result falls on the wanted side of the held-out split."""
    while True:
        text = make()
        if held_out(text) == held:
            return text


@dataclass(frozen=True)
class Fact:
    """One planted fact and the question that asks for it."""

    what: str
    name: str
    value: str

    def sentence(self, template: str = FACTS[0]) -> str:
        value = f'"{self.value}"' if self.what == "magic word" else self.value
        return template.format(what=self.what, name=self.name, value=value)

    def question(self, template: str = QUESTIONS[0]) -> str:
        return template.format(what=self.what, name=self.name)


def draw_facts(rng: random.Random, count: int, held: bool = False, kind: str | None = None) -> list[Fact]:
    """`count` facts with distinct names, but for one in eight that gives an earlier name a second kind of value."""
    facts: list[Fact] = []
    taken: set[tuple[str, str]] = set()
    while len(facts) < count:
        what = kind or rng.choices(KINDS, (6, 2, 2))[0]
        if facts and kind is None and rng.random() < 0.125:
            name = rng.choice(facts).name
        else:
            name = draw(rng, lambda: syllables(rng, rng.choice((2, 3, 3, 3, 4))).capitalize(), held)
            if any(f.name == name for f in facts):
                continue
        if (what, name) in taken:
            continue
        taken.add((what, name))
        if what == "magic word":
            value = draw(rng, lambda: syllables(rng, 3), held)
        else:
            digits = 5 if what == "secret code" else 7
            value = draw(rng, lambda n=digits: "".join(rng.choice(DIGITS) for _ in range(n)), held)
        facts.append(Fact(what, name, value))
    return facts


def plant(document: str, lines: list[tuple[float, str]]) -> str:
    """`document` with each `(depth, line)` on a line of its own; depth 0 is the start of the text, 1 its end."""
    starts = [0] + [m.end() for m in re.finditer("\n", document)]
    if document and not document.endswith("\n"):
        starts.append(len(document))
    cuts = sorted((starts[bisect_right(starts, depth * len(document)) - 1], line) for depth, line in lines)
    parts, last = [], 0
    for at, line in cuts:
        parts.append(document[last:at])
        if at and document[at - 1] != "\n":
            parts.append("\n")
        parts.append(line + "\n")
        last = at
    return "".join(parts) + document[last:]


def prompt(document: str, question: str) -> str:
    """The one user message that holds a document and a question about it."""
    return f"{document.rstrip()}\n\n{question}"


def render(turns: list[tuple[str, str]], preface: str = "") -> str:
    """A whole conversation of (user, assistant) turns, exactly as the chat template renders it."""
    system = preface.rstrip() + "\n" if preface else ""
    return BOS + system + "".join(f"{USER}{u}{ASSISTANT}{a}{EOS}" for u, a in turns)


WORD = re.compile(r"\b[A-Za-z_][A-Za-z0-9_]{2,}\b")
TOP = re.compile(r"\n(?=(?:def|class|async def|@)[ \w])")


class Library:
    """Documents of a wanted length, drawn from source files with a little disturbance against learning by heart."""

    def __init__(self, files: dict[str, str], augment: bool):
        self.augment = augment
        self.groups = [list(g.items()) for g in self._split(files) if g]
        words: dict[str, int] = {}
        for text in files.values():
            for word in set(WORD.findall(text)):
                words[word] = words.get(word, 0) + 1
        self.words = [w for w, n in words.items() if n >= 2 and not keyword.iskeyword(w)]

    @staticmethod
    def _split(files: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
        tests = {n: t for n, t in files.items() if n.startswith("test/") or "/test" in n}
        return {n: t for n, t in files.items() if n not in tests}, tests

    def rename(self, text: str, rng: random.Random) -> str:
        """A random part of the identifiers replaced throughout, by names from anywhere in the library."""
        share, new = rng.uniform(0.05, 0.4), {}

        def swap(match: re.Match) -> str:
            word = match.group()
            if word not in new:
                change = not keyword.iskeyword(word) and rng.random() < share
                new[word] = rng.choice(self.words) if change else word
            return new[word]

        return WORD.sub(swap, text)

    def prose(self, rng: random.Random, chars: int) -> str:
        """Sentences of a small grammar: the generated documents."""
        nouns, verbs, adjectives = NOUNS.split(), VERBS.split(), ADJECTIVES.split()
        parts, size = [], 0
        while size < chars:
            sentence = (
                f"The {rng.choice(adjectives)} {rng.choice(nouns)} {rng.choice(verbs)} the "
                f"{rng.choice(adjectives)} {rng.choice(nouns)} {rng.choice(TRAIL)}."
            )
            parts.append(sentence + rng.choice((" ", " ", " ", "\n", "\n\n")))
            size += len(parts[-1])
        return "".join(parts)

    def text(self, rng: random.Random, chars: int) -> str:
        """About `chars` characters: whole files one after another, the first from a random line on."""
        if self.augment and rng.random() < 0.1:
            return self.prose(rng, chars)
        parts, size = [], 0
        while size < chars:
            group = self.groups[0] if len(self.groups) == 1 or rng.random() < 0.5 else self.groups[1]
            name, text = rng.choice(group)
            if not parts and len(text) > chars // 2:
                text = text[text.find("\n", rng.randrange(0, max(1, len(text) - chars // 2))) + 1 :]
            if self.augment and rng.random() < 0.3:
                blocks = TOP.split(text)
                rng.shuffle(blocks)
                text = "\n".join(blocks)
            text = f"# {name}\n{text[: chars - size].rstrip()}\n\n"
            parts.append(text)
            size += len(text)
        text = "".join(parts)
        return self.rename(text, rng) if self.augment and rng.random() < 0.5 else text


def cut(text: str, tokenizer, tokens: int) -> str:
    """The longest head of `text` that ends with a line and has at most `tokens` tokens."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    if len(encoding.ids) <= tokens:
        return text
    end = encoding.offsets[tokens][0]
    return text[: text.rfind("\n", 0, end) + 1 or end]


def one_document(rng: random.Random, document: str, facts: list[Fact], asked: int) -> str:
    """A conversation that opens with the whole document; all its questions follow."""
    mark = rng.choice(MARKS)
    text = plant(document, [(rng.random(), mark + f.sentence(rng.choice(FACTS))) for f in facts])
    turns = [(f.question(rng.choice(QUESTIONS)), f.value) for f in rng.sample(facts, asked)]
    if rng.random() < 0.15:
        return render(turns, preface=text)
    return render([(prompt(text, turns[0][0]), turns[0][1]), *turns[1:]])


def document_in_parts(rng: random.Random, document: str, facts: list[Fact], asked: int) -> str:
    """A conversation whose turns each bring a part of the document and ask about anything said so far."""
    mark = rng.choice(MARKS)
    cuts = sorted(document.find("\n", int(rng.random() * len(document))) + 1 for _ in range(asked - 1))
    parts = [document[a:b] for a, b in zip([0, *cuts], [*cuts, len(document)])]
    homes = [0, *rng.choices(range(asked), [len(p) + 1 for p in parts], k=len(facts) - 1)]
    turns, known, text = [], [], ""
    for i, part in enumerate(parts):
        new = [f for f, home in zip(facts, homes) if home == i]
        known += new
        text += plant(part, [(rng.random(), mark + f.sentence(rng.choice(FACTS))) for f in new])
        if known:
            fact = known.pop(rng.randrange(len(known)))
            question = fact.question(rng.choice(QUESTIONS))
            turns.append((prompt(text, question) if text.strip() else question, fact.value))
            text = ""
    return render(turns)


def conversation(rng: random.Random, library: Library, tokenizer, tokens: int) -> list[int]:
    """Token ids of a document with planted facts and turns that ask for them, at most `tokens` long."""
    count = min(max(1, tokens // 200), int(2 ** rng.uniform(0, 5)))
    asked = rng.randint((count + 1) // 2, count)
    facts = draw_facts(rng, count)
    room = tokens - 24 * (count + asked)
    document = library.text(rng, room * 7 // 2)
    make = one_document if rng.random() < 0.65 else document_in_parts
    while True:
        ids = tokenizer.encode(make(rng, document, facts, asked), add_special_tokens=False).ids
        if len(ids) <= tokens:
            return ids
        document = document[: int(len(document) * (0.98 - (len(ids) - tokens) / max(room, 1)))]


def sequence(rng: random.Random, library: Library, tokenizer, length: int) -> list[int]:
    """Exactly `length` token ids: conversations (one long, or several), the rest filled with plain text."""
    ids: list[int] = []
    while length - len(ids) >= 256 and not (not ids and rng.random() < 0.05):
        room = length - len(ids)
        ids += conversation(rng, library, tokenizer, room if rng.random() < 0.7 else rng.randint(256, room))
        if room < length and rng.random() < 0.1:
            break
    while len(ids) < length:
        text = BOS + library.text(rng, (length - len(ids)) * 4 + 400)
        ids += tokenizer.encode(text, add_special_tokens=False).ids[: length - len(ids)]
    return ids


def needle(
    rng: random.Random, document: str, depth: float, distractors: int = 0, kind: str = KINDS[0]
) -> tuple[str, str]:
    """A held-out needle: the content of one user message (document, fact at `depth`, question) and the answer.

    `distractors` more facts of the same kind, about other names, stand at random depths.
    """
    fact, *others = draw_facts(rng, 1 + distractors, held=True, kind=kind)
    lines = [(depth, "# " + fact.sentence())] + [(rng.random(), "# " + f.sentence()) for f in others]
    return prompt(plant(document, lines), fact.question()), fact.value
