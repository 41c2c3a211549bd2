"""Whether computing still makes sense in this process: what would hang or fail without a word is an error here.

MLX computes in threads, and a forked child has none of its parent's: anything it computes waits for ever. And a cache
whose host has taken opentq's attention out again holds tokens that nobody can attend.
"""

from __future__ import annotations

import os

from ..contracts.shared import Shared
from ..errors import UserError


class ProcessError(UserError):
    """This process can't compute with MLX."""


class Seam(Shared):
    """A host's attention function with ours in it; caches made for the host look at it before they take a token."""

    def __init__(self) -> None:
        self.live = False


_computed = False
_forked = False


def computing() -> None:
    """MLX computes in this process from now on. Raises ProcessError in a child of one that has."""
    global _computed
    check()
    _computed = True


def check(seam: Seam | None = None) -> None:
    """Raise ProcessError, or UserError where the host's attention is gone."""
    if _forked:
        raise ProcessError(
            "this process was forked from one that has computed with MLX, whose threads don't exist here: anything it "
            "computes would wait for ever; start workers with multiprocessing.set_start_method('spawn')"
        )
    if seam is not None and not seam.live:
        raise UserError(
            "opentq's attention was taken out (opentq.uninstall()) while this cache was in use, so its tokens can't be "
            "attended: compress the model again and make fresh caches"
        )


def _after_fork() -> None:
    global _forked
    _forked = _computed


os.register_at_fork(after_in_child=_after_fork)
