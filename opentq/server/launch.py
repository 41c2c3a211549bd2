"""From options to a running server: load in the engine's thread, price, bind, and stop cleanly."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import uvicorn

from ..contracts.layout import FLUSH
from ..errors import UserError
from ..hosts import hooks
from ..hosts.mlx_lm.generate import check_draft
from ..hosts.mlx_lm.load import load, make_cache, model_folder, ranks
from ..hosts.mlx_vlm.load import takes_images
from ..memory.device import GIB
from ..memory.loaded import model_context
from ..records import fingerprint, make_folder
from ..spec.recipe import Recipe
from ..spec.recommended import advice
from ..spec.text import AUTO
from . import connections
from .admission import Admission
from .app import MAX_HEADERS, build
from .draft import Draft
from .engine import Engine
from .options import ServeOptions
from .pace import choose_chunk
from .prefix import PrefixStore
from .prefix_files import NOTE, OPTION, Identity, PrefixFiles, kept_chunk
from .pricing import Prices, appraise
from .roster import Roster
from .service import Service
from .team import Alone, Team, gone
from .worker import Worker

log = logging.getLogger("opentq.serve")

MAX_CHUNK = 2048


def bind(options: ServeOptions) -> socket.socket:
    """Take the port before anything is loaded; nobody is let in yet. Raises UserError where it can't be had."""
    taken = socket.socket(socket.AF_INET6 if ":" in options.host else socket.AF_INET)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((options.host, options.port))
    except (OSError, OverflowError) as error:
        taken.close()
        raise _no_port(options, error) from error
    return taken


