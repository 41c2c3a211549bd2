"""The header of a GGUF file: metadata and where each tensor lies, without reading any weight.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. Read here in a tenth
of a second; the reader of the `gguf` package makes an object of every token and takes seconds for a vocabulary. That
package says what the tensor types are, and it decodes them (`tensors.py`).
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ....errors import UserError

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Value types of the format as `struct` knows them."""
STRING, ARRAY = 8, 9
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
PLAUSIBLE = 1 << 32
"""No count or length in a header is as large as this; a damaged file may say so."""


class GGUFError(UserError):
    """This GGUF file can't be used; the message says why and what to do."""


@dataclass(frozen=True)
class Tensor:
    """One tensor: rows first in `shape`, its type's number in the format, and its bytes from the file's start."""

    shape: tuple[int, ...]
    type: int
    file: Path
    start: int
    size: int


@dataclass(frozen=True)
class Header:
    """What a file says of itself; of a split model, what all parts say together."""

    path: Path
    metadata: dict[str, Any] = field(repr=False)
    tensors: dict[str, Tensor] = field(repr=False)

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the architecture's own, such as `block_count` for `llama.block_count`."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def need(self, key: str) -> Any:
        """The same. Raises GGUFError when the file does not have it."""
        value = self.get(key)
        if value is None:
            raise GGUFError(f"{self.path.name} lacks {self.architecture}.{key}; convert the model again")
        return value


def library() -> Any:
    """The `gguf` package. Raises GGUFError when it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise GGUFError("GGUF files need the package gguf: pip install 'opentq[gguf]'") from error
    return gguf


def read(path: Path | str) -> Header:
    """Read a file's header, and those of the other parts where it is one of several.

    Raises GGUFError for what is no GGUF file, is cut short, lacks a part, or holds no language model.
    """
    path = Path(path).expanduser()
    first = _read_one(path)
    count = int(first.metadata.get("split.count", 1))
    if count > 1:
        first = _join(path, count)
    _check_kind(first)
    return first


def _join(path: Path, count: int) -> Header:
    match = PART.fullmatch(path.name)
    if match is None:
        raise GGUFError(f"{path.name} is one of {count} parts of a model; give it its own name back: NAME-00001-of-...")
    parts = [path.with_name(f"{match[1]}-{n:05}-of-{count:05}.gguf") for n in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise GGUFError(f"{path.name} is one of {count} parts and {', '.join(missing)} is missing; download it, too")
    headers = [_read_one(part) for part in parts]
    tensors = {name: tensor for header in headers for name, tensor in header.tensors.items()}
    return Header(parts[0], headers[0].metadata, tensors)


def _check_kind(header: Header) -> None:
    name, kind = header.path.name, str(header.metadata.get("general.type", "model"))
    if header.architecture == "clip" or kind == "mmproj":
        raise GGUFError(
            f"{name} is a vision projector (mmproj), not a language model; give the other .gguf of the model"
        )
    if kind != "model":
        raise GGUFError(f"{name} holds no model but: {kind}; give the .gguf of the model itself")
    if not header.architecture:
        raise GGUFError(f"{name} does not say its architecture (general.architecture); convert the model again")


def _read_one(path: Path) -> Header:
    try:
        file = path.open("rb")
    except OSError as error:
        raise GGUFError(f"can't read {str(path)!r}: {error.strerror}") from error
    with file:
        try:
            metadata, tensors = _Reader(file, path).header()
        except (EOFError, struct.error, UnicodeDecodeError, OverflowError, MemoryError) as error:
            raise GGUFError(f"{path.name} is cut short or damaged in its header; download it again") from error
    size = path.stat().st_size
    end = max((t.start + t.size for t in tensors.values()), default=0)
    if end > size:
        raise GGUFError(f"{path.name} is cut short: {size:,} of {end:,} bytes are there; download it again")
    return Header(path, metadata, tensors)


class _Reader:
    """One pass over a header."""

    def __init__(self, file: BinaryIO, path: Path):
        self.file, self.path = file, path

    def header(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        magic = self.file.read(4)
        if magic != b"GGUF":
            pointer = magic == b"vers"
            what = "a Git LFS pointer: fetch the file itself with `git lfs pull`" if pointer else "not a GGUF file"
            raise GGUFError(f"{self.path.name} is {what}")
        version = self.number("I")
        if version not in (2, 3):
            order = "big-endian" if version in (2 << 24, 3 << 24) else f"of version {version}"
            raise GGUFError(f"{self.path.name} is a GGUF file {order}; versions 2 and 3, little-endian, can be read")
        count, pairs = self.count(), self.count()
        metadata = {self.string(): self.value(self.number("I")) for _ in range(pairs)}
        found = [self.tensor() for _ in range(count)]
        align = int(metadata.get("general.alignment", 32))
        base = -(-self.file.tell() // align) * align
        tensors = {name: Tensor(shape, kind, self.path, base + at, size) for name, shape, kind, at, size in found}
        return metadata, tensors

    def tensor(self) -> tuple[str, tuple[int, ...], int, int, int]:
        name = self.string()
        shape = tuple(self.count() for _ in range(self.number("I")))[::-1]
        kind, at = self.number("I"), self.number("Q")
        return name, shape, kind, at, self.bytes_of(name, shape, kind)

    def bytes_of(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        constants = library().constants
        try:
            block, size = constants.GGML_QUANT_SIZES[constants.GGMLQuantizationType(kind)]
        except (KeyError, ValueError) as error:
            raise GGUFError(
                f"{self.path.name}: tensor {name} has type {kind}, which the installed gguf package does not know; "
                "upgrade it, or take another quantisation of the model"
            ) from error
        return math.prod(shape) // block * size

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(form)))[0]

    def count(self) -> int:
        number = self.number("Q")
        if number > PLAUSIBLE:
            raise EOFError
        return number

    def take(self, size: int) -> bytes:
        data = self.file.read(size)
        if len(data) < size:
            raise EOFError
        return data

    def string(self) -> str:
        return self.take(self.count()).decode("utf-8", errors="surrogateescape")

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise EOFError
        inner, count = self.number("I"), self.count()
        if inner in SCALARS:
            form = SCALARS[inner]
            return list(struct.unpack(f"<{count}{form}", self.take(count * struct.calcsize(form))))
        return [self.value(inner) for _ in range(count)]
