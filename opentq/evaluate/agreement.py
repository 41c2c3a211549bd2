"""How long two greedy generations stay the same, token for token, and whether answers with one right form are right.

A compressed cache whose predictions are close will still leave the reference's path at some token where two
continuations are nearly equal; after that the texts differ and need not be worse. So the length of agreement is a
strict measure, and exact answers to questions about the context (`recall`) are the fair one beside it.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import UserError
from ..records import Record
from . import metrics
from .contenders import NATIVE, Contender, enter
from .corpus import KINDS
from .evaluation import Evaluation
from .forward import Tick, greedy, prefill
from .needle import Grid, ask, make


@dataclass(frozen=True)
class Task:
    """`prompts` texts of `context` tokens are continued for `tokens` tokens; `questions` of each kind are asked."""

    context: int = 2048
    tokens: int = 128
    prompts: int = 8
    questions: int = 8
    distractors: int = 8
    prefill: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.context, self.tokens, self.prompts, self.prefill) < 1 or min(self.questions, self.distractors) < 0:
            raise UserError("generate needs at least one prompt, one token of context and one token to generate")


def run(on: Evaluation, task: Task) -> list[Record]:
    """One record per contender; old ones where the file has them."""

    @functools.cache
    def prompts() -> mx.array:
        return mx.array(on.text.tokens(on.tokenizer, task.prompts, task.context, task.seed))

    @functools.cache
    def expected() -> list[list[int]]:
        return continued(enter(NATIVE, on.model))

    def continued(contender: Contender) -> list[list[int]]:
        return _continue(on.model, prompts(), contender.caches(), task, on.tick)

    def measure(contender: Contender) -> Record:
        same = [agreement(a, b) for a, b in zip(expected(), continued(contender))]
        samples = np.array(same, dtype=np.float64)[:, None]
        recall = {kind: _recall(on, task, contender, kind) for kind in KINDS} if task.questions else None
        return {
            "agreement": metrics.bootstrap(samples, lambda x: x.mean(-1)),
            "identical": sum(n == task.tokens for n in same),
            "lengths": same,
            **({} if recall is None else {"recall": recall}),
        }

    settings = on.about("generate", task=asdict(task))
    return list(on.each(settings, on.names, measure, task.prompts * (task.context + task.tokens)))


def _recall(on: Evaluation, task: Task, contender: Contender, kind: str) -> int:
    """Questions of one kind that are answered right."""
    grid = Grid((task.context,), (0.5,), task.questions, kind, task.distractors, prefill=task.prefill)
    needles = [make(on.tokenizer, on.text, grid, task.context, 0.5, n) for n in range(task.questions)]
    return sum(ask(on.model, on.tokenizer, contender.caches, needles, grid))


def _continue(model: Any, prompts: mx.array, caches: list[Any], task: Task, tick: Tick) -> list[list[int]]:
    """Greedy continuations; they don't stop at the end of a text, so that all have the same length."""
    prefill(model, prompts[:, :-1], caches, task.prefill, tick)
    return greedy(model, prompts[:, -1:], caches, task.tokens, set(), tick)


def agreement(a: list[int], b: list[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
