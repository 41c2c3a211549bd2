"""What opentq does with every architecture of mlx-lm, found out by running tiny models of all of them.

`python -m tests.models_page` writes the findings to docs/models.md; `test_architectures.py` holds each of them to them.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import (
    ArraysCache,
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

from opentq.caches.composite import members
from opentq.hosts import hooks
from opentq.hosts.host import host_of
from opentq.hosts.mlx_lm.seams import SEAMS
from opentq.hosts.policy import NothingCompressed, native_reason

from .architectures import LEFT_OUT, NAMES, build

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
PROMPT = [(7 * i + i * i) % 97 + 1 for i in range(140)]
STEPS = ((0, 100), (100, 130), (130, 131), (131, 135), (135, 136))
"""A long chunk, a second one, a token, a speculative bundle and a token more: `[start, stop)` of PROMPT."""
RAGGED = (1, 9, 75)
BUDGET = 4


class Rounded(KVCache):
    """mlx-lm's cache with keys and values rounded to float16, as a compressed cache keeps its newest tokens."""

    def update_and_fetch(self, keys, values):
        return super().update_and_fetch(*(x.astype(mx.float16).astype(x.dtype) for x in (keys, values)))


class RoundedWindow(RotatingKVCache):
    def update_and_fetch(self, keys, values):
        return super().update_and_fetch(*(x.astype(mx.float16).astype(x.dtype) for x in (keys, values)))


def forward(model: Any, cache: list[Any], steps=STEPS) -> list[mx.array]:
    """Logits of the last position of every step."""
    out = []
    for start, stop in steps:
        out.append(model(mx.array([PROMPT[start:stop]]), cache=cache)[0, -1])
        mx.eval(out[-1])
    return out


def rounded(model: Any, window: bool) -> list[Any]:
    """The model's own caches, with those that are compressed (and the windows) rounded to float16."""
    caches, host = make_prompt_cache(model), host_of(model)
    for cache in caches:
        for part, c in enumerate(members(cache)):
            if type(c) is KVCache and not native_reason(cache, part, None, host.caches, SEAMS.traits(model)):
                c.__class__ = Rounded
            elif window and type(c) is RotatingKVCache:
                c.__class__ = RoundedWindow
    return caches


def distance(got: list[mx.array], want: list[mx.array]) -> float:
    """Largest difference of logits, relative to their size."""
    return max((mx.abs(g - w).max() / mx.abs(w).max()).item() for g, w in zip(got, want))


def tokens_alone(model: Any, prompt: list[int]) -> list[int]:
    return [int(t) for t, _ in generate_step(mx.array(prompt), model, max_tokens=BUDGET, prefill_step_size=64)]


