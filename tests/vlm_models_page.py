"""What opentq does with every architecture of mlx-vlm, found out by running tiny language models of all of them.

`python -m tests.vlm_models_page` writes the findings to the second half of docs/models.md; `test_vlm_architectures.py`
holds each of them to them.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_vlm.generate.ar import BatchGenerator
from mlx_vlm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache, make_prompt_cache

from opentq.caches.composite import composite, members
from opentq.hosts import hooks
from opentq.hosts.mlx_vlm.host import HOST
from opentq.hosts.mlx_vlm.seams import SEAMS
from opentq.hosts.policy import native_reason

from .models_page import BUDGET, PAGE, PROMPT, RAGGED, STEPS, Verdict, distance, judged
from .vlm_architectures import LEFT_OUT, NAMES, build

TITLE = "# Models of mlx-vlm"


class Rounded:
    """A cache of mlx-vlm with keys and values rounded to float16, as a compressed cache keeps its newest tokens."""

    def update_and_fetch(self, keys, values):
        return super().update_and_fetch(*(x.astype(mx.float16).astype(x.dtype) for x in (keys, values)))


def logits(model: Any, tokens: list[int], cache: list[Any]) -> mx.array:
    out = model(mx.array([tokens]), cache=cache)
    return getattr(out, "logits", out)[0, -1]


def forget_positions(model: Any) -> None:
    """Multimodal positions belong to one conversation, and the model keeps them: mlx-vlm resets them like this."""
    for name in ("_rope_deltas", "_position_ids", "_rope_delta"):
        if hasattr(model, name):
            setattr(model, name, None)


def forward(model: Any, cache: list[Any], steps=STEPS) -> list[mx.array]:
    """Logits of the last position of every step."""
    if steps[0][0] == 0:
        forget_positions(model)
    out = []
    for start, stop in steps:
        out.append(logits(model, PROMPT[start:stop], cache))
        mx.eval(out[-1])
    return out


def rounded(model: Any, window: bool) -> list[Any]:
    """The model's own caches, with those that are compressed (and the windows) rounded to float16."""
    caches, traits = make_prompt_cache(model), SEAMS.traits(model)
    for cache in caches:
        for part, c in enumerate(members(cache)):
            ours = isinstance(c, KVCache) and not native_reason(cache, part, None, HOST.caches, traits)
            if ours or (window and type(c) is RotatingKVCache):
                c.__class__ = type("Rounded", (Rounded, type(c)), {})
    return caches


def embedded(model: Any, prompt: list[int]) -> mx.array:
    """What the whole model would hand to its language model: the prompt's embeddings `[1, T, E]`."""
    found = {n.rpartition(".")[2]: m for n, m in model.named_modules()}
    names = ("embed_tokens", "wte", "tok_embeddings", "word_embeddings", "embedding", "embeddings")
    tables = [found[name] for name in names if name in found]
    tables += [m for m in found.values() if isinstance(m, nn.Embedding)]
    return tables[0](mx.array([prompt]))


def tokens_alone(model: Any, prompt: list[int]) -> list[int]:
    """Greedy tokens of one prompt: all but its last token in one step, as mlx-vlm does it, then one by one."""
    forget_positions(model)
    cache = make_prompt_cache(model)
    if prompt[:-1]:
        model(mx.array([prompt[:-1]]), inputs_embeds=embedded(model, prompt[:-1]), cache=cache)
    out = model(mx.array([prompt[-1:]]), inputs_embeds=embedded(model, prompt[-1:]), cache=cache)
    tokens = [int(mx.argmax(getattr(out, "logits", out)[0, -1]))]
    while len(tokens) < BUDGET:
        tokens.append(int(mx.argmax(logits(model, tokens[-1:], cache))))
    return tokens


