"""All measurements of the studies on a real network, appended to results/*.jsonl; what is there is not measured again.

    python docs/studies/real.py --model smollm2
    python docs/studies/real.py --model smollm2 --only fidelity,tasks --quick
    python docs/studies/real.py --model smollm2 --only fidelity --specs int4,recipe.toml --texts code
    python docs/studies/real.py --model smollm2 --only fidelity --share 2/4

Runs on the device that MLX uses (`--device cpu` for the CPU). Weights are decoded to float32 and caches simulated for
fidelity, so that what differs between two rows is the codec; `use`, `tasks` and `needles` go through the caches as they
are. Stopped at any time it goes on where it was; `--share 2/4` takes every fourth spec from the second on, so that four
processes work side by side on one file.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

# isort: off
import opentq  # noqa: F401 (before MLX, so that its faster matrix product is found on CPUs)

# isort: on
from opentq.errors import UserError
from opentq.evaluate import contenders, corpus, fidelity, layers, needle, tasks, use
from opentq.evaluate.evaluation import Evaluation
from opentq.records import Records
from opentq.spec.text import split
from opentq.tuning.tune import Goal, Tuner

sys.path.insert(0, str(Path(__file__).parent))
from network import Network, on_gpu, options

RIVALS = ["native", "mlx4", "mlx8", "q4_0", "q4_0:norot"]
FRONT = """
tq5/tq3:nc tq5/tq3:nc:center tq5/tq3:nc:sink=4 tq5/tq3:nc:center:sink=4 tq5/tq3:nc:center:sink=4:recent=128
tq5/tq3:nc:center:sink=16 tq5/tq3:nc:center:sink=4:last1=int8 tq5/tq3:nc:center:sink=4:first1=int8
int4 int4:sink=4 int4:center:sink=4 int4:g64 int4:g64:center:sink=4 int4:norot k8v4:g64
tq4:nc tq4:nc:center:sink=4 tq5/tq3 tq6/tq3:nc:center:sink=4 tq5/tq4:nc:center:sink=4 tq4/tq3:nc:center:sink=4
tq3:nc tq3:nc:center tq3:nc:sink=4 tq3:nc:center:sink=4 tq3 tq2 tq2:nc:center:sink=4 int3:g64 int2 polar4
qjl qjl2/int4 qjl6/int4 qjl4/int4:sketch=gauss tq3p tq3p:sketch=orth int4:first2=qjl tq3:skip=first1 tq3:skip=last1
tq3/tq4 tq4/tq3 tq4:haar tq3:out=2 tq2.5 tq3.5 int8
tq5/tq3:nc:center:sink=4:first9=tq5/tq4 tq5/tq3:nc:center:sink=4:last9=tq5/tq4
""".split()  # noqa: SIM905
"""What the tables of codecs.md and negative_results.md need, the goal's candidates first."""
FRAGILE = (8, 14, 17, 18, 20, 21, 23, 24, 26)
"""Nine of SmolLM2's layers: seven tenths of what 3-bit values cost is theirs (`--only probes`)."""
MIXED = "|".join(f"tq5/tq{4 if i in FRAGILE else 3}:nc:center:sink=4" for i in range(30))
SHORT = ["int4", "q4_0", "mlx4", "tq5/tq3:nc", "tq5/tq3:nc:center:sink=4", "tq3:nc", "tq3:nc:center:sink=4", "k8v4:g64"]
"""What is asked in use, in tasks and for needles."""
GAINS, SPREADS = (0.25, 4), (0.5, 2)


