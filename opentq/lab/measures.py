"""What a trial can measure: functions of its settings, which are their parameters, with the defaults that they have."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..evaluate.evaluation import Evaluation

Settings = dict[str, Any]
Result = dict[str, Any]


def fidelity(
    model: str = "",
    kv: str = "int4",
    depth: int = 1024,
    window: int = 64,
    sequences: int = 2,
    simulate: bool = True,
    seed: int = 0,
) -> Result:
    """KL, top-1 agreement and perplexity against the model's own cache at one depth.

    `simulate` keeps decoded values in fp16: the same errors, faster for codecs without fused kernels.
    """
    from ..evaluate import fidelity as evaluate

    protocol = evaluate.Protocol((depth,), window, 16, sequences, 512, seed, simulate)
    (found,) = evaluate.run(_evaluation(model, kv), protocol)
    intervals = {k: found[k][0] for k in ("kl_mean", "kl_p99", "top1", "ppl_ratio")}
    return {"bits": found["bits"], **intervals, "kl_interval": list(found["kl_mean"])}


def needle(
    model: str = "",
    kv: str = "int4",
    length: int = 1024,
    trials: int = 4,
    distractors: int = 0,
    simulate: bool = True,
    seed: int = 0,
) -> Result:
    """Share of planted facts that are found."""
    from ..evaluate import needle as evaluate

    grid = evaluate.Grid(
        (length,), (0.1, 0.5, 0.9), trials=trials, distractors=distractors, seed=seed, simulate=simulate
    )
    found = evaluate.run(_evaluation(model, kv), grid)
    return {"bits": found[0]["bits"], "accuracy": sum(r["correct"] for r in found) / (trials * len(found))}


def vectors(
    kv: str = "int4",
    keys: str = "gaussian",
    alpha: float = 1.0,
    spread: float = 0.0,
    size: float = 1.0,
    dim: int = 128,
    tokens: int = 512,
    seed: int = 0,
) -> Result:
    """Constructed queries, keys and values of one attention call: what a codec does to them.

    `keys` is gaussian, outliers (4 channels 20 times larger) or offset (4 channels with a constant added). `alpha` is
    the attention scale times sqrt(D); `spread` the standard deviation of the logits, held by scaling the queries, or 0
    to leave the queries alone, so that a larger alpha means larger logits.
    """
    import mlx.core as mx
    import numpy as np

    from ..evaluate.layers import attention_errors
    from ..spec.kv import KVSpec

    rng = np.random.default_rng(seed)
    rows = 32
    q, k, v = (rng.standard_normal((1, 1, n, dim)).astype(np.float32) * size for n in (rows, tokens, tokens))
    if keys == "outliers":
        k[..., 3:dim:32] *= 20
    elif keys == "offset":
        k[..., 3:dim:32] += 20 * size
    scale = alpha / dim**0.5
    if spread:
        logits = q[0, 0] @ k[0, 0].T * scale
        q *= spread / logits.std(-1).mean()
    found = attention_errors(mx.array(q), mx.array(k), mx.array(v), scale, KVSpec.parse(kv))
    return {"bits": KVSpec.parse(kv).bits_per_value(dim), **found}


def speed(
    model: str = "",
    kv: str = "native",
    weights: int = 0,
    dtype: str = "default",
    pipeline: bool = True,
    chunk: int = 512,
    depth: int = 512,
    count: int = 32,
    seed: int = 0,
) -> Result:
    """Prefill and decode tokens per second of a model, with one thing changed at a time.

    `weights` quantises linear layers (0: as they are), `dtype` is that of all other arithmetic, `pipeline` lets the
    next step start before the last token is read, `chunk` is the prefill step.
    """
    import mlx.core as mx
    import mlx.nn as nn

    from ..evaluate.forward import prefill
    from ..hosts import hooks
    from ..hosts.mlx_lm.load import load
    from ..hosts.mlx_lm.public import make_prompt_cache

    network, _ = load(model)
    if weights:
        nn.quantize(network, group_size=32, bits=weights)
    if kv != "native":
        hooks.compress(network, kv)
    if dtype != "default":
        network.set_dtype(getattr(mx, dtype))
    tokens = mx.array([[5 + (seed + i) * 7919 % 1000 for i in range(depth)]])
    caches = make_prompt_cache(network)
    mx.eval(network.parameters())
    start = time.perf_counter()
    prefill(network, tokens, caches, chunk)
    filled = time.perf_counter()
    token = tokens[:, -1:]
    for _ in range(count):
        token = mx.argmax(network(token, cache=caches)[:, -1:], axis=-1)
        if pipeline:
            mx.async_eval(token)
        else:
            token.item()
    mx.eval(token)
    decode = count / (time.perf_counter() - filled)
    return {"prefill_per_s": depth / (filled - start), "decode_per_s": decode}


def speculative(
    model: str = "", draft: str = "", depth: int = 256, count: int = 32, drafts: int = 3, seed: int = 0
) -> Result:
    """Speculative decoding: the share of tokens that the draft model got right, and speed against plain decoding."""
    import mlx.core as mx

    from ..evaluate import corpus
    from ..hosts.mlx_lm.public import generate_step, speculative_generate_step

    (network, tokenizer), (small, _) = _loaded(model), _loaded(draft)
    prompt = mx.array(corpus.load(None).tokens(tokenizer, 1, depth, seed)[0])
    start = time.perf_counter()
    plain = sum(1 for _ in generate_step(prompt, network, max_tokens=count))
    middle = time.perf_counter()
    steps = speculative_generate_step(prompt, network, small, num_draft_tokens=drafts, max_tokens=count)
    accepted = [bool(step[2]) for step in steps]
    speculated = time.perf_counter() - middle
    ratio = (len(accepted) / speculated) / (plain / (middle - start))
    return {"acceptance": sum(accepted) / len(accepted), "speedup": ratio}


def _evaluation(model: str, kv: str) -> Evaluation:
    """One contender on the held-out text, its result kept by nobody but the trial."""
    from ..evaluate import corpus
    from ..evaluate.evaluation import Evaluation
    from ..records import Records

    network, tokenizer = _loaded(model)
    return Evaluation(network, {"name": model}, tokenizer, corpus.load(None), [kv], Records())


@functools.lru_cache(maxsize=2)
def _loaded(path: str) -> Any:
    from ..hosts.mlx_lm.load import load

    return load(path)


MEASURES: dict[str, Callable[..., Result]] = {f.__name__: f for f in (fidelity, needle, vectors, speed, speculative)}


def defaults(measure: str) -> Settings:
    """The settings that a measure takes, itself the first, as they are when nothing else is said."""
    parameters = inspect.signature(MEASURES[measure]).parameters.values()
    return {"measure": measure, **{p.name: p.default for p in parameters}}


def run(settings: Settings) -> Result:
    """Measure one trial."""
    return MEASURES[settings["measure"]](**{name: value for name, value in settings.items() if name != "measure"})
