"""Who is compared: KV specs of this package, and the caches that people use instead, at their true bits.

Rivals: `mlx4` and `mlx8` are mlx-lm's own `--kv-bits` (group 64) from the first token on, which quantises every token
at once and keeps no fp16 tail; `q4_0` is llama.cpp's format (blocks of 32, symmetric, one fp16 scale, 4.5 bits) with
the Hadamard rotation that llama.cpp applies, in this package's cache. mlx-lm can't quantise sliding windows; here they
stay as they are for everybody.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_cache

from .. import hooks
from ..codecs import Affine, Codec, packing
from ..codecs.base import FP16_MAX, Packed
from ..policy import native_reason
from ..spec import KVSpec

NATIVE = "native"
"""The model's own cache: the reference of every comparison."""


@dataclass(frozen=True)
class Contender:
    """One way to hold the cache of one model.

    Attributes:
        name: as given on the command line, canonical.
        bits: true bits per value of a compressed token, metadata included, over all layers that can be compressed.
        caches: makes fresh caches.
    """

    name: str
    bits: float
    caches: Callable[[], list[Any]]


@dataclass(frozen=True)
class _Q4(Affine):
    """llama.cpp's q4_0 as scale and zero: the extreme of a block of 32 becomes -8, `x = (code - 8) * scale`."""

    def __str__(self) -> str:
        return "q4_0" + ("" if self.rotated else ":norot")

    def bits_per_value(self, head_dim: int) -> float:
        return 4 + 16 * self.groups(head_dim) / head_dim  # the zero follows from the scale and is not stored there

    def encode(self, y: mx.array) -> Packed:
        self.check(y.shape[-1])
        blocks = self._split(mx.clip(y.astype(mx.float32), -FP16_MAX, FP16_MAX), edge=True)
        low, high = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
        extreme = mx.where(-low >= high, low, high)
        scale = (extreme / -8).astype(mx.float16)
        step = mx.where(scale == 0, 1.0, scale.astype(mx.float32))
        codes = mx.clip(mx.floor(blocks / step + 8.5), 0, 15).reshape(*y.shape[:-1], -1)[..., : y.shape[-1]]
        scales = mx.concatenate([scale, scale * -8], axis=-1).reshape(*y.shape[:-1], -1)
        return packing.pack(codes, 4), scales


@dataclass(frozen=True)
class _Q4Spec(KVSpec):
    """A spec for the cache of this package whose codec is q4_0; evaluation only."""

    def codecs(self) -> tuple[Codec, Codec]:
        return _Q4(4, 32, self.rotate), _Q4(4, 32, self.rotate)

    def __str__(self) -> str:
        return "q4_0" if self.rotate else "q4_0:norot"


def check(name: str) -> str:
    """The canonical name of a contender, before any model is loaded. Raises SpecError."""
    name = name.strip().lower()
    if name in (NATIVE, "q4_0", "q4_0:norot") or _mlx(name):
        return name
    return str(KVSpec.parse(name))


def enter(name: str, model: Any) -> Contender:
    """Make contender `name` ready for `model`, which keeps its own caches. Raises what `opentq.compress` raises."""
    name = check(name)
    hooks.uninstall(model)

    def own() -> list[Any]:
        return mlx_cache.make_prompt_cache(model)

    if name == NATIVE:
        return Contender(name, 16.0, own)
    if bits := _mlx(name):
        return Contender(name, bits + 32 / 64, lambda: [_quantised(c, bits) for c in own()])
    spec = _Q4Spec(rotate=name == "q4_0") if name.startswith("q4_0") else KVSpec.parse(name)
    hooks.compress(model, spec)
    record = hooks.installed(model)
    hooks.uninstall(model)
    assert record is not None
    plans = [p for p in record.plans if p.compressed]
    values = sum(p.kv_heads * (p.key_dim + p.value_dim) for p in plans)
    return Contender(name, 8 * sum(p.bytes_per_token() for p in plans) / values, lambda: hooks.make_caches(record))


def _mlx(name: str) -> int:
    """Bits of `mlx4`, `mlx8`, ...; 0 for other names."""
    match = re.fullmatch(r"mlx([2348])", name)
    return int(match[1]) if match else 0


def _quantised(cache: Any, bits: int) -> Any:
    """mlx-lm's quantised cache where it has one, as `mlx_lm.generate --kv-bits` would use."""
    return mlx_cache.QuantizedKVCache(group_size=64, bits=bits) if not native_reason(cache) else cache
