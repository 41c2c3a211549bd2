"""The measurements behind pages.md, appended to results/pages.jsonl; what is there is not repeated.

    python docs/studies/pages.py --model smollm2
    python docs/studies/pages.py --model models/tiny-llama --only needles --lengths 4096

`rules`: what every rule misses of the softmax at the end of one text, by layer and head. `fidelity`: KL to the model's
own cache over the last tokens of a long text, by rule, page and budget. `needles`: facts found, the question read as
decode steps read, so that it, too, reads pages. All three choose among the model's own keys and values (`rules.py`).
`caches`: the same through the caches themselves, token by token. Runs on the device that MLX uses (`--device cpu` for
the CPU); stopped at any time it goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

# isort: off
import opentq  # noqa: F401 (before MLX, so that its faster matrix product is found on CPUs)
import mlx.core as mx

# isort: on
import numpy as np
from safetensors.numpy import load_file

from opentq.attention import channels
from opentq.attention.pages import CANDIDATES
from opentq.contracts.rotary import Rotary
from opentq.evaluate import corpus, fidelity, metrics, needle
from opentq.evaluate.contenders import NATIVE, enter
from opentq.evaluate.corpus import Corpus, about
from opentq.evaluate.forward import greedy, prefill
from opentq.evaluate.metrics import wilson
from opentq.hosts import hooks
from opentq.records import Record
from opentq.spec.kv import KVSpec
from opentq.tuning.calibrate import Calibrator, Reading, texts

sys.path.insert(0, str(Path(__file__).parent))
from network import ROOT, Network, on_gpu, options
from rules import MEAN, ORACLE, QUEST, SPEC, Call, Rule, Sparse
from rules import sketch as sketches

BUDGETS = (512, 1024, 2048)
PAGES = (16, 32, 64, 128)
OWN = "own: "
"""What names of the package's own sketches start with: three pairs in 4 bits and the mean key of the others."""
SKETCHES = {  # pairs, bits, tokens of a run whose mean key is kept, and its bits: as many bytes as the package's, or
    "runs of 32": (3, 4, 32, 4),
    "runs of 16": (2, 4, 16, 4),
    "4 pairs of 3 bits": (4, 3, 64, 4),
    "5 pairs of 2 bits": (5, 2, 64, 8),
    "8 pairs": (8, 4, 64, 8),  # twice as many
}
BY_KEYS = "by keys, "
"""A rule that starts with this names `CANDIDATES` times the budget by largest scores, and the keys of these choose."""
BY_MASS = "by mass, "
"""A rule that starts with this weighs query heads by how much they look at packed tokens."""
PROMPT = "prompt"
SOURCES = {  # which text, how many tokens of it, and in sequences of how many
    "code": ("code", 8192, 1024),
    "prose": ("prose", 8192, 1024),
    "code, 512 tokens": ("code", 512, 512),
    "code, 2048 tokens": ("code", 2048, 1024),
    "code, 32768 tokens": ("code", 32768, 4096),
}
PACKED = "tq5/tq3:nc:center:sink=4"


def prose(part: int) -> Corpus:
    """Half of Python's language reference: 0 to calibrate on, 1 to judge on."""
    whole = corpus.language_reference()
    some = tuple((n, t) for n, t in whole.texts if zlib.crc32(n.encode()) % 2 == part)
    return Corpus(f"{whole.name}-{part}", some)


