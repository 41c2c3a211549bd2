"""Multiple choice by log likelihood: which description belongs to a name, with a page of documentation before it.

Half of the questions are to be *read*: the page holds the entry that is asked for. The others are to be *known*: none
of the four descriptions stands on the page. The page is fed in steps, so that what is read is read from compressed
tokens; a choice is scored by its log likelihood per character. Every spec answers the same questions as the model's own
cache, and differences are paired.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import UserError
from ..records import Record
from . import metrics
from .contenders import NATIVE, Contender
from .entries import documentation, entries, reference
from .evaluation import Evaluation
from .forward import Tick, nothing, prefill

KINDS = ("read", "known")
CHOICES = 4


@dataclass(frozen=True)
class Task:
    """`questions` with pages of `context` tokens, read in steps of `prefill`, `batch` of them together."""

    questions: int = 200
    context: int = 640
    prefill: int = 128
    batch: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.questions <= len(entries()) or min(self.context, self.prefill, self.batch) < 1:
            raise UserError(f"tasks needs 1 to {len(entries())} questions, and pages of one token or more")


@dataclass(frozen=True)
class Question:
    """`page` ends with the name that is asked for; `choices` are tokens, `lengths` their characters."""

    kind: str
    page: list[int]
    choices: list[list[int]]
    lengths: list[int]
    right: int


def make(tokenizer: Any, task: Task) -> list[Question]:
    """The questions: the same for every spec, and for every model with the same tokenizer."""
    asked = list(entries())
    random.Random(task.seed).shuffle(asked)
    made = []
    for number, entry in enumerate(asked[: task.questions]):
        rng = random.Random(f"{task.seed} {number}")
        same = [e for e in entries() if e.source == entry.source and e != entry]
        choices = [entry, *rng.sample(same, CHOICES - 1)]
        rng.shuffle(choices)
        kind = KINDS[number % len(KINDS)]
        name = tokenizer.encode(f"{entry.name}:", add_special_tokens=False)
        around = entry if kind == "read" else None
        page = reference(tokenizer, task.context - len(name), rng, without=choices, around=around)
        tokens = [tokenizer.encode(f" {c.text}.", add_special_tokens=False) for c in choices]
        lengths = [len(c.text) for c in choices]
        made.append(Question(kind, page + name, tokens, lengths, choices.index(entry)))
    return made


def run(on: Evaluation, task: Task) -> list[Record]:
    """One record per contender, the model's own cache first; old ones where the file has them."""
    shown = {k: v for k, v in asdict(task).items() if k != "batch"}
    settings = on.about("tasks", documentation(), task=shown)
    questions = make(on.tokenizer, task)
    found: list[Record] = []

    def measure(contender: Contender) -> Record:
        return marks(questions, answer(on.model, questions, contender.caches, task, on.tick), found[:1])

    names = (NATIVE, *(n for n in on.names if n != NATIVE))
    for record in on.each(settings, names, measure, task.questions * task.context):
        found.append(record)
    return found


def answer(
    model: Any, questions: Sequence[Question], caches: Callable[[], list[Any]], task: Task, tick: Tick = nothing
) -> list[int]:
    """1 for every question whose right choice is the likeliest, else 0."""
    right: list[int] = []
    for start in range(0, len(questions), task.batch):
        batch = questions[start : start + task.batch]
        held = caches()
        pages = mx.array([q.page for q in batch])
        prefill(model, pages[:, :-1], held, task.prefill, tick)
        scores = np.stack([_score(model, batch, choice, held) for choice in range(CHOICES)], axis=1)
        best = (scores / np.array([q.lengths for q in batch])).argmax(1)
        right += [int(b == q.right) for b, q in zip(best, batch)]
    return right


def _score(model: Any, batch: Sequence[Question], choice: int, held: list[Any]) -> np.ndarray:
    """Log likelihood `[questions]` of one choice after each page; the caches are left as they are."""
    # Not trimmed afterwards instead: tokens that a long choice pushes into packing would stay packed for the next one.
    own = copy.deepcopy(held)
    tokens = [q.choices[choice] for q in batch]
    longest = max(map(len, tokens))
    # Each is fed behind the last token of its page; what fills a shorter one up comes after it, and is not counted.
    fed = mx.array([[q.page[-1], *t[:-1], *[0] * (longest - len(t))] for q, t in zip(batch, tokens)])
    wanted = mx.array([t + [0] * (longest - len(t)) for t in tokens])
    logs = metrics.log_probs(model(fed, cache=own))
    picked = mx.take_along_axis(logs, wanted[..., None], axis=-1)[..., 0]
    inside = mx.arange(longest)[None] < mx.array([[len(t)] for t in tokens])
    total = mx.where(inside, picked, 0).sum(1)
    mx.eval(total)
    return np.array(total, dtype=np.float64)


def marks(questions: Sequence[Question], right: list[int], reference: Sequence[Record]) -> Record:
    """Accuracies, and where a reference is given the paired difference to it."""
    result: Record = {"answers": right, "accuracy": metrics.wilson(sum(right), len(right))}
    for kind in KINDS:
        own = [r for q, r in zip(questions, right) if q.kind == kind]
        result[kind] = metrics.wilson(sum(own), len(own)) if own else None
    for record in reference:
        pairs = list(zip(record["answers"], right))
        lost, won = pairs.count((1, 0)), pairs.count((0, 1))
        result |= {"lost": lost, "won": won, "difference": metrics.paired(lost, won, len(pairs))}
        result["mcnemar_p"] = metrics.mcnemar(lost, won)
    return result
