"""`import mlx_lm.models` without `import mlx_lm`.

The package's own init imports transformers, which takes two seconds that a command which only reads a config need not
spend. The first use of any of the package's own names runs its init after all.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

from ...errors import UserError


def defer_mlx_lm() -> None:
    """Let `mlx_lm.models` be imported without `mlx_lm` itself, which imports transformers and takes two seconds.

    The package is entered into `sys.modules` unexecuted; the first use of any of its own names executes it.
    """
    if "mlx_lm" in sys.modules:
        return
    spec = importlib.util.find_spec("mlx_lm")
    if spec is None:
        raise UserError("mlx-lm is not installed: pip install 'mlx-lm>=0.32.2,<0.33'")
    package = importlib.util.module_from_spec(spec)
    package.__class__ = _Deferred
    sys.modules["mlx_lm"] = package


class _Deferred(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self.__class__ = types.ModuleType  # type: ignore[assignment]
        assert self.__spec__ is not None and self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)
