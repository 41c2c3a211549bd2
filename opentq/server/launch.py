"""From options to a running server: load in the engine's thread, price, bind, and stop cleanly."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import uvicorn

from ..contracts.layout import FLUSH
from ..errors import UserError
from ..hosts import hooks
from ..hosts.mlx_lm.generate import check_draft
from ..hosts.mlx_lm.load import check_folder, load, make_cache, model_folder, ranks
from ..hosts.mlx_vlm.load import takes_images
from ..memory.device import GIB
from ..memory.loaded import model_context
from ..records import fingerprint, make_folder
from ..spec.recipe import Recipe
from ..spec.recommended import advice
from ..spec.text import AUTO, Asked
from . import connections
from .admission import Admission
from .app import MAX_HEADERS, Access, build
from .draft import Draft
from .engine import Engine
from .pace import choose_chunk, fits_blocks
from .prefix import PrefixStore
from .prefix_files import NOTE, OPTION, Identity, PrefixFiles, kept_chunk
from .pricing import Prices, appraise
from .roster import Roster
from .service import Service, ServiceConfig
from .team import Alone, Team, gone
from .worker import Worker

log = logging.getLogger("opentq.serve")

LOOPBACK = ("127.0.0.1", "::1", "localhost")
LOCAL_HOSTS = frozenset({"127.0.0.1", "[::1]", "localhost"})
MAX_CHUNK = 2048


@dataclass
class ServeOptions:
    """What `opentq serve` was asked for; see its help for the meanings."""

    model: str
    kv: Asked = AUTO
    names: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    insecure: bool = False
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    max_body: int = 32 << 20
    max_context: int | None = None
    max_tokens: int = 4096
    memory: int | None = None
    prompt_cache_bytes: int | None = None
    prompt_cache_dir: Path | None = None
    prompt_cache_dir_bytes: int = 20 << 30
    concurrency: int = 64
    queue: int = 64
    prefill_step: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    adapter: str | None = None
    chat_template: str | None = None
    template: dict[str, Any] = field(default_factory=dict)
    keep_alive: float = 5.0
    drain: float = 30.0
    trust_remote_code: bool = False
    loadable: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    any_model: bool = False
    lookup: bool = True
    draft: str = ""
    drafts: int = 3
    keep_volatile: bool = False

    @property
    def served_names(self) -> tuple[str, ...]:
        """The names that requests may give: the model's own, the path or repository as it was given, and aliases."""
        short = Path(self.model).name
        own = self.names or ((short,) if short == self.model else (short, self.model))
        return (*own, "default_model", *(alias for alias, name in self.aliases if name in own))

    @property
    def shown_names(self) -> tuple[str, ...]:
        """The names that everybody is told: without the folder, and without mlx-lm's name for any model."""
        hidden = {"default_model", *([self.model] if Path(self.model).expanduser().exists() else [])} - set(self.names)
        return tuple(n for n in self.served_names if n not in hidden) or (Path(self.model).resolve().name,)


def aliases(given: list[str], options: ServeOptions) -> tuple[tuple[str, str], ...]:
    """The pairs of (alias, name) of `--alias NAME[=MODEL]`. Raises UserError for a model that is not served."""
    models = [options.served_names, *((Path(folder).name, folder) for folder in options.loadable)]
    own = options.served_names[0]
    pairs = []
    for text in given:
        alias, _, name = (part.strip() for part in text.partition("="))
        if not alias or not any((name or own) in names for names in models):
            served = ", ".join(names[0] for names in models)
            raise UserError(f"--alias {text!r} must be NAME or NAME=MODEL, and MODEL one of {served}")
        pairs.append((alias, name or own))
    return tuple(pairs)


def check(options: ServeOptions) -> None:
    """Raise UserError for options that must not go together, before anything is loaded."""
    if options.host not in LOOPBACK and not options.api_key and not options.insecure:
        raise UserError(
            f"--host {options.host} can be reached from other machines: set --api-key (or OPENTQ_API_KEY), "
            "or say --insecure"
        )
    step = options.prefill_step
    if step is not None and not fits_blocks(step):
        raise UserError(f"--prefill-step-size {step} must divide 64, the tokens packed together, or be a multiple")
    parts = {"--prompt-cache-dir": options.prompt_cache_dir, "--draft-model": options.draft}
    for name, value in (parts | {"--allow-model-loading": options.loadable}).items():
        if value and ranks() > 1:
            raise UserError(f"{name} can't be used where several processes run the model; leave it out")
    if options.prompt_cache_dir:
        make_folder(options.prompt_cache_dir.expanduser(), OPTION, 0o700)
    for folder in options.loadable:
        check_folder(folder)
        if not Path(folder).expanduser().exists():
            raise UserError(f"--allow-model-loading {folder} is neither a folder nor a .gguf file")


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
    admission = Admission(prices.cached(), prices.budget, options.concurrency, options.queue)
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
    config = ServiceConfig(
        names=options.served_names,
        shown=options.shown_names,
        max_context=longest,
        max_tokens=options.max_tokens,
        sampling={k: getattr(options, k) for k in ("temperature", "top_p", "top_k", "min_p")},
        prompt_cache_bytes=store.max_bytes,
        template=options.template,
        keep_alive=options.keep_alive,
        any_model=options.any_model,
        keep_volatile=options.keep_volatile,
        images_bytes=images_bytes,
    )
    return Service(engine, admission, config, vocab, worker), prices


def access(options: ServeOptions) -> Access:
    hosts = None
    if options.host in LOOPBACK or options.hosts:
        hosts = LOCAL_HOSTS | {h.lower() for h in options.hosts}
    return Access(options.api_key, hosts, options.origins, options.max_body)


class Server(uvicorn.Server):
    """uvicorn with a drain of our own: running answers end, the rest get an error each; a second signal is final."""

    def __init__(self, service: Service, options: ServeOptions):
        self.roster = Roster(service, options, lambda o: make_service(o, service.worker)[0])
        config = uvicorn.Config(
            build(self.roster, access(options)),
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

    config, engine = service.config, service.engine
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
    full = prices.price(config.max_context)
    lines += [
        f"context: {config.max_context} tokens, {full / 2**20:.0f} MiB each when full; "
        f"{prices.budget / GIB:.2f} GiB for requests and remembered prefixes",
        f"prompts are read in chunks of {engine.chunk} tokens; up to {service.admission.slots} requests run, "
        f"{service.admission.queue} wait",
        "prompts may have images" if service.prompter.vision else "prompts are text",
        f"serving {', '.join(config.shown)} on http://{options.host}:{options.port}/v1",
    ]
    return "\n".join(lines)
