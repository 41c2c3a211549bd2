"""Load a model of mlx-vlm with a compressed cache, with errors for people."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from ...spec.text import Spec, asked
from .. import floats, hooks
from ..mlx_lm.load import ModelError, check_folder
from ..mlx_lm.names import resolve

EXTRA = "pip install 'opentq[vlm]'"


def only_here(path: str) -> bool:
    """Whether a model folder is of a type that mlx-vlm knows and mlx-lm does not; mlx-vlm is not imported for it."""
    config = Path(resolve(path)).expanduser() / "config.json"
    try:
        kind = str(json.loads(config.read_text()).get("model_type"))
    except (OSError, ValueError, AttributeError):
        return False
    if not kind.isidentifier() or importlib.util.find_spec("mlx_vlm") is None:
        return False
    return _has("mlx_vlm", kind) and not _has("mlx_lm", kind)


def _has(package: str, kind: str) -> bool:
    models = importlib.util.find_spec(package).submodule_search_locations[0]  # type: ignore[union-attr,index]
    folder = Path(models) / "models"
    return (folder / f"{kind}.py").exists() or (folder / kind / "__init__.py").exists()


def load(path: str, kv: Spec | str | None = None) -> tuple[Any, Any]:
    """Load a model folder or repository with mlx-vlm; returns `(model, processor)`.

    Args:
        path: folder or Hugging Face repository.
        kv: a KV spec or its text; `"auto"` for what is recommended for the model's family; None or "off" leaves
            mlx-vlm's own caches.

    Raises:
        ModelError: mlx-vlm is not installed, or the model is missing, incomplete, or not one that it knows.
        SpecError, NothingCompressed, HookError: see `opentq.compress`.
    """
    spec = None if kv is None else asked(kv)
    path = resolve(path)
    check_folder(path)
    if importlib.util.find_spec("mlx_vlm") is None:
        raise ModelError(f"models that take images need mlx-vlm: {EXTRA}")
    import mlx_vlm

    try:
        model, processor = mlx_vlm.load(path)
    except (ValueError, FileNotFoundError, RuntimeError, TypeError, OSError) as error:
        said = str(error).strip().splitlines()
        raise ModelError(
            f"model {path!r} can't be loaded by mlx-vlm: {said[0] if said else type(error).__name__}"
        ) from error
    floats.settle(model)
    if spec is not None:
        hooks.compress(model, spec)
    return model, processor


def sees(model: Any) -> bool:
    """Whether `model` takes images."""
    return any(name in model for name in ("vision_tower", "vision_model", "vision_encoder", "visual", "vision_embed"))
