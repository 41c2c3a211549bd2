"""A conversation with a model: its messages and one set of caches, so that each turn reads only what is new.

When a template rewrites the past (thoughts that are dropped, a changed system message), the caches are cut back to what
is still true. Layers that can't be cut (windows that have forgotten, recurrent states) go back to a copy, made just
before the end of the last prompt; where that is not far enough back, the conversation is read again, and the turn says
so. A stop is heeded between two tokens or two chunks of the prompt, never within one: all layers hold the same.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..dialogue.errors import ApiError
from ..dialogue.output import Parser
from ..dialogue.pictures import Content
from ..dialogue.prompt import Prompt, Prompter
from ..dialogue.request import Delta, Draw, GenerationRequest, Progress
from ..dialogue.sampling import make_sampler
from ..errors import UserError
from ..hosts import hooks
from ..hosts.generation import cache_bytes, fp16_bytes
from ..hosts.mlx_lm.load import make_cache
from ..hosts.mlx_lm.public import stream_generate

CHUNKS = {"cpu": 128, "gpu": 512}
"""Prompt tokens that are read between two looks at whether to stop: seconds at most, where they are many."""
SPARE = 16
"""Tokens before a prompt's end where copies are made: what a template puts behind the last message is shorter."""


@dataclass(frozen=True)
class Settings(Draw):
    """What /set changes. `max_tokens` 0: as many as fit."""

    max_tokens: int = 0


