"""A whole model in llama.cpp, through llama-cpp-python, as an arm of `opentq bench model`: the same file and threads.

As llama-bench measures: a prompt in batches of 2,048 tokens (512 at a time inside), then one token after another, each
evaluated to its logits; nothing is sampled. Flash attention is on, which quantised values need.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ... import machine
from ...errors import UserError
from ...hosts.mlx_lm.names import is_gguf, resolve
from .llama_cpp import TYPES, require

BLOCK_BYTES = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
BATCH = 2048


def check(model: str) -> Path:
    """The file of `model`. Raises UserError when it is no GGUF file or llama-cpp-python is not installed."""
    path = resolve(model)
    if not is_gguf(path):
        raise UserError(f"--against llama.cpp needs a .gguf file that both can read, and {model!r} is none")
    require()
    return Path(path)


class LlamaCppArm:
    """One KV type of llama.cpp at one depth; what `bench.model.ModelArm` is for ours."""

    parallel = 1
    served_by = "llama.cpp"

    def __init__(self, path: Path, kind: str, room: int):
        from llama_cpp import Llama

        self.kv, self.kind, self.room = f"llama.cpp {kind}", kind, room
        self.depth, self.peak, self.note = 0, 0, ""  # its peak is not known
        self.weight_bytes = path.stat().st_size
        count = machine.threads()
        self.llama: Any = Llama(
            str(path),
            n_ctx=room,
            n_batch=BATCH,
            n_threads=count,
            n_threads_batch=count,
            n_gpu_layers=0,
            type_k=TYPES[kind],
            type_v=TYPES[kind],
            flash_attn=True,
            verbose=False,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values of the tokens so far, by the format's size."""
        meta = self.llama.metadata
        arch = meta["general.architecture"]
        heads, layers = int(meta[f"{arch}.attention.head_count_kv"]), int(meta[f"{arch}.block_count"])
        width = int(meta[f"{arch}.embedding_length"]) // int(meta[f"{arch}.attention.head_count"])
        width = int(meta.get(f"{arch}.attention.key_length", width))
        return int(2 * layers * heads * width * BLOCK_BYTES[self.kind] * self.depth)

    def fill(self, depth: int, how: str) -> None:
        """Read `depth` tokens; random vectors can't be put into its cache, so it is always a prefill."""
        self._eval(depth)
        self.depth = depth

    def prompt(self, count: int, others: int) -> float:
        """Seconds to read `count` more tokens."""
        return self._timed([count])

    def generate(self, count: int, others: int) -> float:
        """Seconds for `count` tokens, one after another."""
        return self._timed([1] * count)

    def _timed(self, steps: list[int]) -> float:
        self.llama.n_tokens = self.depth  # the next call drops what came after
        start = time.perf_counter()
        for count in steps:
            self._eval(count)
        return time.perf_counter() - start

    def _eval(self, count: int) -> None:
        vocabulary = self.llama.n_vocab()
        self.llama.eval([i * 7919 % vocabulary for i in range(count)])

    def close(self) -> None:
        self.llama.close()


def arms(path: Path, room: int) -> list[LlamaCppArm]:
    """One arm for each KV type, with room for `room` tokens."""
    return [LlamaCppArm(path, kind, room) for kind in TYPES]
