"""How much each layer's keys and values suffer from fewer bits, and what that predicts for a whole recipe.

One layer at a time gets fewer bits, keys or values, everything else staying at 8 bits (whose own KL is a hundredth of
what matters, and which the fused kernels serve), and the KL is measured. Small errors of different layers hardly meet,
so their sum predicts the KL of a recipe well enough to choose what to measure next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

BITS = (8, 4, 3, 2)
GROUPS = (32, 64)


@dataclass(frozen=True)
class Choice:
    """What one block of layers can be: key bits, value bits, group."""

    keys: int
    values: int
    group: int

    def __str__(self) -> str:
        head = f"int{self.keys}" if self.keys == self.values else f"k{self.keys}v{self.values}"
        return head if self.group == 32 else f"{head}:g{self.group}"


def choices(head_dim: int) -> list[Choice]:
    """All choices; groups wider than the head are the head."""
    groups = [g for g in GROUPS if g <= head_dim] or [GROUPS[0]]
    return [Choice(k, v, g) for k in BITS for v in BITS for g in groups]


@dataclass(frozen=True)
class Sensitivity:
    """Measured KL of one block alone: `kl["k", bits, group]` and `kl["v", bits, group]`; 8 bits are none."""

    kl: dict[tuple[str, int, int], float]

    def predicted(self, choice: Choice) -> float:
        sides = (("k", choice.keys), ("v", choice.values))
        return sum(self.kl.get((side, bits, choice.group), 0.0) for side, bits in sides)


def probes(count: int, blocks: list[list[int]], head_dim: int) -> Iterator[tuple[int, str, int, int, str]]:
    """(block, side, bits, group, recipe in one line) of every measurement."""
    for group in [g for g in GROUPS if g <= head_dim] or [GROUPS[0]]:
        for number, block in enumerate(blocks):
            for side in ("k", "v"):
                for bits in BITS[1:]:
                    own = Choice(bits, 8, group) if side == "k" else Choice(8, bits, group)
                    yield number, side, bits, group, "|".join(str(own) if i in block else "int8" for i in range(count))


def frontier(sensitivities: list[Sensitivity], options: list[Choice], bits: dict[Choice, float]) -> list[list[Choice]]:
    """Recipes on the predicted frontier of KL and bits: for every exchange rate each block takes its best choice."""
    found: list[list[Choice]] = []
    for exponent in range(-60, 21):
        rate = 10 ** (exponent / 8)
        recipe = [_best(s, options, bits, rate) for s in sensitivities]
        if recipe not in found:
            found.append(recipe)
    return found


def _best(sensitivity: Sensitivity, options: list[Choice], bits: dict[Choice, float], rate: float) -> Choice:
    return min(options, key=lambda c: sensitivity.predicted(c) + rate * bits[c])
