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
from dataclasses import replace
from typing import Any

from ..dialogue.errors import ApiError, Gone, overloaded
from ..dialogue.output import Parser
from ..dialogue.pictures import MOST
from ..dialogue.prompt import Prompt, Prompter, check_choices, too_long
from ..dialogue.request import Done, Generated, GenerationRequest, Progress, Usage
from .admission import Admission
from .diverge import Watch
from .engine import Engine
from .grammar import Grammars
from .job import Event, Job
from .metrics import Metrics
from .options import ServeOptions
from .team import Lost, gone
from .worker import Worker

log = logging.getLogger("opentq.serve")

STATUS = {"shutting_down": "draining", "model_loading": "loading", "no_model": "no model", "model_lost": "failed"}
DEFAULTS = ("temperature", "top_p", "top_k", "min_p")
"""What requests may leave to the server's options."""
GONE = Gone()


class Stream:
    """What becomes of an accepted request: iterate over its events. Ends with the last Done or raises an ApiError."""

    def __init__(self, service: Service, answers: int):
        self.id = secrets.token_hex(12)
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.jobs: list[Job] = []  # one for each answer
        self._left = answers
        self._usage = Usage()
        self.service = service

    async def __aiter__(self) -> AsyncIterator[Progress | Generated | Done]:
        while True:
            event = await self.events.get()
            if isinstance(event, ApiError):
                raise event
            yield event
            if isinstance(event, Done) and event.last:
                return

    def put(self, job: Job, event: Event) -> None:
        """Tell an event of one answer: which one it is, and at its end what all have cost so far."""
        if isinstance(event, Done):
            self._left -= 1
            self._usage = _sum(self._usage, event.usage, job.leader is None)
            event = replace(event, choice=self.jobs.index(job), last=not self._left, usage=self._usage)
        elif isinstance(event, Generated) and len(self.jobs) > 1:
            event = replace(event, choice=self.jobs.index(job))
        self.events.put_nowait(event)

    def cancel(self, error: ApiError = GONE) -> None:
        """End it; nobody else notices. Safe at any time."""
        for job in self.jobs:
            self.service.cancel(job, error)


def _sum(so_far: Usage, more: Usage, reads: bool) -> Usage:
    """Tokens written by all; a prompt counts once, as OpenAI counts it. Seconds are those of the slowest."""
    return Usage(
        prompt=so_far.prompt + (more.prompt if reads else 0),
        cached=so_far.cached + (more.cached if reads else 0),
        completion=so_far.completion + more.completion,
        queue_seconds=max(so_far.queue_seconds, more.queue_seconds),
        prompt_seconds=max(so_far.prompt_seconds, more.prompt_seconds),
        generation_seconds=max(so_far.generation_seconds, more.generation_seconds),
    )


