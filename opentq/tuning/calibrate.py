"""Where a model's queries look: means and covariances of queries and keys after RoPE, per layer and KV head.

Text goes through the model once, with its keys and values in fp16. After every step each layer's queries and keys
are summed up (on the device, in float32) and added to sums in float64; nothing else is kept, so memory is that of the
sums and of one sequence, whatever the number of tokens. The sums are written down after every sequence, and a run that
was stopped goes on behind the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ..attention import channels
from ..caches.step import Handle, Step
from ..contracts.rotary import Rotary
from ..errors import UserError
from ..evaluate.corpus import Corpus
from ..evaluate.forward import Tick, nothing, prefill
from ..evaluate.simulate import SimulatedCache
from ..files import appearing
from ..hosts import hooks, rotary
from ..hosts.identity import fingerprint
from ..spec import calibration
from ..spec.kv import KVSpec
from ..spec.recipe import text as recipe_text
from ..spec.text import Spec

SUMS = ("q_sum", "q_outer", "k_sum", "k_outer")


@dataclass(frozen=True)
class Reading:
    """What is read: `sequences` texts of `context` tokens, `step` at a time."""

    tokens: int = 2048
    context: int = 1024
    step: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < calibration.NEEDED:
            raise UserError(
                f"--tokens {self.tokens} is too little to calibrate on: at least {calibration.NEEDED} are needed"
            )
        if self.context < 2 or self.step < 1:
            raise UserError(f"--context {self.context} must be at least 2 tokens")

    @property
    def lengths(self) -> list[int]:
        """Tokens of every sequence: whole contexts, and what is left."""
        whole, rest = divmod(self.tokens, self.context)
        return [self.context] * whole + ([rest] if rest > 1 else [])


class Moments:
    """Float64 sums over tokens of one layer, per KV head; queries of all heads that share it count alike."""

    def __init__(self) -> None:
        self.count = 0
        self.group = 1
        self.rotary = Rotary()
        self.sums: dict[str, np.ndarray] = {}

    def add(self, count: int, group: int, sums: dict[str, mx.array]) -> None:
        """Sums over `count` more tokens, with `group` queries to a key."""
        self.count += count
        self.group = group
        for name, array in sums.items():
            self.sums[name] = self.sums.get(name, 0) + np.array(array).astype(np.float64)

    def mean(self, side: str) -> np.ndarray:
        """Mean of "q" or "k", `[H, D]`."""
        return self.sums[f"{side}_sum"] / (self.count * (self.group if side == "q" else 1))

    def second(self, side: str) -> np.ndarray:
        """E[x x'] of "q" or "k", `[H, D, D]`."""
        return self.sums[f"{side}_outer"] / (self.count * (self.group if side == "q" else 1))

    def covariance(self, side: str) -> np.ndarray:
        mean = self.mean(side)
        return self.second(side) - mean[..., :, None] * mean[..., None, :]

    def energy(self) -> np.ndarray:
        """The energy of every unit of channels, `[H, U]` (`attention.channels`)."""
        q_square = np.diagonal(self.second("q"), axis1=-2, axis2=-1)
        k_variance = np.diagonal(self.covariance("k"), axis1=-2, axis2=-1)
        return channels.energies(q_square, np.maximum(k_variance, 0), self.rotary)

    def tensors(self) -> dict[str, np.ndarray]:
        """What is kept of a layer."""
        energy = self.energy()
        dim = self.sums["k_sum"].shape[-1]
        chosen = [channels.choose(e, self.rotary, dim, channels.count(dim)) for e in energy]
        moments = {f"{s}_{name}": getattr(self, name)(s) for s in "qk" for name in ("mean", "covariance")}
        return {
            **{name: a.astype(np.float32) for name, a in {**moments, "energy": energy}.items()},
            "channels": np.array(chosen, np.int32),
            "rotary": np.array(self.rotary, np.int32),
        }


class _Watched(SimulatedCache):
    """An fp16 cache that sums up the queries and keys that pass through."""

    def __init__(self, spec: KVSpec):
        super().__init__(spec)
        self.pending: list[tuple[int, int, dict[str, mx.array]]] = []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Handle, Handle]:
        handles = super().update_and_fetch(keys, values)
        step = _WatchedStep(handles[0].step, keys, self)
        return tuple(Handle(step, h.shape, h.dtype) for h in handles)  # type: ignore[arg-type, return-value]


