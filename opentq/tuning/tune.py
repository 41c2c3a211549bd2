"""`opentq tune`: measure sensitivities, search recipes, verify the winner on other text, and write it down.

Optuna's multi-objective sampler (bits, KL) starts from the recipes that the sensitivities predict to be best, and is
stopped when two generations bring nothing smaller. Every measurement is a record in a file, and none is made twice, so
a run that was stopped goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..errors import UserError
from ..evaluate import contenders, fidelity, needle
from ..evaluate.evaluation import Evaluation
from ..hosts import hooks
from ..hosts.plan import LayerPlan
from ..lab.store import need_optuna
from ..memory import plan
from ..memory.device import GIB, here
from ..memory.loaded import check_length, weight_bytes
from ..spec.kv import KVSpec
from ..spec.recipe import Recipe
from ..spec.recommended import recommend
from ..spec.text import Spec, parse
from .sensitivity import WIDTHS, Sensitivity, Widths, frontier, probes

BLOCKS = 40
"""Layers of deeper models are tuned in at most so many blocks of neighbours. Neighbours are not alike: in SmolLM2 3-bit
values of layer 20 cost ten times those of layer 19."""

INTEGERS = ["int8", "k8v4", "int4", "int4:g64", "int3:g64", "int2:g64"]
CODEBOOKS = ["tq6/tq4:nc", "tq5/tq4:nc", "tq5/tq3:nc", "tq4:nc", "tq4/tq3:nc", "tq3:nc", "tq3/tq2:nc", "tq2:nc"]
UNIFORM = INTEGERS + CODEBOOKS
"""What one spec for all layers can do: the recipe is compared with the smallest of these that reaches its quality."""
GENERATION = 8


@dataclass(frozen=True)
class Goal:
    """What the recipe must satisfy.

    Attributes:
        max_kl: largest mean KL to the model's own cache, nats per token.
        memory: bytes for weights, cache, prefill and reserve at `context`; 0: any.
        context: tokens, for `memory`.
        min_speed: decode tokens per second at the protocol's depth; 0: any.
    """

    max_kl: float
    memory: int = 0
    context: int = 0
    min_speed: float = 0.0


@dataclass(frozen=True)
class Winner:
    """The recipe and its evidence. `uniform` is the smallest uniform spec of the same quality, if there is one."""

    layers: list[str]
    bits: float
    kl: float
    held_out: dict[str, Any]
    uniform: str
    uniform_bits: float

    @property
    def saving(self) -> float:
        """How much smaller than the uniform spec, 0.15 for 15 %."""
        return 1 - self.bits / self.uniform_bits


def free(model: Any) -> str:
    """What every spec of this model has because it takes no bits: centred keys and sinks, where recommended."""
    best = recommend(model).spec
    return (":center" if best.center else "") + (f":sink={best.sink}" if best.sink else "")


class Tuner:
    """One model, its measurements and its goal; `on` says which text is read and where records go."""

    def __init__(
        self,
        on: Evaluation,
        goal: Goal,
        protocol: fidelity.Protocol,
        window: str = "native",
        say: Callable[[str], None] = print,
    ):
        self.on, self.model = on, on.model
        check_length(self.model, protocol.length)
        self.goal, self.protocol, self.say = goal, protocol, say
        self.suffix = free(self.model) + (":window=compress" if window == "compress" else "")
        self.plans = [p for p in self._plans(KVSpec.parse("int4" + self.suffix)) if p.compressed]
        count = len(self.plans)
        size = -(-count // min(count, BLOCKS))
        self.blocks = [list(range(at, min(at + size, count))) for at in range(0, count, size)]

    def _plans(self, spec: Spec) -> list[LayerPlan]:
        return hooks.plan(self.model, spec)

    def lines(self, recipe: list[Widths]) -> list[str]:
        """One spec per layer."""
        by_layer = {layer: c for c, block in zip(recipe, self.blocks) for layer in block}
        return [f"{by_layer[i]}{self.suffix}" for i in range(len(self.plans))]

    def measure(self, names: list[str], seed: int | None = None) -> dict[str, tuple[float, float]]:
        """(bits, mean KL over depths) of each spec; measured once and kept."""
        protocol = self.protocol if seed is None else replace(self.protocol, seed=seed)
        canonical = {name: contenders.check(name) for name in names}
        unique = list(dict.fromkeys(canonical.values()))
        found = fidelity.run(self.on._replace(names=unique), protocol)
        kl: dict[str, list[float]] = {}
        bits = {}
        for record in found:
            spec = record["settings"]["spec"]
            kl.setdefault(spec, []).append(record["kl_mean"][0])
            bits[spec] = record["bits"]
        return {name: (bits[c], sum(kl[c]) / len(kl[c])) for name, c in canonical.items()}

    def probes(self) -> dict[str, tuple[int, str, int]]:
        """The recipes by which every block is measured alone, and the block, side and bits of each."""
        return {
            "|".join(layer + self.suffix for layer in line.split("|")): (block, side, bits)
            for block, side, bits, line in probes(len(self.plans), self.blocks)
        }

    def sensitivities(self) -> list[Sensitivity]:
        """Measure every block alone."""
        asked = self.probes()
        self.say(f"sensitivities: {len(asked)} measurements of {len(self.blocks)} blocks of layers")
        rest = "|".join([f"int8{self.suffix}"] * len(self.plans))
        found = self.measure([*asked, rest])
        out: list[dict[tuple[str, int], float]] = [{} for _ in self.blocks]
        for line, (block, side, bits) in asked.items():
            out[block][side, bits] = max(0.0, found[line][1] - found[rest][1])
        for layers, kl in zip(self.blocks, out):
            self.say(f"  layers {layers[0]}-{layers[-1]}: KL at 4 bits: keys {kl['k', 4]:.1e}, values {kl['v', 4]:.1e}")
        return [Sensitivity(kl) for kl in out]

    def search(self, generations: int) -> list[tuple[float, float, list[str]]]:
        """(bits, KL, layers) of everything measured, smallest first."""
        optuna = need_optuna()
        dims = self.plans[0].key_dim, self.plans[0].value_dim
        bits = {c: KVSpec.parse(str(c)).bits_per_value(*dims) for c in WIDTHS}
        known = {str(c): c for c in WIDTHS}
        study = optuna.create_study(directions=["minimize"] * 2, sampler=optuna.samplers.TPESampler(seed=0))
        sensitivities = self.sensitivities()
        for recipe in self._promising(frontier(sensitivities, bits), sensitivities):
            study.enqueue_trial({f"block{i}": str(c) for i, c in enumerate(recipe)})
        found: dict[str, tuple[float, float, list[str]]] = {}
        best, idle = float("inf"), 0
        for generation in range(generations):
            trials = [study.ask() for _ in range(GENERATION)]
            picks = [
                [known[t.suggest_categorical(f"block{i}", list(known))] for i in range(len(self.blocks))]
                for t in trials
            ]
            names = ["|".join(self.lines(p)) for p in picks]
            results = self.measure(names)
            for trial, pick, name in zip(trials, picks, names):
                study.tell(trial, list(results[name]))
                found[name] = (*results[name], self.lines(pick))
            good = [f for f in found.values() if f[1] <= self.goal.max_kl]
            now = min((f[0] for f in good), default=float("inf"))
            idle = 0 if now < best else idle + 1
            best = min(best, now)
            so_far = f"{best:.3f} bits" if good else f"none within KL {self.goal.max_kl:g} yet"
            self.say(f"search: generation {generation + 1}, {len(found)} recipes, best so far {so_far}")
            if idle >= 2 and good:
                break
        return sorted(found.values(), key=lambda f: f[0])

    def _promising(self, recipes: list[list[Widths]], sensitivities: list[Sensitivity]) -> list[list[Widths]]:
        """Predicted recipes ordered by how near their KL is to the bound: those are worth measuring first."""

        def distance(recipe: list[Widths]) -> float:
            kl = sum(s.predicted(c) for s, c in zip(sensitivities, recipe))
            return abs(kl / self.goal.max_kl - 0.8)

        return sorted(recipes, key=distance)[: 2 * GENERATION]

    def fits(self, layers: list[str]) -> bool:
        """Whether a recipe satisfies the bounds on memory and speed."""
        if self.goal.memory:
            device = here()
            held = plan.price(self._plans(Recipe.of(layers)), self.goal.context, device.float_bytes)
            if weight_bytes(self.model) + held + plan.RESERVE > self.goal.memory:
                return False
        return not self.goal.min_speed or self.speed("|".join(layers)) >= self.goal.min_speed

    def speed(self, spec: str) -> float:
        """Decode tokens per second after the first depth of the protocol."""
        from ..bench.build import Built
        from ..bench.model import ModelArm

        vocabulary = len(self.on.tokenizer.get_vocab())
        arm = ModelArm(Built(self.model, "", self.on.tokenizer, 0, vocabulary, 0), parse(spec), 512, 0)
        arm.fill(self.protocol.depths[0], "prefill")
        return 16 / min(arm.generate(16, 0) for _ in range(3))

    def run(self, generations: int = 8) -> Winner:
        """The smallest recipe that satisfies the goal on the search text and on held-out text.

        Raises UserError when there is none, with the best that was found.
        """
        uniform = self.measure([u + self.suffix for u in UNIFORM])
        found = self.search(generations)
        found += [(b, kl, [name] * len(self.plans)) for name, (b, kl) in uniform.items()]
        for bits, kl, layers in sorted(found, key=lambda f: f[0]):
            if kl > self.goal.max_kl or not self.fits(layers):
                continue
            name = "|".join(layers)
            held_out = self.measure([name], seed=self.protocol.seed + 1000)[name][1]
            if held_out > self.goal.max_kl:
                self.say(f"{bits:.3f} bits: KL {kl:.4f}, but {held_out:.4f} on held-out text; the next one")
                continue
            best = self._smallest(uniform)
            return Winner(layers, bits, kl, {"kl": held_out, **self.needles(name)}, best[1], best[0])
        near = min(found, key=lambda f: f[1])
        memory = f" and {self.goal.memory / GIB:.1f} GiB" if self.goal.memory else ""
        raise UserError(
            f"no recipe stays within KL {self.goal.max_kl:g}{memory}; the most exact one has {near[0]:.2f} bits and "
            f"KL {near[1]:.4f}: allow more with --max-kl, or use --kv f16"
        )

    def _smallest(self, uniform: dict[str, tuple[float, float]]) -> tuple[float, str]:
        """(bits, spec): the smallest uniform spec that satisfies the goal on both texts, as a recipe must."""
        for name, (bits, kl) in sorted(uniform.items(), key=lambda item: item[1][0]):
            if kl <= self.goal.max_kl and self.measure([name], self.protocol.seed + 1000)[name][1] <= self.goal.max_kl:
                return bits, name
        return 16.0, "f16"

    def needles(self, name: str) -> dict[str, Any]:
        """Planted facts found with the recipe and with the model's own cache."""
        length, simulate = self.protocol.depths[-1], self.protocol.simulate
        grid = needle.Grid((length,), (0.1, 0.5, 0.9), trials=4, seed=1000, simulate=simulate)
        found = needle.run(self.on._replace(names=["native", contenders.check(name)]), grid)
        half = len(found) // 2
        asked = grid.trials * half
        return {
            "needles_native": f"{sum(r['correct'] for r in found[:half])}/{asked}",
            "needles": f"{sum(r['correct'] for r in found[half:])}/{asked}",
        }
