"""The measurements behind pages.md and calibration.md, appended to results/pages.jsonl; what is there is not repeated.

    python docs/studies/pages.py --model smollm2
    python docs/studies/pages.py --model models/tiny-llama --only needles --lengths 4096

`rules` looks at queries and keys of one text: how much of the softmax every rule misses, by page size, budget and
calibration. `fidelity` and `needles` run the model with caches in fp16 (`f16:pages=N`), so that what differs from the
model's own cache is what was not read; the rules other than ours take the place of the choice inside the cache.
Runs on the device that MLX uses (`--device cpu` for the CPU); stopped at any time it goes on where it was.
"""

from __future__ import annotations

import argparse
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# isort: off
import opentq  # before MLX, so that its faster matrix product is found on CPUs
import mlx.core as mx

# isort: on
import numpy as np
from mlx_lm.utils import dequantize_model
from safetensors.numpy import load_file

from opentq.attention import channels, pages, tiled
from opentq.caches.step import Step
from opentq.contracts.rotary import Rotary
from opentq.evaluate import corpus, fidelity, layers, needle
from opentq.evaluate.contenders import NATIVE, enter
from opentq.evaluate.corpus import Corpus, about
from opentq.evaluate.forward import greedy, prefill
from opentq.evaluate.metrics import wilson
from opentq.hosts.mlx_lm.load import model_folder
from opentq.records import Records, model_name
from opentq.spec.kv import KVSpec
from opentq.tuning.calibrate import Calibrator, Reading, texts

ROOT = Path(__file__).parents[2]
BUDGETS = (512, 1024, 2048)

Weigh = Callable[[mx.array, mx.array], mx.array]
"""Scaled queries `[B, H, R, D]` and keys in pages `[B, H, n, page, D]` -> log weights `[B, H, R, n]`."""


def exact(q: mx.array, k: mx.array) -> mx.array:
    return mx.logsumexp(q[:, :, None] @ k.swapaxes(-1, -2), axis=-1).swapaxes(-1, -2)


def quest(q: mx.array, k: mx.array) -> mx.array:
    """An upper bound of every score of a page, from the minimum and maximum of each channel (arXiv 2406.10774)."""
    low, high = k.min(3), k.max(3)
    bounds = [mx.maximum(q[:, :, i, None] * low, q[:, :, i, None] * high).sum(-1) for i in range(q.shape[2])]
    return mx.stack(bounds, axis=2)


def mean_key(q: mx.array, k: mx.array) -> mx.array:
    return q @ k.mean(3).swapaxes(-1, -2)


def two_bits(k: mx.array) -> mx.array:
    """Channels in 2 bits, steps of one standard deviation of the page."""
    step = mx.sqrt(mx.square(k).mean(3, keepdims=True)) + 1e-9
    return (mx.clip(mx.floor(k / step), -2, 1) + 0.5) * step


def four_bits(k: mx.array) -> mx.array:
    """Channels as sketches have them: 16 levels to the largest of the page."""
    step = mx.abs(k).max(3, keepdims=True) / pages.LEVELS + 1e-9
    return (mx.clip(mx.floor(k / step), -8, 7) + 0.5) * step


def some(chosen: np.ndarray, bits: int = 0, mean: bool = False) -> Weigh:
    """Scores from the channels `chosen [H, C]`, in 4 or 2 bits; `mean`: from the others by the mean key of the page."""

    def weigh(q: mx.array, k: mx.array) -> mx.array:
        rest = 0
        if mean:
            left = np.ones((k.shape[1], k.shape[-1]), np.float32)
            np.put_along_axis(left, chosen, 0, axis=1)
            rest = mean_key(q * mx.array(left)[None, :, None], k)
        index = mx.array(chosen, dtype=mx.int32)[None, :, None]
        few_q = mx.take_along_axis(q, mx.broadcast_to(index, (*q.shape[:3], index.shape[-1])), axis=-1)
        index = index[:, :, None]
        few_k = mx.take_along_axis(k, mx.broadcast_to(index, (*k.shape[:4], index.shape[-1])), axis=-1)
        if bits:
            few_k = two_bits(few_k) if bits == 2 else four_bits(few_k)
        return exact(few_q, few_k) + rest

    return weigh