def tokens_together(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of several prompts in one batch."""
    generator = BatchGenerator(model, prefill_step_size=64)
    uids = generator.insert([list(p) for p in prompts], max_tokens=[BUDGET] * len(prompts))
    tokens: dict[int, list[int]] = {u: [] for u in uids}
    while any(len(t) < BUDGET for t in tokens.values()):
        for response in generator.next()[1]:
            tokens[response.uid].append(response.token)
    return [tokens[u] for u in uids]


@dataclass(frozen=True)
class Verdict:
    """One row of the table.

    Attributes:
        compressed, unbounded: caches that are compressed, and that grow with the context.
        native: what stays as mlx-lm made it, with the reason.
        fidelity: distance of the logits from native fp16 caches when nothing is quantised (spec f16).
        window: the same for window=compress; None without sliding windows.
        calls: attention calls per compressed cache and forward step.
        batch: "equal" (to single runs, exact tokens), or what stands against it.
        resumed: whether caches that were copied, saved and loaded go on as if nothing had happened.
        trimmed: the same for tokens taken back; None where mlx-lm can't trim this model's caches.
    """

    name: str
    compressed: int
    unbounded: int
    native: tuple[str, ...]
    fidelity: float
    window: float | None
    calls: tuple[float, ...]
    batch: str
    resumed: bool
    trimmed: bool | None
    features: tuple[str, ...]

    @property
    def word(self) -> str:
        """The verdict in a word."""
        if not self.compressed:
            return "native"
        return "compressed" if self.compressed == self.unbounded else "partly"


@functools.cache
def verdict(name: str) -> Verdict:
    """What opentq does with architecture `name`."""
    return judged(name, build(name), sys.modules[__name__])


def judged(name: str, model: Any, page: Any) -> Verdict:
    """Find out, by running it, what opentq does with an architecture; `page` knows its host."""
    caches = page.make_prompt_cache(model)
    features = page.features(model, caches)
    want, own = page.forward(model, fp16 := page.rounded(model, False)), [c for cache in fp16 for c in members(cache)]
    unbounded = sum(page.grows(c) for c in own)
    window = None
    if any(isinstance(c, page.RotatingKVCache) for c in own):
        want_window = page.forward(model, page.rounded(model, True))
        plans = hooks.compress(model, "f16:window=compress")
        window = distance(page.forward(model, model.make_cache()), want_window)
        if not any(p.window for p in plans):
            window = None
    try:
        hooks.compress(model, "f16")
    except NothingCompressed:
        hooks.uninstall(model)
        reasons = _counted(decide_all(model, caches))
        return Verdict(name, 0, unbounded, reasons, 0.0, window, (), "-", True, None, features)
    fidelity = distance(page.forward(model, model.make_cache()), want)
    plans = hooks.compress(model, "int4")
    stats = hooks.installed(model).stats
    before = {key: s.calls for key, s in stats.items()}
    page.forward(model, model.make_cache())
    packed = [(p.index, p.part) for p in plans if p.compressed]
    calls = tuple((stats[key].calls - before[key]) / len(STEPS) for key in packed)
    native = _counted((p.kind, p.reason) for p in plans if not p.compressed)
    batch, resumed, trimmed = page.batch(model), page.resumes(model), page.trims(model)
    return Verdict(name, len(packed), unbounded, native, fidelity, window, calls, batch, resumed, trimmed, features)


def grows(cache: Any) -> bool:
    """Whether a cache that has seen tokens grows with the context."""
    return type(cache) in (KVCache, Rounded) and not cache.empty()


def decide_all(model: Any, caches: list[Any]) -> list[tuple[str, str]]:
    """(cache class, why it is native) for a model of which nothing is compressed."""
    host = host_of(model)
    traits = host.traits(host.decoder(model))
    slots = [(m, part, c) for m in caches for part, c in enumerate(members(m))]
    return [(type(c).__name__, native_reason(m, part, None, host.caches, traits)) for m, part, c in slots]


def _counted(reasons: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    return tuple(f"{n} {kind}: {reason}" for (kind, reason), n in sorted(Counter(reasons).items()))


def features(model: Any, caches: list[Any]) -> tuple[str, ...]:
    source = inspect.getsource(inspect.getmodule(type(model)))  # type: ignore[arg-type]
    kinds = {type(c) for cache in caches for c in members(cache)}
    found = {
        "window": RotatingKVCache in kinds,
        "chunked": ChunkedKVCache in kinds,
        "recurrent": ArraysCache in kinds,
        "sinks": "sinks=" in source,
        "softcap": hasattr(getattr(model, "args", None), "attn_logit_softcapping"),
        "shared KV": any(word in source for word in ("kv_shared", "kv_reuse", "previous_kvs", "loop_window")),
        "latent": SEAMS.traits(model).latent,
        "sharded": hasattr(model, "shard"),
        "pipelined": hasattr(getattr(model, "model", None), "pipeline"),
    }
    return tuple(word for word, there in found.items() if there)


def batch(model: Any) -> str:
    """Ragged prompts in one batch against the same prompts alone."""
    prompts = [PROMPT[:n] for n in RAGGED]
    try:
        together = tokens_together(model, prompts)
    except (ValueError, AttributeError):
        if _native_batches(model, prompts) is not None:
            raise
        return "not in mlx-lm"
    if together == [tokens_alone(model, p) for p in prompts]:
        return "equal"
    if _native_batches(model, prompts):
        return "differs"
    # mlx-lm's own caches give other tokens in a ragged batch, too; prompts of one length need no padding.
    even = [PROMPT[i : i + 75] for i in range(3)]
    same = tokens_together(model, even) == [tokens_alone(model, p) for p in even]
    return "equal lengths only, as in mlx-lm" if same else "differs"


def _native_batches(model: Any, prompts: list[list[int]]) -> bool | None:
    """Whether mlx-lm's own caches give the same tokens in a batch as alone; None when it can't batch the model."""
    spec = hooks.installed(model).spec
    hooks.uninstall(model)
    try:
        return tokens_together(model, prompts) == [tokens_alone(model, p) for p in prompts]
    except (ValueError, AttributeError):
        return None
    finally:
        hooks.compress(model, spec)


def resumes(model: Any) -> bool:
    """A cache that was copied, or saved and loaded by mlx-lm, continues bit for bit."""
    cache = model.make_cache()
    forward(model, cache, [(0, 100)])
    copied = copy.deepcopy(cache)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "cache.safetensors")
        save_prompt_cache(path, [c for c in cache if not c.empty()])
        loaded = iter(load_prompt_cache(path))
        loaded = [next(loaded) if not c.empty() else c for c in copy.deepcopy(cache)]
    want = forward(model, cache, STEPS[1:3])
    return all(distance(forward(model, other, STEPS[1:3]), want) == 0 for other in (copied, loaded))


def trims(model: Any) -> bool | None:
    """Five tokens taken back leave no trace; None where mlx-lm can't take tokens back (windows, recurrent states)."""
    plain, cache = model.make_cache(), model.make_cache()
    forward(model, plain, [(0, 100)])
    forward(model, cache, [(0, 100), (40, 45)])
    if not all(c.is_trimmable() for c in cache):
        return None
    trim_prompt_cache(cache, 5)
    return distance(forward(model, cache, STEPS[1:3]), forward(model, plain, STEPS[1:3])) == 0


# ---- the page


def page() -> str:
    """docs/models.md."""
    verdicts = [verdict(name) for name in NAMES]
    lines = header(Counter(v.word for v in verdicts)) + [row(v) for v in verdicts]
    lines += ["", "## Not in the table", ""]
    lines += [f"* `{name}`: {reason}" for name, reason in sorted(LEFT_OUT.items())]
    return "\n".join([*lines, "", *_seams()]) + "\n"


def header(words: Counter[str]) -> list[str]:
    """All above the rows; `words` counts the verdicts."""
    return [
        "# Models",
        "",
        f"What `--kv` does with each of the {words.total()} architectures of mlx-lm 0.32 that have a KV cache, found "
        "out by running tiny random models. Written by `python -m tests.models_page`; the same checks run in CI.",
        "",
        f"* **{words['compressed']} compressed**: every cache that grows with the context is packed.",
        f"* **{words['partly']} partly**: some of them are.",
        f"* **{words['native']} native**: none can be; the column *native* says why, and `--kv` says it, too.",
        "",
        "*Layers*: compressed caches / caches that grow with the context. *Native*: what stays as mlx-lm made it. "
        "*Batch*: ragged prompts in one `BatchGenerator` give exactly the tokens of single runs. *Window*: "
        "`window=compress` was compared with mlx-lm's rotating cache. *Trim*: tokens can be taken back (speculative "
        "decoding, reuse of prefixes); mlx-lm can't where a window has slid or a state is recurrent. *Several "
        "machines*: mlx-lm can cut the model by head (tensor) or by layer (pipeline).",
        "",
        "| architecture | verdict | layers | native | batch | window | trim | several machines | remarks |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]


def row(v: Verdict) -> str:
    """One line of the table."""
    machines = " and ".join(w for w, f in (("tensor", "sharded"), ("pipeline", "pipelined")) if f in v.features)
    remarks = ", ".join(f for f in v.features if f in ("recurrent", "sinks", "softcap", "shared KV", "latent"))
    window = "equal" if v.window is not None else "native" if "window" in v.features else ""
    trim = {True: "yes", False: "no", None: ""}[v.trimmed]
    native = "; ".join(v.native)
    layers = f"{v.compressed}/{v.unbounded}"
    return f"| {v.name} | {v.word} | {layers} | {native} | {v.batch} | {window} | {trim} | {machines} | {remarks} |"


def _seams() -> list[str]:
    """What is done for models that don't go through mlx-lm's attention function."""
    lines = ["## Models with a seam of their own", ""]
    lines += [f"* `{name}`: {inspect.getdoc(function)}" for name, function in sorted(SEAMS.served().items())]
    lines += [f"* `{name}`: its cache lends the keys and values of the step to it" for name in SEAMS.lenders]
    return lines


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"{PAGE}: {Counter(verdict(n).word for n in NAMES)}")
