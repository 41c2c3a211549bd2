"""What a trial can measure: functions from settings to numbers, and the settings that each takes."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Settings = dict[str, Any]
Result = dict[str, Any]


@dataclass(frozen=True)
class Measure:
    """A kind of trial: what it does and the settings it takes, with their defaults."""

    run: Callable[[Settings], Result]
    settings: Settings

    def takes(self) -> str:
        return ", ".join(self.settings)


def fidelity(s: Settings) -> Result:
    """KL, top-1 agreement and perplexity against the model's own cache at one depth.

    `simulate` keeps decoded values in fp16: the same errors, faster for codecs without fused kernels.
    """
    from ..evaluate import corpus
    from ..evaluate import fidelity as evaluate
    from ..records import Records

    model, tokenizer = _loaded(s["model"])
    protocol = evaluate.Protocol((s["depth"],), s["window"], 16, s["sequences"], 512, s["seed"], s["simulate"])
    (found,) = evaluate.run(model, {"name": s["model"]}, tokenizer, corpus.load(None), [s["kv"]], protocol, Records())
    intervals = {k: found[k][0] for k in ("kl_mean", "kl_p99", "top1", "ppl_ratio")}
    return {"bits": found["bits"], **intervals, "kl_interval": list(found["kl_mean"])}


def needle(s: Settings) -> Result:
    """Share of planted facts that are found."""
    from ..evaluate import corpus
    from ..evaluate import needle as evaluate
    from ..records import Records

    model, tokenizer = _loaded(s["model"])
    options = {k: s[k] for k in ("trials", "distractors", "seed", "simulate")}
    grid = evaluate.Grid((s["length"],), (0.1, 0.5, 0.9), **options)
    found = evaluate.run(model, {"name": s["model"]}, tokenizer, corpus.load(None), [s["kv"]], grid, Records())
    return {"bits": found[0]["bits"], "accuracy": sum(r["correct"] for r in found) / (s["trials"] * len(found))}


def vectors(s: Settings) -> Result:
    """Constructed queries, keys and values of one attention call: what a codec does to them.

    `keys` is gaussian, outliers (4 channels 20 times larger) or offset (4 channels with a constant added). `alpha` is
    the attention scale times sqrt(D); `spread` the standard deviation of the logits, held by scaling the queries, or 0
    to leave the queries alone, so that a larger alpha means larger logits.
    """
    import mlx.core as mx
    import numpy as np

    from ..evaluate.layers import attention_errors
    from ..spec.kv import KVSpec

    rng = np.random.default_rng(s["seed"])
    dim, tokens, rows = s["dim"], s["tokens"], 32
    q, k, v = (rng.standard_normal((1, 1, n, dim)).astype(np.float32) * s["size"] for n in (rows, tokens, tokens))
    if s["keys"] == "outliers":
        k[..., 3:dim:32] *= 20
    elif s["keys"] == "offset":
        k[..., 3:dim:32] += 20 * s["size"]
    scale = s["alpha"] / dim**0.5
    if s["spread"]:
        logits = q[0, 0] @ k[0, 0].T * scale
        q *= s["spread"] / logits.std(-1).mean()
    found = attention_errors(mx.array(q), mx.array(k), mx.array(v), scale, KVSpec.parse(s["kv"]))
    return {"bits": KVSpec.parse(s["kv"]).bits_per_value(dim), **found}


def speed(s: Settings) -> Result:
    """Prefill and decode tokens per second of a model, with one thing changed at a time.

    `weights` quantises linear layers (0: as they are), `dtype` is that of all other arithmetic, `pipeline` lets the
    next step start before the last token is read, `chunk` is the prefill step.
    """
    import mlx.core as mx
    import mlx.nn as nn

    from ..hosts import hooks
    from ..hosts.mlx_lm.load import load
    from ..hosts.mlx_lm.public import make_prompt_cache

    model, _ = load(s["model"])
    if s["weights"]:
        nn.quantize(model, group_size=32, bits=s["weights"])
    if s["kv"] != "native":
        hooks.compress(model, s["kv"])
    if s["dtype"] != "default":
        model.set_dtype(getattr(mx, s["dtype"]))
    tokens = mx.array([[5 + (s["seed"] + i) * 7919 % 1000 for i in range(s["depth"])]])
    caches = make_prompt_cache(model)
    mx.eval(model.parameters())
    start = time.perf_counter()
    for at in range(0, s["depth"], s["chunk"]):
        model(tokens[:, at : at + s["chunk"]], cache=caches)
        mx.eval([c.state for c in caches])
    filled = time.perf_counter()
    token = tokens[:, -1:]
    for _ in range(s["count"]):
        token = mx.argmax(model(token, cache=caches)[:, -1:], axis=-1)
        if s["pipeline"]:
            mx.async_eval(token)
        else:
            token.item()
    mx.eval(token)
    decode = s["count"] / (time.perf_counter() - filled)
    return {"prefill_per_s": s["depth"] / (filled - start), "decode_per_s": decode}


def speculative(s: Settings) -> Result:
    """Speculative decoding: the share of tokens that the draft model got right, and speed against plain decoding."""
    import mlx.core as mx

    from ..evaluate import corpus
    from ..hosts.mlx_lm.public import generate_step, speculative_generate_step

    (model, tokenizer), (draft, _) = _loaded(s["model"]), _loaded(s["draft"])
    prompt = mx.array(corpus.load(None).tokens(tokenizer, 1, s["depth"], s["seed"])[0])
    start = time.perf_counter()
    plain = sum(1 for _ in generate_step(prompt, model, max_tokens=s["count"]))
    middle = time.perf_counter()
    steps = speculative_generate_step(prompt, model, draft, num_draft_tokens=s["drafts"], max_tokens=s["count"])
    accepted = [bool(step[2]) for step in steps]
    speculated = time.perf_counter() - middle
    ratio = (len(accepted) / speculated) / (plain / (middle - start))
    return {"acceptance": sum(accepted) / len(accepted), "speedup": ratio}


@functools.lru_cache(maxsize=2)
def _loaded(path: str) -> Any:
    from ..hosts.mlx_lm.load import load

    return load(path)


MEASURES = {
    "fidelity": Measure(
        fidelity,
        {
            "measure": "fidelity",
            "model": "",
            "kv": "int4",
            "depth": 1024,
            "window": 64,
            "sequences": 2,
            "simulate": True,
            "seed": 0,
        },
    ),
    "needle": Measure(
        needle,
        {
            "measure": "needle",
            "model": "",
            "kv": "int4",
            "length": 1024,
            "trials": 4,
            "distractors": 0,
            "simulate": True,
            "seed": 0,
        },
    ),
    "vectors": Measure(
        vectors,
        {
            "measure": "vectors",
            "kv": "int4",
            "keys": "gaussian",
            "alpha": 1.0,
            "spread": 0.0,
            "size": 1.0,
            "dim": 128,
            "tokens": 512,
            "seed": 0,
        },
    ),
    "speed": Measure(
        speed,
        {
            "measure": "speed",
            "model": "",
            "kv": "native",
            "weights": 0,
            "dtype": "default",
            "pipeline": True,
            "chunk": 512,
            "depth": 512,
            "count": 32,
            "seed": 0,
        },
    ),
    "speculative": Measure(
        speculative,
        {"measure": "speculative", "model": "", "draft": "", "depth": 256, "count": 32, "drafts": 3, "seed": 0},
    ),
}


def run(settings: Settings) -> Result:
    """Measure one trial."""
    return MEASURES[settings["measure"]].run(settings)
