"""The table that every codec, cache and kernel is held to: codec x cache x shape. Adding a codec is adding one row."""

from __future__ import annotations

from dataclasses import dataclass

SPECS = [
    "f16",
    "int8",
    "int4",
    "int3",
    "int2",
    "k8v4",
    "int4:norot",
    "int4:g64",
    "k4v2:g128",
    "int4:sink=4",
    "int4:recent=70",
    "int3:g64:sink=5:recent=33",
    "tq4",
    "tq2.5:nc",
    "tq3p:recent=70",
    "polar4:sink=4",
    "qjl2/int4",
    "k8tq4:out=2",
    "int4:center",
    "tq5/tq3:center:sink=4",
]


@dataclass(frozen=True)
class Shape:
    """One attention shape: sequences, query heads, KV heads, key and value dims."""

    batch: int = 1
    q_heads: int = 4
    kv_heads: int = 2
    key_dim: int = 64
    value_dim: int = 64

    def __str__(self) -> str:
        dims = f"d{self.key_dim}" + ("" if self.key_dim == self.value_dim else f"x{self.value_dim}")
        return f"b{self.batch}-h{self.q_heads}:{self.kv_heads}-{dims}"


HEAD_DIMS = [Shape(key_dim=d, value_dim=d) for d in (64, 80, 96, 112, 128, 192, 256, 512)]
GQA = [Shape(q_heads=2 * g, kv_heads=2) for g in (1, 2, 4, 7, 8, 16)]
ODD = [Shape(batch=2, q_heads=6, kv_heads=3, key_dim=192, value_dim=128), Shape(q_heads=5, kv_heads=1)]
SHAPES = [*HEAD_DIMS, *GQA, *ODD]

DIMS = (64, 80, 96, 112, 128, 256, 512)
HALVES = {("tq2.5:nc", 80), ("tq2.5:nc", 112)}
OUTLIERS = {("k8tq4:out=2", dim) for dim in DIMS}
SKETCHES = {("qjl2/int4", 512), ("tq3p:recent=70", 512)}
NOT_SERVED = {
    "cpu": HALVES,
    "cuda": HALVES | OUTLIERS | SKETCHES | {("f16", dim) for dim in DIMS},
    "metal": OUTLIERS | SKETCHES,
}
"""(spec, head dim) that fused kernels leave to the portable path; all else of `SPECS` x `DIMS` is theirs."""
