"""The server's core, without HTTP: a `GenerationRequest` comes in, is priced, waits or runs, and its events come out.

Everything here runs in the event loop's thread, except tokenizing (a worker thread) and the engine (its own).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from ..dialogue.errors import ApiError, overloaded
from ..dialogue.output import Parser
from ..dialogue.pictures import MOST
from ..dialogue.prompt import Prompt, Prompter, check_choices, too_long
from ..dialogue.request import Done, Generated, GenerationRequest, Progress
from .admission import Admission
from .diverge import Watch
from .engine import Engine
from .grammar import Grammars
from .job import Event, Job
from .metrics import Metrics
from .team import Lost, gone
from .worker import Worker

log = logging.getLogger("opentq.serve")

STATUS = {"shutting_down": "draining", "model_loading": "loading", "no_model": "no model", "model_lost": "failed"}
GONE = ApiError(499, "the client went away", code="client_closed")


@dataclass
class ServiceConfig:
    """What `opentq serve` was told."""

    names: tuple[str, ...]  # that requests may give
    shown: tuple[str, ...]  # that are told to everybody: no folder of this machine
    max_context: int
    max_tokens: int = 4096
    sampling: dict[str, Any] = field(
        default_factory=lambda: {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    )
    prompt_cache_bytes: int = 1 << 62
    template: dict[str, Any] = field(default_factory=dict)
    keep_alive: float = 5.0
    any_model: bool = False
    keep_volatile: bool = False
    images_bytes: int = 0  # what the images of prompts that are not read yet may hold


class Events:
    """What becomes of a request: iterate over its events. Ends with the last Done or raises an ApiError."""

    def __init__(self, id: str):
        self.id = id
        self.events: asyncio.Queue[Event] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[Progress | Generated | Done]:
        while True:
            event = await self.events.get()
            if isinstance(event, ApiError):
                raise event
            yield event
            if isinstance(event, Done) and event.last:
                return


class Stream(Events):
    """The events of one accepted request, which `cancel` ends."""

    def __init__(self, service: Service, job: Job):
        super().__init__(secrets.token_hex(12))
        self.job = job
        self.ended = False
        self._service = service

    def cancel(self, error: ApiError = GONE) -> None:
        """End it; nobody else notices. Safe at any time."""
        if not self.ended:
            self._service.cancel(self, error)


class Service:
    """Prices requests and moves them between the clients and the engine."""

    def __init__(self, engine: Engine, admission: Admission, config: ServiceConfig, vocab: int, worker: Worker):
        self.engine = engine
        self.admission = admission
        self.config = config
        self.metrics = Metrics()
        vision = getattr(engine.model, "vision", None)
        self.prompter = Prompter(engine.tokenizer, vocab, config.template, config.keep_volatile, vision)
        self._tokenizing = ThreadPoolExecutor(1, "tokenizer")  # in their order; who goes away is not even begun
        self.watch = Watch()
        self.grammars = Grammars(engine.tokenizer, vocab)
        self.vocab = vocab
        self._closing = False
        self.failure = ""  # why nothing will ever be answered again
        self.on_failure: Callable[[], None] = lambda: None
        self.refusal: tuple[str, str] | None = None  # why nothing is taken on any more: words and code
        self.started = time.time()
        self._streams: dict[Job, Stream] = {}
        self.worker = worker
        self._outbox: deque[tuple[Job, Event]] = deque()
        self._woken = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    # ---- life

    def start(self) -> None:
        """Start the engine's thread. Called in the event loop."""
        self._loop = asyncio.get_running_loop()
        self.engine.team.watch(lambda error: self.call_soon(lambda: self._lose(error)))
        self._run_engine()

    def _run_engine(self) -> None:
        assert self._loop is not None
        future = self.worker.submit(self.engine.run)
        future.add_done_callback(lambda f: self._loop.call_soon_threadsafe(self._engine_ended, f))  # type: ignore[union-attr]

    def _engine_ended(self, future: Future[None]) -> None:
        error = future.exception()
        if error is None:
            return
        if self.engine.team.size > 1:
            self._lose(error)
            return
        log.error("the engine failed; its requests end with an error and it goes on", exc_info=error)
        self.worker.submit(self.engine.recover, error)
        self._run_engine()

    def _lose(self, error: BaseException) -> None:
        """End everything: this process alone has only a part of the model."""
        if self.failure or self._closing:
            return
        self.failure = str(error if isinstance(error, Lost) else gone(error))
        log.error("%s", self.failure)
        self.refuse("a part of the model is gone", "model_lost")
        for job in list(self._streams):
            self._deliver(job, ApiError(500, "a part of the model is gone", code="model_lost"))
        self.on_failure()

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return self.refusal is not None

    def refuse(self, words: str, code: str) -> None:
        """Refuse new requests from now on, with a 503 that says why."""
        self.refusal = (words, code)

    def _check_open(self) -> None:
        if self.refusal:
            raise overloaded(self.refusal[0], 10, self.refusal[1])

    async def drain(self, seconds: float) -> None:
        """Refuse new requests, let running ones end for `seconds`, then end the rest with an error each."""
        self.refuse("the server is shutting down", "shutting_down")
        if self._streams:
            log.info("stopping: %d requests have %g seconds to end", len(self._streams), seconds)
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            log.warning("stopping: %d requests are cancelled", len(self._streams))
            for stream in list(self._streams.values()):
                stream.cancel(overloaded("the server is shutting down", 10, "shutting_down"))
            await self._idle.wait()

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Run `callback` in the event loop; may be called from anywhere, a signal handler included."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(callback)

    def close(self) -> None:
        """Stop the engine after the step it is in, and let it write what waits for the disk."""
        self._closing = True
        self._tokenizing.shutdown(wait=False)
        self.engine.close()
        if not self.failure:  # else its thread may wait for another process for ever
            self.worker.submit(self.engine.finish).result()

    @property
    def max_body(self) -> int:
        """Bytes beyond which no body can hold a prompt that fits: 12 for a character escaped as two surrogates, and
        the largest images in base64.
        """
        images = MOST * self.prompter.vision.largest * 4 // 3 if self.prompter.vision else 0
        return (1 << 20) + 12 * self.prompter.encoder.longest * self.config.max_context + images

    @property
    def busy(self) -> bool:
        """Whether anybody is being answered or waits."""
        return bool(self._streams)

    # ---- requests

    async def open(self, request: GenerationRequest, leader: Job | None = None) -> Stream:
        """Admit a request; `leader` is another's job that reads the same prompt.

        Raises ApiError: 400 for what can't be served, 503 for what can't be served now.
        """
        self._check_model(request)
        self._check_open()
        check_choices(request, self.vocab)
        request = self.grammars.fitted(request)
        loop = asyncio.get_running_loop()
        prompt = await self._encode(request, self.config.max_context) if not leader else leader.prompt
        tokens = prompt.tokens
        if not leader and (said := await loop.run_in_executor(None, self.watch.see, tokens)):
            log.info("%s", said)
        max_tokens = self._answer_room(request, len(tokens))
        state = self.prompter.initial_state(request, tokens)
        constraint = await loop.run_in_executor(None, self.grammars.constraint, request, state)
        given = request.sampling
        defaults = {k: v for k, v in self.config.sampling.items() if getattr(given, k) is None}
        sampling = replace(given, **defaults)
        tokenizer = self.engine.tokenizer
        tools = () if request.tool_choice == "none" else request.tools
        parser = Parser(tokenizer, state, request.stop, tools, request.parallel_calls, raw=request.messages is None)
        job = Job(prompt, max_tokens, sampling, parser, self._post, constraint, request.logprobs, leader=leader)
        return self._admit(job)

    async def count(self, request: GenerationRequest) -> int:
        """Tokens of a prompt, also of one that is too long to be answered."""
        self._check_model(request)
        self._check_open()
        return len((await self._encode(self.grammars.fitted(request), None)).tokens)

    async def _encode(self, request: GenerationRequest, limit: int | None) -> Prompt:
        """The prompt, made in a worker thread that stops when this call is cancelled."""
        gone = threading.Event()
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._tokenizing, self.prompter.encode, request, limit, gone.is_set
            )
        finally:
            gone.set()

    def cancel(self, stream: Stream, error: ApiError) -> None:
        job = stream.job
        if job in self.admission.running:
            self.engine.cancel(job, error)
        else:
            self._deliver(job, error)

    def _check_model(self, request: GenerationRequest) -> None:
        if request.model and request.model not in self.config.names and not self.config.any_model:
            served = ", ".join(self.config.shown)
            raise ApiError(
                404, f"model {request.model[:100]!r} is not served here; served: {served}", "model", "model_not_found"
            )

    def _answer_room(self, request: GenerationRequest, prompt: int) -> int:
        """Tokens for the answer: what was asked for, or what is left, since clients send their model's maximum."""
        limit = self.config.max_context
        if prompt >= limit:
            raise too_long(limit, str(prompt), "prompt" if request.messages is None else "messages")
        return min(self.config.max_tokens if request.max_tokens is None else request.max_tokens, limit - prompt)

    def _admit(self, job: Job) -> Stream:
        self._check_open()
        held = sum(j.images.nbytes for j in (*self._streams, job) if j.images and not j.leader)
        if held > self.config.images_bytes:
            self.metrics.requests.labels("refused").inc()
            raise overloaded(f"no room for more images now: they would hold {held / 2**20:.0f} MiB", 10)
        verdict = self.admission.offer(job, job.total)
        if verdict == "full":
            self.metrics.requests.labels("refused").inc()
            need, have = self.admission.price(job.total), self.admission.budget - self.admission.committed()
            raise overloaded(
                f"no room for {job.total} tokens now: they need {need / 2**20:.0f} MiB and {have / 2**20:.0f} MiB are "
                "free; retry later",
                self._retry_after(),
            )
        stream = Stream(self, job)
        self._streams[job] = stream
        self._idle.clear()
        self.metrics.prompt.inc(len(job.tokens))
        if verdict == "run":
            self._submit(job)
        return stream

    def _submit(self, job: Job) -> None:
        room = min(self.config.prompt_cache_bytes, self.admission.budget - self.admission.committed())
        self.engine.submit(job, max(room, 0))

    def _retry_after(self) -> int:
        """Seconds until the first running answer can be expected to end, at the present pace."""
        left = min((j.max_tokens - j.generated for j in self.admission.running if isinstance(j, Job)), default=1)
        return int(min(max(left * self.engine.pace.step, 1), 60))

    # ---- events, from the engine's thread to the clients

    def _post(self, job: Job, event: Event) -> None:
        # The engine's thread. One wake-up of the loop takes all events of a step. `_woken` is cleared before the
        # outbox is emptied, so an event that finds it set is still taken.
        self._outbox.append((job, event))
        if not self._woken:
            self._woken = True
            self._loop.call_soon_threadsafe(self._flush)  # type: ignore[union-attr]

    def _flush(self) -> None:
        self._woken = False
        while self._outbox:
            self._deliver(*self._outbox.popleft())

    def _deliver(self, job: Job, event: Event) -> None:
        stream = self._streams.get(job)
        if stream is None:
            return
        stream.events.put_nowait(event)
        if isinstance(event, (Done, ApiError)):
            self._end(stream, event)

    def _end(self, stream: Stream, event: Done | ApiError) -> None:
        stream.ended = True
        job = stream.job
        del self._streams[job]
        for waiting in self.admission.release(job):
            self._submit(waiting)  # type: ignore[arg-type]
        if not self._streams:
            self._idle.set()
        outcome = event.reason if isinstance(event, Done) else (event.code or "error")
        self.metrics.requests.labels(outcome).inc()
        self.metrics.generated.inc(job.generated)
        self.metrics.cached.inc(job.cached)
        seconds = time.perf_counter() - job.created
        if job.first:
            self.metrics.first.observe(job.first - job.created)
        self.metrics.whole.observe(seconds)
        log.info(
            "%s %s: %d tokens in the prompt (%d remembered, %.0f %%), %d written, %.2f s",
            stream.id, outcome, len(job.tokens), job.cached, 100 * job.cached / len(job.tokens), job.generated, seconds,
        )  # fmt: skip

    # ---- for /health and /metrics

    def gauges(self) -> Metrics:
        m, a = self.metrics, self.admission
        m.running.set(len(a.running))
        m.waiting.set(len(a.waiting))
        m.committed.set(a.committed())
        m.budget.set(a.budget)
        m.prefixes.set(self.engine.store.nbytes)
        m.active.set(mx.get_active_memory())
        m.read.set(self.engine.tokens_read)
        m.guessed.set(self.engine.guessed)
        m.guessed_right.set(self.engine.guessed_right)
        m.step.set(self.engine.pace.step)
        m.chunk.set(self.engine.pace.chunk)
        return m

    def health(self) -> dict[str, Any]:
        a = self.admission
        return {
            "status": STATUS[self.refusal[1]] if self.refusal else "ok",
            "running": len(a.running),
            "waiting": len(a.waiting),
            "committed_bytes": a.committed(),
            "budget_bytes": a.budget,
            "prefix_bytes": self.engine.store.nbytes,
            "max_context": self.config.max_context,
        }
