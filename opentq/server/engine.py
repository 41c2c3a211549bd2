"""The engine: one thread that does all of the model's work, one small step at a time.

Each turn gives every running answer its next token, then reads one chunk of one waiting prompt if that is within the
time that `pace` allows: a running answer is not slowed down more than threefold, however long a prompt is that someone
sends. Prompts take turns by two rules, alternately: the one with least left to read (short questions pass long
documents), and the one that came first (nobody starves).

Prompts are read alone, on single caches; then the sequence joins the batch of its bucket (`admission.bucket`).
"""

from __future__ import annotations

import copy
import logging
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import numpy as np

from ..dialogue.errors import ApiError, bad
from ..dialogue.request import Chosen, Done, Generated, Progress
from ..dialogue.sampling import KeyedSampler, Processor, make_processors
from ..errors import UserError
from ..hosts.mlx_lm.private import StopSequences, _merge_caches
from ..hosts.mlx_lm.public import make_prompt_cache
from .admission import bucket
from .decoding import Decoding, RowSampling
from .draft import Draft
from .job import Job
from .lookup import LONGEST, Lookup
from .orders import Order, Orders
from .pace import Pace
from .prefix import PrefixStore, exact_trim
from .team import Alone

log = logging.getLogger("opentq.serve")

CHECKPOINTS = (1, 4, 16, 64)
"""Blocks before a prompt's end at which caches that can't be cut are kept; reading on costs four times what differs."""
CHECKPOINT_SHARE = 8
"""Checkpoints before the end are kept where this many fit into what running requests leave."""


