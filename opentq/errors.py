"""Errors for people: what is wrong, with which value, and what to do. The command line prints them in one line."""

from __future__ import annotations

import errno
import tempfile


class UserError(ValueError):
    """Something the user can mend; exits with `exit_code` and no traceback."""

    exit_code = 2


def first_line(error: BaseException) -> str:
    """A library's error in one line; what is no text of its own (a KeyError's key) after the error's name."""
    said = str(error).strip().partition("\n")[0]
    return said if said and type(error) in (ValueError, RuntimeError, OSError) else f"{type(error).__name__}: {said}"


def explained(error: BaseException) -> UserError | None:
    """What a library's error means for the user, where that is known: its own words are about the library's insides."""
    text = str(error)
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in text:
        return UserError(
            f"the disk is full: make room in {tempfile.gettempdir()} (where MLX compiles what it computes with) and in "
            "the folders that are written to, or set TMPDIR to a folder with room"
        )
    if "Currently only supports float32" in text:
        return UserError(
            "on a CPU MLX multiplies these weights in float32 only, and they were set to half precision after the "
            "model was compressed: call model.set_dtype(mx.float32), or opentq.compress(model, ...) again"
        )
    return None