class _WatchedStep:
    """Stands in for a step and sums up its queries."""

    def __init__(self, inner: Step, keys: mx.array, cache: _Watched):
        self.inner, self.keys, self.cache = inner, keys, cache

    def attend(self, q: mx.array, **options: Any) -> mx.array:
        heads = self.keys.shape[1]
        sums = {}
        for side, x in (("q", q), ("k", self.keys)):
            # Query heads of one KV head lie together: [B, H, group * L, D] -> [H, B * group * L, D].
            rows = x.reshape(x.shape[0], heads, -1, x.shape[-1]).swapaxes(0, 1).astype(mx.float32)
            rows = rows.reshape(heads, -1, x.shape[-1])
            sums[f"{side}_sum"], sums[f"{side}_outer"] = rows.sum(1), rows.swapaxes(1, 2) @ rows
        count = self.keys.shape[0] * self.keys.shape[2]
        self.cache.pending.append((count, q.shape[1] // heads, sums))
        return self.inner.attend(q, **options)


class Calibrator:
    """Runs a model over texts and keeps the moments of its layers.

    Args:
        model: a loaded model; it keeps its own caches.
        spec: what the recipe says of every layer; which layers can be compressed follows from it.
        partial: where sums are written after every sequence; None keeps them in memory.
    """

    def __init__(self, model: Any, spec: Spec, reading: Reading, partial: Path | None = None):
        self.model, self.reading, self.partial = model, reading, partial
        self.spec = spec
        plans = [p for p in hooks.compress(model, self.spec) if p.compressed]
        hooks.uninstall(model)
        self.layers = [str(p.spec) for p in plans]
        # Windows forget, latents are keys of all heads at once: neither is ever read in pages.
        self.places = {n: p.index for n, p in enumerate(plans) if not (p.window or p.latent or p.part)}
        if not self.places:
            raise UserError("no layer of this model has keys that can be calibrated (only windows, latents or shared)")
        self.moments = {n: Moments() for n in self.places}
        self.done = 0
        self.model_print = fingerprint(model)

    def run(self, rows: Sequence[Sequence[int]], about: str = "", tick: Tick = nothing) -> None:
        """Read `rows` of token ids; `about` says what they are, so that a stopped run goes on with the same only."""
        key = f"{self.model_print} {self.reading} {about}"
        self._resume(key)
        for row in rows[: self.done]:
            tick(len(row))
        for row in rows[self.done :]:
            caches, watched = self._caches()
            tokens = mx.array([list(row)])
            if not self.done:
                with rotary.watch(list(watched.values())) as seen:
                    self._read(tokens, caches, watched, tick)
                for n, cache in watched.items():
                    self.moments[n].rotary = seen[id(cache)]
            else:
                self._read(tokens, caches, watched, tick)
            self.done += 1
            self._keep(key)

    def _read(self, tokens: mx.array, caches: list[Any], watched: dict[int, _Watched], tick: Tick) -> None:
        def summed(count: int) -> None:
            for n, cache in watched.items():
                for part in cache.pending:
                    self.moments[n].add(*part)
                cache.pending.clear()
            tick(count)

        prefill(self.model, tokens, caches, self.reading.step, summed)

    def _caches(self) -> tuple[list[Any], dict[int, _Watched]]:
        hooks.compress(self.model, self.spec, self_test=False)
        record = hooks.installed(self.model)
        assert record is not None
        hooks.uninstall(self.model)
        caches = record.own_caches()
        watched = {n: _Watched(KVSpec.parse("f16")) for n in self.places}
        for n, index in self.places.items():
            caches[index] = watched[n]
        return caches, watched

    # ---- a run that was stopped

    def _keep(self, key: str) -> None:
        if self.partial is None:
            return
        arrays = {f"{n}.{s}": m.sums[s] for n, m in self.moments.items() for s in SUMS}
        for n, m in self.moments.items():
            arrays[f"{n}.about"] = np.array([m.count, m.group, *m.rotary], np.int64)
        write(self.partial, arrays, {"key": key, "done": str(self.done)})

    def _resume(self, key: str) -> None:
        if self.partial is None or not self.partial.exists():
            return
        from safetensors import safe_open

        try:
            with safe_open(self.partial, "numpy") as file:
                metadata = file.metadata() or {}
            arrays = load_file(self.partial)
        except (OSError, SafetensorError):
            return  # cut while it was written: begin again
        if metadata.get("key") != key:
            return
        self.done = int(metadata["done"])
        for n, m in self.moments.items():
            m.count, m.group, dims, traditional = map(int, arrays[f"{n}.about"])
            m.rotary = Rotary(dims, bool(traditional))
            m.sums = {s: arrays[f"{n}.{s}"] for s in SUMS}

    # ---- what comes out

    @property
    def tokens(self) -> int:
        """Tokens read so far."""
        return min(m.count for m in self.moments.values())

    def save(self, path: Path, evidence: dict[str, Any]) -> None:
        """Write the recipe and its tensors. Raises UserError when statistics are too few or not finite."""
        if self.tokens < calibration.NEEDED:
            raise UserError(
                f"{self.tokens} tokens are too few to calibrate on: at least {calibration.NEEDED} are needed"
            )
        tensors = {f"{n}.{name}": a for n, m in self.moments.items() for name, a in m.tensors().items()}
        bad = sorted(name for name, a in tensors.items() if not np.isfinite(a).all())
        if bad:
            layer = bad[0].partition(".")[0]
            raise UserError(f"layer {layer} gave queries or keys that are not finite: this model can't be calibrated")
        file = path.with_suffix(".safetensors")
        write(file, tensors, {"format": "opentq-calibration", "model": self.model_print})
        table = {
            "tensors": file.name,
            "sha256": calibration.sha256(file),
            "model": self.model_print,
            "tokens": self.tokens,
        }
        comment = f"Made by opentq calibrate. Use it with --kv {path.name}"
        with appearing(path) as temporary:
            temporary.write_text(recipe_text(self.layers, comment, evidence, table))
        if self.partial is not None:
            self.partial.unlink(missing_ok=True)


def write(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """A safetensors file that appears whole or not at all. Raises UserError when it can't be written."""
    try:
        with appearing(path) as temporary:
            save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, temporary, metadata)
    except OSError as error:
        raise UserError(f"can't write {str(path)!r}: {error.strerror}") from error


def texts(corpus: Corpus, tokenizer: Any, reading: Reading) -> list[list[int]]:
    """The token ids that are read. Raises UserError when the text is too short."""
    lengths = reading.lengths
    rows = corpus.tokens(tokenizer, len(lengths), max(lengths), reading.seed)
    return [row[:n] for row, n in zip(rows, lengths)]