def _no_port(options: ServeOptions, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(f"can't listen on {options.host}, port {options.port} ({reason}): give another --host or --port")


def make_service(options: ServeOptions, worker: Worker | None = None) -> tuple[Service, Prices]:
    """Load the model in the engine's thread, a new one if none is given, and put the service together."""
    worker = worker or Worker()
    return worker.submit(_prepare, options, worker).result()


def _prepare(options: ServeOptions, worker: Worker) -> tuple[Service, Prices]:
    tokens: dict[str, Any] = {"trust_remote_code": options.trust_remote_code or None}
    if options.chat_template:
        tokens["chat_template"] = options.chat_template
    adapter = {"adapter_path": options.adapter} if options.adapter else {}
    images = not adapter and ranks() == 1 and takes_images(options.model)
    model, tokenizer = load(options.model, kv=options.kv, images=images, tokenizer_config=tokens, **adapter)
    team = Alone()
    if ranks() > 1:
        if not hasattr(model, "shard"):
            raise UserError(
                f"{options.model}: mlx-lm's {type(model).__module__.rpartition('.')[2]} can't be cut by heads over "
                "several processes; serve it with one, or another model"
            )
        team = Team()
    draft = None
    if options.draft:
        draft, own = load(options.draft, kv=AUTO if isinstance(options.kv, Recipe) else options.kv)
        check_draft(model, tokenizer, draft, own)
    if options.prompt_cache_dir:
        record = hooks.installed(model)
        folders: list[Path | str] = [model_folder(options.model), *([options.adapter] if options.adapter else [])]
        identity = Identity(
            options.model, "+".join(fingerprint(f) for f in folders), str(record.spec) if record else "off"
        )
        folder = identity.folder(options.prompt_cache_dir)
        step = kept_chunk(folder, lambda: choose_chunk(model, MAX_CHUNK), options.prefill_step)
    else:
        step = options.prefill_step or choose_chunk(model, MAX_CHUNK, team.slowest)
    context = model_context(model)
    if options.max_context and context and options.max_context > context:
        log.warning(
            "--max-context %d is longer than the %d tokens that the model was made for", options.max_context, context
        )
    wanted = options.max_context or context or 32768
    prices = appraise(model, step, options.memory, wanted, draft)
    prices = replace(prices, budget=team.least(prices.budget))
    admission = Admission(lru_cache(4096)(prices.price), prices.budget, options.concurrency, options.queue)
    longest = admission.largest(wanted)
    if longest < wanted:
        if options.max_context:
            raise UserError(
                f"--max-context {wanted} needs {prices.price(wanted) / GIB:.2f} GiB and {prices.budget / GIB:.2f} GiB "
                f"are left; {longest} tokens fit, or give more with --memory"
            )
        log.warning("the context is %d tokens, not the model's %d: more does not fit in memory", longest, wanted)
    cache_bytes = prices.budget if options.prompt_cache_bytes is None else options.prompt_cache_bytes
    mx.set_cache_limit(max(64 << 20, min(prices.weights, 1 << 30)))
    store = PrefixStore(max(step, FLUSH), min(cache_bytes, prices.budget))
    if options.prompt_cache_dir:
        pending = prices.budget // 8  # held until they are written; taken from what requests may hold
        admission.budget -= pending
        disk_bytes = options.prompt_cache_dir_bytes
        here = make_folder(folder / f"{NOTE}-{step}", OPTION, 0o700)
        store.files = PrefixFiles(here, identity, store.block, disk_bytes, pending, lambda: make_cache(model))
    images_bytes = 0
    if getattr(model, "vision", None):
        images_bytes = prices.budget // 8  # held until their prompts are read; taken from what requests may hold
        admission.budget -= images_bytes
    engine = Engine(model, tokenizer, store, step, team)
    engine.lookup = options.lookup and team.size == 1  # guesses are settled by one process
    if draft:
        engine.draft = Draft(draft, options.drafts, model_context(draft) or longest)
    vocab = int(model(mx.array([[0]])).shape[-1])
    return Service(engine, admission, options, longest, vocab, worker, images_bytes), prices


class Server(uvicorn.Server):
    """uvicorn with a drain of our own: running answers end, the rest get an error each; a second signal is final."""

    def __init__(self, service: Service, options: ServeOptions):
        self.roster = Roster(service, options, lambda o: make_service(o, service.worker)[0])
        config = uvicorn.Config(
            build(self.roster, options),
            host=options.host,
            port=options.port,
            http=connections.limited(connections.allowed()),
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            h11_max_incomplete_event_size=MAX_HEADERS,
            timeout_graceful_shutdown=5,
            backlog=connections.BACKLOG,
        )
        super().__init__(config)
        self.options = options
        self._draining: asyncio.Task[None] | None = None

    @property
    def service(self) -> Service:
        return self.roster.service

    async def serve(self, sockets: Any = None) -> None:
        connections.quiet_accept(asyncio.get_running_loop())
        self.service.on_failure = lambda: setattr(self, "should_exit", True)
        self.service.start()
        try:
            await super().serve(sockets)
        finally:
            await self.roster.changed()
            self.service.close()

    async def startup(self, sockets: Any = None) -> None:
        try:
            await super().startup(sockets)
        except OSError as error:  # two servers that loaded at the same time may both have been given the port
            raise _no_port(self.options, error) from error

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self._draining or not self.started:
            self.force_exit = self._draining is not None and sig == signal.SIGINT
            self.should_exit = True
            return
        # Signals arrive outside the loop's own calls: hand over to it.
        self.service.call_soon(self.begin_drain)

    def begin_drain(self) -> None:
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        await self.roster.changed()
        await self.service.drain(self.options.drain)
        self.should_exit = True


def follow(service: Service) -> None:
    """Take the first process's steps until it stops. Raises Lost when it, or another one, is gone."""
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, signal.SIG_IGN)  # sent to all of them: the first lets answers end
    try:
        service.worker.submit(service.engine.run).result()
    except RuntimeError as error:
        raise gone(error) from error


def describe(service: Service, prices: Prices, options: ServeOptions) -> str:
    """What is in use, for the terminal."""
    from ..hosts.report import report

    engine = service.engine
    lines = []
    if hooks.installed(engine.model):
        lines.append(str(report(engine.model)))
        if line := advice(engine.model, options.kv):
            lines.append(line)
    else:
        lines.append("KV cache: mlx-lm's own, not compressed")
    if engine.team.size > 1:
        lines.append(f"{engine.team.size} processes run the model, a part each; bytes are those of one part")
    if engine.draft:
        lines.append(f"draft: {options.draft} guesses {options.drafts} tokens of single answers at once")
    full = prices.price(service.max_context)
    lines += [
        f"context: {service.max_context} tokens, {full / 2**20:.0f} MiB each when full; "
        f"{prices.budget / GIB:.2f} GiB for requests and remembered prefixes",
        f"prompts are read in chunks of {engine.chunk} tokens; up to {service.admission.slots} requests run, "
        f"{service.admission.queue} wait",
        "prompts may have images" if service.prompter.vision else "prompts are text",
        f"serving {', '.join(service.shown)} on http://{options.host}:{options.port}/v1",
    ]
    return "\n".join(lines)
