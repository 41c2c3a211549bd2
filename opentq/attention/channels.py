"""Which channels of a key tell pages apart: those that its queries look along.

RoPE turns what a head looks for with the distance, so no fixed direction of its key space stays important; what stays
is how much goes on in a rotary pair. The energy of a unit of channels (a rotary pair, or a single channel that is not
turned) is E|q_u|^2 Var(k_u): how much the logits that pass through it can differ from token to token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..contracts.rotary import Rotary


def count(dim: int) -> int:
    """How many channels of a key its sketch keeps: three rotary pairs, two where the mean of the others is long.

    So that sketches are at most 6 % of a cache of about 4 bits with heads of 64 channels, and 3.5 % from 96 on.
    """
    return min(6 if dim <= 64 else 4, dim)


def energies(q_square: np.ndarray, k_variance: np.ndarray, rotary: Rotary) -> np.ndarray:
    """The energy of every unit, `[..., U]`, of a channel's mean square of queries and variance of keys, `[..., D]`."""
    units = rotary.units(q_square.shape[-1])
    sums = [q_square[..., list(u)].sum(-1) * k_variance[..., list(u)].sum(-1) for u in units]
    return np.stack(sums, axis=-1)


def choose(energy: Sequence[float] | np.ndarray, rotary: Rotary, head_dim: int, wanted: int) -> list[int]:
    """`wanted` channels of one head, whole units, those with the most energy per channel first; sorted.

    Raises ValueError where a head has fewer.
    """
    units = rotary.units(head_dim)
    if wanted > head_dim:
        raise ValueError(f"{wanted} channels can't be chosen from {head_dim}")
    picked: list[int] = []
    for index in sorted(range(len(units)), key=lambda i: (-energy[i] / len(units[i]), i)):
        if len(picked) + len(units[index]) <= wanted:
            picked += units[index]
    return sorted(picked)
