"""How much each layer's keys and values suffer from fewer bits, and what that predicts for a whole recipe.

One layer at a time gets fewer bits, keys or values, everything else staying at 8 bits (whose own KL is a hundredth of
what matters, and which the fused kernels serve), and the KL is measured. Small errors of different layers hardly meet,
so their sum predicts the KL of a recipe well enough to choose what to measure next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

BITS = (8, 6, 5, 4, 3, 2)
"""8 bits are integers in groups; fewer are codebooks with the right length, the best at every size
(`docs/studies/codecs.md`)."""


@dataclass(frozen=True)
class Widths:
    """What one block of layers can be: key bits and value bits."""

    keys: int
    values: int

    def __str__(self) -> str:
        keys, values = ("int8" if bits == 8 else f"tq{bits}" for bits in (self.keys, self.values))
        head = keys if keys == values else f"{keys}/{values}"
        return head if head == "int8" else f"{head}:nc"


WIDTHS = tuple(Widths(k, v) for k in BITS for v in BITS)


@dataclass(frozen=True)
class Sensitivity:
    """Measured KL of one block alone: `kl["k", bits]` and `kl["v", bits]`; 8 bits are none."""

    kl: dict[tuple[str, int], float]

    def predicted(self, choice: Widths) -> float:
        return self.kl.get(("k", choice.keys), 0.0) + self.kl.get(("v", choice.values), 0.0)


def probes(count: int, blocks: list[list[int]]) -> Iterator[tuple[int, str, int, str]]:
    """(block, side, bits, recipe in one line) of every measurement."""
    for number, block in enumerate(blocks):
        for side in ("k", "v"):
            for bits in BITS[1:]:
                own = Widths(bits, 8) if side == "k" else Widths(8, bits)
                yield number, side, bits, "|".join(str(own) if i in block else "int8" for i in range(count))


def frontier(sensitivities: list[Sensitivity], bits: dict[Widths, float]) -> list[list[Widths]]:
    """Recipes on the predicted frontier of KL and bits: for every exchange rate each block takes its best choice."""
    found: list[list[Widths]] = []
    for exponent in range(-180, 61):
        rate = 10 ** (exponent / 24)
        recipe = [min(WIDTHS, key=lambda w: s.predicted(w) + rate * bits[w]) for s in sensitivities]
        if recipe not in found:
            found.append(recipe)
    return found
