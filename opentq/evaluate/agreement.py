"""How long two greedy generations stay the same, token for token, and whether answers with one right form are right.

A compressed cache whose predictions are close will still leave the reference's path at some token where two
continuations are nearly equal; after that the texts differ and need not be worse. So the length of agreement is a
strict measure, and exact answers to questions about the context (`recall`) are the fair one beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import UserError
from ..records import Record, Records
from . import metrics
from .contenders import NATIVE, enter
from .corpus import KINDS, Corpus, about
from .forward import Tick, greedy, nothing, prefill
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


def run(
    model: Any,
    model_id: Record,
    tokenizer: Any,
    corpus: Corpus,
    names: Sequence[str],
    task: Task,
    records: Records,
    tick: Tick = nothing,
) -> list[Record]:
    """One record per contender; old ones where the file has them."""
    settings = about("generate", model_id, corpus, task=asdict(task))
    expected: list[list[int]] = []
    found = []
    for name in names:
        key = {**settings, "spec": name}
        record = records.find(key)
        if record is None:
            prompts = mx.array(corpus.tokens(tokenizer, task.prompts, task.context, task.seed))
            expected = expected or _continue(model, prompts, enter(NATIVE, model).caches(), task, tick)
            contender = enter(name, model)
            rows = _continue(model, prompts, contender.caches(), task, tick)
            same = [agreement(a, b) for a, b in zip(expected, rows)]
            samples = np.array(same, dtype=np.float64)[:, None]
            result: Record = {
                "bits": round(contender.bits, 4),
                "agreement": metrics.bootstrap(samples, lambda x: x.mean(-1)),
                "identical": sum(n == task.tokens for n in same),
                "lengths": same,
            }
            if task.questions:
                result["recall"] = {}
                for kind in KINDS:
                    grid = Grid((task.context,), (0.5,), task.questions, kind, task.distractors, prefill=task.prefill)
                    needles = [make(tokenizer, corpus, grid, task.context, 0.5, n) for n in range(task.questions)]
                    right = ask(model, tokenizer, contender.caches, needles, grid)
                    result["recall"][kind] = sum(right)
            record = records.add(key, result)
        found.append(record)
    return found


def _continue(model: Any, prompts: mx.array, caches: list[Any], task: Task, tick: Tick) -> list[list[int]]:
    """Greedy continuations; they don't stop at the end of a text, so that all have the same length."""
    prefill(model, prompts[:, :-1], caches, task.prefill, tick)
    return greedy(model, prompts[:, -1:], caches, task.tokens, set(), tick)


def agreement(a: list[int], b: list[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
