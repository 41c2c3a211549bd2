"""How far a compressed cache moves a model's predictions: KL divergence, top-1 agreement and perplexity, at depths.

Reference and contender read the same text. At each depth a window of tokens is teacher-forced in small steps, and each
prediction is compared with the one that the model makes from its own cache after the very same steps. The whole text
passes through the compressed cache, so the error is that of use: hidden states, and the keys made from them, are
those of a model that has attended to compressed tokens from the start.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import UserError
from ..records import Record
from . import metrics
from .contenders import NATIVE, Contender, enter
from .evaluation import Evaluation
from .forward import Tick, forced, prefill


@dataclass(frozen=True)
class Protocol:
    """How fidelity is measured.

    Attributes:
        depths: tokens of context before each window.
        window: tokens scored at each depth, a multiple of `step`.
        step: tokens per teacher-forced step; within a step tokens see each other in fp16.
        sequences: texts, read as one batch.
        prefill: tokens per step of the text between windows.
        seed: which texts.
        simulate: all contenders are simulated (`contenders.enter`), not only those of `Evaluation.simulated`.
    """

    depths: tuple[int, ...] = (512, 2048, 4096)
    window: int = 128
    step: int = 16
    sequences: int = 2
    prefill: int = 512
    seed: int = 0
    simulate: bool = False

    def __post_init__(self) -> None:
        if not self.depths or list(self.depths) != sorted(set(self.depths)) or self.depths[0] < 1:
            raise UserError(f"--depths must be ascending numbers of tokens above 0, not {list(self.depths)}")
        if min(self.window, self.step, self.sequences, self.prefill) < 1 or self.window % self.step:
            raise UserError(f"--window {self.window} must be a positive multiple of --step {self.step}")
        for before, after in zip(self.depths, self.depths[1:]):
            if before + self.window > after:
                raise UserError(f"windows overlap: depth {before} plus --window {self.window} passes depth {after}")

    @property
    def length(self) -> int:
        """Tokens per text: the last window and the token that its last prediction is of."""
        return self.depths[-1] + self.window + 1


@dataclass
class _Reading:
    """One pass over the texts: log probabilities `[B, window, V]` per depth and the bytes that the cache held there."""

    log_probs: list[mx.array]
    cache_bytes: list[int]


def run(on: Evaluation, protocol: Protocol) -> list[Record]:
    """Measure each contender at each depth; returns their records in order, old ones where the file has them."""
    keys = _keys(on, protocol)
    missing = [name for name, own in keys.items() if not all(map(on.records.find, own))]
    on.tick((len(keys) - len(missing)) * protocol.sequences * (protocol.length - 1))
    if missing:
        rows = on.text.tokens(on.tokenizer, protocol.sequences, protocol.length, protocol.seed)
        tokens = mx.array(rows)
        simulated = _simulated(on, protocol, NATIVE)
        reference = _read(on.model, enter(NATIVE, on.model, simulated), tokens, protocol, on.tick)
        note = {"reference": "f16"} if simulated and not protocol.simulate else {}
        for name in missing:
            start = time.perf_counter()
            contender = enter(name, on.model, _simulated(on, protocol, name))
            # The first reading is both sides of the native row.
            reading = reference if name == NATIVE else _read(on.model, contender, tokens, protocol, on.tick)
            seconds = time.perf_counter() - start
            for i, (depth, key) in enumerate(zip(protocol.depths, keys[name])):
                if on.records.find(key) is None:
                    targets = tokens[:, depth + 1 : depth + protocol.window + 1]
                    result = compare(reference.log_probs[i], reading.log_probs[i], targets, protocol.step)
                    held = {"cache_bytes": reading.cache_bytes[i], "native_bytes": reference.cache_bytes[i]}
                    bits = {"bits": round(contender.bits, 4), **note}
                    on.records.add(key, {**bits, **result, **held, "seconds": round(seconds, 2)})
    found = [on.records.find(key) for own in keys.values() for key in own]
    return [r for r in found if r is not None]


def _simulated(on: Evaluation, protocol: Protocol, name: str) -> bool:
    return protocol.simulate or name in on.simulated


def _keys(on: Evaluation, protocol: Protocol) -> dict[str, list[Record]]:
    """What identifies the results of every contender, by depth."""
    settings, keys = on.about("fidelity"), {}
    for name in on.names:
        described = asdict(protocol) | {"depths": list(protocol.depths), "simulate": _simulated(on, protocol, name)}
        keys[name] = [{**settings, "protocol": described, "spec": name, "depth": depth} for depth in protocol.depths]
    return keys


def _read(model: Any, contender: Contender, tokens: mx.array, protocol: Protocol, tick: Tick) -> _Reading:
    caches = contender.caches()
    reading = _Reading([], [])
    position = 0
    for depth in protocol.depths:
        prefill(model, tokens[:, position:depth], caches, protocol.prefill, tick)
        window = tokens[:, depth : depth + protocol.window]
        parts = [metrics.log_probs(y) for _, y in forced(model, window, caches, protocol.step, tick)]
        whole = mx.concatenate(parts, axis=1)
        mx.eval(whole)
        reading.log_probs.append(whole)
        reading.cache_bytes.append(sum(c.nbytes for c in caches))
        position = depth + protocol.window
    return reading


def compare(reference: mx.array, other: mx.array, targets: mx.array, block: int) -> Record:
    """Statistics of two predictions `[B, T, V]` (log probabilities) of `targets` `[B, T]`, each with its interval.

    KL in nats; `kl_blocks` are its means over blocks of neighbours, by which two specs can be compared in pairs;
    `ppl_ratio` is the contender's perplexity over the reference's; `top1` the share of equal argmaxes.
    """
    distance = np.array(metrics.kl(reference, other), dtype=np.float64)
    agree = np.array(mx.argmax(reference, -1) == mx.argmax(other, -1), dtype=np.float64)
    seen = np.array(mx.take_along_axis(reference, targets[..., None], axis=-1)[..., 0], dtype=np.float64)
    got = np.array(mx.take_along_axis(other, targets[..., None], axis=-1)[..., 0], dtype=np.float64)

    def mean(x: np.ndarray) -> np.ndarray:
        return x.mean(-1)

    def ratio(x: np.ndarray) -> np.ndarray:
        return np.exp((x[..., 0] - x[..., 1]).mean(-1))

    return {
        "tokens": int(distance.size),
        "kl_mean": metrics.bootstrap(distance, mean, block),
        "kl_blocks": [float(f"{x:.4g}") for x in distance.reshape(-1, block).mean(-1)],
        "kl_median": metrics.bootstrap(distance, lambda x: np.median(x, axis=-1), block),
        "kl_p99": metrics.bootstrap(distance, lambda x: np.percentile(x, 99, axis=-1), block),
        "top1": metrics.bootstrap(agree, mean, block),
        "ppl": float(np.exp(-got.mean())),
        "ppl_native": float(np.exp(-seen.mean())),
        "ppl_ratio": metrics.bootstrap(np.stack([seen, got], axis=-1), ratio, block),
    }
