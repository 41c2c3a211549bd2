"""A GGUF file as `(model, tokenizer)`, the way `mlx_lm.load` gives them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import load_model, load_tokenizer

from . import architectures, tensors
from .architectures import config
from .header import GGUFError, Header
from .tokenizer import eos_ids, write


def load(header: Header, tokenizer_config: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """The model, evaluated, and its tokenizer.

    Weights have the floats of the default device: float32 on a CPU, where only such products are fast, else 16 bits.
    Raises GGUFError when the file is not the model that it says it is.
    """
    settings = config(header)
    # mlx-lm makes models and tokenizers from folders: this one holds all but the weights.
    with tempfile.TemporaryDirectory(prefix="opentq-gguf-") as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(settings))
        write(header, folder)
        try:
            model, _ = load_model(folder, lazy=True, strict=False)
        except (TypeError, ValueError, KeyError) as error:
            raise GGUFError(
                f"{header.path.name} can't be loaded as a {settings['model_type']} model: {error}"
            ) from error
        tokenizer = load_tokenizer(folder, tokenizer_config, eos_token_ids=eos_ids(header))
    _fill(model, header, settings)
    return model, tokenizer


def _fill(model: Any, header: Header, settings: dict[str, Any]) -> None:
    arch = architectures.find(header)
    floats = _floats(arch)
    places = {name: architectures.place(arch, name) for name in header.tensors}
    weights: dict[str, mx.array] = {}
    quantised: dict[str, dict[str, Any]] = {}
    for name, path in places.items():
        if path is None:
            continue
        tensor = header.tensors[name]
        arrays = architectures.undone(arch, name, tensors.read(tensor), settings)
        if width := tensors.bits(tensor):
            quantised[path] = {"group_size": tensors.GROUP, "bits": width, "mode": "affine"}
        if name.endswith(".bias"):
            arrays = {"bias": arrays["weight"]}
        for key, array in arrays.items():
            whole = array if array.dtype == mx.uint32 else array.astype(floats)
            mx.eval(whole)
            weights[f"{path}.{key}"] = whole
    nn.quantize(model, class_predicate=lambda path, module: quantised.get(path, False))
    try:
        model.load_weights(list(weights.items()))
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise GGUFError(f"{header.path.name} is not a whole {settings['model_type']} model: {reason[:200]}") from error
    mx.eval(model.parameters())


def _floats(arch: architectures.Architecture) -> mx.Dtype:
    return mx.float32 if mx.default_device() == mx.Device(mx.cpu) else arch.half
