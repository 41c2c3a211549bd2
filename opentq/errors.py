"""Errors for people: what is wrong, with which value, and what to do. The command line prints them in one line."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can mend; exits with `exit_code` and no traceback."""

    exit_code = 2
