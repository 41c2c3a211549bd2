"""Who is compared: KV specs of this package, and the caches that people use instead, at their true bits.

Rivals: `mlx4` and `mlx8` are mlx-lm's own `--kv-bits` (group 64) from the first token on, which quantises every token
at once and keeps no fp16 tail; `q4_0` is llama.cpp's format (blocks of 32, symmetric, one fp16 scale, 4.5 bits) with
the Hadamard rotation that llama.cpp applies, in this package's cache. mlx-lm can't quantise sliding windows; here they
stay as they are for everybody.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..codecs import Affine, Codec, packing
from ..contracts.codec import FP16_MAX, Packed
from ..errors import UserError
from ..hosts import hooks
from ..hosts.mlx_lm.host import HOST
from ..hosts.mlx_lm.public import KVCache, QuantizedKVCache, RotatingKVCache, make_prompt_cache
from ..hosts.policy import native_reason
from ..spec.kv import KVSpec
from ..spec.text import OFF, Spec, parse
from .simulate import SimulatedCache

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
    """llama.cpp's q4_0 as scale and zero: the extreme of a block of 32 becomes -8, `x = (code - 8) * scale`.

    No kernel knows its format: fused ones would choose scales and codes in their own way.
    """

    def __str__(self) -> str:
        return "q4_0" + ("" if self.rotated else ":norot")

    def format(self, head_dim: int) -> None:
        return None

    def bits_per_value(self, head_dim: int) -> float:
        return 4 + 16 * self.groups(head_dim) / head_dim  # the zero follows from the scale and is not stored

    def encode(self, y: mx.array) -> Packed:
        if y.shape[-1] % 32:
            raise ValueError(f"q4_0: head_dim {y.shape[-1]} is not a multiple of 32")
        blocks = mx.clip(y.astype(mx.float32), -FP16_MAX, FP16_MAX).reshape(*y.shape[:-1], -1, 32)
        low, high = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
        scale = (mx.where(-low >= high, low, high) / -8).astype(mx.float16)
        step = mx.where(scale == 0, 1.0, scale.astype(mx.float32))
        codes = mx.clip(mx.floor(blocks / step + 8.5), 0, 15).reshape(y.shape)
        return packing.pack(codes, 4), mx.concatenate([scale, scale * -8], axis=-1).reshape(*y.shape[:-1], -1)


@dataclass(frozen=True)
class _Q4Spec(KVSpec):
    """A spec for the cache of this package whose codec is q4_0; evaluation only."""

    def codecs(self) -> tuple[Codec, Codec]:
        return _Q4(rotated=self.rotate), _Q4(rotated=self.rotate)

    def __str__(self) -> str:
        return "q4_0" if self.rotate else "q4_0:norot"


@dataclass(frozen=True)
class _Mlx(Codec):
    """mlx-lm's quantisation as a codec, for simulation: `mx.quantize` of fp16 numbers, groups of 64, not rotated."""

    bits: int = 4

    def __str__(self) -> str:
        return f"mlx{self.bits}"

    def check(self, head_dim: int) -> None:
        if head_dim % 64:
            raise ValueError(f"mlx-lm's quantised cache: head_dim {head_dim} is not a multiple of 64")

    def bits_per_value(self, head_dim: int) -> float:
        return self.bits + 32 / 64

    def encode(self, y: mx.array) -> Packed:
        return tuple(mx.quantize(y.astype(mx.float16), group_size=64, bits=self.bits))

    def decode(self, packed: Packed, dtype: mx.Dtype, head_dim: int) -> mx.array:
        codes, scales, biases = packed
        return mx.dequantize(codes, scales, biases, group_size=64, bits=self.bits).astype(dtype)


@dataclass(frozen=True)
class _MlxSpec(KVSpec):
    """A spec whose codec is mlx-lm's; simulation only."""

    bits: int = 4

    def codecs(self) -> tuple[Codec, Codec]:
        return _Mlx(self.bits), _Mlx(self.bits)


