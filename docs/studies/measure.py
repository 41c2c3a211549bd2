"""The measurements behind the studies, appended to results/*.jsonl; what is there already is not measured again.

    python docs/studies/measure.py codecs --models models/tiny-llama,models/tiny-gemma

Models run in float32, and caches are simulated (`opentq/evaluate/simulate.py`): every row goes through the same
attention function, so that what differs between two rows is the codec and nothing else. `draw.py` makes the pictures.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

# isort: off
import opentq  # before MLX, so that its faster matrix product is found on CPUs
import mlx.core as mx

# isort: on
from opentq.attention import tiled
from opentq.evaluate import contenders, corpus, fidelity, layers, needle, show
from opentq.evaluate.evaluation import Evaluation
from opentq.hosts.mlx_lm.load import model_folder
from opentq.records import Records, model_name
from opentq.spec.kv import KVSpec

ROOT = Path(__file__).parents[2]

# Every method at every size; both roads to 4.5 and to 3.25 bits; protections. Ordered by what matters most.
CODECS = """
native mlx4 q4_0 int4 tq4 tq3 tq5/tq3 tq6/tq3 tq5/tq4 tq6/tq4 tq6/tq2 int4:g64 int4:norot k8v4:g64 tq2 int3:g64
polar4 qjl tq3p int2 tq3:center int4:center tq5/tq3:center tq5/tq3:sink=4:recent=64 tq3:sink=4:recent=64
tq3p:sketch=orth tq4/tq3 k8tq3 mlx8 int4:first2=qjl tq3:nc tq2.5 qjl6/int4 tq3:out=2 tq4:sink=4:recent=64
tq4:center tq3.5 tq3:ub k8tq2 tq3:skip=first1 tq3:skip=last1 qjl2/int4 tq4p:sketch=orth tq1 tq4:haar int8:g64
qjl4/int4:sketch=gauss qjl/int2 int4:out=2 int3 tq3/tq4 q4_0:norot int4:g64:norot tq5/tq3:nc:center tq5/tq3:nc
tq6/tq3:nc tq6/tq3:nc:center tq6/tq3:center tq4:nc tq3:nc:center tq3:nc:sink=4:recent=64
tq5/tq3:nc:sink=4:recent=64 tq3:nc:last1=int8 tq2:nc int4:g64:center
""".split()  # noqa: SIM905

NEEDLES = "native mlx4 tq3 int4 tq5/tq3 tq2 int4:g64 qjl polar4 int2 tq3p int3:g64".split()  # noqa: SIM905

PROBED = "int8 int4 tq4 tq3 tq2 tq1 int4:norot int2 polar4 tq3p qjl2/int4 qjl6/int4 k8tq2 tq4/tq1".split()  # noqa: SIM905

GAINS = (0.25, 1, 4)
SPREADS = (0.5, 0.71, 1.41, 2)


def identity(folder: str):
    return model_name(folder, model_folder(folder))


def load(folder: str):
    """A model in float32 with its tokenizer."""
    model, tokenizer = opentq.load(folder)
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model, tokenizer


def codecs(args: argparse.Namespace) -> None:
    """Fidelity of every spec at three depths."""
    protocol = fidelity.Protocol(args.depths, window=128, step=16, sequences=args.sequences, simulate=True)
    records = Records(args.results / "fidelity.jsonl")
    for folder in args.models:
        model, tokenizer = load(folder)
        start = time.perf_counter()
        names = args.specs or CODECS
        found = fidelity.run(
            Evaluation(model, identity(folder), tokenizer, corpus.load(args.text), names, records), protocol
        )
        for name, group in show.grouped(found).items():
            numbers = " ".join(f"{r['kl_mean'][0]:.2e}/{100 * r['top1'][0]:.1f}" for r in group)
            print(f"{folder} {name:<28} {group[0]['bits']:.3f} bits {numbers}")
        print(f"codecs {folder} {time.perf_counter() - start:.0f} s", flush=True)


def needles(args: argparse.Namespace) -> None:
    """Needles among eight distractors at two lengths."""
    grid = needle.Grid(args.lengths, trials=args.trials, distractors=args.distractors, batch=args.batch, simulate=True)
    records = Records(args.results / "needle.jsonl")
    for folder in args.models:
        model, tokenizer = load(folder)
        start = time.perf_counter()
        names = args.specs or NEEDLES
        found = needle.run(Evaluation(model, identity(folder), tokenizer, corpus.load(args.text), names, records), grid)
        for name, group in show.grouped(found).items():
            print(f"{folder} {name:<28} {sum(r['correct'] for r in group) / (len(group) * args.trials):.4f}")
        print(f"needles {folder} {time.perf_counter() - start:.0f} s", flush=True)


def depth(args: argparse.Namespace) -> None:
    """Error per layer: trained models, and random residual stacks of 32, 60 and 80 layers."""
    records = Records(args.results / "layers.jsonl")
    view = layers.View(context=2048, window=32, sequences=2)
    for folder in args.models:
        model, tokenizer = load(folder)
        layers.run(
            Evaluation(model, identity(folder), tokenizer, corpus.load(args.text), args.specs or PROBED, records), view
        )
        print("layers", folder, flush=True)
    view = layers.View(context=256, window=32, sequences=1)
    for count in (32, 60, 80):
        for sharp in (1.0, 6.0):
            name = f"random-{count}" + ("-sharp" if sharp > 1 else "")
            tokens = mx.random.randint(0, 512, (1, view.context), key=mx.random.key(count))
            settings = {"kind": "layers", "model": {"name": name}, "text": {"name": "random"}, "view": vars(view)}
            specs = [KVSpec.parse(s) for s in ("int4", "tq3", "tq1", "qjl6/int4", "qjl2/int4")]
            layers.measure(random_stack(count, sharp), tokens, specs, view, settings, records)
            print("layers", name, flush=True)


def random_stack(count: int, sharp: float):
    """A Llama of `count` random layers; `sharp` multiplies its queries, which makes attention pick few tokens."""
    from mlx_lm.models import llama

    mx.random.seed(count)
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=256,
            num_hidden_layers=count,
            intermediate_size=512,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            rms_norm_eps=1e-5,
            vocab_size=512,
        )
    )
    for layer in model.layers:
        layer.self_attn.q_proj.weight = layer.self_attn.q_proj.weight * sharp * 3**0.5
        layer.self_attn.k_proj.weight = layer.self_attn.k_proj.weight * 3**0.5
    mx.eval(model.parameters())
    return model


def scale(args: argparse.Namespace) -> None:
    """Attention scale against query gain at fixed logits, and logit spread at fixed scale."""
    records = Records(args.results / "scale.jsonl")
    protocol = fidelity.Protocol((1024,), window=128, step=16, sequences=args.sequences, simulate=True)
    view = layers.View(context=1024, window=32, sequences=2)
    for folder in args.models:
        model, tokenizer = load(folder)
        variants = [(g, 1 / g, f"gain x{g:g}, scale x{1 / g:g}") for g in GAINS]
        variants += [(s, 1.0, f"gain x{s:g}") for s in SPREADS]
        for gain, alpha, title in variants:
            change(model, gain, alpha)
            changed = {**identity(folder), "change": title, "gain": gain, "alpha": alpha}
            for spec in ("int4", "tq3", "tq2"):
                fidelity.run(Evaluation(model, changed, tokenizer, corpus.load(args.text), [spec], records), protocol)
            layers.run(
                Evaluation(model, changed, tokenizer, corpus.load(args.text), ["int4", "tq3", "tq2"], records), view
            )
            change(model, 1 / gain, 1 / alpha)
            print("scale", folder, title, flush=True)


def change(model, gain: float, alpha: float) -> None:
    """Multiply the queries of every layer by `gain` and its attention scale by `alpha`."""
    for layer in model.layers:
        attention = layer.self_attn
        if hasattr(attention, "q_norm"):  # Gemma stores the gain minus one
            attention.q_norm.weight = (1 + attention.q_norm.weight) * gain - 1
        else:
            attention.q_proj.weight = attention.q_proj.weight * gain
        attention.scale = attention.scale * alpha


def constructed(args: argparse.Namespace) -> None:
    """Attention over made-up keys: Gaussian, with outlier channels, with offset outliers as biased keys have."""
    records = Records(args.results / "constructed.jsonl")
    dim, count = 128, 2048
    for kind in ("gaussian", "outliers", "offset outliers"):
        keys = mx.random.normal((1, 4, count, dim), key=mx.random.key(1))
        channels = mx.array([3, 40, 67, 104])
        if kind == "outliers":
            keys[..., channels] = keys[..., channels] * 20
        elif kind == "offset outliers":
            keys[..., channels] = keys[..., channels] + 20
        values = mx.random.normal((1, 4, count, dim), key=mx.random.key(2))
        q = mx.random.normal((1, 16, 64, dim), key=mx.random.key(3))
        q[..., channels] = q[..., channels] / (20 if kind != "gaussian" else 1)
        for name in args.specs or CODECS:
            if (
                name in ("native", "mlx8", "mlx4")
                or "center" in name
                or "sink" in name
                or "skip" in name
                or "first" in name
            ):
                continue
            spec = contenders._Q4Spec(rotate=name == "q4_0") if name.startswith("q4_0") else KVSpec.parse(name)
            settings = {"kind": "constructed", "keys": kind, "dim": dim, "tokens": count, "spec": name}
            if records.find(settings) is None:
                errors = layers.attention_errors(q, keys, values, dim**-0.5 * 2, spec)
                records.add(settings, {"bits": round(spec.bits_per_value(dim), 4), **errors})
        print("constructed", kind, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    tasks = {"codecs": codecs, "needles": needles, "depth": depth, "scale": scale, "constructed": constructed}
    parser.add_argument("task", choices=tasks)
    parser.add_argument("--models", default="models/tiny-llama,models/tiny-gemma")
    parser.add_argument("--specs", default="")
    parser.add_argument("--text", type=Path, help="what to read: code, prose, or a folder")
    parser.add_argument("--depths", default="1024,4096")
    parser.add_argument("--lengths", default="2048")
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--batch", type=int, default=15)
    parser.add_argument("--distractors", type=int, default=8)
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    args = parser.parse_args()
    args.models = [m for m in args.models.split(",") if m]
    args.specs = [s for s in args.specs.split(",") if s]
    args.depths, args.lengths = (tuple(map(int, x.split(","))) for x in (args.depths, args.lengths))
    if mx.default_device() == mx.Device(mx.gpu):
        mx.set_cache_limit(4 << 30)
        tiled.SCRATCH = 512 << 20  # larger tiles, fewer launches; the numbers are the same
    tasks[args.task](args)


if __name__ == "__main__":
    sys.exit(main())