@dataclass(frozen=True)
class Turn:
    """What the last answer cost, in tokens and seconds; `again` of those read had been read before."""

    read: int = 0
    again: int = 0
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
        self.stopping = False  # set it, as a signal handler may, to end the answer soon
        self.prompter = Prompter(tokenizer, 1 << 31, keep_volatile=True, vision=getattr(model, "vision", None))
        self._seen: Any = None  # the images of the last prompt
        self._torn = False  # the model is at work, or was stopped at it
        self._copied, self._copies = 0, dict[int, Any]()  # tokens held by the copies of layers, by index

    def ask(self, content: Content) -> Iterator[Delta | Progress]:
        """The answer to one more message, piece by piece. `stopping`, or closing the iterator, ends it.

        What was said is kept; where nothing was, the message is taken back. Raises UserError, and takes the message
        back, when it does not fit or the template refuses it.
        """
        self.stopping, said = False, ""
        self.messages.append({"role": "user", "content": content})
        self.turn = Turn()
        try:
            with closing(self._generate(*self._prompt())) as events:
                for event in events:
                    said += event.text if isinstance(event, Delta) and event.kind == "content" else ""
                    yield event
        finally:
            if said or self.turn.reason in ("stop", "length"):
                self.messages.append({"role": "assistant", "content": said})
            else:
                self.messages.pop()

    def clear(self) -> None:
        """Forget everything that was said."""
        self.messages.clear()
        self._restart()

    @property
    def kv_bytes(self) -> int:
        return cache_bytes([*self.caches, *self._copies.values()])

    @property
    def spec(self) -> str:
        record = hooks.installed(self.model)
        return str(record.spec) if record else "mlx-lm"

    @property
    def ratio(self) -> float:
        """How many times smaller the caches are for what is compressed; 0 when nothing is compressed or held."""
        held = self.kv_bytes
        return fp16_bytes(self.model, len(self.held), self.caches) / held if held else 0.0

    def _prompt(self) -> tuple[Prompt, str]:
        head = [{"role": "system", "content": self.system}] if self.system else []
        ask = GenerationRequest(messages=(*head, *self.messages))
        if not self.tokenizer.has_chat_template:
            ask = GenerationRequest(prompt="\n".join(m["content"] for m in ask.messages or ()))
        try:
            prompt = self.prompter.encode(ask, self.context)
        except ApiError as error:
            raise UserError(error.message) from error
        if (length := len(prompt.tokens)) >= self.context:
            raise UserError(
                f"the conversation would be {length} tokens and the context is {self.context}: /clear, or say less"
            )
        if prompt.images:
            prompt.images.examine(self.model.model, alone=True)
        return prompt, self.prompter.initial_state(ask, prompt.tokens)

    def _generate(self, prompt: Prompt, state: str) -> Generator[Delta | Progress, None, None]:
        parser, tokens, model = Parser(self.tokenizer, state), prompt.tokens, self.model
        again = self._reuse(prompt)
        fresh, written, reason = len(tokens) - len(self.held), 0, "stopped"
        room = self.context - len(tokens)
        start = first = time.perf_counter()
        stream: Any = ()
        try:
            yield from self._read(prompt)
            if prompt.images:
                model = prompt.images.speaker(self.model)
            stream = stream_generate(
                model,
                self.tokenizer,
                tokens[-1:],
                max_tokens=min(self.settings.max_tokens or room, room),
                sampler=make_sampler(self.settings),
                prompt_cache=self.caches,
            )
            while not self.stopping:
                self._torn = True
                r = next(stream)
                self._torn = False
                if not written:
                    self.held, first = list(tokens), time.perf_counter()
                self.held.append(r.token)  # mlx-lm computes a token before it gives it away
                written += 1
                if r.finish_reason != "stop":
                    yield from parser.token(r.token)
                if r.finish_reason:
                    reason = r.finish_reason
                    break
            yield from parser.finish()
        finally:
            if stream:
                stream.close()
            end = time.perf_counter()
            self.turn = Turn(fresh, again, (first if written else end) - start, written, end - first, reason)
            if self._torn:
                self._restart()

    def _read(self, prompt: Prompt) -> Iterator[Progress]:
        """Read all of a prompt but its last token, which makes the answer's first."""
        chunk, tokens, images = CHUNKS[mx.default_device().type.name], prompt.tokens, prompt.images
        last, mark = len(tokens) - 1, len(tokens) - SPARE
        while (done := len(self.held)) < last and not self.stopping:
            stop = min(done + chunk, mark if done < mark else last)
            self._torn = True
            if images and done < images.end:
                stop = min(last, images.end if images.whole else min(stop, images.end))
                images.read(self.model.model, self.caches, done, stop)
            else:
                shift = {"shifts": (images.shift,)} if images else {}
                self.model(mx.array([tokens[done:stop]]), cache=self.caches, **shift)
            mx.eval([c.state for c in self.caches])
            mx.clear_cache()
            self._torn = False
            self.held = tokens[:stop]
            if stop == mark:
                self._copied = stop
                self._copies = {i: copy.deepcopy(c) for i, c in enumerate(self.caches) if _forgets(c)}
            elif stop < mark:
                yield Progress(stop, len(tokens))

    def _reuse(self, prompt: Prompt) -> int:
        """Cut the caches back to where a prompt differs from what they hold; returns how many are to be read again."""
        tokens, images, seen = prompt.tokens, prompt.images, self._seen
        pairs = zip(self.held, tokens[:-1])
        shared = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
        shared = min(len(self.held), len(tokens) - 1) if shared is None else shared
        ours, theirs = (set(p.marks if p else ()) for p in (seen, images))
        shared = min([shared, *(place for place, _ in ours ^ theirs)])
        if images and images.whole:
            if shared < images.end:
                shared = 0
            elif seen:
                images.shift = seen.shift  # which the towers may have said
        self._seen = images
        if shared < len(self.held):
            self._cut(shared)
        return shared - len(self.held)

    def _cut(self, length: int) -> None:
        """Go back to the first `length` tokens, or as near before that as all layers can."""
        stuck = [i for i, c in enumerate(self.caches) if not c.is_trimmable()]
        if stuck and (length < self._copied or not self._copies.keys() >= set(stuck)):
            self._restart()
            return
        length = self._copied if stuck else length
        for i, cache in enumerate(self.caches):
            if i in stuck:
                self.caches[i] = copy.deepcopy(self._copies[i])
            else:
                cache.trim(len(self.held) - length)
        self.held = self.held[:length]
        if length < self._copied:
            self._copied, self._copies = 0, {}

    def _restart(self) -> None:
        self.caches, self.held, self._torn = make_cache(self.model), [], False
        self._copied, self._copies = 0, {}


def _forgets(cache: Any) -> bool:
    """Whether a layer's cache can't always be cut: a window, a recurrent state, or several caches with one of them."""
    if hasattr(cache, "caches"):
        return any(map(_forgets, cache.caches))
    bounds = (getattr(cache, name, 0) for name in ("max_size", "chunk_size", "window"))
    return not cache.is_trimmable() or any(bounds)