def tokens_together(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of several prompts in one batch of mlx-vlm's, which pads them on the left."""
    forget_positions(model)
    criteria = type("Never", (), {"__call__": lambda self, token: False, "add_eos_token_ids": lambda self, ids: None})()
    processor = SimpleNamespace(stopping_criteria=criteria)
    generator = BatchGenerator(model, processor, prefill_batch_size=len(prompts), compute_logprobs=False)
    embeds = [{"inputs_embeds": embedded(model, p)} for p in prompts]
    uids = generator.insert([list(p) for p in prompts], [BUDGET] * len(prompts), prompt_kwargs=embeds)
    tokens: dict[int, list[int]] = {u: [] for u in uids}
    while generator.has_work:
        for response in generator.next()[1]:
            tokens[response.uid].append(response.token)
    generator.close()
    return [tokens[u] for u in uids]


@functools.cache
def verdict(name: str) -> Verdict:
    """What opentq does with architecture `name`."""
    return judged(name, build(name), sys.modules[__name__])


def grows(cache: Any) -> bool:
    """Whether a cache that has seen tokens grows with the context."""
    return (
        not cache.empty() and not isinstance(cache, (RotatingKVCache, ArraysCache)) and not hasattr(cache, "chunk_size")
    )


def features(model: Any, caches: list[Any]) -> tuple[str, ...]:
    source = inspect.getsource(inspect.getmodule(type(model)))  # type: ignore[arg-type]
    kinds = {type(c) for cache in caches for c in members(cache)}
    found = {
        "window": RotatingKVCache in kinds,
        "recurrent": ArraysCache in kinds,
        "sinks": "sinks=" in source,
        "softcap": "attn_logit_softcapping" in source,
        "shared KV": any(word in source for word in ("kv_shared", "kv_reuse", "previous_kvs", "loop_window")),
        "latent": SEAMS.traits(model).latent,
        "M-RoPE": hasattr(model, "get_rope_index"),
        "an indexer, whose keys stay as they are": bool(SEAMS.traits(model).beside),
    }
    return tuple(word for word, there in found.items() if there)


def batch(model: Any) -> str:
    """Ragged prompts in one batch against the same prompts alone."""
    prompts = [PROMPT[:n] for n in RAGGED]
    try:
        together = tokens_together(model, prompts)
    except (ValueError, AttributeError, TypeError):
        if _native_batches(model, prompts) is not None:
            raise
        return "not in mlx-vlm"
    if together == [tokens_alone(model, p) for p in prompts]:
        return "equal"
    return "differs" if _native_batches(model, prompts) else "differs in mlx-vlm, too"


def _native_batches(model: Any, prompts: list[list[int]]) -> bool | None:
    """Whether mlx-vlm's own caches give the same tokens in a batch as alone; None when it can't batch the model."""
    spec = hooks.installed(model).spec
    hooks.uninstall(model)
    try:
        return tokens_together(model, prompts) == [tokens_alone(model, p) for p in prompts]
    except (ValueError, AttributeError, TypeError):
        return None
    finally:
        hooks.compress(model, spec)


def resumes(model: Any) -> bool:
    """A cache that was copied, or taken apart and put together as mlx-vlm does it, continues bit for bit."""
    cache = model.make_cache()
    forward(model, cache, [(0, 100)])
    copied = copy.deepcopy(cache)
    again = [taken_apart(c) for c in copy.deepcopy(cache)]
    want = forward(model, cache, STEPS[1:3])
    return all(distance(forward(model, other, STEPS[1:3]), want) == 0 for other in (copied, again))


def taken_apart(cache: Any) -> Any:
    """A cache made of its own state. mlx-vlm's CacheList itself finds only classes of mlx-vlm's own module."""
    if composite(cache):
        return CacheList(*map(taken_apart, members(cache)))
    return type(cache).from_state(cache.state, cache.meta_state) if not cache.empty() else cache


def trims(model: Any) -> bool | None:
    """Five tokens taken back leave no trace; None where mlx-vlm can't take tokens back (windows, recurrent states)."""
    plain, cache = model.make_cache(), model.make_cache()
    forward(model, plain, [(0, 100)])
    forward(model, cache, [(0, 100), (40, 45)])
    if not all(c.is_trimmable() for c in cache):
        return None
    for c in cache:
        c.trim(5)
    return distance(forward(model, cache, STEPS[1:3]), forward(model, plain, STEPS[1:3])) == 0


# ---- the page


def page() -> str:
    """The half of docs/models.md about mlx-vlm."""
    verdicts = [verdict(name) for name in NAMES]
    lines = header(Counter(v.word for v in verdicts)) + [row(v) for v in verdicts]
    lines += ["", "## Modules of mlx-vlm that are not in the table", ""]
    lines += [f"* {', '.join(f'`{n}`' for n in names.split())}: {reason}" for reason, names in sorted(LEFT_OUT.items())]
    lines += ["", "## Attention of mlx-vlm with a seam of its own", ""]
    lines += [f"* `{name}`: {inspect.getdoc(function)}" for name, function in sorted(SEAMS.served().items())]
    return "\n".join(lines) + "\n"


def header(words: Counter[str]) -> list[str]:
    """All above the rows; `words` counts the verdicts."""
    return [
        TITLE,
        "",
        f"The same for the language models of the {words.total()} architectures of mlx-vlm 0.7 that have a KV cache; "
        "written by `python -m tests.vlm_models_page`.",
        "",
        f"* **{words['compressed']} compressed**, **{words['partly']} partly**, **{words['native']} native**.",
        "",
        "*Batch*: ragged prompts, padded on the left as mlx-vlm pads them, in one of its `BatchGenerator`s.",
        "",
        "| architecture | verdict | layers | native | batch | window | trim | remarks |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]


def row(v: Verdict) -> str:
    """One line of the table."""
    remarks = ", ".join(f for f in v.features if f != "window")
    window = "equal" if v.window is not None else "native" if "window" in v.features else ""
    trim = {True: "yes", False: "no", None: ""}[v.trimmed]
    layers = f"{v.compressed}/{v.unbounded}"
    return f"| {v.name} | {v.word} | {layers} | {'; '.join(v.native)} | {v.batch} | {window} | {trim} | {remarks} |"


def halves() -> tuple[str, str]:
    """docs/models.md: what it says of mlx-lm, and of mlx-vlm."""
    first, _, second = PAGE.read_text().partition(TITLE)
    return first, TITLE + second if second else ""


if __name__ == "__main__":
    PAGE.write_text(halves()[0].rstrip() + "\n\n" + page())
    print(f"{PAGE}: {Counter(verdict(n).word for n in NAMES)}")
