"""The decode kernel's instances: everything about a launch that is arithmetic (row tiles, warps, ring stages, shared
memory, splits), so that it can be tested anywhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .launch import KernelSource, format_type, short
from .layout import MmaLayout

SHARED_LIMIT = 227 * 1024
"""Bytes of shared memory that one block may have on Hopper."""
IN_FLIGHT = 32 * 1024
"""Bytes that a multiprocessor should have asked for at any time; more only spread the accesses."""
LIGHT = 3600
"""Bytes of a record of keys and one of values below which more warps pay."""
MAX_SPLITS = 160
"""Beyond this the merge of the partial results takes longer than the splits save."""

CALL = (
    *(
        (name, "int")
        for name in ("k_blocks", "v_blocks", "columns", "q_heads", "kv_heads", "length", "window", "causal")
    ),
    *((name, "int") for name in ("packed", "sink", "tail_start")),
    *((name, "float") for name in ("scale", "softcap")),
    ("centered", "int"),
    ("listed", "int"),
)
"""Names and types of `opentq::Call`, decode's scalars."""


@dataclass(frozen=True)
class Fused:
    """What only some decode launches do: `opentq::Fused`.

    `append`: new keys and values come with the call, and all dense columns go out. `rotate_k`, `rotate_v`: queries and
    new keys are rotated, new values and the output back. `listed`: only the pages of a list are read. `capped`: scores
    have a softcap.
    """

    append: bool = False
    rotate_k: bool = False
    rotate_v: bool = False
    listed: bool = False
    capped: bool = False

    LENGTH = 8
    """Query tokens of a launch that appends, at most."""

    @property
    def type(self) -> str:
        flags = (self.append, self.rotate_k, self.rotate_v, self.listed, self.capped)
        return f"opentq::Fused<{', '.join('true' if flag else 'false' for flag in flags)}>"

    def __str__(self) -> str:
        names = {
            "append": self.append,
            "k": self.rotate_k,
            "v": self.rotate_v,
            "pages": self.listed,
            "cap": self.capped,
        }
        return "_".join(name for name, does in names.items() if does)