def check(name: str) -> str:
    """The canonical name of a contender, before any model is loaded. Raises SpecError."""
    own = name.strip().lower()
    if own in OFF:
        return NATIVE
    return own if own in ("q4_0", "q4_0:norot") or _mlx(own) else str(parse(name))


def enter(name: str, model: Any, simulate: bool = False) -> Contender:
    """Make contender `name` ready for `model`, which keeps its own caches.

    With `simulate` every contender, the native one included, is a `SimulatedCache` where it can be: the same numbers
    through the same attention function, at the same speed. Raises what `opentq.compress` raises.
    """
    name = check(name)
    hooks.uninstall(model)

    def own() -> list[Any]:
        return make_prompt_cache(model)

    bits = _mlx(name)
    if not simulate and name == NATIVE:
        return Contender(name, 16.0, own)
    if not simulate and bits:
        quantised = Contender(name, bits + 32 / 64, lambda: [_quantised(c, bits) for c in own()])
        _try(quantised, model)
        return quantised
    spec = _spec(name)
    record = hooks.prepare(model, spec)
    plans = [p for p in record.plans if p.compressed]
    values = sum(p.kv_heads * (p.key_dim + p.value_dim) for p in plans)
    true_bits = 8 * sum(p.bytes_per_token() for p in plans) / values
    if not simulate:
        return Contender(name, true_bits, lambda: hooks.make_caches(record))
    if any(p.spec.pages for p in plans if p.spec):
        raise UserError(
            f"--kv {name}: pages are chosen among packed tokens and can't be simulated; leave --simulate out"
        )
    if any(p.part for p in record.plans):
        raise UserError("layers that hold several caches can't be simulated; leave --simulate out for this model")
    places = {p.index: p.spec for p in plans if p.spec is not None}

    def simulated() -> list[Any]:
        caches = own()
        for i, cache in enumerate(caches):
            if i in places:
                caches[i] = SimulatedCache(places[i], eager=bool(bits))
            elif type(cache) is RotatingKVCache and not cache.keep:
                caches[i] = SimulatedCache("f16", window=cache.max_size)
        return caches

    return Contender(name, true_bits, simulated)


def slow(names: Sequence[str], model: Any) -> frozenset[str]:
    """Which of the contenders, and of the reference, are better simulated here, because MLX attends to them slowly.

    On a CPU these are the model's own cache and all rivals; where a model has caches of other kinds, none.
    """
    if mx.default_device() != mx.Device(mx.cpu):
        return frozenset()
    if not all(type(c) is KVCache or (type(c) is RotatingKVCache and not c.keep) for c in make_prompt_cache(model)):
        return frozenset()
    return frozenset({NATIVE, *(n for n in names if n.startswith("q4_0") or _mlx(n))})


def _try(contender: Contender, model: Any) -> None:
    """Raise UserError where MLX has no product of quantised keys and values for this device and type."""
    try:
        caches = contender.caches()
        for length in (64, 1):  # as prompts are read, and as answers are made
            mx.eval(model(mx.zeros((1, length), dtype=mx.int32), cache=caches))
    except RuntimeError as error:
        raise UserError(
            f"{contender.name}: MLX can't compute mlx-lm's quantised cache here ({error}); "
            "compare it with eval fidelity --simulate, or on another device"
        ) from error


def _spec(name: str) -> Spec:
    if name.startswith("q4_0"):
        return _Q4Spec(rotate=name == "q4_0")
    if bits := _mlx(name):
        return _MlxSpec(bits=bits)
    return parse("f16" if name == NATIVE else name)


def _mlx(name: str) -> int:
    """Bits of `mlx4`, `mlx8`, ...; 0 for other names."""
    match = re.fullmatch(r"mlx([2348])", name)
    return int(match[1]) if match else 0


def _quantised(cache: Any, bits: int) -> Any:
    """mlx-lm's quantised cache where it has one, as `mlx_lm.generate --kv-bits` would use."""
    return QuantizedKVCache(group_size=64, bits=bits) if not native_reason(cache, 0, None, HOST.caches) else cache
