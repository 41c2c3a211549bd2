"""The measurements behind calibration.md, appended to results/calibration.jsonl; what is there is not repeated.

    python docs/studies/calibration.py --model smollm2

KL of simulated caches to the model's own, on code and prose, at three depths: the front of uniform specs with what is
free (`center`, `sink=4`), codecs that spend their bits where queries look (`runs.py`: channels grouped by the energy of
their rotary pair, or by a KLT in the queries' metric), and rivals. Calibrated on other text, at positions below 1,024.
Stopped at any time it goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

# isort: off
import opentq  # noqa: F401 (before MLX, so that its faster matrix product is found on CPUs)
import mlx.core as mx

# isort: on
import numpy as np

from opentq.evaluate import corpus, fidelity, layers
from opentq.evaluate.contenders import NATIVE, Contender, enter
from opentq.evaluate.corpus import about
from opentq.evaluate.simulate import SimulatedCache
from opentq.hosts import hooks, rotary
from opentq.spec.kv import KVSpec

sys.path.insert(0, str(Path(__file__).parent))
from network import Network, on_gpu, options
from pages import prose
from runs import Balanced, Clipped, Pair, Runs, halves

FREE = ":nc:center:sink=4"
FRONT = [
    f"{k}/{v}{FREE}"
    for k, v in zip(("tq6", "tq5", "tq5", "tq4", "tq3", "tq3"), ("tq4", "tq4", "tq3", "tq3", "tq3", "tq2"))
]
UNIFORM = [*FRONT, f"tq4{FREE}", f"tq2{FREE}", "tq5/tq3:nc", "tq5/tq3:nc:sink=4", "tq5/tq3:nc:center", "q4_0", "mlx4"]
RUNS = [
    *(f"{how} {menu} / tq3" for how in ("pairs", "klt") for menu in ("6433", "5432", "5322", "4321")),
    *(f"{how} {menu} / tq2" for how in ("pairs", "klt") for menu in ("5322", "4211")),
    *(
        f"{how} {menu} / klt {values}"
        for how in ("pairs", "klt")
        for menu, values in (("6433", "4332"), ("5432", "4322"), ("5322", "3322"))
    ),
    "plain 5322 / tq3",
    "pairs 5322 / tq3, prose",
    "klt 5322 / tq3, prose",
]
"""How key channels are grouped and the bits of their runs, and what values are. In `pairs` and `klt` the spread of keys
is weighted by the attention that they get, in `plain` it is not."""
RIVALS = ["oscar 2", "oscar 3", "kvarn 4/2", "kvarn 4/4"]


class Seen:
    """What one layer's queries, keys and values are like, per KV head, on the calibration text.

    Attributes:
        metric: E[q q'], with 30 % of its trace as identity, `[H, D, D]`.
        keys, values: samples `[H, N, D]`, centred.
        spread: covariance of keys, weighted by the attention that they get from rows at least 64 later, `[H, D, D]`.
        even: the same with equal weights.
        out: W_O' W_O of the query heads that share a KV head, with 30 % of its trace as identity.
    """

    def __init__(self, probe: layers._Probe, weight: np.ndarray):
        k, v = (np.array(mx.concatenate(x, axis=2).astype(mx.float32)) for x in (probe.seen_keys, probe.seen_values))
        batch, heads, held, dim = k.shape
        assert probe.queries is not None
        q = np.array(probe.queries.astype(mx.float32)).reshape(batch, heads, -1, probe.queries.shape[2], dim)
        rows = q.shape[3]
        flat = q.swapaxes(0, 1).reshape(heads, -1, dim)
        self.metric = _firm(flat.swapaxes(1, 2) @ flat / flat.shape[1])
        first = held - rows
        late = np.arange(held)[None] > np.arange(first, held)[:, None] - 64
        mass = np.zeros((batch, heads, held))
        for b in range(batch):
            scores = np.array(mx.array(q[b]) @ mx.array(k[b])[:, None].swapaxes(-1, -2)) * probe.scale
            seen = np.arange(held)[None] <= np.arange(first, held)[:, None]
            scores = np.where(seen, scores, -np.inf)
            share = np.exp(scores - scores.max(-1, keepdims=True))
            share /= share.sum(-1, keepdims=True)
            mass[b] = np.where(late, 0, share).sum((1, 2))
        mass[..., :4] = 0  # sinks stay exact
        self.even = _covariance(k[:, :, 4:], np.ones((batch, heads, held - 4)))
        self.spread = _covariance(k[:, :, 4:], mass[..., 4:])
        self.keys = (k[:, :, 4:] - k[:, :, 4:].mean(2, keepdims=True)).swapaxes(0, 1).reshape(heads, -1, dim)
        self.values = v[:, :, 4:].swapaxes(0, 1).reshape(heads, -1, dim)
        self.value_spread = self.values.swapaxes(1, 2) @ self.values / self.values.shape[1]
        parts = weight.reshape(weight.shape[0], heads, -1, dim)
        self.out = _firm(np.einsum("ohgd,ohge->hde", parts, parts))
        self.q_square = np.square(flat).mean(1)


def _firm(metric: np.ndarray) -> np.ndarray:
    dim = metric.shape[-1]
    return metric + 0.3 * np.trace(metric, axis1=1, axis2=2)[:, None, None] / dim * np.eye(dim)


def _covariance(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """`[B, H, T, D]` under weights `[B, H, T]`: `[H, D, D]`, around the mean of each text."""
    weight = weight / weight.sum((0, 2), keepdims=True)
    mean = (weight[..., None] * x).sum(2, keepdims=True) / weight.sum(2)[..., None, None]
    y = x - mean
    return np.einsum("bht,bhtd,bhte->hde", weight, y, y)


def klt(metric: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """A basis in which the metric is the identity and vectors are uncorrelated, the widest first: `[H, D, D]`."""
    values, vectors = np.linalg.eigh(metric)
    root = vectors * np.sqrt(values)[:, None] @ vectors.swapaxes(1, 2)
    _, best = np.linalg.eigh(root @ spread @ root)
    return best[:, :, ::-1].swapaxes(1, 2) @ root


class Study(Network):
    """One model and its records."""

    def __init__(self, args: argparse.Namespace):
        super().__init__(args)
        self.records = self.file("calibration")
        self.judged = {"code": corpus.standard_library(), "prose": prose(1)}
        self.seen: dict[str, list[Seen]] = {}

    def calibrated(self, kind: str) -> list[Seen]:
        """What all layers are like on calibration text of one kind."""
        if kind not in self.seen:
            text = corpus.standard_library(corpus.CALIBRATION) if kind == "code" else prose(0)
            count, context = (1, 512) if self.args.quick else (6, 1024)
            rows = mx.array(text.tokens(self.tokenizer, count, context, 0))
            view = layers.View(context, context // 2, count)
            probes = layers._watch(self.model, rows, KVSpec.parse("f16"), view, lambda _: None)
            outs = [np.array(layer.self_attn.o_proj.weight) for layer in self.model.layers]
            self.seen[kind] = [Seen(probes[i], out) for i, out in enumerate(outs)]
            caches = hooks.own_caches(self.model)()
            with rotary.watch(caches) as turned:
                mx.eval(self.model(rows[:1, :1], cache=caches))
            self.rotary = turned[id(caches[0])]
            self.say("calibrated on", kind)
        return self.seen[kind]

    def basis(self, how: str, seen: Seen) -> np.ndarray:
        """How a layer's key channels are grouped, the most important first: `[H, D, D]`."""
        if how == "klt":
            return klt(seen.metric, seen.spread)
        wide = np.diagonal(seen.spread if how == "pairs" else seen.even, axis1=1, axis2=2)
        made = []
        for q, k in zip(seen.q_square, wide):
            units = self.rotary.units(len(q))
            order = sorted(units, key=lambda u: -sum(q[list(u)]) * sum(k[list(u)]) / len(u) ** 2)
            made.append(np.eye(len(q))[[c for u in order for c in u]])
        return np.array(made)

    def codecs(self, name: str) -> list[tuple[Any, Any]]:
        """(keys, values) of every layer."""
        name, _, kind = name.partition(", ")
        all_seen = self.calibrated(kind or "code")
        if name.startswith("oscar"):
            bits = int(name.split()[1])
            found = []
            for seen in all_seen:
                both = []
                for metric in (seen.metric, seen.value_spread):
                    to = mx.array(np.linalg.eigh(metric)[1].swapaxes(1, 2).astype(np.float32))
                    both.append(Clipped(name, bits + halves(2), to, 2**bits))
                found.append(tuple(both))
            return found
        if name.startswith("kvarn"):
            keys, values = map(int, name.split()[1].split("/"))
            k, v = Balanced(name, keys + halves(3), 2**keys, True), Balanced(name, values + halves(3), 2**values, False)
            return [(k, v)] * len(all_seen)
        (how, menu), values = name.split(" / ")[0].split(), name.split(" / ")[1]
        found = []
        for seen in all_seen:
            keys = Runs.make(name, tuple(map(int, menu)), self.basis(how, seen), seen.keys)
            if values.startswith("klt"):
                to = klt(seen.out, seen.value_spread)
                value = Runs.make(values, tuple(map(int, values.split()[1])), to, seen.values)
            else:
                value = KVSpec.parse(f"{values}:nc").codecs()[1]
            found.append((keys, value))
        return found

    def contender(self, name: str) -> Contender:
        if name in UNIFORM:
            return enter(name, self.model, simulate=True)
        both = self.codecs(name)
        hooks.uninstall(self.model)
        hooks.prepare(self.model, KVSpec.parse("f16"))
        base = Pair(sink=4, center=True)
        bits = np.mean([(k.bits_per_value(64) + v.bits_per_value(64)) / 2 for k, v in both])
        return Contender(name, float(bits), lambda: [SimulatedCache(replace(base, both=pair)) for pair in both])

    def run(self) -> None:
        names = [*UNIFORM, *RUNS, *RIVALS]
        depths, window, count = ((256,), 32, 1) if self.args.quick else ((512, 2048, 4096), 128, 2)
        if self.args.quick:
            names = ["q4_0", FRONT[2], *RUNS[:1], RUNS[-1], "klt 5322 / klt 3322", "oscar 2", "kvarn 4/2"]
        protocol = fidelity.Protocol(depths, window=window, sequences=count, simulate=True)
        for kind, text in self.judged.items():
            settings = about("calibration", self.id, text, depths=list(depths), window=window, sequences=count)
            missing = [n for n in names if self.records.find({**settings, "spec": n}) is None]
            if not missing:
                continue
            tokens = mx.array(text.tokens(self.tokenizer, count, protocol.length, 0))

            def read(contender: Contender, tokens: mx.array = tokens) -> list[mx.array]:
                return fidelity._read(self.model, contender, tokens, protocol, lambda _: None).log_probs

            exact = read(enter(NATIVE, self.model, simulate=True))
            for name in missing:
                contender = self.contender(name)
                found = []
                for depth, own, other in zip(depths, exact, read(contender)):
                    found.append(fidelity.compare(own, other, tokens[:, depth + 1 : depth + window + 1], 16))
                result = {"kl": [f["kl_mean"] for f in found], "top1": [f["top1"] for f in found]}
                result["kl_blocks"] = [f["kl_blocks"] for f in found]
                self.records.add({**settings, "spec": name}, {"bits": round(contender.bits, 4), **result})
                self.say(kind, name, round(contender.bits, 3), [round(f["kl_mean"][0], 4) for f in found])


def main() -> None:
    parser = options(__doc__)
    args = parser.parse_args()
    on_gpu(args)
    Study(args).run()


if __name__ == "__main__":
    main()
