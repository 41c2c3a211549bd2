"""Where the error is made and how it travels: per layer, what the codec does to it alone, and what has piled up.

Two forward passes over the same text are watched, one with an fp16 cache and one compressed. *Local* numbers take the
queries, keys and values of the fp16 pass and put only this layer's keys and values through the codec. *Accumulated*
numbers compare what the two passes hand to and get from attention, so they carry the errors of all layers below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from ..caches.step import Handle, Step
from ..errors import UserError
from ..hosts import hooks
from ..records import Record, Records
from ..spec.kv import KVSpec
from .evaluation import Evaluation
from .forward import Tick, nothing, prefill
from .simulate import SimulatedCache


@dataclass(frozen=True)
class View:
    """`context` tokens are read, and the attention of the last `window` of them is looked at, in `sequences` texts."""

    context: int = 2048
    window: int = 32
    sequences: int = 2
    prefill: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.window < self.context or self.sequences < 1:
            raise UserError(f"--window {self.window} must be at least 1 and less than --context {self.context}")


class _Probe(SimulatedCache):
    """A simulated cache that keeps what passes through: keys and values as they came, the last queries and outputs."""

    def __init__(self, spec: KVSpec):
        super().__init__(spec)
        self.seen_keys: list[mx.array] = []
        self.seen_values: list[mx.array] = []
        self.queries: mx.array | None = None
        self.output: mx.array | None = None
        self.scale = 1.0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Handle, Handle]:
        self.seen_keys.append(keys)
        self.seen_values.append(values)
        handles = super().update_and_fetch(keys, values)
        step = _ProbeStep(handles[0].step, self)
        return tuple(Handle(step, h.shape, h.dtype) for h in handles)  # type: ignore[arg-type, return-value]


class _ProbeStep:
    """Stands in for a step and remembers its last call."""

    def __init__(self, inner: Step, probe: _Probe):
        self.inner, self.probe = inner, probe

    def attend(self, q: mx.array, *, scale: float, **rest: Any) -> mx.array:
        out = self.inner.attend(q, scale=scale, **rest)
        self.probe.queries, self.probe.output, self.probe.scale = q, out, scale
        return out


def run(on: Evaluation, view: View) -> list[Record]:
    """One record per spec and compressed layer, in order; old ones where the file has them."""
    tokens = mx.array(on.text.tokens(on.tokenizer, view.sequences, view.context, view.seed))
    specs, settings = [KVSpec.parse(n) for n in on.names], on.about("layers", view=asdict(view))
    return measure(on.model, tokens, specs, view, settings, on.records, on.tick)


def measure(
    model: Any,
    tokens: mx.array,
    specs: Sequence[KVSpec],
    view: View,
    settings: Record,
    records: Records,
    tick: Tick = nothing,
) -> list[Record]:
    """`run` for given tokens `[B, context]`, with or without a tokenizer in the world."""
    reference: dict[int, _Probe] = {}
    found: list[Record] = []
    for spec in specs:
        old = [r for r in records.all if _without_layer(r) == {**settings, "spec": str(spec)}]
        if old:
            found += old
            continue
        reference = reference or _watch(model, tokens, KVSpec.parse("f16"), view, tick)
        passed = _watch(model, tokens, spec, view, tick)
        for layer, probe in passed.items():
            result = {**local(reference[layer], probe.spec), **accumulated(reference[layer], probe)}
            found.append(records.add({**settings, "spec": str(spec), "layer": layer}, result))
    return found


def _without_layer(record: Record) -> Record:
    return {k: v for k, v in record["settings"].items() if k != "layer"}


def _watch(model: Any, tokens: mx.array, spec: KVSpec, view: View, tick: Tick) -> dict[int, _Probe]:
    """Read the tokens with probes in all layers that can be compressed; returns them by layer index."""
    record = hooks.prepare(model, spec)
    caches = record.own_caches()
    probes = {p.index: _Probe(p.spec) for p in record.plans if p.spec is not None and not p.part}
    if len(probes) < sum(p.compressed for p in record.plans):
        raise UserError("eval layers can't look into layers that hold several caches; use eval fidelity for this model")
    for index, probe in probes.items():
        caches[index] = probe
    prefill(model, tokens[:, : -view.window], caches, view.prefill, tick)
    prefill(model, tokens[:, -view.window :], caches, view.window, tick)
    return probes


def local(reference: _Probe, spec: KVSpec) -> Record:
    """What `spec` does to one layer's keys, values, logits and output, everything else being exact."""
    keys, values = (mx.concatenate(x, axis=2) for x in (reference.seen_keys, reference.seen_values))
    assert reference.queries is not None
    return attention_errors(reference.queries, keys, values, reference.scale, spec)


