"""The model that a benchmark runs: a folder or GGUF file with weights, or a known shape with random ones."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from ..errors import UserError
from ..hosts.floats import to_float32
from ..hosts.mlx_lm.classes import classes
from ..hosts.mlx_lm.files import context_length
from ..memory import skeleton, source
from ..memory.device import here
from ..memory.loaded import weight_bytes

WEIGHTS = ("random-4bit", "random-f16")
PER_LAYER = ("layer_types", "mlp_only_layers")
"""Config lists with one entry per layer, cut together with the number of layers."""


@dataclass(frozen=True)
class Built:
    """A model, its name for tables, its tokenizer (None with random weights), the bytes of its weights, and sizes."""

    model: Any
    name: str
    tokenizer: Any
    weight_bytes: int
    vocabulary: int
    context_limit: int


def build(model: str, weights: str = "", layers: int = 0, seed: int = 0) -> Built:
    """Load `model`, or make it with random weights. Raises UserError for options that don't go together."""
    if weights and weights not in WEIGHTS:
        raise UserError(f"--weights {weights!r} is not known: use {' or '.join(WEIGHTS)}, or none for a model folder")
    origin = source.find(model)
    if origin.has_weights and not weights:
        if layers:
            raise UserError("--layers is for random weights: add --weights random-4bit, or leave it out")
        from ..hosts.mlx_lm.load import load

        loaded, tokenizer = load(model)
        return Built(loaded, origin.name, tokenizer, weight_bytes(loaded), *_sizes(origin.config))
    config = _cut(origin.config, layers)
    made = random_model(config, weights or "random-4bit", seed)
    name = f"{origin.name} ({config['num_hidden_layers']} layers, {weights or 'random-4bit'})"
    return Built(made, name, None, weight_bytes(made), *_sizes(config))


def random_model(config: dict[str, Any], weights: str, seed: int = 0) -> Any:
    """An mlx-lm model whose weights are random bits of the right shapes: what speed and memory depend on."""
    model_class, args_class, _ = classes(config)
    model = model_class(args_class.from_dict(json.loads(json.dumps(config))))
    skeleton.tie(model)
    mx.random.seed(seed)
    floats = mx.float32 if here().float_bytes == 4 else mx.float16
    if weights == "random-4bit":
        predicate: Any = getattr(model, "quant_predicate", None)

        def choose(path: str, module: Any) -> Any:
            if not hasattr(module, "to_quantized") or module.weight.shape[-1] % 64:
                return False
            return predicate(path, module) if predicate else True

        nn.quantize(model, group_size=64, bits=4, class_predicate=choose)

    def draw(path: str, old: mx.array) -> mx.array:
        if old.dtype == mx.uint32:
            new = mx.random.randint(-(2**31), 2**31 - 1, old.shape).view(mx.uint32)
        elif path.endswith("scales"):
            new = mx.full(old.shape, 0.01, floats)
        elif path.endswith("biases"):
            new = mx.full(old.shape, -0.075, floats)  # codes 0..15 around zero
        elif path.endswith("weight") and old.ndim > 1:
            new = (0.04 * mx.random.normal(old.shape)).astype(floats)
        elif mx.issubdtype(old.dtype, mx.floating):
            new = old.astype(floats)
        else:
            new = old
        # One at a time, so that no float32 intermediate outlives its array.
        mx.eval(new)
        return new

    model.update(tree_map_with_path(draw, model.parameters()))
    to_float32(model)
    return model.eval()


def _cut(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """The config with fewer layers; 0 leaves it."""
    if not layers:
        return config
    text = config.get("text_config") or config
    if not 0 < layers <= text["num_hidden_layers"]:
        raise UserError(f"--layers {layers}: the model has {text['num_hidden_layers']}")
    cut = {**text, "num_hidden_layers": layers}
    cut |= {key: text[key][:layers] for key in PER_LAYER if isinstance(text.get(key), list)}
    return {**config, "text_config": cut, "num_hidden_layers": layers} if "text_config" in config else cut


def _sizes(config: dict[str, Any]) -> tuple[int, int]:
    """(vocabulary, tokens the model was made for; 0 when it does not say)."""
    text = {**config, **(config.get("text_config") or {})}
    return int(text["vocab_size"]), context_length(config)
