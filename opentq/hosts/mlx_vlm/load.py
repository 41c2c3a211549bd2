"""Load a model of mlx-vlm with a compressed cache, with errors for people."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from ...errors import first_line
from ...spec.text import Spec, asked
from .. import floats, hooks
from ..mlx_lm.load import ModelError, check_folder
from ..mlx_lm.names import resolve

EXTRA = "pip install 'opentq[vlm]'"


def only_here(path: str) -> bool:
    """Whether a model folder is of a type that mlx-vlm knows and mlx-lm does not; mlx-vlm is not imported for it."""
    kind = str(_config(path).get("model_type"))
    return _known(kind) and not _has("mlx_lm", kind)


def takes_images(path: str) -> bool:
    """Whether a model folder is of a model with eyes that mlx-vlm knows; mlx-vlm is not imported for it."""
    config = _config(path)
    whole = any((_folder(path) / name).exists() for name in ("preprocessor_config.json", "processor_config.json"))
    return bool(config.get("vision_config")) and whole and _known(str(config.get("model_type")))


def _folder(path: str) -> Path:
    """Where a model's small files are; those of a repository are downloaded, as the model is going to be."""
    folder = Path(resolve(path)).expanduser()
    if folder.exists() or path.count("/") != 1:
        return folder
    from huggingface_hub import snapshot_download

    for offline in (True, False):
        try:
            return Path(snapshot_download(path, allow_patterns="*.json", local_files_only=offline))
        except (OSError, ValueError):  # the errors of its own are of these, and loading will say what is wrong
            continue
    return folder


def _config(path: str) -> dict[str, Any]:
    """What config.json says; nothing where there is none."""
    try:
        config = json.loads((_folder(path) / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _known(kind: str) -> bool:
    return kind.isidentifier() and importlib.util.find_spec("mlx_vlm") is not None and _has("mlx_vlm", kind)


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
        raise ModelError(f"model {path!r} can't be loaded by mlx-vlm: {first_line(error)}") from error
    floats.to_float32(model)
    if spec is not None:
        hooks.compress(model, spec)
    return model, processor


def sees(model: Any) -> bool:
    """Whether `model` takes images."""
    return any(name in model for name in ("vision_tower", "vision_model", "vision_encoder", "visual", "vision_embed"))
