"""mlx-vlm, as a host: its models are several, and the language model among them has the caches."""

from __future__ import annotations

from typing import Any

from ...errors import UserError
from ..host import Host
from . import private
from .caches import BatchVLMCache, BatchVLMLatentCache, VLMCache, VLMLatentCache
from .qsa import BatchVLMQSACache, VLMQSACache
from .seams import SEAMS


def decoder(model: Any) -> Any:
    """The language model of `model`, or itself where layers and encoder lie side by side; UserError without layers."""
    language = getattr(model, "language_model", model)
    if not hasattr(language, "layers"):
        raise UserError(
            f"{type(model).__module__} has no language model with layers: there is no KV cache to compress; use it "
            "--kv off"
        )
    return language


CLASSES = (VLMCache, BatchVLMCache, VLMLatentCache, BatchVLMLatentCache, VLMQSACache, BatchVLMQSACache)
for _cls in CLASSES:
    _cls.__module__ = private.caches.__name__  # where mlx-vlm's prefix cache finds the classes that its files name

HOST = Host(
    name="mlx-vlm",
    base=private.base,
    caches=private.caches,
    check=private.check,
    decoder=decoder,
    traits=SEAMS.traits,
    enter=SEAMS.enter,
    leave=SEAMS.leave,
    single=VLMCache,
    latent=VLMLatentCache,
    classes=CLASSES,
    choosing=VLMQSACache,
)
