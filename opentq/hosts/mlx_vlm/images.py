"""Images that people give: read whole, checked, and refused in a line where they are broken, too large or unknown."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from ...errors import UserError

KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
BYTES = 20_000_000
"""Largest file."""

PIXELS = 64_000_000
"""What the pictures of one prompt have together: each takes three bytes a pixel before the model makes it smaller."""


class ImageError(UserError):
    """An image can't be used; the message says which and why."""


def read(path: Path) -> bytes:
    """The bytes of an image file that can be decoded. Raises ImageError."""
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= BYTES else b""
    except OSError as error:
        raise ImageError(f"can't read the image {str(path)!r}: {error.strerror}") from error
    if size > BYTES:
        raise ImageError(_too_large(repr(str(path)), size))
    decode(data, repr(str(path)))
    return data


def decode(data: bytes, name: str = "the image", pixels: int | None = None) -> Image.Image:
    """The image in `data`, upright, RGB; `name` is what errors call it, `pixels` what others have left of `PIXELS`.

    Raises ImageError.
    """
    most = PIXELS if pixels is None else pixels
    if len(data) > BYTES:
        raise ImageError(_too_large(name, len(data)))
    try:
        picture = Image.open(io.BytesIO(data), formats=KINDS)
        # The size stands in the header: a picture that would fill the memory is refused before it is decoded.
        if picture.width * picture.height > most:
            bound = f"{PIXELS:,}" if most == PIXELS else f"the {most:,} that the images before it leave"
            raise ImageError(
                f"{name} has {picture.width:,} x {picture.height:,} pixels, more than {bound}: make it smaller"
            )
        picture.load()
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not an image of a known type ({', '.join(KINDS)})") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"{name} is broken: {error}") from error
    return ImageOps.exif_transpose(picture).convert("RGB")


def _too_large(name: str, size: int) -> str:
    return f"{name} has {size / 1e6:.1f} MB, more than {BYTES / 1e6:.0f}: make it smaller"
