"""What the studies measured on made-up keys and on random networks, appended to results/*.jsonl, once.

python docs/studies/made.py
"""

from __future__ import annotations

import sys
from pathlib import Path

# isort: off
import opentq  # noqa: F401 (before MLX, so that its faster matrix product is found on CPUs)
import mlx.core as mx

# isort: on
from mlx_lm.models import llama

from opentq.evaluate import contenders, layers
from opentq.records import Records
from opentq.spec.kv import KVSpec

sys.path.insert(0, str(Path(__file__).parent))
from network import ROOT

CODECS = """
q4_0 q4_0:norot int8:g64 int4 int4:g64 int4:norot int4:g64:norot int4:out=2 int3 int3:g64 int2 k8v4:g64 k8tq3 k8tq2
tq1 tq2 tq2.5 tq3 tq3.5 tq4 tq3:nc tq3:ub tq3:out=2 tq4:haar tq5/tq3 tq6/tq3 tq5/tq4 tq6/tq4 tq6/tq2 tq4/tq3 tq3/tq4
tq3p tq3p:sketch=orth tq4p:sketch=orth polar4 qjl qjl/int2 qjl2/int4 qjl6/int4 qjl4/int4:sketch=gauss
""".split()  # noqa: SIM905


def constructed() -> None:
    """Attention over made-up keys: Gaussian, with outlier channels, with offset outliers as biased keys have."""
    records = Records(ROOT / "results" / "constructed.jsonl")
    dim, count, channels = 128, 2048, mx.array([3, 40, 67, 104])
    for kind in ("gaussian", "outliers", "offset outliers"):
        keys = mx.random.normal((1, 4, count, dim), key=mx.random.key(1))
        if kind == "outliers":
            keys[..., channels] = keys[..., channels] * 20
        elif kind == "offset outliers":
            keys[..., channels] = keys[..., channels] + 20
        values = mx.random.normal((1, 4, count, dim), key=mx.random.key(2))
        q = mx.random.normal((1, 16, 64, dim), key=mx.random.key(3))
        q[..., channels] = q[..., channels] / (20 if kind != "gaussian" else 1)
        for name in CODECS:
            spec = contenders._Q4Spec(rotate=name == "q4_0") if name.startswith("q4_0") else KVSpec.parse(name)
            settings = {"kind": "constructed", "keys": kind, "dim": dim, "tokens": count, "spec": name}
            if records.find(settings) is None:
                errors = layers.attention_errors(q, keys, values, dim**-0.5 * 2, spec)
                records.add(settings, {"bits": round(spec.bits_per_value(dim), 4), **errors})
        print("constructed", kind, flush=True)


def depth() -> None:
    """Error per layer of random residual stacks of 32, 60 and 80 layers."""
    records = Records(ROOT / "results" / "layers.jsonl")
    view = layers.View(context=256, window=32, sequences=1)
    specs = [KVSpec.parse(s) for s in ("int4", "tq3", "tq1", "qjl6/int4", "qjl2/int4")]
    for count in (32, 60, 80):
        for sharp in (1.0, 6.0):
            name = f"random-{count}" + ("-sharp" if sharp > 1 else "")
            tokens = mx.random.randint(0, 512, (1, view.context), key=mx.random.key(count))
            settings = {"kind": "layers", "model": {"name": name}, "text": {"name": "random"}, "view": vars(view)}
            layers.measure(stack(count, sharp), tokens, specs, view, settings, records)
            print("layers", name, flush=True)


def stack(count: int, sharp: float) -> llama.Model:
    """A Llama of `count` random layers; `sharp` multiplies its queries, which makes attention pick few tokens."""
    mx.random.seed(count)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    args = {"model_type": "llama", "head_dim": 64, "rms_norm_eps": 1e-5, "vocab_size": 512, **sizes}
    model = llama.Model(llama.ModelArgs(num_hidden_layers=count, **args))
    for layer in model.layers:
        layer.self_attn.q_proj.weight = layer.self_attn.q_proj.weight * sharp * 3**0.5
        layer.self_attn.k_proj.weight = layer.self_attn.k_proj.weight * 3**0.5
    mx.eval(model.parameters())
    return model


if __name__ == "__main__":
    constructed()
    depth()