class Service:
    """Prices requests and moves them between the clients and the engine."""

    def __init__(
        self,
        engine: Engine,
        admission: Admission,
        options: ServeOptions,
        max_context: int,
        vocab: int,
        worker: Worker,
        images_bytes: int = 0,
    ):
        """`images_bytes` is what the images of prompts that are not read yet may hold."""
        self.engine: Engine = engine
        self.admission: Admission = admission
        self.options = options
        self.names, self.shown = options.served_names, options.shown_names
        self.max_context = max_context
        self.images_bytes = images_bytes
        self.metrics = Metrics(self)
        vision = getattr(engine.model, "vision", None)
        self.prompter = Prompter(engine.tokenizer, vocab, options.template, options.keep_volatile, vision)
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
            for job in list(self._streams):
                self.cancel(job, overloaded("the server is shutting down", 10, "shutting_down"))
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
        return (1 << 20) + 12 * self.prompter.encoder.longest * self.max_context + images

    @property
    def busy(self) -> bool:
        """Whether anybody is being answered or waits."""
        return bool(self._streams)

    # ---- requests

    async def open(self, request: GenerationRequest) -> Stream:
        """Admit all answers of a request, or none: `n` to each prompt, which the first of them reads for the others.

        Raises ApiError: 400 for what can't be served, 503 for what can't be served now.
        """
        self._check_model(request)
        self._check_open()
        check_choices(request, self.vocab)
        request = self.grammars.fitted(request)
        prompts = [replace(request, prompt=p) for p in request.prompts] or [request]
        stream = Stream(self, request.n * len(prompts))
        try:
            for one in prompts:
                leader: Job | None = None
                for i in range(request.n):
                    job = await self._job(one, i, leader)
                    self._admit(job, stream)
                    leader = leader or job
        except BaseException:  # a client that went away included
            stream.cancel()
            raise
        return stream

    async def _job(self, request: GenerationRequest, index: int, leader: Job | None) -> Job:
        """The `index`th answer to a request's prompt; `leader` is another's that reads it."""
        loop = asyncio.get_running_loop()
        prompt = await self._encode(request, self.max_context) if not leader else leader.prompt
        tokens = prompt.tokens
        if not leader and (said := await loop.run_in_executor(None, self.watch.see, tokens)):
            log.info("%s", said)
        max_tokens = self._answer_room(request, len(tokens))
        state = self.prompter.initial_state(request, tokens)
        constraint = await loop.run_in_executor(None, self.grammars.constraint, request, state)
        given = request.sampling
        defaults = {k: getattr(self.options, k) for k in DEFAULTS if getattr(given, k) is None}
        seed = None if given.seed is None else (given.seed + index) % 2**64
        sampling = replace(given, seed=seed, **defaults)
        tokenizer = self.engine.tokenizer
        tools = () if request.tool_choice == "none" else request.tools
        parser = Parser(tokenizer, state, request.stop, tools, request.parallel_calls, raw=request.messages is None)
        return Job(prompt, max_tokens, sampling, parser, self._post, constraint, request.logprobs, leader=leader)

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

    def cancel(self, job: Job, error: ApiError) -> None:
        if job in self.admission.running:
            self.engine.cancel(job, error)
        else:
            self._deliver(job, error)

    def _check_model(self, request: GenerationRequest) -> None:
        if request.model and request.model not in self.names and not self.options.any_model:
            served = ", ".join(self.shown)
            raise ApiError(
                404, f"model {request.model[:100]!r} is not served here; served: {served}", "model", "model_not_found"
            )

    def _answer_room(self, request: GenerationRequest, prompt: int) -> int:
        """Tokens for the answer: what was asked for, or what is left, since clients send their model's maximum."""
        limit = self.max_context
        if prompt >= limit:
            raise too_long(limit, str(prompt), "prompt" if request.messages is None else "messages")
        return min(self.options.max_tokens if request.max_tokens is None else request.max_tokens, limit - prompt)

    def _admit(self, job: Job, stream: Stream) -> None:
        self._check_open()
        held = sum(j.images.nbytes for j in (*self._streams, job) if j.images and not j.leader)
        if held > self.images_bytes:
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
        stream.jobs.append(job)
        self._streams[job] = stream
        self._idle.clear()
        self.metrics.prompt.inc(len(job.tokens))
        if verdict == "run":
            self._submit(job)

    def _submit(self, job: Job) -> None:
        self.engine.submit(job, max(self.admission.budget - self.admission.committed(), 0))

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
        stream.put(job, event)
        if isinstance(event, (Done, ApiError)):
            self._end(job, event)

    def _end(self, job: Job, event: Done | ApiError) -> None:
        stream = self._streams.pop(job)
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

    def health(self) -> dict[str, Any]:
        a = self.admission
        return {
            "status": STATUS[self.refusal[1]] if self.refusal else "ok",
            "running": len(a.running),
            "waiting": len(a.waiting),
            "committed_bytes": a.committed(),
            "budget_bytes": a.budget,
            "prefix_bytes": self.engine.store.nbytes,
            "max_context": self.max_context,
        }