class Study(Network):
    """One model, where its records go, and how much is measured."""

    def __init__(self, args: argparse.Namespace):
        super().__init__(args)
        self.quick, self.batch = args.quick, args.batch
        self.part, self.of = (int(n) for n in args.share.split("/"))
        self.specs = [contenders.check(name) for name in split(args.specs, "--specs")] if args.specs else []
        self.texts = [corpus.load(Path(args.code if name == "code" else name)) for name in args.texts.split(",")]

    def on(
        self, names: list[str], records: Records, text: corpus.Corpus | None = None, sim: bool = False
    ) -> Evaluation:
        simulated = frozenset(names if sim else ())
        return Evaluation(self.model, self.id, self.tokenizer, text, names, records, simulated=simulated)

    def asked(self, names: list[str]) -> list[str]:
        """This process's share of the specs that were asked for, else of `names`."""
        return (self.specs or names)[self.part - 1 :: self.of]

    def served(self, names: list[str]) -> list[tuple[bool, list[str]]]:
        """(False, those whose real caches this device can run), (True, the others, which are simulated)."""
        both: dict[bool, list[str]] = {False: [], True: []}
        for name in self.asked(names):
            try:
                contenders.enter(name, self.model)
            except UserError as error:
                self.say("simulated:", error)
                both[True].append(name)
            else:
                both[False].append(name)
        return [(simulated, found) for simulated, found in both.items() if found]

    def fidelity(self) -> None:
        """Every spec on code and prose at four depths."""
        depths, window, sequences = ((256,), 32, 1) if self.quick else ((512, 2048, 4096, 7168), 128, 2)
        protocol = fidelity.Protocol(depths, window=window, sequences=sequences, simulate=True)
        found = [r["recipe"] for r in self.file("tune").all if r.get("settings", {}).get("model") == self.id]
        names = self.asked(
            ["native", "mlx4", "q4_0", "tq5/tq3:nc:center:sink=4"] if self.quick else [*RIVALS, *FRONT, MIXED, *found]
        )
        records = self.file("fidelity")
        for text in self.texts:
            for some in (names[i : i + 8] for i in range(0, len(names), 8)):
                for r in fidelity.run(self.on(some, records, text), protocol):
                    settings = r["settings"]
                    self.say(text.name, settings["spec"], settings["depth"], f"{r['kl_mean'][0]:.2e}")

    def needles(self) -> None:
        """Five depths of three lengths."""
        lengths, trials = ((600,), 1) if self.quick else ((1536, 3584, 6656), 4)
        grid = needle.Grid(lengths, trials=trials, batch=self.batch, answer=24)
        for simulated, names in self.served(SHORT[:1] if self.quick else ["native", *SHORT]):
            on = self.on(names, self.file("needle"), self.texts[0])
            for r in needle.run(on, replace(grid, simulate=simulated)):
                settings = r["settings"]
                self.say("needles", settings["spec"], settings["length"], settings["depth"], r["correct"])

    def use(self) -> None:
        """Answers to 200 short prompts."""
        job = use.Task(prompts=4, tokens=8, batch=4) if self.quick else use.Task(batch=self.batch)
        for simulated, names in self.served(SHORT[:1] if self.quick else SHORT):
            for r in use.run(self.on(names, self.file("use"), sim=simulated), job):
                self.say("use", r["settings"]["spec"], r["equal"])

    def tasks(self) -> None:
        """Multiple choice, paired with the model's own cache."""
        job = tasks.Task(questions=8, batch=4) if self.quick else tasks.Task(batch=self.batch)
        for simulated, names in self.served(SHORT[:1] if self.quick else SHORT):
            for r in tasks.run(self.on(names, self.file("tasks"), sim=simulated), job):
                self.say("tasks", r["settings"]["spec"], r["accuracy"], r.get("difference"))

    def depth(self) -> None:
        """Error per layer."""
        view = layers.View(256, 16, 1) if self.quick else layers.View(context=2048, window=32, sequences=2)
        for name in self.asked(["int4"] if self.quick else ["int4", "tq3", "tq1", "qjl2/int4", "tq5/tq3:nc", "tq2"]):
            layers.run(self.on([name], self.file("layers"), self.texts[0]), view)
            self.say("layers", name)

    def scale(self) -> None:
        """Attention scale against query gain at fixed logits, and logit spread at fixed scale."""
        protocol = fidelity.Protocol((1024,), window=128, sequences=2, simulate=True)
        view = layers.View(context=1024, window=32, sequences=2)
        if self.quick:
            protocol, view = fidelity.Protocol((128,), window=16, sequences=1, simulate=True), layers.View(128, 16, 1)
        variants = [(g, 1 / g, f"gain x{g:g}, scale x{1 / g:g}") for g in GAINS]
        variants = [(1.0, 1.0, "none"), *variants, *((s, 1.0, f"gain x{s:g}") for s in SPREADS)]
        specs = self.asked(["tq3"] if self.quick else ["int4", "tq3", "tq2"])
        for gain, alpha, title in variants[:2] if self.quick else variants:
            change(self.model, gain, alpha)
            changed = {**self.id, "change": title, "gain": gain, "alpha": alpha}
            for task, job in ((fidelity, protocol), (layers, view)):
                task.run(self.on(specs, self.file("scale"), self.texts[0])._replace(model_id=changed), job)
            change(self.model, 1 / gain, 1 / alpha)
            self.say("scale", title)

    def tuner(self) -> Tuner:
        """On the calibration text, which no other part reads."""
        protocol = fidelity.Protocol((1024,), window=64, sequences=4, simulate=True)
        if self.quick:
            protocol = fidelity.Protocol((128,), window=16, sequences=1, simulate=True)
        records = Records(self.args.results / "tune" / f"{self.id['name']}.jsonl")
        on = self.on([], records, corpus.standard_library(corpus.CALIBRATION))
        return Tuner(on, Goal(1.0), protocol, say=self.say)

    def probes(self) -> None:
        """What every layer's keys and values cost alone, from which `tune` starts."""
        tuner = self.tuner()
        lines = list(tuner.probes())[self.part - 1 :: self.of]
        for some in (lines[i : i + 15] for i in range(0, len(lines), 15)):
            tuner.measure(some)
            self.say("probes", some[-1])

    def tune(self) -> None:
        """The smallest recipes within half of q4_0's divergence, and within that of uniform specs, on two texts."""
        recipes = []
        for name in self.asked(["q4_0", "tq5/tq3:nc:center:sink=4", "tq4/tq3:nc:center:sink=4"]):
            share = 0.45 if name == "q4_0" else 1.0
            tuner = self.tuner()
            bound = share * max(tuner.measure([name], seed)[name][1] for seed in (None, tuner.protocol.seed + 1000))
            tuner.goal = Goal(bound)
            found = tuner.run(1 if self.quick else 8)
            recipes.append("|".join(found.layers))
            settings = tuner.on.about("tune", protocol=asdict(tuner.protocol), of=name, share=share, texts=2)
            numbers = {"bits": round(found.bits, 4), "kl": found.kl, "max_kl": bound, "held_out": found.held_out}
            numbers |= {"uniform": found.uniform, "uniform_bits": found.uniform_bits, "saving": round(found.saving, 4)}
            self.file("tune").add(settings, {"recipe": recipes[-1], **numbers})
            self.say("tune", name, numbers)
        self.specs, self.part, self.of = recipes, 1, 1
        self.fidelity()