class Engine:
    """Runs jobs on a model. `submit`, `cancel` and `close` may be called from any thread; `run` is the thread."""

    def __init__(self, model: Any, tokenizer: Any, store: PrefixStore, chunk: int, team: Alone | None = None):
        self.model = model
        self.tokenizer = tokenizer
        self.store = store
        self.chunk = chunk
        self.team = team or Alone()
        self.orders = Orders(self.team)
        self.pace = Pace()
        self.reading: list[Job] = []
        self.batches: dict[int, tuple[Decoding, list[Job]]] = {}
        self.at_work: Job | None = None
        self.unread: deque[Job] = deque()  # whose answers have whole blocks that were not read as prompts are
        self.tokens_read = 0
        self.lookup = True  # whether a single answer's next tokens are guessed from what is there
        self.draft: Draft | None = None  # what else guesses them
        self.guessed = self.guessed_right = 0
        self._heard: deque[Order] = deque()
        self._over: list[Job] = []  # whose answers ended by what only the first process knows
        self._eos = StopSequences([(t,) for t in tokenizer.eos_token_ids])
        self._chunks = 0
        self._closed = False

    # ---- from other threads

    def submit(self, job: Job, room: int) -> None:
        """Start a job that was admitted; `room` is what running requests leave for remembered prefixes, in bytes."""
        self.orders.put("submit", job, room)

    def cancel(self, job: Job, error: ApiError) -> None:
        """End a job with `error`, wherever it is; its memory is free when the error is posted."""
        self.orders.put("cancel", job, error)

    def close(self) -> None:
        self.orders.put("close")

    # ---- the engine's own thread

    def run(self) -> None:
        """Work until closed. An error of the model's ends this call; `recover` says what to do then."""
        while not self._closed:
            idle = not (self.reading or self.batches or self.unread)
            if idle and self.store.files and self.store.files.waiting and self.orders.empty():
                self.store.files.write_one()
                continue
            self._heard += self.orders.hear(wait=idle and not self._heard)
            while self._heard:  # one that fails leaves the others
                self._obey(*self._heard.popleft())
            if self.batches:
                tic = time.perf_counter()
                grew = [job for key in sorted(self.batches) for job in self._decode(key)]
                self.pace.decoded(time.perf_counter() - tic)
                self._end_step(grew)
                if self.team.agree(bool(self.batches and self.pace.debt)):
                    continue
            if self.reading:
                self._read_chunk(self._next_reader())
            elif self.unread:
                self._read_answer(self.unread.popleft())

    def finish(self) -> None:
        """After `close`: write what waits for the disk."""
        while self.store.files and self.store.files.waiting:
            self.store.files.write_one()

    def forget(self) -> None:
        """After `finish`: let model, prefixes and caches go. What is asked about the engine has an answer still."""
        self.model = self.draft = None
        self.store = PrefixStore(self.store.block, 0)
        self.batches.clear()

    def recover(self, error: BaseException) -> None:
        """After `run` failed: end the job at work, or all running answers if it was theirs, with an error each."""
        failed = (
            [self.at_work, *self.at_work.followers]
            if self.at_work
            else [j for _, jobs in self.batches.values() for j in jobs]
        )
        if not self.at_work:
            self.batches.clear()
        self.at_work = None
        if self.draft:
            self.draft.forget()
        self.reading = [j for j in self.reading if j not in failed]
        mx.clear_cache()
        for job in failed:
            self._leave(job)
            job.post(
                job, ApiError(500, f"the engine failed on this request: {type(error).__name__}", code="engine_error")
            )

    def _obey(self, kind: str, value: Any) -> None:
        if kind == "submit":
            self._start(*value)
        elif kind == "cancel":
            self._cancel(*value)
        else:
            self._closed = True

    def _start(self, job: Job, room: int) -> None:
        self.at_work = job
        job.started = time.perf_counter()
        if job.leader and job.leader in self.reading:
            job.leader.followers.append(job)
            self.at_work = None
            return
        self.store.give_way(room)
        if job.images:
            try:
                job.images.examine(self.model.model)
            except UserError as error:
                self.at_work = None
                job.post(job, bad(str(error), "messages", "invalid_image"))
                return
        # What is read at once, images in sight of each other, is not cut into blocks again.
        job.names = [] if job.images and job.images.whole else self.store.names(job.tokens, job.marks)
        job.known = len(job.names)
        hit = self.store.fetch(job.names)
        job.caches = hit.caches or make_prompt_cache(self.model)
        job.read = job.cached = hit.tokens
        self.team.check(hit.tokens, "how much of a prompt is remembered")
        job.trims = exact_trim(job.caches)
        if not job.trims:
            # Such caches are remembered only at points chosen beforehand: the end, where known prompts part, and before
            # the end at growing distances, where another session of the same agent or a changed last message may part.
            ends = {len(job.names) - d for d in (0, *CHECKPOINTS)}
            job.snapshots = {n * self.store.block for n in ends if n > 0} | {hit.shared} - {0}
        self.reading.append(job)
        self.at_work = None

    def _next_reader(self) -> Job:
        self._chunks += 1
        if self._chunks % 2:
            return self.reading[0]
        return min(self.reading, key=lambda j: len(j.tokens) - j.read)

    def _read_chunk(self, job: Job) -> None:
        """One chunk of a prompt; after the last, in a turn of its own, the job joins a batch."""
        self.at_work = job
        tic, running = time.perf_counter(), bool(self.batches)
        end = job.read + self.chunk
        if job.images and job.images.whole:
            end = max(end, job.images.end)
        end = min(end, len(job.tokens) - 1)
        if end > job.read:
            try:
                self._read(job, job.read, end, job.caches or [])
            except UserError as error:
                self._cancel(job, bad(str(error), "messages", "invalid_image"))
                self.at_work = None
                return
            job.read = end
            if end in job.snapshots:
                names, last = job.names[: end // self.store.block], end == len(job.names) * self.store.block
                if last or CHECKPOINT_SHARE * sum(c.nbytes for c in job.caches or ()) <= self.store.room:
                    self.store.remember(names, job.tokens, copy.deepcopy(job.caches or []))
            self.pace.read(time.perf_counter() - tic, running)
            job.post(job, Progress(end, len(job.tokens)))
        else:
            self._join(job)
            self.pace.owe(time.perf_counter() - tic, running)
        self.at_work = None

    def _read(self, job: Job, start: int, end: int, caches: list[Any]) -> None:
        """Read prompt and answer of a job from `start` to `end`. Raises UserError where its images can't be."""
        if job.images and job.sees(start):
            job.images.read(self.model.model, caches, start, end)
        else:
            shifts = {"shifts": (job.images.shift,)} if job.images else {}
            self.model(mx.array([[*job.tokens, *job.answer][start:end]]), cache=caches, **shifts)
        mx.eval([c.state for c in caches])
        self.tokens_read += end - start

    def _read_answer(self, job: Job) -> None:
        """One block of an answer, in chunks as a prompt's, so that the next turn finds it.

        What was computed while it was written won't do: a token at a time, in a batch, rounds otherwise than in a
        chunk, and a remembered prefix has to be what a fresh reading gives. A block costs two steps or so, once in a
        block's worth of steps.
        """
        self.at_work = job
        tic, block, tokens = time.perf_counter(), self.store.block, [*job.tokens, *job.answer]
        names = self.store.names([*tokens, 0], job.marks)
        own = job.trims or job.known > len(job.names)  # else the point where the prompt ended is to stay
        while job.known < len(names) and self.store.knows(names[: job.known + 1]):
            job.known, own = job.known + 1, job.trims
        if job.known < len(names):
            start = job.known * block
            caches = self.store.take(names[: job.known], own) if start else make_prompt_cache(self.model)
            if caches is None:
                job.known = len(tokens) + job.max_tokens  # it had to make room: no more of this one
            else:
                for at in range(start, start + block, self.chunk):
                    self._read(job, at, min(at + self.chunk, start + block), caches)
                job.known += 1
                self.store.remember(names[: job.known], tokens, caches)
        if job.known < len(names):
            self.unread.append(job)
        self.pace.owe(time.perf_counter() - tic, bool(self.batches))
        self.at_work = None

    def _join(self, job: Job) -> None:
        self.reading.remove(job)
        single = job.caches or []
        self._enter(job, single)
        while job.followers:
            follower = job.followers.pop()
            follower.cached = job.read
            self._enter(follower, single)
        self._remember(job, single)

    def _remember(self, job: Job, caches: list[Any]) -> None:
        """Keep the whole blocks of a prompt that is in `caches`, whose owner the store becomes."""
        blocks = job.read // self.store.block
        if blocks and exact_trim(caches):
            for c in caches:
                c.trim(job.read - blocks * self.store.block)
            self.store.remember(job.names[:blocks], job.tokens, caches)

    def _enter(self, job: Job, single: list[Any]) -> None:
        """Give a job whose prompt is in the caches `single` its place in a batch."""
        how = job.sampling
        processors: list[Processor] = make_processors(how, len(job.tokens))
        if job.constraint:
            processors.append(job.constraint)
        sampler = None if how.greedy else KeyedSampler(how)
        shift = job.images.shift if job.images else 0
        row = RowSampling(sampler, how.logit_bias, job.logprobs is not None, shift)
        caches = _merge_caches([single])
        more = (self._eos, job.max_tokens, self.team.share)
        batch = Decoding(self.model, id(job), job.tokens, caches, row, processors, *more)
        job.first = time.perf_counter()
        job.caches = None
        if job.images:
            job.images.release()
        key = bucket(job.total)
        if key in self.batches:
            self.batches[key][0].extend(batch)
            self.batches[key][1].append(job)
        else:
            self.batches[key] = (batch, [job])

    def _decode(self, key: int) -> list[Job]:
        """The next token of every answer in a bucket; returns whose answers grew."""
        batch, jobs = self.batches[key]
        over: list[Job] = []
        grew: dict[Job, None] = {}
        for job, r in self._next(batch, list(jobs)):
            if job in over:
                break  # a stop text or a call ended it among the tokens of one step
            if job.constraint and job.constraint.failed:
                jobs.remove(job)
                if not r.finish_reason:
                    over.append(job)
                job.post(job, job.constraint.error())
                continue
            job.generated += 1
            job.answer.append(r.token)
            grew[job] = None
            reason = r.finish_reason or ""
            deltas = [] if reason == "stop" else job.parser.token(r.token)
            chosen = (
                () if job.logprobs is None or reason == "stop" else (self._chosen(r.token, r.logprobs, job.logprobs),)
            )
            if job.parser.stopped:
                reason = reason or "stop"
                if not r.finish_reason:
                    over.append(job)
            if reason:
                jobs.remove(job)
                deltas = deltas + job.parser.finish()
            if deltas or chosen:
                job.post(job, Generated(tuple(deltas), chosen))
            if reason:
                done = "tool_calls" if job.parser.calls and reason == "stop" else reason
                job.post(job, Done(done, job.usage(), job.parser.stop.matched))
        self._over += over
        if over:
            gone = {id(j) for j in over}
            batch.filter([i for i, uid in enumerate(batch.uids) if uid not in gone])
        if not jobs:
            del self.batches[key]
            mx.clear_cache()
        return list(grew)

    def _end_step(self, grew: list[Job]) -> None:
        """After a step: end what only the first process saw ending, and note whose answers have a block to be read."""
        for number, length in self.team.agree([[job.number, len(job.answer)] for job in self._over]):
            if self.team.follows and (job := self.orders.job(number)):
                del job.answer[length:]
                self._leave(job)
        self._over.clear()
        for job in grew:
            whole = len(job.tokens) + len(job.answer) >= (job.known + 1) * self.store.block
            seen = job.images is not None and (job.images.whole or job.sees(job.known * self.store.block))
            if whole and not seen and job.leader is None and job not in self.unread:
                self.unread.append(job)

    def _next(self, batch: Decoding, jobs: list[Job]) -> Iterable[tuple[Job, Any]]:
        """The next token of every answer; of a single one the next few, where they can be guessed."""
        if (self.lookup or self.draft) and len(jobs) == len(self.batches) == 1 and not self.reading:
            (job,) = jobs
            guesses, lookup = self._guesses(job, batch)
            if guesses:
                responses, right = batch.verify(guesses)
                if lookup:
                    lookup.outcome(len(guesses), right)
                self.guessed += len(guesses)
                self.guessed_right += right
                return [(job, r) for r in responses]
        return zip(jobs, batch.next())

    def _guesses(self, job: Job, batch: Decoding) -> tuple[list[int], Lookup | None]:
        """Tokens that may follow in a single answer: what followed the same ones before, or else the draft model's."""
        if not (room := batch.room()):
            return [], None
        if job.lookup is None:
            job.lookup = Lookup([*job.tokens, *job.answer])
        lookup = job.lookup
        for token in job.answer[len(lookup.tokens) - len(job.tokens) :]:
            lookup.add(token)
        if self.lookup and lookup.wanted and (guesses := lookup.guess(batch.newest, min(room, LONGEST))):
            return guesses, lookup
        if self.draft and not job.images:
            return self.draft.guess(lookup.tokens, batch.newest, room), None
        return [], None

    def _chosen(self, token: int, logprobs: mx.array, top: int) -> Chosen:
        """A token with its log probability; JSON has no infinity, so an impossible token has OpenAI's -9999."""
        best = np.array(mx.argsort(-logprobs)[:top])
        ids = [token, *(int(t) for t in best)]
        values = np.maximum(np.array(logprobs[mx.array(ids)].astype(mx.float32)), -9999.0)
        pairs = [(self.tokenizer.decode([t]), float(v)) for t, v in zip(ids, values)]
        return Chosen(*pairs[0], tuple(pairs[1:]))

    def _cancel(self, job: Job | None, error: ApiError) -> None:
        if job is None:
            return  # it ended here, and elsewhere
        if job in self.reading:
            self.reading.remove(job)
            self._remember(job, job.caches or [])  # clients that lose patience try again
            job.caches = None
            mx.clear_cache()
            for follower in job.followers:
                self._start(follower, self.store.room)
        elif leader := next((j for j in self.reading if job in j.followers), None):
            leader.followers.remove(job)
        elif not self._leave(job):
            return  # it ended by itself meanwhile, and said so
        job.post(job, error)

    def _leave(self, job: Job) -> bool:
        """Take a running answer out of its batch, if it is in one."""
        for key, (batch, jobs) in list(self.batches.items()):
            if job in jobs:
                jobs.remove(job)
                batch.filter([i for i, uid in enumerate(batch.uids) if uid != id(job)])
                if not jobs:
                    del self.batches[key]
                    mx.clear_cache()
                return True
        return False
