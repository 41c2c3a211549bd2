"""How a layer's positions enter its keys and queries: which channels RoPE turns together."""

from __future__ import annotations

from typing import NamedTuple


class Rotary(NamedTuple):
    """Rotary embedding of the first `dims` channels of a head; 0 where there is none (or none was seen).

    `traditional` turns channels (2i, 2i + 1) together, otherwise (i, i + dims / 2).
    """

    dims: int = 0
    traditional: bool = False

    def units(self, head_dim: int) -> tuple[tuple[int, ...], ...]:
        """The channels of a head in units that no position can tear apart: rotary pairs, then single channels."""
        half = self.dims // 2
        pairs = [(2 * i, 2 * i + 1) if self.traditional else (i, i + half) for i in range(half)]
        return (*pairs, *((c,) for c in range(2 * half, head_dim)))


NO_ROTARY = Rotary()