def change(model: Any, gain: float, alpha: float) -> None:
    """Multiply the queries of every layer by `gain` and its attention scale by `alpha`."""
    for layer in model.layers:
        attention = layer.self_attn
        if hasattr(attention, "q_norm"):  # Gemma stores the gain minus one
            attention.q_norm.weight = (1 + attention.q_norm.weight) * gain - 1
        else:
            attention.q_proj.weight = attention.q_proj.weight * gain
        attention.scale = attention.scale * alpha


PARTS = ("fidelity", "needles", "use", "tasks", "depth", "scale", "probes", "tune")


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, comma-separated")
    parser.add_argument("--code", default="code", help="the code: a folder; default: this Python's library")
    parser.add_argument("--texts", default="code,prose", help="what fidelity reads; the first is what the others read")
    parser.add_argument("--specs", default="", help="instead of the study's own, comma-separated")
    parser.add_argument("--share", default="1/1", help="i/n: every n-th spec from the i-th on")
    parser.add_argument("--batch", type=int, help="prompts read together; default: 40, on a CPU 4")
    args = parser.parse_args()
    args.batch = args.batch or (40 if on_gpu(args) else 4)
    study = Study(args)
    for part in args.only.split(","):
        getattr(study, part)()


if __name__ == "__main__":
    main()
