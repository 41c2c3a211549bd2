"""Agreement in use: the same short prompts answered with a model's own cache and with a compressed one.

Prompts carry a passage of documentation and an instruction about it, because the newest 64 to 127 tokens are fp16 in
every cache here: a prompt of one line would compare nothing. Answers are greedy, and end where the model ends them with
its own cache.
"""

from __future__ import annotations

import functools
import random
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import UserError
from ..records import Record
from . import metrics
from .agreement import agreement
from .contenders import NATIVE, Contender, enter
from .corpus import template
from .entries import documentation, entries, reference
from .evaluation import Evaluation
from .forward import Tick, greedy, prefill

INSTRUCTIONS = (
    "Explain what {name} is for.",
    "Explain {name} to a beginner.",
    "When would you use {name}?",
    "Give an example of how {name} is used.",
    "Which of these are related to {name}?",
    "Summarise this list in two sentences.",
    "Which of these deal with files?",
    "What do these have in common?",
)


@dataclass(frozen=True)
class Task:
    """`prompts` of `context` tokens, `batch` together; answers of up to `tokens` tokens."""

    prompts: int = 200
    context: int = 384
    tokens: int = 64
    prefill: int = 128
    batch: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.prompts, self.context, self.tokens, self.prefill, self.batch) < 1:
            raise UserError("use needs at least one prompt, one token of context and one token to generate")


def make(tokenizer: Any, task: Task) -> list[list[int]]:
    """Prompts of exactly `task.context` tokens, in the model's chat template where it has one."""
    before, after = template(tokenizer)
    rows = []
    for number in range(task.prompts):
        rng = random.Random(f"use {task.seed} {number}")
        entry = rng.choice(entries())
        wish = INSTRUCTIONS[number % len(INSTRUCTIONS)].format(name=entry.name)
        question = tokenizer.encode(f"\n{wish}", add_special_tokens=False) + after
        opened = reference(tokenizer, task.context - len(before) - len(question), rng, around=entry, opens=False)
        rows.append(before + opened + question)
    return rows


def run(on: Evaluation, task: Task) -> list[Record]:
    """One record per contender; old ones where the file has them."""
    shown = {k: v for k, v in asdict(task).items() if k != "batch"}
    settings = on.about("use", documentation(), task=shown)
    prompts = make(on.tokenizer, task)
    stop = set(getattr(on.tokenizer, "eos_token_ids", None) or [])

    def answers(contender: Contender) -> list[list[int]]:
        return _answers(on.model, prompts, contender, task, on.tick)

    @functools.cache
    def expected() -> list[list[int]]:
        return [until(row, stop) for row in answers(enter(NATIVE, on.model))]

    def measure(contender: Contender) -> Record:
        return compare(expected(), answers(contender))

    return list(on.each(settings, on.names, measure, task.prompts * (task.context + task.tokens)))


def _answers(model: Any, prompts: list[list[int]], contender: Contender, task: Task, tick: Tick) -> list[list[int]]:
    rows: list[list[int]] = []
    for start in range(0, len(prompts), task.batch):
        batch = mx.array(prompts[start : start + task.batch])
        caches = contender.caches()
        prefill(model, batch[:, :-1], caches, task.prefill, tick)
        # Nobody stops: all of a batch go on, and `until` cuts.
        rows += greedy(model, batch[:, -1:], caches, task.tokens, set(), tick)
    return rows


def until(row: list[int], stop: set[int]) -> list[int]:
    """The answer with the token that ends it, if one does."""
    end = next((i for i, token in enumerate(row) if token in stop), len(row) - 1)
    return row[: end + 1]


def compare(expected: list[list[int]], rows: list[list[int]]) -> Record:
    """Answers that are equal to the end, and for all answers the tokens before the first that differs."""
    same = [agreement(a, b) for a, b in zip(expected, rows)]
    equal = sum(n == len(a) for n, a in zip(same, expected))
    left = [n for n, a in zip(same, expected) if n < len(a)]
    shares = np.array([n / len(a) for n, a in zip(same, expected)], dtype=np.float64)[:, None]
    return {
        "equal": metrics.wilson(equal, len(rows)),
        "share_before_divergence": metrics.bootstrap(shares, lambda x: x.mean(-1)),
        "diverged_at_median": float(np.median(left)) if left else None,
        "lengths": same,
        "answer_tokens": [len(a) for a in expected],
    }
