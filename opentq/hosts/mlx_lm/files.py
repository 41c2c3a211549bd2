"""A model's folder, looked at before anything is loaded: its config.json and the headers of its weights.

`plan` and every command that loads a model read a folder here, so that they agree on whether it is whole. What counts
is what mlx-lm does: it loads every `model*.safetensors`, and a tensor that is in two files once.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from ...errors import UserError

INDEX = "model.safetensors.index.json"
MOST_HEADER = 100 << 20
"""Bytes of the longest header that the format allows."""


WRONG = (ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError, AssertionError)
"""What models raise when a field of their configuration is missing, or is not what it should be."""


class ModelError(UserError):
    """The model can't be loaded; the message says what is missing and what to do."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file. Raises ModelError."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged ({error}); download the model again") from error
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds a {type(found).__name__}, not a JSON object, so it is not a model's")
    return found


def read_config(path: Path) -> dict[str, Any]:
    """A config.json, which says at least what type of model it is for. Raises ModelError."""
    config = read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{path} has no 'model_type', so it is not a model's config.json")
    context_length(config, str(path))
    return config


CONTEXT = [
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "max_seq_length",
    "max_context_length",
    "model_max_length",
    "seq_length",
    "n_ctx",
    "block_size",
]
"""Names that configurations give the number of tokens that a model was made for."""
PARTS = ("text_config", "language_config", "llm_config")
UNBOUNDED = 1 << 40
"""Numbers from here on say that there is no limit: tokenizers write 1e30."""


def context_length(config: dict[str, Any], where: str = "config.json") -> int:
    """Tokens that a model was made for, by its configuration; 0 where that doesn't say. Raises ModelError."""
    for part in [p for p in (*(config.get(name) for name in PARTS), config) if isinstance(p, dict)]:
        for name in CONTEXT:
            said = part.get(name)
            if said is None:
                continue
            number = isinstance(said, (int, float)) and not isinstance(said, bool) and not math.isnan(said)
            if not number or said < 1 or (said < UNBOUNDED and said != int(said)):
                raise ModelError(f"{where}: {name} is {json.dumps(said)}, which is no number of tokens; mend it")
            return int(said) if said < UNBOUNDED else 0
    return 0


def weights(folder: Path) -> list[Path]:
    """The files that a model is loaded from; mlx-vlm takes other names, too, where there are no `model*`."""
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))


def tensors(folder: Path) -> dict[str, dict[str, Any]]:
    """The headers' entries (dtype, shape) of all tensors that a folder's weights hold, each once.

    Raises ModelError when there are none, when a file is damaged, or when some are missing.
    """
    files = weights(folder)
    if not files:
        raise ModelError(f"{str(folder)!r} has no weights (model*.safetensors); the download is not complete")
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        found |= header(file)
    missing = _missing(folder, {f.name for f in files}, set(found))
    if missing:
        raise ModelError(f"{str(folder)!r} lacks {', '.join(missing)}; the download is not complete")
    return found


def _missing(folder: Path, files: set[str], tensors: set[str]) -> list[str]:
    """Files that a folder should have: those of tensors that its index names, else the other shards of a set."""
    if (folder / INDEX).exists():
        places = read_json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
            raise ModelError(f"{folder / INDEX} is damaged (no weight_map); download the model again")
        # An index may be older than the weights: what it names that is there, wherever, is not missing.
        return sorted({place for name, place in places.items() if name not in tensors})
    shards = [re.fullmatch(r"(.+-)(\d+)-of-(\d+)\.safetensors", name) for name in files]
    if not all(shards):  # one file that is whole
        return []
    wanted = {f"{m[1]}{n:0{len(m[2])}d}-of-{m[3]}.safetensors" for m in shards if m for n in range(1, int(m[3]) + 1)}
    return sorted(wanted - files)


def header(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of a safetensors file by tensor, checked against its length. Raises ModelError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length == int.from_bytes(b"version ", "little"):
            raise ModelError(f"{path} is a pointer of Git LFS, not the weights: run `git lfs pull`, or download it")
        if size < 8 or length > min(size - 8, MOST_HEADER):
            raise ModelError(f"{path} is empty, cut off or no safetensors file; download it again")
        try:
            entries = json.loads(file.read(length))
            entries.pop("__metadata__", None)
            end = max((_end(entry) for entry in entries.values()), default=0)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ModelError(f"{path} is damaged ({type(error).__name__}: {error}); download it again") from error
    if 8 + length + end > size:
        raise ModelError(f"{path} is cut off: it has {size:,} of {8 + length + end:,} bytes; download it again")
    return entries


def _end(entry: dict[str, Any]) -> int:
    """Where a tensor's bytes end. Raises ValueError, TypeError or KeyError for what is no entry."""
    start, end = entry["data_offsets"]
    numbers = [start, end, *entry["shape"]]
    if not isinstance(entry["dtype"], str) or any(not isinstance(n, int) or n < 0 for n in numbers) or start > end:
        raise ValueError("a tensor without a type, shape and place")
    return end