@dataclass(frozen=True)
class Geometry:
    """Everything about a decode launch that is fixed at compile time, and the choice of splits.

    `rows` are the query rows of one KV head (GQA ratio x L); a row tile holds 8 * `tiles` of them.
    """

    k: MmaLayout
    v: MmaLayout
    dtype: str
    tiles: int
    warps: int
    stages: int
    fused: Fused = Fused()

    @classmethod
    def choose(cls, k: MmaLayout, v: MmaLayout, dtype: str, rows: int, fused: Fused = Fused()) -> Geometry:
        """Measured best (`dev/kernels/cuda.md`): eight warps and two stages; more warps where arithmetic takes as long
        as bytes do, which is where records are light or codes are looked up: sixteen, or twelve where the code needs
        the registers. Fewer where shared memory ends, more stages where records are tiny.
        """
        tiles = 1 if rows <= 8 else 2 if rows <= 16 else 4
        tiles = max(1, min(tiles, 512 // max(k.head_dim, v.head_dim)))
        stage = 4 * (k.record_words + v.record_words)
        busy = tiles == 1 and (stage <= LIGHT or not (k.zeroed and v.zeroed))
        plain = len(k.runs) == len(v.runs) == 1 and max(k.query, v.channels) <= 128
        wanted = 8 if not busy else 16 if plain else 12
        warps = next(w for w in (wanted, 8, 4, 2, 1) if 2 * w * stage <= 200 * 1024 or w == 1)
        stages = max(2, min(4, -(-IN_FLIGHT // (warps * stage))))
        return cls(k, v, dtype, tiles, warps, stages, fused)

    @property
    def row_tile(self) -> int:
        return 8 * self.tiles

    @property
    def shared(self) -> int:
        """Bytes of shared memory: `Plan::BYTES` of decode_warp.cuh; decode.cu asserts that it is enough."""
        rows = self.row_tile
        ring = self.warps * self.stages * 4 * (self.k.record_words + self.v.record_words)
        whole = self.warps * rows * (self.v.head_dim + 4) * 4
        area = max(ring, whole if whole <= max(ring, 49152) else self.warps * rows * (min(64, self.v.head_dim) + 4) * 4)
        query = (1 + self.fused.rotate_k) * (self.k.query // 16) * self.tiles * 256
        sums = self.tiles * (0 if not self.k.zeroed else 2 if self.k.groups > 8 else 1) * 256
        biases = self.k.groups * rows * 4 * self.k.biased
        fresh = Fused.LENGTH * (self.k.head_dim + self.v.head_dim) * 2 * self.fused.append
        output = rows * (self.v.head_dim + 4) * 4 * self.fused.rotate_v
        small = rows * 8 + 2 * self.warps * rows * 4 + 16
        return area + query + sums + self.warps * self.stages * 8 + biases + fresh + output + small

    @property
    def resident(self) -> int:
        """Blocks per multiprocessor: two where registers (one row tile, D up to 128) and shared memory allow."""
        small = self.tiles == 1 and max(self.k.query, self.v.head_dim) <= 128 and self.warps <= 8
        return 2 if small and 2 * (self.shared + 1024) <= SHARED_LIMIT else 1

    def splits(self, tiles: int, records: int, strips: int, multiprocessors: int) -> int:
        """How many blocks share the keys of one row tile; `tiles` = row tiles of all heads and sequences.

        One block per multiprocessor, if that leaves few of them idle, else as many as are resident at once. But a block
        should have four records of 32 tokens or eight dense strips of 16: below that a merge costs more than it saves.
        """
        fill = multiprocessors // tiles
        if fill * tiles < 0.75 * multiprocessors:
            fill = self.resident * multiprocessors // tiles
        work = max(-(-records // 4), -(-strips // 8))
        return max(1, min(fill, work, MAX_SPLITS))

    def source(self) -> KernelSource:
        t, sizes = self.dtype, f"{self.tiles}, {self.warps}, {self.stages}"
        name = f"opentq_decode_{short(t)}_{self.k.name}_{self.v.name}_{self.tiles}_{self.warps}_{self.stages}"
        calls = ", ".join(name for name, _ in CALL)
        inputs = [
            ("q", t),
            ("k", "unsigned"),
            ("v", "unsigned"),
            ("dense_k", "opentq::f16"),
            ("dense_v", "opentq::f16"),
        ]
        inputs += [("lens", "int"), ("sinks", "float"), ("tickets", "unsigned")]
        outputs = [("out", t), ("scratch", "float")]
        tensors = [name for name, _ in inputs + outputs] + ["pages" if self.fused.listed else "nullptr"]
        if self.fused.append:
            inputs += [("fresh_k", t), ("fresh_v", t), ("center", "opentq::f16")]
            outputs += [("new_k", "opentq::f16"), ("new_v", "opentq::f16")]
            tensors += ["fresh_k", "fresh_v", "center", "new_k", "new_v"]
        if self.fused.listed:
            inputs += [("pages", "int")]
        if self.fused != Fused():
            name += f"_{self.fused}"
        types = f"{t}, {format_type(self.k)}, {format_type(self.v)}, {sizes}, {self.shared}, {self.fused.type}"
        body = f"  opentq::decode<{types}>(\n      {{{', '.join(tensors)}}}, {{{calls}}});"
        return KernelSource(
            name=re.sub(r"\W+", "_", name),
            file="decode.cu",
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            scalars=CALL,
            body=body,
            threads=32 * self.warps,
            shared=self.shared,
            resident=self.resident,
        )

    def grid(self, batch: int, kv_heads: int, rows: int, splits: int) -> tuple[int, int, int]:
        """Blocks."""
        return splits, kv_heads * -(-rows // self.row_tile), batch
