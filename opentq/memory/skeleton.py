"""A model without weights: mlx-lm builds it from its config, lazily, and one token is traced through it unevaluated.

MLX makes arrays only when they are evaluated, so a 70B model's skeleton takes kilobytes and a tenth of a second, and
yet every shape is the true one: parameters, the caches that the model itself asks for, their heads and dims, recurrent
state. No formula per model family is needed, so none can be wrong.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from ..caches.composite import members
from ..errors import first_line
from ..hosts.hooks import own_caches
from ..hosts.host import host_of
from ..hosts.mlx_lm.classes import classes
from ..hosts.mlx_lm.files import WRONG, ModelError, context_length
from ..hosts.plan import LayerPlan
from ..hosts.policy import decide, left_alone, shaped
from ..spec.text import Spec

HEADS = ("num_attention_heads", "num_query_heads", "num_heads", "n_heads", "n_head")
HIDDEN = ("hidden_size", "model_dim", "hidden_dim", "d_model", "n_embd")
"""Names that configurations give their query heads (a list has one number per layer) and their width."""


@dataclass(frozen=True)
class Skeleton:
    """What planning needs to know of a model.

    Attributes:
        name: for tables.
        config: the model's config.json.
        model: the mlx-lm model, with weightless parameters.
        caches: the caches it asks for, after one traced token.
        notes: what was assumed, in words.
    """

    name: str
    config: dict[str, Any]
    model: Any = field(repr=False)
    caches: list[Any] = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> dict[str, Any]:
        """The language model's part of the config."""
        return {**self.config, **(self.config.get("text_config") or {})}

    @property
    def context_limit(self) -> int:
        """Tokens the model was made for; 0 when the config does not say."""
        return context_length(self.config)

    @cached_property
    def modules(self) -> list[tuple[str, Any]]:
        """Modules without children, with their paths."""
        return flat(self.model.leaf_modules(), is_leaf=lambda m: isinstance(m, nn.Module))

    @cached_property
    def arrays(self) -> list[tuple[str, mx.array]]:
        """Parameters with their paths."""
        return flat(self.model.parameters())

    @cached_property
    def widths(self) -> tuple[int, int, int]:
        """(hidden size, widest inner projection, query heads): what the activations of a chunk are made of."""
        text = self.text
        linear = [m for _, m in self.modules if hasattr(m, "to_quantized")]
        hidden, vocabulary = self._said(HIDDEN), self._said(("vocab_size", "num_vocab"))
        inner = max(
            (m.weight.shape[0] for m in linear if m.weight.ndim == 2 and m.weight.shape[0] != vocabulary), default=0
        )
        # A mixture's experts see every token several times over.
        repeats = int(text.get("num_experts_per_tok") or text.get("top_k_experts") or 1)
        experts = max((m.weight.shape[1] for m in linear if m.weight.ndim == 3), default=0)
        return hidden, max(inner, repeats * (experts + 2 * hidden // 3) if experts else 0), self._said(HEADS)

    def _said(self, names: tuple[str, ...]) -> int:
        """The number that the config gives under one of `names`, the largest of a list; 0 where it gives none."""
        found = next((self.text[name] for name in names if self.text.get(name)), 0)
        return int(max(found) if isinstance(found, list) else found)

    @property
    def has_sinks(self) -> bool:
        return any(path.endswith("sinks") for path, _ in self.arrays)

    @property
    def parameters(self) -> int:
        return sum(p.size for _, p in self.arrays)

    def weight_bytes(self, bits: int, group: int = 64, float_bytes: int = 2) -> int:
        """Bytes of the weights, linear layers and embeddings quantised to `bits` (16: not) in groups of `group`.

        Layers that mlx-lm would leave alone or quantise otherwise (routers) are counted so.
        """
        total = 0
        counted: set[str] = set()
        predicate = getattr(self.model, "quant_predicate", None)
        for path, module in self.modules:
            own = flat(module.parameters())
            counted.update(f"{path}.{k}" for k, _ in own)
            choice: Any = bits < 16 and hasattr(module, "to_quantized") and module.weight.shape[-1] % group == 0
            if choice and predicate is not None:
                choice = predicate(path, module)
            asked = choice if isinstance(choice, dict) else {}
            b, g = asked.get("bits", bits), asked.get("group_size", group)
            for key, p in own:
                if choice and key == "weight":
                    total += p.size * b // 8 + 2 * float_bytes * p.size // g
                else:
                    total += p.size * float_bytes
        return total + sum(p.size for k, p in self.arrays if k not in counted) * float_bytes

    def plans(self, spec: Spec | None) -> list[LayerPlan]:
        """One plan per cache with its shapes filled in; without a spec every layer is mlx-lm's own."""
        host = host_of(self.model)
        traits = host.traits(self.model)
        if spec is None:
            return left_alone(self.caches, traits)
        plans = decide(self.caches, spec, host.caches, traits)
        return [shaped(p, members(self.caches[p.index])[p.part]) for p in plans]


def build(config: dict[str, Any], name: str, float_bytes: int = 2) -> Skeleton:
    """The skeleton of a config in floats of 2 or 4 bytes. Raises ModelError naming the wrong field or model type."""
    model_class, args_class, notes = classes(config)
    zero = mx.array(0, mx.bfloat16 if float_bytes == 2 else mx.float32)
    try:
        model = model_class(args_class.from_dict(copy.deepcopy(config)))
        tie(model)
        # Models that look at numbers while they are traced (routers) must not find that out from true products.
        model.update(tree_map(lambda p: mx.broadcast_to(zero, p.shape), model.parameters()))
        for _, module in flat(model.leaf_modules(), is_leaf=lambda m: isinstance(m, nn.Module)):
            if type(module) is nn.Linear:
                module.__class__ = _Weightless
        caches = own_caches(model)()
        model(mx.array([[0]]), cache=caches)
        return Skeleton(name, config, model, caches, notes)
    except WRONG as error:
        raise ModelError(
            f"the config of {name!r} can't be used: {first_line(error)} (model type {config.get('model_type')!r}); "
            "give the model's whole config.json"
        ) from error
    except RuntimeError as error:
        raise ModelError(f"{name!r} can't be planned on this machine: {first_line(error)}") from error


class _Weightless(nn.Linear):
    """A linear layer whose output has the right shape and costs nothing."""

    def __call__(self, x: mx.array) -> mx.array:
        return mx.broadcast_to(mx.array(0, x.dtype), (*x.shape[:-1], self.weight.shape[0]))


def flat(tree: Any, **options: Any) -> list[tuple[str, Any]]:
    return cast("list[tuple[str, Any]]", tree_flatten(tree, **options))


def tie(model: Any) -> None:
    """Gemma 3 learns only from its weights that the output layer is the embedding: without weights, tell it."""
    text = getattr(model, "language_model", model)
    if getattr(text, "model_type", "") == "gemma3_text" and "lm_head" in text:
        text.tie_word_embeddings = True
        text.pop("lm_head")
