"""Distances between two predictions of the same token, and how sure their averages are."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import numpy as np

Interval = tuple[float, float, float]
"""(value, low, high): a statistic and its 95 % interval."""


def log_probs(logits: mx.array) -> mx.array:
    """`[..., V]` logits of any dtype -> float32 log probabilities."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def kl(reference: mx.array, other: mx.array) -> mx.array:
    """KL(reference || other) in nats of two sets of log probabilities `[..., V]`: `[...]`, never negative."""
    return mx.maximum((mx.exp(reference) * (reference - other)).sum(-1), 0)


def bootstrap(
    samples: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], block: int = 1, draws: int = 1000
) -> Interval:
    """`statistic` over all samples and its percentile interval, resampling blocks of neighbours.

    Neighbouring tokens of a text are not independent; tokens of one block are drawn together.

    Args:
        samples: `[rows, tokens]`, or `[rows, tokens, k]` for statistics of several numbers per token.
        statistic: maps `[draws, n]` (or `[draws, n, k]`) to `[draws]`.
        block: tokens per block; must divide the tokens.
    """
    rows, tokens = samples.shape[:2]
    if tokens % block:
        raise ValueError(f"bootstrap: {tokens} tokens are not whole blocks of {block}")
    blocks = samples.reshape(rows * tokens // block, block, *samples.shape[2:])
    value = statistic(blocks.reshape(1, -1, *samples.shape[2:]))[0]
    picks = np.random.RandomState(0).randint(0, len(blocks), (draws, len(blocks)))
    resampled = np.concatenate(
        [statistic(blocks[p].reshape(len(p), -1, *samples.shape[2:])) for p in np.array_split(picks, draws // 50)]
    )
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(value), float(low), float(high)


def wilson(successes: int, trials: int) -> Interval:
    """A proportion and its 95 % Wilson interval."""
    if trials <= 0:
        raise ValueError("a proportion needs at least one trial")
    z, p = 1.959964, successes / trials
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * (p * (1 - p) / trials + z * z / (4 * trials * trials)) ** 0.5
    return p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def paired(lost: int, won: int, trials: int) -> Interval:
    """Difference of two proportions of the same trials and its 95 % interval (Bonett and Price 2012, adjusted Wald).

    `lost` trials succeeded only the first time, `won` only the second.
    """
    if trials <= 0:
        raise ValueError("a difference needs at least one trial")
    p, q = (lost + 1) / (trials + 2), (won + 1) / (trials + 2)
    half = 1.959964 * ((p + q - (q - p) ** 2) / (trials + 2)) ** 0.5
    return (won - lost) / trials, max(-1.0, q - p - half), min(1.0, q - p + half)


def mcnemar(lost: int, won: int) -> float:
    """Two-sided exact McNemar test: how likely so uneven a split of the trials that differ is by chance."""
    differ = lost + won
    tail = sum(math.comb(differ, k) for k in range(min(lost, won) + 1)) / 2**differ
    return min(1.0, 2 * tail)
