"""The one door for text from outside: arguments, standard input, files, saved conversations.

Text is UTF-8. A byte-order mark at its start is no text and is taken off; bytes that are no UTF-8 are refused by name.
"""

from __future__ import annotations

import sys
from pathlib import Path

from .errors import UserError

MARK = "\ufeff"
UTF16 = (b"\xff\xfe", b"\xfe\xff")


def decode(data: bytes, what: str) -> str:
    """Bytes as text. Raises UserError, naming `what`, when they are not UTF-8."""
    try:
        return data.decode().removeprefix(MARK)
    except UnicodeDecodeError as error:
        looks = "; it looks like UTF-16" if data.startswith(UTF16) else ""
        raise UserError(
            f"{what} is not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x}){looks}; convert it"
        ) from error


def read(path: Path, what: str) -> str:
    """A file's text; "-" is standard input. Raises UserError."""
    if str(path) == "-":
        return stdin()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"can't read {what} {str(path)!r}: {error.strerror}") from error
    return decode(data, f"{what} {str(path)!r}")


def stdin() -> str:
    """All of standard input. Raises UserError."""
    return decode(sys.stdin.buffer.read(), "standard input")


def check(text: str, what: str) -> str:
    """A string that Python made of an argument or of a typed line: it marks bytes that are no UTF-8 as surrogates."""
    try:
        return decode(text.encode("utf-8", "surrogateescape"), what)
    except UnicodeEncodeError as error:
        raise UserError(f"{what} is not text: it holds half a character (U+{ord(text[error.start]):04X})") from error
