"""Several models, one at a time: the folders of `--allow-model-loading`, and the change from one to another.

A request that names another model of the list has it loaded when nobody is being answered; until it is there, and while
somebody is, requests get a 503. The memory planner is asked before the old model is let go, and when the new one can't
be loaded the old one comes back; if that fails, too, each later request has it tried again. Names are those of the list
alone: nothing in a request is ever used as a path.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx

from ..dialogue.errors import ApiError, overloaded
from ..dialogue.request import GenerationRequest
from ..errors import UserError
from ..memory import source
from ..memory.device import GIB, here
from ..memory.plan import predict
from ..memory.skeleton import build
from ..spec.recommended import AUTO, recommend
from .options import ServeOptions
from .service import Service

log = logging.getLogger("opentq.serve")

LOADING = ("another model is being loaded", "model_loading")
LOST = ("no model is loaded, because the last change of models failed", "no_model")

FIRST_CONTEXT = 1024
"""Tokens that must fit beside a model for it to be loaded."""


class Roster:
    """The models that requests may name; `service` runs the one that is loaded. Used in the event loop."""

    def __init__(self, service: Service, options: ServeOptions, load: Callable[[ServeOptions], Service]):
        """`load` makes a service from the options of one model; it is called in a worker thread."""
        self.service = service
        self.options = options
        self._load = load
        self._change_task: asyncio.Task[None] | None = None
        models = [
            options,
            *(
                replace(options, model=folder, names=(), adapter=None, chat_template=None, draft="")
                for folder in options.loadable
            ),
        ]
        self._known = {name: o for o in reversed(models) for name in o.served_names}

    @property
    def names(self) -> tuple[str, ...]:
        """The names that are told: the loaded model's, then the others'."""
        own = self.service.shown
        others = sorted({n for o in self._known.values() for n in o.shown_names} - set(own))
        return (*own, *others)

    async def find(self, request: GenerationRequest) -> Service:
        """The service that answers `request`, after its model was loaded if need be. Raises ApiError 503 or 507."""
        if self._change_task and not self._change_task.done():
            raise overloaded(LOADING[0], 10, LOADING[1])
        wanted = self._known.get(request.model or "")
        service = self.service
        if service.refusal == LOST:
            wanted = wanted or self.options
        elif wanted is None or wanted.model == self.options.model or service.draining:
            return service
        elif service.busy:
            raise _busy(service)
        # Shielded: a client that goes away must not leave the change half done.
        self._change_task = asyncio.ensure_future(self._change(wanted))
        self._change_task.add_done_callback(
            lambda task: task.cancelled() or task.exception()
        )  # its client may have gone away
        await asyncio.shield(self._change_task)
        return self.service

    async def changed(self) -> None:
        """Wait until no model is being changed."""
        if self._change_task:
            await asyncio.wait([self._change_task])

    async def _change(self, wanted: ServeOptions) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(None, check_memory, wanted)
        except UserError as error:
            raise _failed(wanted, error) from error
        if self.service.busy:  # a request was on its way in
            raise _busy(self.service)
        lost = self.service.refusal == LOST
        self.service.refuse(*LOADING)
        try:
            service = await loop.run_in_executor(None, self._swap, wanted)
        except BaseException as error:
            # Whatever it was: the old model comes back, unless that is the one that could not be loaded.
            if not (lost and wanted is self.options):
                await self._back()
            else:
                self.service.refuse(*LOST)
            if isinstance(error, UserError):
                raise _failed(wanted, error) from error
            raise
        self.service, self.options = service, wanted
        service.start()
        log.info("serving %s", ", ".join(service.names))

    async def _back(self) -> None:
        """Load the model before again. When that fails, too, each later request tries once more."""
        try:
            service = await asyncio.get_running_loop().run_in_executor(None, self._load, self.options)
        except BaseException as error:  # noqa: BLE001 (whatever it was, the server must go on answering)
            self.service.refuse(*LOST)
            log.error("no model is loaded: %s could not be loaded again: %s", self.options.model, error)
        else:
            self.service = service
            service.start()

    def _swap(self, wanted: ServeOptions) -> Service:
        """Let the old model go, wait for what it writes to disk, and load the other. A worker thread."""
        self.service.close()
        self.service.engine.forget()
        self.service.prompter.vision = None  # it holds the model, too
        gc.collect()
        mx.clear_cache()
        return self._load(wanted)


def _busy(service: Service) -> ApiError:
    name = service.shown[0]
    return overloaded(f"{name!r} is answering; a request can have another model loaded after it", 10, "model_busy")


def _failed(wanted: ServeOptions, error: UserError) -> ApiError:
    log.error("%s can't be loaded: %s", wanted.model, error)
    return ApiError(507, "this model can't be loaded; the server's log says why", "model", "model_error")


def check_memory(options: ServeOptions) -> None:
    """Raise ApiError when, by the memory planner, the model does not fit with a short context."""
    device = here()
    limit = device.usable if options.memory is None else options.memory
    origin = source.find(options.model)
    kind = origin.config.get("model_type", "")
    asked = recommend(kind).spec if options.kv == AUTO else options.kv
    skeleton = build(origin.config, origin.name, device.float_bytes)
    plans = skeleton.plans(asked)
    weights = source.decoded_bytes(skeleton, device) or origin.weight_bytes(device.float_bytes) or 0
    need = predict(skeleton, plans, FIRST_CONTEXT, weights, device, options.prefill_step or 64).total
    if need > limit:
        text = f"this model needs {need / GIB:.2f} GiB and the server has {limit / GIB:.2f}"
        raise ApiError(507, text, "model", "model_too_large")
