"""One sequence on its way through the engine, and what is said of it meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..dialogue.errors import ApiError
from ..dialogue.output import Parser
from ..dialogue.prompt import Prompt
from ..dialogue.request import Done, Generated, Progress, SamplingParams, Usage
from .grammar import Constraint
from .lookup import Lookup

if TYPE_CHECKING:
    from ..hosts.mlx_vlm.vision import ImagePrompt

Event = Progress | Generated | Done | ApiError


@dataclass(eq=False)
class Job:
    """One sequence on its way. The client's side fills in the first fields, the engine the rest."""

    prompt: Prompt
    max_tokens: int
    sampling: SamplingParams
    parser: Parser
    post: Callable[[Job, Event], None]
    constraint: Constraint | None = None
    logprobs: int | None = None
    leader: Job | None = None  # another that reads the same prompt
    created: float = field(default_factory=time.perf_counter)

    names: list[str] = field(default_factory=list)
    number: int = 0  # in the order of submission
    caches: list[Any] | None = None
    read: int = 0  # prompt tokens in the caches
    cached: int = 0
    snapshots: set[int] = field(default_factory=set)
    started: float = 0.0
    first: float = 0.0  # when the prompt was read
    generated: int = 0
    answer: list[int] = field(default_factory=list)
    lookup: Lookup | None = None
    known: int = 0  # blocks of prompt and answer in the prefix store
    trims: bool = True  # whether its caches serve all shorter prefixes
    followers: list[Job] = field(default_factory=list)  # jobs that wait for this one's prompt to be read

    @property
    def tokens(self) -> list[int]:
        return self.prompt.tokens

    @property
    def images(self) -> ImagePrompt | None:
        return self.prompt.images

    @property
    def total(self) -> int:
        return len(self.tokens) + self.max_tokens

    @property
    def marks(self) -> tuple[tuple[int, bytes], ...]:
        return self.images.marks if self.images else ()

    def sees(self, place: int) -> bool:
        """Whether an image lies at or behind a place of the prompt."""
        return self.images is not None and place < self.images.end

    def usage(self) -> Usage:
        now = time.perf_counter()
        first = self.first or now
        return Usage(
            prompt=len(self.tokens),
            completion=self.generated,
            cached=self.cached,
            queue_seconds=max(0.0, (self.started or now) - self.created),
            prompt_seconds=first - self.started if self.started else 0.0,
            generation_seconds=now - first,
        )
