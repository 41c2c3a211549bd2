"""The wired limit for a model at work: its weights and the cache it will fill; elsewhere than on a Mac nothing.

While mlx-lm itself generates it wires all that is recommended, and then restores what it found: this limit, which
holds before, and between the turns of a conversation, when macOS would otherwise let go of the weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from . import device, plan
from .loaded import layer_plans, weight_bytes


@contextlib.contextmanager
def wired_for(models: list[Any], tokens: int, step: int = plan.PREFILL_STEP) -> Iterator[int]:
    """Wire loaded models and their caches at `tokens` of context; yields the limit, 0 where nothing is to be wired."""
    machine = device.here()
    if machine.kind != "mac":
        yield 0
        return
    needed = 0
    for model in models:
        needed += weight_bytes(model) + plan.price(layer_plans(model), tokens, machine.float_bytes, step)
    with device.wired(needed, machine) as limit:
        yield limit
