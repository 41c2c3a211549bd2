"""Load a model and make it generate on a compressed cache: thin over mlx-lm, with errors for people."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import sharded_load

from ...errors import first_line
from ...spec.text import Spec, asked
from .. import floats, hooks
from . import files
from .gguf import architectures as gguf_architectures
from .gguf import header as gguf_header
from .gguf import model as gguf_model
from .names import ModelError, check_folder, is_gguf, resolve


def load(path: str, kv: Spec | str | None = None, images: bool = False, **options: Any) -> tuple[Any, Any]:
    """Load a model; returns `(model, tokenizer)` as `mlx_lm.load` does.

    Args:
        path: a folder, a `.gguf` file, a known name such as `smollm2`, or a Hugging Face repository.
        kv: a KV spec or its text, such as `"int4"`; `"auto"` for what is recommended for the model's family; None or
            `"off"` leaves mlx-lm's own caches.
        images: whether the model is to take images: it is then mlx-vlm's, with `vision` if it has eyes.
        options: passed on to `mlx_lm.load`.

    Raises:
        ModelError, GGUFError: the model is missing, incomplete, or not one that mlx-lm knows.
        SpecError, NothingCompressed: see `opentq.compress`.
    """
    spec = None if kv is None else asked(kv)
    path = resolve(path)
    if is_gguf(path):
        header = gguf_header.read(path)
        model, tokenizer = _load_gguf(header, options)
        config = gguf_architectures.config(header)
    else:
        model, tokenizer = _load_folder(path, options, images)
        config = files.read_config(model_folder(path) / "config.json")
    # The model's own arguments drop what its computation does not need.
    model.context_length = files.context_length(config)
    floats.to_float32(model)
    if spec is not None:
        hooks.compress(model, spec)
    return model, tokenizer


def _load_gguf(header: gguf_header.Header, options: dict[str, Any]) -> tuple[Any, Any]:
    unknown = set(options) - {"tokenizer_config"}
    if unknown:
        raise ModelError(f"{', '.join(sorted(unknown))} can't be used with a GGUF file")
    model, tokenizer = gguf_model.load(header, options.get("tokenizer_config"))
    if ranks() > 1:
        if not hasattr(model, "shard"):
            raise ModelError(f"{str(header.path)!r}: mlx-lm's {model.model_type} can't be cut over several processes")
        model.shard(mx.distributed.init())
        mx.eval(model.parameters())
    return model, tokenizer


def _load_folder(path: str, options: dict[str, Any], images: bool) -> tuple[Any, Any]:
    check_folder(path)
    from ..mlx_vlm.load import only_here

    if images or only_here(path):
        from ..mlx_vlm import text

        return text.load(path, options.get("tokenizer_config"), images)
    # Under mlx.launch every rank loads its share, and caches are compressed on each.
    read = sharded_load if ranks() > 1 else mlx_lm.load
    try:
        return read(path, **options)[:2]
    except (
        *files.WRONG,
        FileNotFoundError,
    ) as error:  # also a type that mlx-lm does not know, and weights that don't fit the configuration
        raise ModelError(f"model {path!r} can't be loaded: {first_line(error)}") from error
    except RuntimeError as error:
        raise ModelError(f"the weights of {path!r} can't be read ({first_line(error)}); download them again") from error


def ranks() -> int:
    """Processes that run this model together: 1, or what `mlx.launch -n N` started."""
    return mx.distributed.init().size() if "MLX_RANK" in os.environ else 1


def is_first_rank() -> bool:
    """Whether this process speaks for all ranks."""
    return ranks() == 1 or mx.distributed.init().rank() == 0


def model_folder(model: str) -> Path:
    """Where a model's files are, downloaded or local."""
    path = Path(resolve(model)).expanduser()
    if path.exists():
        return path
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, local_files_only=True))


def make_cache(model: Any) -> list[Any]:
    """Fresh caches for one generation: compressed where `compress` said so."""
    return make_prompt_cache(model)


def generate(model: Any, tokenizer: Any, prompt: str | list[int], **options: Any) -> str:
    """`mlx_lm.generate`: the whole answer as text."""
    return mlx_lm.generate(model, tokenizer, prompt=prompt, **options)
