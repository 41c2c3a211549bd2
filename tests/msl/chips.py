"""A model of time on Apple GPUs, from counts: a lower bound, never a measurement.

A decode step of one layer takes at least as long as its bytes take from memory, and at least as long as its lane
operations take to issue; the larger of both is the bound. Bandwidth and cores are as Apple gives them, clocks as people
read them off their machines; of the M5 they are assumed. A core issues 128 lane operations a cycle; a shuffle is one, a
reduction over a simdgroup ten, exp2 and its like four, and an 8x8x8 matrix product 16 per lane, as on chips up to the
M4, whose matrix instructions run on the ordinary lanes. Nothing here knows latency, occupancy, spills, caches,
threadgroup-memory bandwidth, or instructions that issue together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """GB/s, GPU cores of 128 lanes, clock in GHz."""

    name: str
    bandwidth: float
    cores: int
    clock: float

    @property
    def lane_operations(self) -> float:
        return self.cores * 128 * self.clock * 1e9

    def bounds(self, per_token: Mapping[str, float], tokens: int, heads: int) -> tuple[float, float]:
        """Milliseconds from (memory, lanes) of a call over `tokens` in `heads` KV heads, by counts of one of each."""
        n = tokens * heads
        return per_token["unique"] * n / self.bandwidth / 1e6, per_token["issue"] * n / self.lane_operations * 1e3


CHIPS = (
    Chip("M1", 68, 8, 1.278),
    Chip("M1 Max", 400, 32, 1.296),
    Chip("M2 Max", 400, 38, 1.398),
    Chip("M3 Max", 400, 40, 1.38),
    Chip("M4", 120, 10, 1.47),
    Chip("M4 Max", 546, 40, 1.58),
    Chip("M5", 153, 10, 1.62),
    Chip("M5 Max", 614, 40, 1.62),
)
