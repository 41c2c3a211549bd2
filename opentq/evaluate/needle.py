"""Needle in a haystack: a fact is planted at a depth of a long text and asked for at its end.

The text goes through the cache in prefill steps; the question and the answer follow in steps of their own, so that the
fact is read back from compressed tokens (unless it stands in the last hundred tokens, which every cache keeps in
fp16). Answers are greedy and count when they contain the value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..errors import UserError
from ..records import Record
from .contenders import enter
from .corpus import KINDS, Corpus, Needle, needle
from .evaluation import Evaluation
from .forward import Tick, greedy, nothing, prefill
from .metrics import wilson


@dataclass(frozen=True)
class Grid:
    """Which needles are asked: `trials` for each length and depth.

    Attributes:
        lengths: tokens of the prompt.
        depths: 0 is the start of the text, 1 its end.
        trials: needles per cell.
        kind: what is hidden (`corpus.KINDS`).
        distractors: facts of the same kind about other names.
        answer: most tokens of an answer.
        prefill: tokens per step.
        batch: needles read together.
        simulate: see `contenders.enter`.
    """

    lengths: tuple[int, ...] = (1024, 4096)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    trials: int = 8
    kind: str = KINDS[0]
    distractors: int = 0
    answer: int = 12
    prefill: int = 512
    seed: int = 0
    batch: int = 8
    simulate: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"needle kind {self.kind!r} is not known; choose one of {', '.join(KINDS)}")
        if not self.lengths or not self.depths or min(self.trials, self.batch) < 1 or self.distractors < 0:
            raise UserError("a needle grid needs at least one length, one depth and one trial")
        if min(self.depths) < 0 or max(self.depths) > 1:
            raise UserError(f"needle depths are between 0 and 1, not {list(self.depths)}")


def run(on: Evaluation, grid: Grid) -> list[Record]:
    """One record per contender, length and depth, in order; old ones where the file has them."""
    shared = {n: getattr(grid, n) for n in ("distractors", "trials", "prefill", "answer", "seed", "simulate")}
    settings = on.about("needle", what=grid.kind, **shared)
    found = []
    made: dict[tuple[int, float, int], Needle] = {}
    for name in on.names:
        contender = None
        for length in grid.lengths:
            keys = {depth: {**settings, "spec": name, "length": length, "depth": depth} for depth in grid.depths}
            missing = [depth for depth, key in keys.items() if on.records.find(key) is None]
            if missing:
                contender = contender or enter(name, on.model, grid.simulate)
                asked = [(length, depth, trial) for depth in missing for trial in range(grid.trials)]
                for key in asked:
                    made[key] = made.get(key) or make(on.tokenizer, on.text, grid, *key)
                right = ask(on.model, on.tokenizer, contender.caches, [made[key] for key in asked], grid, on.tick)
                for i, depth in enumerate(missing):
                    correct = sum(right[i * grid.trials : (i + 1) * grid.trials])
                    result = {"bits": round(contender.bits, 4), "correct": correct}
                    on.records.add(keys[depth], {**result, "accuracy": wilson(correct, grid.trials)})
            on.tick(length * grid.trials * (len(keys) - len(missing)))
            found += [r for r in map(on.records.find, keys.values()) if r is not None]
    return found


def make(tokenizer: Any, corpus: Corpus, grid: Grid, length: int, depth: float, trial: int) -> Needle:
    """The prompt of one trial."""
    return needle(tokenizer, corpus, length, depth, grid.seed * 1000 + trial, grid.kind, grid.distractors)


def ask(
    model: Any,
    tokenizer: Any,
    caches: Callable[[], list[Any]],
    needles: Sequence[Needle],
    grid: Grid,
    tick: Tick = nothing,
) -> list[bool]:
    """Whether each needle, all in prompts of one length, is found; `grid.batch` of them are read at a time."""
    found: list[bool] = []
    for start in range(0, len(needles), grid.batch):
        batch = needles[start : start + grid.batch]
        # Questions may differ in length, and one batch has one length: the text takes what is too long.
        own = min(len(n.question) for n in batch)
        rows = mx.array([n.text + n.question for n in batch])
        held = caches()
        prefill(model, rows[:, :-own], held, grid.prefill, tick)
        stop = set(getattr(tokenizer, "eos_token_ids", []) or [])
        answers = greedy(model, rows[:, -own:], held, grid.answer, stop)
        tick(own * len(batch))
        found += [n.found(tokenizer.decode(a)) for n, a in zip(batch, answers)]
    return found
