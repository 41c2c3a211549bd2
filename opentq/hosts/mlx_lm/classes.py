"""mlx-lm's classes for a model's config, found without weights and, for most types, without transformers."""

from __future__ import annotations

import copy
import importlib
from typing import Any

from .files import ModelError


def classes(config: dict[str, Any]) -> tuple[Any, Any, tuple[str, ...]]:
    """The model's class, that of its arguments, and notes: an unknown model type is read as a Llama.

    Raises ModelError where the type needs a package that is not installed.
    """
    kind = str(config.get("model_type"))
    try:
        arch = importlib.import_module(f"mlx_lm.models.{kind}")
    except ModuleNotFoundError:
        from .private import _get_classes  # knows the renamed types, but imports transformers: 2 s

        try:
            return (*_get_classes(copy.deepcopy(config)), ())
        except ValueError:
            llama = importlib.import_module("mlx_lm.models.llama")
            note = f"model type {kind!r} is not known to mlx-lm: read as a Llama with full attention in every layer"
            return llama.Model, llama.ModelArgs, (note,)
    except SystemExit as error:  # it has printed which
        raise ModelError(f"mlx-lm's model type {kind!r} needs a package that is not installed") from error
    return arch.Model, arch.ModelArgs, ()