def attention_errors(q: mx.array, keys: mx.array, values: mx.array, scale: float, spec: KVSpec) -> Record:
    """Errors of causal attention of `q [B, Hq, L, D]`, the last L positions, over `keys` and `values` `[B, Hkv, S, D]`.

    `logit_std` and `logit_error_var` are over the keys that a query sees, weighted by attention: how logits vary, and
    how their error varies where it counts. `attention_kl` is of the attention weights, in nats.
    """
    q, keys, values = (x.astype(mx.float32) for x in (q, keys, values))
    coded_keys, coded_values = (_round_trip(codec, x) for codec, x in zip(spec.codecs(), (keys, values)))
    exact, moved = _logits(q, keys, scale), _logits(q, coded_keys, scale)
    visible = exact > -mx.inf
    weights, moved_weights = mx.softmax(exact, axis=-1), mx.softmax(moved, axis=-1)
    logits, error = mx.where(visible, exact, 0), mx.where(visible, moved - exact, 0)
    ratio = mx.where(visible, mx.log(weights + 1e-30) - mx.log(moved_weights + 1e-30), 0)
    out = _mix(weights, values)
    return {
        "key_cosine": _cosine(keys, coded_keys),
        "key_error": _relative(keys, coded_keys),
        "value_cosine": _cosine(values, coded_values),
        "value_error": _relative(values, coded_values),
        "logit_std": float(mx.sqrt(_variance(weights, logits)).mean()),
        "logit_error_var": float(_variance(weights, error).mean()),
        "attention_kl": float((weights * ratio).sum(-1).mean()),
        "output_error_keys": _relative(out, _mix(moved_weights, values)),
        "output_error_values": _relative(out, _mix(weights, coded_values)),
        "output_error": _relative(out, _mix(moved_weights, coded_values)),
        "output_cosine": _cosine(out, _mix(moved_weights, coded_values)),
    }


def _variance(weights: mx.array, x: mx.array) -> mx.array:
    """Variance over the last axis under `weights` that sum to 1."""
    mean = (weights * x).sum(-1, keepdims=True)
    return (weights * mx.square(x - mean)).sum(-1)


def accumulated(reference: _Probe, passed: _Probe) -> Record:
    """What has piled up where the two passes enter and leave this layer's attention."""
    pairs = ((reference.queries, passed.queries), (reference.output, passed.output))
    (q, q2), (out, out2) = (
        (a.astype(mx.float32), b.astype(mx.float32)) for a, b in pairs if a is not None and b is not None
    )
    return {
        "query_cosine": _cosine(q, q2),
        "query_error": _relative(q, q2),
        "passed_output_cosine": _cosine(out, out2),
        "passed_output_error": _relative(out, out2),
    }


def _round_trip(codec: Any, x: mx.array) -> mx.array:
    return codec.unrotate(codec.decode(codec.encode(codec.rotate(x)), mx.float32, x.shape[-1]))


def _logits(q: mx.array, keys: mx.array, scale: float) -> mx.array:
    """Causal logits of the last L positions, `[B, Hkv, group, L, S]`."""
    batch, _, length, dim = q.shape
    grouped = q.reshape(batch, keys.shape[1], -1, length, dim)
    logits = (grouped @ keys[:, :, None].swapaxes(-1, -2)) * scale
    total = keys.shape[2]
    seen = mx.arange(total)[None] <= mx.arange(total - length, total)[:, None]
    return mx.where(seen, logits, -mx.inf)


def _mix(weights: mx.array, values: mx.array) -> mx.array:
    return weights @ values[:, :, None]


def _cosine(a: mx.array, b: mx.array) -> float:
    lengths = mx.linalg.norm(a, axis=-1) * mx.linalg.norm(b, axis=-1)
    return float(((a * b).sum(-1) / mx.maximum(lengths, 1e-20)).mean())


def _relative(a: mx.array, b: mx.array) -> float:
    """Root of the total squared error over the total square."""
    return float(mx.sqrt(mx.square(a - b).sum() / mx.maximum(mx.square(a).sum(), 1e-20)))