def prose(part: int) -> Corpus:
    """Half of Python's language reference: 0 to calibrate on, 1 to judge on."""
    whole = corpus.language_reference()
    some = tuple((n, t) for n, t in whole.texts if zlib.crc32(n.encode()) % 2 == part)
    return Corpus(f"{whole.name}-{part}", some)


@contextmanager
def choosing(weigh: Weigh | None) -> Iterator[None]:
    """Steps inside choose their pages by another rule, looking at all keys; None: as the package does."""
    own = Step._pages

    def chosen(step: Step, q: mx.array, scale: float, whole: bool | int) -> mx.array | None:
        packed = tuple(n for n, _, _ in step.lens)
        budget = step.sketches.budget if step.sketches else 0
        if whole or q.shape[2] > pages.ROWS or not budget or max(packed) <= budget:
            return None
        count = max(packed) // pages.PAGE
        keys = step.k.codec.unrotate(step.k.decode(0, count * pages.PAGE, mx.float32))
        batch, heads, _, dim = keys.shape
        rows = q.astype(mx.float32).reshape(batch, heads, -1, dim) * scale
        assert weigh is not None
        return pages.top(weigh(rows, keys.reshape(batch, heads, count, pages.PAGE, dim)), packed, budget // pages.PAGE)

    if weigh is not None:
        Step._pages = chosen  # type: ignore[method-assign]
    try:
        yield
    finally:
        Step._pages = own  # type: ignore[method-assign]


class Study:
    """One model and its records."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.began = args, time.perf_counter()
        self.model, self.tokenizer = opentq.load(args.model)
        self.model.set_dtype(mx.float32)
        dequantize_model(self.model)
        mx.eval(self.model.parameters())
        self.id = model_name(args.model, model_folder(args.model))
        self.records = Records(args.results / "pages.jsonl")
        self.judged = {"code": corpus.standard_library(), "prose": prose(1)}
        self.read = {"code": corpus.standard_library(corpus.CALIBRATION), "prose": prose(0)}
        self.folder = args.work / Path(str(args.model)).stem
        self.folder.mkdir(parents=True, exist_ok=True)

    def say(self, *words: object) -> None:
        print(f"{time.perf_counter() - self.began:6.0f} s ", *words, flush=True)

    def recipe(self, kind: str, tokens: int = 0, context: int = 1024, spec: str = "f16") -> Path:
        """A calibration of `tokens` tokens of one kind of text."""
        tokens = tokens or (1024 if self.args.quick else 8192)
        path = self.folder / f"{kind}-{tokens}-{context}-{spec.replace('/', '_').replace(':', '_')}.toml"
        if not path.exists():
            reading = Reading(tokens, min(context, tokens))
            made = Calibrator(self.model, spec, reading, path.with_suffix(".partial"))
            made.run(texts(self.read[kind], self.tokenizer, reading), kind)
            made.save(path, {"text": kind})
            self.say("calibrated", path.name)
        return path

    # ---- what every rule misses

    def rules(self) -> None:
        """Mass missed at the last rows of one text, by rule, page size, budget and calibration."""
        context, window = (1600, 16) if self.args.quick else (self.args.context, 64)
        for kind, text in self.judged.items():
            rows = text.tokens(self.tokenizer, 1, context, 0)
            settings = about("pages-rules", self.id, text, context=context, window=window)
            if self.records.find({**settings, "done": True}) is not None:
                continue
            probes = layers._watch(
                self.model, mx.array(rows), KVSpec.parse("f16"), layers.View(context, window, 1), lambda _: None
            )
            for layer, probe in probes.items():
                self.one_layer(settings, layer, probe, window)
                probe.seen_keys, probe.seen_values = [], []
            self.records.add({**settings, "done": True}, {})
            self.say("rules", kind)

    def chosen(self, layer: int) -> dict[str, tuple[np.ndarray, int, bool]]:
        """Channels of every calibration, the bits of their sketches, and whether the page's mean key helps."""
        found: dict[str, tuple[np.ndarray, int, bool]] = {}
        sources = {"code": ("code", 0, 1024), "prose": ("prose", 0, 1024)}
        if not self.args.quick:
            sources |= {"code, 512 tokens": ("code", 512, 512), "code, 2048 tokens": ("code", 2048, 1024)}
            sources |= {"code, 32768 tokens": ("code", 32768, 4096)}
        for title, (kind, tokens, context) in sources.items():
            tensors = load_file(self.recipe(kind, tokens, context).with_suffix(".safetensors"))
            if f"{layer}.energy" not in tensors:
                continue
            rotary = Rotary(int(tensors[f"{layer}.rotary"][0]), bool(tensors[f"{layer}.rotary"][1]))
            energy, dim = tensors[f"{layer}.energy"], tensors[f"{layer}.k_mean"].shape[-1]
            more = ((2, 4, 0), (8, 0, 0), (8, 4, 0), (16, 0, 0), (8, 2, 0), (2, 4, 1), (3, 4, 1), (4, 4, 1))
            for pairs, bits, mean in ((4, 0, 0), (4, 4, 0), *(more if title in ("code", "prose") else ())):
                picked = np.array([channels.choose(e, rotary, dim, 2 * pairs) for e in energy])
                name = f"{pairs} pairs{f', {bits} bits' if bits else ''}{', mean' if mean else ''}, {title}"
                found[name] = picked, bits, bool(mean)
        return found

    def one_layer(self, settings: dict, layer: int, probe: layers._Probe, window: int) -> None:
        keys = mx.concatenate(probe.seen_keys, axis=2).astype(mx.float32)
        batch, heads, held, dim = keys.shape
        assert probe.queries is not None
        rules: dict[str, Weigh] = {"oracle": exact, "quest": quest, "mean key": mean_key}
        rules |= {name: some(*how) for name, how in self.chosen(layer).items()}
        missed: dict[tuple[str, int, int], list[np.ndarray]] = {}
        for i in range(0, window, 4):  # every fourth row, each with a list of its own
            last = held - window + i
            q = probe.queries[:, :, i : i + 1].astype(mx.float32).reshape(batch, heads, -1, dim) * probe.scale
            whole = (last - 64) // 128 * 128  # what is packed by then, in whole pages of every size
            scores = q @ keys[:, :, : last + 1].swapaxes(-1, -2)
            share = mx.softmax(scores, axis=-1)
            for size in (16, 32, 64, 128):
                cut = keys[:, :, :whole].reshape(batch, heads, -1, size, dim)
                mass = share[..., :whole].reshape(batch, heads, -1, whole // size, size).sum(-1)
                for name, weigh in rules.items():
                    if " bits" in name and size != 64:
                        continue
                    weights = mx.softmax(weigh(q, cut), axis=-1).sum(2)
                    weights[..., -1] = mx.inf
                    order = mx.argsort(-weights, axis=-1)
                    for budget in BUDGETS:
                        take = order[:, :, None, : budget // size]
                        got = mx.take_along_axis(
                            mass, mx.broadcast_to(take, (*mass.shape[:3], take.shape[-1])), axis=-1
                        )
                        gone = (mass.sum(-1) - got.sum(-1)).mean(2)  # [B, H]
                        missed.setdefault((name, size, budget), []).append(np.array(gone)[0])
        for (name, size, budget), found in missed.items():
            key = {**settings, "layer": layer, "rule": name, "page": size, "budget": budget}
            if self.records.find(key) is None:
                self.records.add(key, {"missed": [round(float(x), 5) for x in np.mean(found, axis=0)]})

    # ---- the model's output

    def arms(self, budget: int) -> dict[str, tuple[str, Weigh | None]]:
        """Rules, as specs and as what chooses in their place."""
        return {
            f"oracle:{budget}": (f"f16:pages={budget}", exact),
            f"recipe code:{budget}": (f"{self.recipe('code')}:pages={budget}", None),
            f"recipe prose:{budget}": (f"{self.recipe('prose')}:pages={budget}", None),
            f"own prompt:{budget}": (f"f16:pages={budget}", None),
            f"quest:{budget}": (f"f16:pages={budget}", quest),
            f"mean key:{budget}": (f"f16:pages={budget}", mean_key),
        }

    def fidelity(self) -> None:
        """KL to the model's own cache at the end of a long text, a token at a time."""
        depth, window = (900, 16) if self.args.quick else (self.args.depth, 256)
        protocol = fidelity.Protocol((depth,), window=window, step=1, sequences=1, prefill=512)
        for kind, text in self.judged.items():
            tokens = mx.array(text.tokens(self.tokenizer, 1, protocol.length, 0))
            settings = about("pages-fidelity", self.id, text, depth=depth, window=window)
            own = None
            for budget in BUDGETS if not self.args.quick else BUDGETS[:1]:
                for name, (spec, weigh) in self.arms(budget).items():
                    key = {**settings, "rule": name.split(":")[0], "budget": budget}
                    if self.records.find(key) is not None:
                        continue
                    own = own or fidelity._read(self.model, enter(NATIVE, self.model), tokens, protocol, lambda _: None)
                    with choosing(weigh):
                        read = fidelity._read(self.model, enter(spec, self.model), tokens, protocol, lambda _: None)
                    targets = tokens[:, depth + 1 : depth + window + 1]
                    found = fidelity.compare(own.log_probs[0], read.log_probs[0], targets, 16)
                    self.records.add(key, found)
                    self.say("fidelity", kind, name, f"{found['kl_mean'][0]:.4f}")

    def needles(self) -> None:
        """Facts found, the question read a token at a time, so that it, too, reads pages."""
        lengths = (900,) if self.args.quick else self.args.lengths
        trials = 1 if self.args.quick else 10
        for facts in (1, 4, 16) if not self.args.quick else (1,):
            for length in lengths:
                asked = needle.Grid((length,), (0.1, 0.3, 0.5, 0.7, 0.9), trials=trials, distractors=facts - 1)
                budget = 512 if self.args.quick else 1024
                packed, recipe = "tq5/tq3:nc:sink=4", self.recipe("code", spec="tq5/tq3:nc:sink=4")
                arms = {"native": (NATIVE, None), packed: (packed, None), **self.arms(budget)}
                arms[f"packed, recipe code:{budget}"] = (f"{recipe}:pages={budget}", None)
                for name, (spec, weigh) in arms.items():
                    settings = about("pages-needle", self.id, self.judged["code"], length=length, facts=facts)
                    key = {**settings, "rule": name, "trials": 5 * trials}
                    if self.records.find(key) is not None:
                        continue
                    with choosing(weigh):
                        right = self.ask(spec, asked)
                    self.records.add(key, {"correct": sum(right), "accuracy": wilson(sum(right), len(right))})
                    self.say("needles", length, facts, name, f"{sum(right)}/{len(right)}")

    def ask(self, spec: str, grid: needle.Grid) -> list[bool]:
        contender, right = enter(spec, self.model), []
        stop = set(getattr(self.tokenizer, "eos_token_ids", []) or [])
        cells = [(d, t) for d in grid.depths for t in range(grid.trials)]
        for start in range(0, len(cells), self.args.batch):
            made = [
                needle.make(self.tokenizer, self.judged["code"], grid, grid.lengths[0], d, t)
                for d, t in cells[start : start + self.args.batch]
            ]
            own = min(len(n.question) for n in made)
            rows, held = mx.array([n.text + n.question for n in made]), contender.caches()
            prefill(self.model, rows[:, :-own], held, 512)
            prefill(self.model, rows[:, -own:-1], held, 1)
            answers = greedy(self.model, rows[:, -1:], held, grid.answer, stop)
            right += [n.answer in self.tokenizer.decode(a) for n, a in zip(made, answers)]
        return right


PARTS = ("rules", "fidelity", "needles")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="default: what MLX uses")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, comma-separated")
    parser.add_argument("--context", type=int, default=6144, help="tokens of the text of `rules`")
    parser.add_argument("--depth", type=int, default=6912, help="tokens before those of `fidelity`")
    parser.add_argument("--lengths", type=lambda s: tuple(map(int, s.split(","))), default=(1536, 3584, 6656))
    parser.add_argument("--batch", type=int, default=10, help="needles read together")
    parser.add_argument("--quick", action="store_true", help="a few hundred tokens of each: a test of this script")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--work", type=Path, default=ROOT / "results" / "recipes", help="where recipes are kept")
    args = parser.parse_args()
    if args.device:
        mx.set_default_device(mx.Device(getattr(mx, args.device)))
    if mx.default_device() == mx.Device(mx.gpu):
        mx.set_cache_limit(4 << 30)
        tiled.SCRATCH = 512 << 20  # larger tiles, fewer launches; the numbers are the same
    study = Study(args)
    for part in args.only.split(","):
        getattr(study, part)()


if __name__ == "__main__":
    main()
