"""What requests cost and what there is to spend, in bytes: the memory planner's numbers for a loaded model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..attention.tiled import SCRATCH
from ..errors import UserError
from ..hosts.mlx_lm.public import make_prompt_cache
from ..hosts.plan import LayerPlan
from ..memory import plan
from ..memory.device import GIB, here
from ..memory.loaded import layer_plans, weight_bytes
from .draft import CHUNK as DRAFT_CHUNK


@dataclass(frozen=True)
class Prices:
    """`price(tokens)` is what one sequence holds; `budget` is for all sequences and remembered prefixes together."""

    plans: tuple[LayerPlan, ...]
    weights: int
    budget: int
    float_bytes: int
    chunk: int

    def price(self, tokens: int) -> int:
        return plan.price(self.plans, tokens, self.float_bytes, self.chunk)


def appraise(model: Any, chunk: int, memory: int | None, context: int, draft: Any = None) -> Prices:
    """The prices for a loaded model within `memory` bytes (None: what this machine allows a process).

    A `draft` model counts with its weights, and with its cache of one full context, which it may hold at any time.
    Runs one chunk of a prompt to learn what reading takes. Raises UserError when no request would fit.
    """
    device = here()
    plans = tuple(layer_plans(model))
    weights = weight_bytes(model) + (weight_bytes(draft) if draft else 0)
    limit = device.usable if memory is None else memory
    growing = max((plan.held(p, context, device.float_bytes, chunk) for p in plans), default=0)
    reading = measure_reading(model, chunk) + SCRATCH + growing
    drafting = plan.price(layer_plans(draft), context, device.float_bytes, DRAFT_CHUNK) if draft else 0
    budget = limit - weights - reading - drafting - plan.RESERVE
    prices = Prices(plans, weights, budget, device.float_bytes, chunk)
    if budget < prices.price(1024):
        raise UserError(
            f"no memory for any request: of {limit / GIB:.2f} GiB the weights take {weights / GIB:.2f}, reading a "
            f"prompt {reading / GIB:.2f} and the reserve {plan.RESERVE / GIB:.2f}; give more with --memory, or a "
            "smaller --max-context"
        )
    return prices


def measure_reading(model: Any, chunk: int) -> int:
    """Bytes that reading one chunk takes at its peak, beyond what was held before."""
    caches = make_prompt_cache(model)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model(mx.zeros((1, chunk), dtype=mx.int32), cache=caches)
    mx.eval([c.state for c in caches])
    return max(0, mx.get_peak_memory() - before)
