"""A model end to end: what mlx-lm generates through the compressed cache with the kernels and on the portable path."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import mlx.core as mx
from mlx_lm.generate import generate_step

import opentq
from opentq.hosts.mlx_lm.load import load

MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny-llama"
PROMPT, TOKENS = 1000, 64
TIE = 1 / 32
"""Nats between two tokens below which either may be greedy: two steps of an fp16 logit between 16 and 32."""


@contextlib.contextmanager
def kernels(mode: str):
    """`OPENTQ_KERNELS` for a while."""
    os.environ["OPENTQ_KERNELS"] = mode
    try:
        yield
    finally:
        del os.environ["OPENTQ_KERNELS"]


def run(log) -> None:
    """Greedy tokens must be equal up to the first tie, and every compressed layer served by the CUDA kernels."""
    model, tokenizer = load(str(MODEL))
    text = (MODEL.parent / "README.md").read_text() + (MODEL.parent / "train.py").read_text()
    prompt = mx.array(tokenizer.encode(text)[:PROMPT])
    for spec in ("int4", "tq4", "k8v4", "tq5/tq3", "tq3.5:nc", "tq4p", "qjl4/int4", "polar4"):
        found, served, seconds = {}, set(), 0.0
        for mode in ("native", "tiled"):
            opentq.compress(model, spec)
            with kernels(mode):
                start = time.perf_counter()
                found[mode] = [(int(t), logprobs) for t, logprobs in generate_step(prompt, model, max_tokens=TOKENS)]
                seconds = seconds or time.perf_counter() - start
            if mode == "native":
                served = {row.served_by for row in opentq.report(model).rows if row.calls}
            opentq.uninstall(model)
        pairs = list(zip(found["native"], found["tiled"], strict=True))
        same = next((i for i, ((a, _), (b, _)) in enumerate(pairs) if a != b), TOKENS)
        gap = 0.0
        if same < TOKENS:
            (other, _), (token, logprobs) = pairs[same]
            gap = (logprobs[token] - logprobs[other]).item()
        log.test(f"{spec}: the kernels served every layer", served == {"cuda"}, str(served))
        log.test(
            f"{spec}: tokens equal to the portable path", gap < TIE, f"{same} of {TOKENS}, then {gap:.3f} nats apart"
        )
        log.row(
            "generate",
            kv=spec,
            served_by=sorted(served),
            prompt=len(prompt),
            tokens=TOKENS,
            equal=same,
            then_nats_apart=round(gap, 4),
            seconds=round(seconds, 2),
        )
        print(
            f"  {MODEL.name} {spec}: served by {', '.join(sorted(served))}, {same} of {TOKENS} tokens equal"
            + (f", then {gap:.3f} nats apart" if same < TOKENS else ""),
            flush=True,
        )
