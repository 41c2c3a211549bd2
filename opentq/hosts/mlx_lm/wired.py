"""mlx-lm's own wiring, switched off: while it generates it wires all that macOS recommends, however small the model.

Both its generators ask one private function for that; `hands_off` puts in its place one that wires nothing, so that
the limit stays what it is. Another process's memory is wired in vain otherwise, and a full wired limit has brought
down the kernels of busy Macs (ml-explore/mlx#3186, mlx-lm#1666).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from importlib import import_module, metadata

from ..host import HookError

host = import_module("mlx_lm.generate")  # the package hides it behind its function of the same name

NAME = "maybe_set_recommended_wired_limit"


@contextlib.contextmanager
def hands_off() -> Iterator[None]:
    """mlx-lm leaves the wired limit alone meanwhile. Raises HookError where its function is not as expected."""
    original = getattr(host, NAME, None)
    if original is None or inspect.signature(original).parameters:
        raise HookError(f"mlx-lm {metadata.version('mlx-lm')} wires memory in a way that opentq does not know")
    setattr(host, NAME, lambda: None)  # its word for "this device has no such limit"
    try:
        yield
    finally:
        setattr(host, NAME, original)
