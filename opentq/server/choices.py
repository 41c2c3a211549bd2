"""Several answers to one request: `n` of them to each prompt, as streams side by side whose events come out as one.

Each answer is a request of its own to the engine, priced as such. Those of one prompt read it once: the first reads,
and the others go on from its caches (`Job.leader`).
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from ..dialogue.errors import ApiError
from ..dialogue.request import Done, Generated, GenerationRequest, Usage
from .service import GONE, Events, Service, Stream


def parts(request: GenerationRequest) -> list[GenerationRequest]:
    """A request per prompt, with its own `n`."""
    return [replace(request, prompt=p, prompts=()) for p in request.prompts] or [request]


async def open_all(service: Service, request: GenerationRequest) -> Stream | Several:
    """Admit all answers of a request, or none. Raises ApiError."""
    streams: list[Stream] = []
    try:
        for part in parts(request):
            first: Stream | None = None
            for i in range(part.n):
                seed = part.sampling.seed
                sampling = part.sampling if seed is None else replace(part.sampling, seed=(seed + i) % 2**64)
                stream = await service.open(replace(part, n=1, sampling=sampling), first.job if first else None)
                first = first or stream
                streams.append(stream)
    except BaseException:  # a client that went away included
        for stream in streams:
            stream.cancel()
        raise
    return streams[0] if len(streams) == 1 else Several(streams)


class Several(Events):
    """What `Stream` is, for several: every event says which answer it belongs to, and the last `Done` ends it."""

    def __init__(self, streams: list[Stream]):
        super().__init__(streams[0].id)
        self.streams = streams
        self._left = len(streams)
        self._usage = Usage()
        self._tasks = [asyncio.ensure_future(self._forward(i, s)) for i, s in enumerate(streams)]

    def cancel(self, error: ApiError = GONE) -> None:
        """End all of them. Safe at any time."""
        for task in self._tasks:
            task.cancel()
        for stream in self.streams:
            stream.cancel(error)

    async def _forward(self, index: int, stream: Stream) -> None:
        try:
            async for event in stream:
                if isinstance(event, Done):
                    self._left -= 1
                    first = stream.job.leader is None
                    self._usage = _sum(self._usage, event.usage, first)
                    event = replace(event, choice=index, last=not self._left, usage=self._usage)
                elif isinstance(event, Generated):
                    event = replace(event, choice=index)
                self.events.put_nowait(event)
        except ApiError as error:
            self.events.put_nowait(error)


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