@dataclass
class Looking:
    """What rules miss of the softmax in the calls that it is told of, a layer each, in every fourth row.

    Attributes:
        missed: by rule, page and budget, per layer and head.
        spread: among how many pages of 64 a head spreads what it looks at (the exponential of the entropy).
    """

    names: list[str]
    window: int
    missed: dict[tuple[str, int, int], list[list[float]]] = field(default_factory=dict)
    spread: list[list[float]] = field(default_factory=list)

    def __call__(self, rule: Callable[[str], Rule], call: Call, share: mx.array) -> None:
        rows, (*lead, dim) = mx.arange(0, self.window, 4), call.keys.shape
        q = call.q.reshape(*lead[:2], -1, self.window, dim)[..., rows, :].reshape(*lead[:2], -1, dim)
        keys = call.keys.reshape(*lead[:2], -1, dim)
        for page in PAGES:
            whole = call.whole[rows] * 64 // page
            count = int(whole.max().item())
            part = Call(q, keys[:, :, : count * page].reshape(*lead[:2], count, page, dim), whole, len(rows))
            mass = share[..., rows, SPEC.sink : SPEC.sink + count * page]
            mass = mass.reshape(*mass.shape[:-1], count, page).sum(-1)  # [B, H, G, rows, pages]
            mass = mx.where(mx.arange(count) < whole[:, None], mass, 0)
            for name in self.names:
                if page != 64 and "pairs" in name:
                    continue
                weigh = rule(name)
                weights = weigh.weigh(q, weigh.prepare(part.keys))
                for budget in BUDGETS:
                    taken = part.chosen(weights, budget // page)[:, :, None]
                    gone = mx.where(taken, 0, mass).sum(-1).mean((0, 2, 3))
                    self.missed.setdefault((name, page, budget), []).append([round(x, 4) for x in gone.tolist()])
            if page == 64:
                p = mass / mx.maximum(mass.sum(-1, keepdims=True), 1e-9)
                entropy = -(p * mx.log(p + 1e-9)).sum(-1).mean((0, 2, 3))
                self.spread.append([round(float(np.exp(x)), 2) for x in entropy.tolist()])


class Study(Network):
    """One model and its records."""

    def __init__(self, args: argparse.Namespace):
        super().__init__(args)
        self.records = self.file("pages")
        self.code = corpus.standard_library()
        judged = {"code": self.code, "prose": prose(1)}
        self.judged = {kind: text for kind, text in judged.items() if kind in args.texts}
        self.read = {"code": corpus.standard_library(corpus.CALIBRATION), "prose": prose(0)}
        self.folder = args.work / Path(str(args.model)).stem
        self.folder.mkdir(parents=True, exist_ok=True)
        calibrator = Calibrator(self.model, str(SPEC), Reading())
        self.places = {index: n for n, index in calibrator.places.items()}  # layer -> its number in a recipe
        self.loaded: dict[str, dict[str, np.ndarray]] = {}

    @property
    def sources(self) -> list[str]:
        return list(SOURCES)[: 2 if self.args.quick else None]

    def recipe(self, source: str, spec: str = str(SPEC)) -> Path:
        """The calibration on a text, made once."""
        kind, tokens, context = SOURCES[source]
        tokens = 1024 if self.args.quick else tokens
        path = self.folder / f"{kind}-{tokens}-{context}-{spec.replace('/', '_').replace(':', '_')}.toml"
        if not path.exists():
            reading = Reading(tokens, min(context, tokens))
            made = Calibrator(self.model, spec, reading, path.with_suffix(".partial"))
            made.run(texts(self.read[kind], self.tokenizer, reading), kind)
            made.save(path, {"text": kind})
        return path

    def tensors(self, source: str) -> dict[str, np.ndarray]:
        """What a calibration found, calibrated when it is first asked for."""
        if source not in self.loaded:
            self.loaded[source] = load_file(self.recipe(source).with_suffix(".safetensors"))
            self.say("calibrated on", source)
        return self.loaded[source]

    # ---- rules

    def rotary(self, layer: int) -> Rotary:
        dims, traditional = self.tensors("code")[f"{self.places[layer]}.rotary"]
        return Rotary(int(dims), bool(traditional))

    def picked(self, source: str, layer: int, cache: Sparse, count: int) -> mx.array:
        """The channels of a calibration, or those that the prompt itself chooses: int32 `[B, H, C]`."""
        if source == PROMPT:
            return cache.own_channels(self.rotary(layer), count)
        n = self.places[layer]
        energy, dim = self.tensors(source)[f"{n}.energy"], cache.keys.shape[-1]
        chosen = mx.array([channels.choose(e, self.rotary(layer), dim, count) for e in energy], dtype=mx.int32)
        return mx.broadcast_to(chosen[None], (cache.keys.shape[0], *chosen.shape))

    def rule(self, name: str, layer: int, cache: Sparse) -> Rule:
        """A layer's rule by its name: "oracle", "quest", "mean key", "own: SOURCE", one of `SKETCHES` with a source, or
        "N pairs, B bits, SOURCE"."""
        by_keys, name = name.startswith(BY_KEYS), name.removeprefix(BY_MASS).removeprefix(BY_KEYS)
        sketch = partial(sketches, largest=by_keys)
        if name in ("oracle", "quest", "mean key"):
            return {"oracle": ORACLE, "quest": QUEST, "mean key": MEAN}[name]
        if name.startswith(OWN):
            count = channels.count(cache.keys.shape[-1])
            return sketch(self.picked(name.removeprefix(OWN), layer, cache, count), 4, 64)
        if name.partition(": ")[0] in SKETCHES:
            how, source = name.split(": ")
            count, *rest = SKETCHES[how]
            return sketch(self.picked(source, layer, cache, 2 * count), *rest)
        pairs, bits, source = name.split(", ", 2)
        few = self.picked(source, layer, cache, 2 * int(pairs.split()[0]))
        return sketch(few, 0 if bits == "exact" else int(bits.split()[0]))

    def fork(self, held: list[Any], name: str | None, page: int = 64, budget: int = 1024) -> list[Any]:
        """Caches that go on from `held` and read by a rule; None reads everything."""
        made, by_mass = [], (name or "").startswith(BY_MASS)
        times = CANDIDATES if (name or "").startswith(BY_KEYS) else 0
        for layer, cache in enumerate(held):
            rule = self.rule(name, layer, cache) if name and layer in self.places else None
            made.append(cache.fork(rule, page, budget, by_mass, times) if layer in self.places else cache)
        return made

    def held(self, tokens: mx.array) -> list[Any]:
        """The caches of a prompt `[B, L]`, read as prompts are read."""
        record = hooks.prepare(self.model, KVSpec.parse("f16"))
        caches = record.own_caches()
        if len(self.places) < len(caches):
            raise SystemExit("this study needs a model all of whose layers attend to everything")
        caches = [Sparse() for _ in caches]
        prefill(self.model, tokens, caches, 512)
        return caches

    def wanted(self, name: str) -> bool:
        """Whether a rule is among those that were asked for."""
        return not self.args.rules or name in self.args.rules

    # ---- what every rule misses

    def rules(self) -> None:
        context, window = (1600, 16) if self.args.quick else (self.args.context, 256)
        names = ["oracle", "quest", "mean key", *(OWN + s for s in (PROMPT, *self.sources))]
        bits = ("exact", "2 bits", "3 bits", "4 bits", "8 bits")
        names += [f"{p} pairs, {b}, {s}" for p in (2, 4, 8) for b in bits for s in ("code", "prose")]
        for kind, text in self.judged.items():
            settings = about("pages-rules", self.id, text, context=context, window=window)
            if self.records.find({**settings, "done": True}) is not None:
                continue
            tokens = mx.array(text.tokens(self.tokenizer, 1, context, 0))
            caches = self.held(tokens[:, :-window])
            looking = Looking(names, window)
            for layer, cache in enumerate(caches):
                cache.watch = partial(looking, partial(self.rule, layer=layer, cache=cache))
            prefill(self.model, tokens[:, -window:], caches, window)
            for (name, page, budget), found in looking.missed.items():
                key = {**settings, "rule": name, "page": page, "budget": budget}
                if self.records.find(key) is None:
                    self.records.add(key, {"missed": round(float(np.mean(found)), 5), "by_head": found})
            shares = [self.kept_energy(layer).tolist() for layer in range(len(caches))]
            self.records.add({**settings, "done": True}, {"spread": looking.spread, "energy": shares})
            at = ("oracle", OWN + "code", OWN + "prose", OWN + PROMPT, "quest")
            self.say("rules", kind, {n: round(float(np.mean(looking.missed[n, 64, 1024])), 4) for n in at})

    def kept_energy(self, layer: int) -> np.ndarray:
        """The share of a head's energy that is in the channels of its sketch."""
        energy = self.tensors("code")[f"{self.places[layer]}.energy"]
        dim = self.tensors("code")[f"{self.places[layer]}.k_mean"].shape[-1]
        best = np.sort(energy, axis=-1)[:, ::-1][:, : channels.count(dim) // 2]
        return np.round(best.sum(-1) / energy.sum(-1), 4)

    # ---- the model's output

    def arms(self) -> list[tuple[str, int, int]]:
        """(rule, page, budget)."""
        main = ["oracle", *(BY_KEYS + OWN + s for s in ("code", PROMPT)), OWN + "code", OWN + "prose", OWN + PROMPT]
        main += ["quest", "mean key", "4 pairs, 4 bits, code"]
        if self.args.quick:
            return [(name, 64, 512) for name in main]
        grid = [f"{p} pairs, {b}, code" for p in (2, 4, 8) for b in ("2 bits", "3 bits", "4 bits", "8 bits")]
        more = [f"{how}: code" for how in SKETCHES]
        more += [BY_MASS + n for n in ("oracle", OWN + "code", *more)]
        return [
            *((name, 64, budget) for budget in (1024, 512, 2048) for name in main),
            *((name, page, 1024) for page in (16, 32, 128) for name in main[:7]),
            *((name, 64, 1024) for name in (*grid, *(OWN + s for s in SOURCES), *more) if name not in main),
        ]

    def fidelity(self) -> None:
        depth, window = (900, 16) if self.args.quick else (self.args.depth, 256)
        for kind, text in self.judged.items():
            settings = about("pages-fidelity", self.id, text, depth=depth, window=window)
            keys = {arm: {**settings, **dict(zip(("rule", "page", "budget"), arm))} for arm in self.arms()}
            missing = [a for a, key in keys.items() if self.wanted(a[0]) and self.records.find(key) is None]
            if not missing:
                continue
            tokens = mx.array(text.tokens(self.tokenizer, 1, depth + window + 1, 0))
            held, rows = self.held(tokens[:, :depth]), tokens[:, depth:-1]

            def predictions(*arm: Any, held: Any = held, rows: Any = rows) -> mx.array:
                found = metrics.log_probs(self.model(rows, cache=self.fork(held, *arm)))
                mx.eval(found)
                return found

            exact = predictions(None)
            for arm in missing:
                found = fidelity.compare(exact, predictions(*arm), tokens[:, depth + 1 :], 16)
                self.records.add(keys[arm], found)
                self.say("fidelity", kind, *arm, f"{found['kl_mean'][0]:.4f}")

    # ---- facts

    def asked(self) -> list[tuple[str, dict[str, int]]]:
        several = [(f"{n} of {n}" if n == 1 else f"1 of {n}", {"distractors": n - 1}) for n in (1, 4, 16)]
        return several[:1] if self.args.quick else [*several, ("2 of 4", {"distractors": 3, "asked": 2})]

    def needles(self) -> None:
        """Facts found by rule, in prompts that are read once for all rules."""
        lengths = (900,) if self.args.quick else self.args.lengths
        trials, budget = (1, 512) if self.args.quick else (10, 1024)
        names = [None, "oracle", BY_KEYS + OWN + PROMPT, OWN + "code", OWN + "prose", OWN + PROMPT, "quest", "mean key"]
        names = [n for n in names if self.wanted(n or "exact")]
        depths = (0.1, 0.3, 0.5, 0.7, 0.9)
        for facts, how in self.asked():
            for length in lengths:
                settings = about("pages-needle", self.id, self.code, length=length, facts=facts)
                settings |= {"trials": len(depths) * trials, "budget": budget}
                missing = [n for n in names if self.records.find({**settings, "rule": n or "exact"}) is None]
                if not missing:
                    continue
                cells = [(d, 1000 + t) for d in depths for t in range(trials)]
                made = [corpus.needle(self.tokenizer, self.code, length, d, t, **how) for d, t in cells]
                right: dict[str | None, int] = dict.fromkeys(missing, 0)
                for start in range(0, len(made), self.args.batch):
                    for name, count in self.ask(made[start : start + self.args.batch], missing, budget):
                        right[name] += count
                for name in missing:
                    result = {"correct": right[name], "accuracy": wilson(right[name], len(made))}
                    self.records.add({**settings, "rule": name or "exact"}, result)
                self.say("needles", length, facts, {n or "exact": right[n] for n in missing}, "of", len(made))

    def ask(self, made: list[corpus.Needle], names: list[str | None], budget: int) -> list[tuple[str | None, int]]:
        stop = set(getattr(self.tokenizer, "eos_token_ids", []) or [])
        own = min(len(n.question) for n in made)
        rows = mx.array([n.text + n.question for n in made])
        held, found = self.held(rows[:, :-own]), []
        for name in names:
            answers = greedy(self.model, rows[:, -own:], self.fork(held, name, 64, budget), 24, stop)
            found.append((name, sum(n.found(self.tokenizer.decode(a)) for n, a in zip(made, answers))))
        return found

    # ---- through the caches

    def caches(self) -> None:
        """KL and needles of caches as they are used, a token at a time."""
        depth, window = (900, 16) if self.args.quick else (self.args.depth, 256)
        budget = 512 if self.args.quick else 1024
        protocol = fidelity.Protocol((depth,), window=window, step=1, sequences=1, prefill=512)
        specs = {f"{spec}, code": f"{self.recipe('code', spec)}:pages={budget}" for spec in (str(SPEC), PACKED)}
        specs |= {f"{SPEC}, {PROMPT}": f"{SPEC}:pages={budget}", PACKED: PACKED}
        for kind, text in self.judged.items():
            settings = about("pages-caches", self.id, text, depth=depth, window=window, budget=budget)
            keys = {name: {**settings, "spec": name} for name in specs}
            missing = [name for name in specs if self.records.find(keys[name]) is None]
            tokens = mx.array(text.tokens(self.tokenizer, 1, protocol.length, 0))
            own = fidelity._read(self.model, enter(NATIVE, self.model), tokens, protocol, _no) if missing else None
            for name in missing:
                read = fidelity._read(self.model, enter(specs[name], self.model), tokens, protocol, _no)
                found = fidelity.compare(own.log_probs[0], read.log_probs[0], tokens[:, depth + 1 :], 16)
                self.records.add(keys[name], {**found, "cache_bytes": read.cache_bytes[0]})
                self.say("caches", kind, name, f"{found['kl_mean'][0]:.4f}")
        length, trials = (900, 1) if self.args.quick else (self.args.lengths[-1], 10)
        grid = needle.Grid(
            (length,), (0.1, 0.3, 0.5, 0.7, 0.9), trials, distractors=3, answer=24, batch=self.args.batch
        )
        cells = [(length, d, t) for d in grid.depths for t in range(trials)]
        for name in (PACKED, f"{PACKED}, code"):
            key: Record = about("pages-cache-needle", self.id, self.code, length=length, spec=name)
            key |= {"trials": len(cells), "budget": budget}
            if self.records.find(key) is not None:
                continue
            asked = [needle.make(self.tokenizer, self.code, grid, *cell) for cell in cells]
            right = sum(needle.ask(self.model, self.tokenizer, enter(specs[name], self.model).caches, asked, grid))
            self.records.add(key, {"correct": right, "accuracy": wilson(right, len(asked))})
            self.say("caches", "needles", name, right, "of", len(asked))


def _no(_: int) -> None:
    pass


PARTS = ("rules", "fidelity", "caches", "needles")


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, comma-separated")
    parser.add_argument("--texts", default="code,prose", help="what rules are judged on; needles are asked in code")
    parser.add_argument("--context", type=int, default=6144, help="tokens of the text of `rules`")
    parser.add_argument("--depth", type=int, default=6912, help="tokens before those of `fidelity`")
    parser.add_argument("--lengths", type=lambda s: tuple(map(int, s.split(","))), default=(1536, 3584, 6656))
    parser.add_argument("--rules", type=lambda s: s.split(";"), help="of `fidelity` and `needles` these, by semicolons")
    parser.add_argument("--batch", type=int, help="needles read together; default: 10, on a CPU 5")
    parser.add_argument("--work", type=Path, default=ROOT / "results" / "recipes", help="where recipes are kept")
    args = parser.parse_args()
    args.batch = args.batch or (10 if on_gpu(args, 8 << 30) else 5)
    study = Study(args)
    for part in args.only.split(","):
        getattr(study, part)()


if __name__ == "__main__":
    main()
