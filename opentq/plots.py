"""matplotlib, the one library that draws picture files: `pip install 'opentq[plot]'`."""

from __future__ import annotations

from typing import Any

from .errors import UserError


def pyplot() -> Any:
    """matplotlib.pyplot without a window. Raises UserError when it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install 'opentq[plot]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
