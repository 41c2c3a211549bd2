"""mlx-lm, as a host."""

from __future__ import annotations

from mlx_lm.models import base
from mlx_lm.models import cache as caches

from ...caches import disk
from ...caches.batch import BatchOpenTQCache
from ...caches.latent import BatchOpenTQLatentCache, OpenTQLatentCache
from ...caches.single import OpenTQCache
from ..host import Host
from . import private
from .seams import SEAMS

disk.CLASSES.update({name: c for name, c in vars(caches).items() if isinstance(c, type)})


def _check() -> None:
    # Their signatures are compared when they are asked for.
    for name in ("scaled_dot_product_attention", "make_prompt_cache"):
        getattr(private, name)


HOST = Host(
    name="mlx-lm",
    base=base,
    caches=caches,
    check=_check,
    decoder=lambda model: model,
    traits=SEAMS.traits,
    enter=SEAMS.enter,
    leave=SEAMS.leave,
    single=OpenTQCache,
    latent=OpenTQLatentCache,
    classes=(OpenTQCache, BatchOpenTQCache, OpenTQLatentCache, BatchOpenTQLatentCache),
)
