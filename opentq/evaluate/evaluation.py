"""What every evaluation is given, and the loop that most of them are: a result per contender, measured once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ..records import Record, Records
from .contenders import Contender, enter
from .corpus import Corpus, about
from .forward import Tick, nothing


class Evaluation(NamedTuple):
    """A loaded model, who is compared on it and on which text, and where results are kept.

    Attributes:
        model_id: what identifies the model in records.
        corpus: the text; None where an evaluation brings its own.
        names: contenders, as the command line gives them.
        tick: told how many tokens have been worked off.
        simulated: contenders that are entered so (`contenders.enter`); their records say it.
    """

    model: Any
    model_id: Record
    tokenizer: Any
    corpus: Corpus | None
    names: Sequence[str]
    records: Records
    tick: Tick = nothing
    simulated: frozenset[str] = frozenset()

    def about(self, kind: str, own: Corpus | None = None, **more: Any) -> Record:
        """What identifies a result of `kind`: the model, the text that it read, and the task's own settings."""
        return about(kind, self.model_id, own or self.text, **more)

    @property
    def text(self) -> Corpus:
        """The text, of an evaluation that needs one."""
        assert self.corpus is not None
        return self.corpus

    def each(
        self, settings: Record, names: Sequence[str], measure: Callable[[Contender], Record], tokens: int
    ) -> Iterator[Record]:
        """One record per contender, in order: old ones where the file has them, else what `measure` finds.

        `tokens` are worked off where a contender is not measured again.
        """
        for name in names:
            key = {**settings, "spec": name}
            record = self.records.find(key)
            if record is None:
                simulate = name in self.simulated
                contender = enter(name, self.model, simulate)
                bits = {"bits": round(contender.bits, 4), **({"simulated": True} if simulate else {})}
                record = self.records.add(key, bits | measure(contender))
            else:
                self.tick(tokens)
            yield record
