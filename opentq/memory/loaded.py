"""What a loaded model says of its memory: the bytes of its weights, how its caches grow, and the context it is for."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..errors import UserError
from ..hosts import hooks
from ..hosts.host import host_of
from ..hosts.mlx_lm.files import context_length
from ..hosts.mlx_lm.public import make_prompt_cache
from ..hosts.plan import LayerPlan
from ..hosts.policy import left_alone
from .skeleton import flat


def weight_bytes(model: Any) -> int:
    """Bytes of a model's parameters."""
    return sum(p.nbytes for _, p in flat(model.parameters()))


def layer_plans(model: Any) -> list[LayerPlan]:
    """The plans that `compress` made; for a model left alone, one native plan per cache."""
    record = hooks.installed(model)
    if record:
        return record.plans
    caches = make_prompt_cache(model)
    mx.eval(model(mx.array([[0]]), cache=caches), [c.state for c in caches])
    host = host_of(model)
    return left_alone(caches, host.traits(host.decoder(model)))


def check_length(model: Any, tokens: int) -> None:
    """Raise UserError for texts of more tokens than the model was made for: what is measured there says nothing."""
    made_for = model_context(model)
    if made_for and tokens > made_for:
        raise UserError(
            f"{tokens:,} tokens are asked for, and the model was made for {made_for:,}: beyond them it answers badly "
            "with any cache; ask for fewer"
        )


def model_context(model: Any) -> int:
    """Tokens that the model was made for; 0 when neither its config.json nor its arguments say."""
    known = getattr(model, "context_length", None)
    return known if known is not None else context_length(vars(model.args) if hasattr(model, "args") else {})
