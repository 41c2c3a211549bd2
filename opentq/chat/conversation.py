"""A conversation with a model: its messages and one set of caches, so that each turn reads only what is new.

When a template rewrites the past (thoughts that are dropped, a changed system message), the caches are trimmed to what
is still true, or begun again where a model's caches can't be trimmed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from ..dialogue.output import Parser
from ..dialogue.prompt import Prompter
from ..dialogue.request import Delta, Draw, GenerationRequest
from ..dialogue.sampling import make_sampler
from ..errors import UserError
from ..hosts import hooks
from ..hosts.generation import cache_bytes, fp16_bytes
from ..hosts.mlx_lm.load import make_cache
from ..hosts.mlx_lm.public import can_trim_prompt_cache, stream_generate, trim_prompt_cache


@dataclass(frozen=True)
class Settings(Draw):
    """What /set changes. `max_tokens` 0: as many as fit."""

    max_tokens: int = 0


@dataclass(frozen=True)
class Turn:
    """What the last answer cost. Seconds, tokens, bytes."""

    read: int = 0
    read_seconds: float = 0.0
    written: int = 0
    write_seconds: float = 0.0
    reason: str = ""

    @property
    def read_rate(self) -> float:
        return self.read / max(self.read_seconds, 1e-9)

    @property
    def write_rate(self) -> float:
        # The first token belongs to the reading.
        return max(self.written - 1, 0) / max(self.write_seconds, 1e-9)


class Conversation:
    """Messages, settings and caches of one chat."""

    def __init__(self, model: Any, tokenizer: Any, context: int, system: str = "", settings: Settings = Settings()):
        self.model = model
        self.tokenizer = tokenizer
        self.context = context
        self.system = system
        self.settings = settings
        self.messages: list[dict[str, Any]] = []
        self.caches: list[Any] = make_cache(model)
        self.held: list[int] = []  # the tokens that the caches hold
        self.turn = Turn()
        self.prompter = Prompter(tokenizer, 1 << 31)

    def ask(self, text: str) -> Iterator[Delta]:
        """The answer to one more message, piece by piece. Closing the iterator stops it; what was said is kept.

        Raises UserError, and forgets the message, when it does not fit or the template refuses it.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            tokens, state = self._prompt()
        except UserError:
            self.messages.pop()
            raise
        said = ""
        try:
            for delta in self._generate(tokens, state):
                said += delta.text if delta.kind == "content" else ""
                yield delta
        finally:
            self.messages.append({"role": "assistant", "content": said})

    def clear(self) -> None:
        """Forget everything that was said."""
        self.messages.clear()
        self._restart()

    @property
    def kv_bytes(self) -> int:
        return cache_bytes(self.caches)

    @property
    def spec(self) -> str:
        record = hooks.installed(self.model)
        return str(record.spec) if record else "mlx-lm"

    @property
    def ratio(self) -> float:
        """How many times smaller than fp16 the caches are; 0 when nothing is compressed or held."""
        dense = fp16_bytes(self.model, len(self.held))
        return dense / self.kv_bytes if dense and self.kv_bytes else 0.0

    def _prompt(self) -> tuple[list[int], str]:
        head = [{"role": "system", "content": self.system}] if self.system else []
        ask = GenerationRequest(messages=(*head, *self.messages))
        if self.tokenizer.has_chat_template:
            try:
                tokens = list(self.tokenizer.apply_chat_template(list(ask.messages or ()), add_generation_prompt=True))
            except TemplateError as error:
                raise UserError(f"the model's chat template refuses this: {error}") from error
        else:
            tokens = list(self.tokenizer.encode("\n".join(m["content"] for m in ask.messages or ())))
        if len(tokens) >= self.context:
            raise UserError(
                f"the conversation would be {len(tokens)} tokens and the context is {self.context}: /clear, or say less"
            )
        return tokens, self.prompter.initial_state(ask, tokens)

    def _generate(self, tokens: list[int], state: str) -> Iterator[Delta]:
        parser = Parser(self.tokenizer, state)
        room = self.context - len(tokens)
        rest = tokens[self._reuse(tokens) :]
        written: list[int] = []
        start = first = time.perf_counter()
        reason = "stopped"
        stream = stream_generate(
            self.model,
            self.tokenizer,
            rest,
            max_tokens=min(self.settings.max_tokens or room, room),
            sampler=make_sampler(self.settings),
            prompt_cache=self.caches,
        )
        try:
            for r in stream:
                if not written:
                    first = time.perf_counter()
                written.append(r.token)
                if r.finish_reason != "stop":
                    yield from parser.token(r.token)
                reason = r.finish_reason or reason
            yield from parser.finish()
        finally:
            stream.close()
            end = time.perf_counter()
            self.turn = Turn(len(rest), (first if written else end) - start, len(written), end - first, reason)
            self._settle(tokens + written)

    def _reuse(self, tokens: list[int]) -> int:
        """How many tokens the caches hold already, after what is no longer true was trimmed."""
        shared = 0
        for ours, theirs in zip(self.held, tokens[:-1]):
            if ours != theirs:
                break
            shared += 1
        extra = len(self.held) - shared
        if extra and can_trim_prompt_cache(self.caches):
            trim_prompt_cache(self.caches, extra)
            self.held = self.held[:shared]
        elif extra:
            self._restart()
        return len(self.held)

    def _settle(self, tokens: list[int]) -> None:
        """After a turn: what the caches hold. mlx-lm computes one token ahead, and an interrupt may leave it there."""
        sizes = {c.offset for c in self.caches if hasattr(c, "offset")}
        count = sizes.pop() if len(sizes) == 1 else -1
        if 0 <= count <= len(tokens):
            self.held = tokens[:count]
        elif count > len(tokens) and can_trim_prompt_cache(self.caches):
            trim_prompt_cache(self.caches, count - len(tokens))
            self.held = tokens
        else:
            self._restart()

    def _restart(self) -> None:
        self.caches = make_cache(self.model)
        self.held = []
