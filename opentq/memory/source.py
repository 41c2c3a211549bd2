"""Where a model's config and weight sizes come from: a folder, a GGUF file, a config.json, a named shape, or a
repository.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..hosts import floats
from ..hosts.mlx_lm import files
from ..hosts.mlx_lm.gguf import architectures, header, tensors
from ..hosts.mlx_lm.names import is_gguf, resolve
from . import shapes
from .device import Device
from .skeleton import Skeleton

FLOATS = {"F64", "F32", "F16", "BF16"}
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "U64": 8, "U32": 4, "U16": 2}


@dataclass(frozen=True)
class Source:
    """A model to plan for: its name, config, and the folder or GGUF file that holds its weights, if there is one."""

    name: str
    config: dict[str, Any]
    folder: Path | None = None
    promised_bits: int | None = None
    gguf: header.Header | None = None

    @property
    def has_weights(self) -> bool:
        return bool(self.folder or self.gguf)

    def weight_bytes(self, float_bytes: int) -> int | None:
        """Bytes that the weights take once loaded with floats of `float_bytes`; None without weights.

        Raises ModelError when some are missing or damaged.
        """
        if self.gguf:
            return tensors.loaded_bytes(self.gguf, float_bytes)
        if self.folder is None or not files.weights(self.folder):
            return None
        entries = files.tensors(self.folder).values()
        return sum(math.prod(e["shape"]) * _width(e["dtype"], float_bytes) for e in entries)

    @property
    def quantization(self) -> tuple[int, int] | None:
        """(bits, group) of the weights as the config or the name says."""
        said = self.config.get("quantization") or self.config.get("quantization_config") or {}
        if isinstance(said, dict) and isinstance(said.get("bits"), int):
            return said["bits"], int(said.get("group_size") or 64)
        return (self.promised_bits, 64) if self.promised_bits else None


def decoded_bytes(skeleton: Skeleton, machine: Device) -> int:
    """Bytes of the weights where this machine computes in float32 whatever they were; 0 where it does not."""
    size = 4 * skeleton.parameters
    return size if machine.kind == "cpu" and floats.decodes(size, machine.memory) else 0


def find(model: str) -> Source:
    """The source of `model`. Raises UserError when it is no folder, no shape, and its config can't be had."""
    path = Path(resolve(model)).expanduser()
    if is_gguf(path):
        head = header.read(path)
        return Source(path.stem, architectures.config(head), gguf=head)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UserError(f"{model!r} is not a model folder: it has no config.json")
        return Source(path.resolve().name, files.read_config(path / "config.json"), path)
    if path.is_file():
        name = path.resolve().parent.name if path.name == "config.json" else path.stem
        return Source(name, files.read_config(path))
    named = shapes.find(model)
    if named:
        return Source(model, named[1], promised_bits=shapes.bits_in_name(model))
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise UserError(f"model {model!r} is no folder, config.json or known shape; shapes: {', '.join(shapes.NAMED)}")
    return Source(model, files.read_config(_download_config(model)), promised_bits=shapes.bits_in_name(model))


def _download_config(repository: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, "config.json"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"the config of {repository!r} is not in the local cache and can't be fetched "
            f"({type(error).__name__}); give a folder, a config.json, or a known shape: {', '.join(shapes.NAMED)}"
        ) from error


def _width(dtype: str, float_bytes: int) -> int:
    """Bytes of a number once loaded."""
    return float_bytes if dtype in FLOATS else BYTES.get(dtype, 1)
