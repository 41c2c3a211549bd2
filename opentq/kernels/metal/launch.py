"""Metal kernels: their sources, their launch geometry, and the `mx.fast.metal_kernel` objects built from them.

A kernel is one `.metal` file or several: helper functions, then a line `// ---- body`, then the body of the kernel; MLX
writes the signature. Every kernel takes whole, over-allocated, row-contiguous buffers plus lengths in a small array, so
nothing is ever copied, and nothing that changes from step to step is a constant of its text. `Tuning` holds the numbers
that only a measurement on the device can choose: `opentq bench kernel --tune` writes them to `tuning_file()`, by GPU;
for others there is a table keyed by GPU generation.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...contracts.layout import FLUSH
from ...errors import UserError

HERE = Path(__file__).parent
BODY = "// ---- body\n"
THREADGROUP_BYTES = 32768
"""Threadgroup memory that every Apple GPU has."""
MAX_SPLITS = 1024
LANES = 32
"""Lanes of a simdgroup, and the entries of a table that it holds, one in each."""


class Format(IntEnum):
    """How one run of keys or values is packed, as `OtqFormat` in common.metal."""

    NONE = 0
    INT2 = 1
    INT3 = 2
    INT4 = 3
    INT8 = 4
    HALF = 5
    BOOK1 = 6
    BOOK2 = 7
    BOOK3 = 8
    BOOK4 = 9
    BOOK5 = 10
    BOOK6 = 11
    POLAR = 12

    @classmethod
    def integers(cls, bits: int) -> Format:
        return cls[f"INT{bits}"]

    @classmethod
    def book(cls, bits: int) -> Format:
        return cls[f"BOOK{bits}"]


MAX_QUERY = 768
"""Channels of a query that a simdgroup holds in matrices."""


@dataclass(frozen=True)
class Kernel:
    """Names of one kernel's arrays, and its files, whose bodies follow one another; `strided`: whether MLX may have to
    copy inputs that a model made.
    """

    files: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    strided: bool = False


_PACKED = ("k_codes", "k_more", "k_scales", "v_codes", "v_more", "v_scales")
_CACHE = (*_PACKED, "dense_k", "dense_v", "lens", "meta", "real", "books")
_LANES = ("lanes.metal", "decode_lanes.metal")
KERNELS = {
    "decode_lanes": Kernel(_LANES, ("q", *_CACHE, "pages"), ("partial",)),
    "decode_whole": Kernel((*_LANES, "finish.metal"), ("q", *_CACHE, "pages", "sinks"), ("out", "partial")),
    "matrix": Kernel(("attend_matrix.metal",), ("q", *_CACHE, "sinks"), ("out",)),
    "merge": Kernel(("merge.metal",), ("partial", "sinks", "meta"), ("out",)),
    "append": Kernel(
        ("append.metal",),
        ("q", "new_k", "new_v", "dense_k", "dense_v", "center", "meta", "real"),
        ("q_out", "k_out", "v_out"),
        strided=True,
    ),
    "weigh": Kernel(
        ("lanes.metal", "weigh.metal"),
        ("q", "k_codes", "k_more", "k_scales", "lens", "meta", "real", "books", "pages"),
        ("weights",),
        strided=True,
    ),
    "sketches": Kernel(("sketches.metal",), ("sketches", "queries", "meta"), ("weights",), strided=True),
    "pick": Kernel(("pick.metal",), ("weights", "packed", "meta"), ("list", "shares"), strided=True),
    "pack": Kernel(("pack.metal",), ("y", "meta"), ("codes", "scales")),
    "pack_book": Kernel(("pack_book.metal",), ("y", "lengths", "cuts", "entries", "meta"), ("codes", "scales")),
}


@dataclass(frozen=True)
class Tuning:
    """What to measure on a device: `opentq bench kernel --tune` does. Raises ValueError for what no kernel can be.

    Attributes:
        variant: decode by "lanes" or "matrix".
        teams: teams of a decode threadgroup, where a team is one simdgroup.
        keys: keys a lane holds at once (1 or 2).
        handover: keys whose weights a simdgroup hands over at a time (4, 8, 16 or 32); sets threadgroup memory.
        simdgroups: simdgroups per GPU core that a decode launch should offer.
    """

    variant: str = "lanes"
    teams: int = 4
    keys: int = 2
    handover: int = 16
    simdgroups: int = 12

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"Metal tuning: {name} {getattr(self, name)!r} is not one of {allowed}")


CHOICES: dict[str, tuple[Any, ...]] = {
    "variant": ("lanes", "matrix"),
    "teams": (1, 2, 4, 8),
    "keys": (1, 2),
    "handover": (4, 8, 16, 32),
    "simdgroups": (4, 8, 12, 16, 24, 32, 48, 64),
}
"""What a tuning may say."""


TUNED = {"g17": Tuning(variant="matrix")}  # M5: the first with matrix units
"""By GPU generation, where the defaults are not the best. Chosen by counting operations and bytes, not yet by
measurement: no row is from a real device."""

CORES = {"p": 6, "g": 10, "s": 32, "c": 40, "d": 76}
"""GPU cores by the last letter of the architecture's name (phone, base, Pro/Max, Max, Ultra): the scale of a launch."""


@functools.cache
def architecture() -> str:
    """MLX's name of the GPU, e.g. `applegpu_g13s`; "" without one."""
    return str(mx.metal.device_info().get("architecture", "")) if mx.metal.is_available() else ""


def tuning() -> Tuning:
    """A tuning under trial, else the one measured on this GPU, else its generation's, else the default."""
    return _trial or _known()


@functools.cache
def _known() -> Tuning:
    by_generation = next((t for key, t in TUNED.items() if key in architecture()), Tuning())
    return measured().get(architecture(), by_generation)


_trial: Tuning | None = None


@contextlib.contextmanager
def trying(tune: Tuning) -> Iterator[None]:
    """Decode by `tune` meanwhile."""
    global _trial
    before, _trial = _trial, tune
    try:
        yield
    finally:
        _trial = before


def tuning_file() -> Path:
    """Where measured tunings are kept: `$XDG_CONFIG_HOME/opentq/metal.json`, by default in `~/.config`."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "opentq" / "metal.json"


def measured() -> dict[str, Tuning]:
    """What `tuning_file()` says, by architecture. Raises UserError for a file that is none."""
    path = tuning_file()
    if not path.exists():
        return {}
    try:
        return {name: Tuning(**fields) for name, fields in json.loads(path.read_text()).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it, or run opentq bench kernel --tune again") from error


def keep(tune: Tuning) -> Path:
    """Write `tune` down for this GPU, beside those of others; returns the file."""
    path = tuning_file()
    known = {**measured(), architecture(): tune}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({name: asdict(t) for name, t in known.items()}, indent=1) + "\n")
    _known.cache_clear()
    return path


def cores() -> int:
    return CORES.get(architecture()[-1:], 10)


@functools.cache
def source(*files: str) -> tuple[str, str]:
    """(header, body) of `.metal` files; the shared header comes first."""
    helpers, _, bodies = zip(*((HERE / file).read_text().partition(BODY) for file in files))
    common = (HERE / "common.metal").read_text()
    return "\n".join((common, *helpers, "")), "".join(bodies)


make: Callable[..., Any] = mx.fast.metal_kernel
"""Builds a kernel object; tests put their emulator here."""


Template = tuple[tuple[str, Any], ...]
"""Constants of a kernel by name: types, numbers, and whether or not."""

TYPES = {mx.float16: "half", mx.bfloat16: "bfloat16_t", mx.float32: "float"}


kernels: dict[tuple[str, Template], Any] = {}
"""What was built; whoever keeps a kernel asks whether this is still the same object."""


def forget() -> None:
    """Build all kernels anew, as when tests change their text or what builds them."""
    global kernels
    kernels = {}


def kernel(name: str, template: Template = ()) -> Any:
    """The `mx.fast.metal_kernel` object called `name` with these constants, built once.

    They are written into its text: MLX's own template arguments are put together anew in every call, which takes the
    host as long as the call itself.
    """
    if (name, template) in kernels:
        return kernels[name, template]
    spec = KERNELS[name]
    header, body = source(*spec.files)
    text = "".join(_constant(*pair) for pair in template)
    made = make(
        name=f"opentq_{name}_{hashlib.sha256(text.encode()).hexdigest()[:8]}",
        input_names=list(spec.inputs),
        output_names=list(spec.outputs),
        source=text + body,
        header=header,
        ensure_row_contiguous=spec.strided,
    )
    kernels[name, template] = made
    return made


def _constant(name: str, value: Any) -> str:
    if isinstance(value, mx.Dtype):
        return f"  using {name} = {TYPES[value]};\n"
    return f"  constexpr {type(value).__name__} {name} = {str(value).lower()};\n"


@dataclass(frozen=True)
class Side:
    """Keys or values as a kernel sees them.

    Attributes:
        format: of the first run.
        group: channels that share a scale; of a book all channels of a run.
        dim: head dim.
        second: of a second run of codes, which is as long as the first; or NONE.
        sketch: channels of a query's sketch, which stands behind the query itself.
        packed: channels of packed keys, which meet as many channels at a query's end; 0 for `dim`.
    """

    format: Format
    group: int
    dim: int
    second: Format = Format.NONE
    sketch: int = 0
    packed: int = 0

    @property
    def width(self) -> int:
        return self.packed or self.dim

    @property
    def query(self) -> int:
        return self.dim + self.sketch

    @property
    def groups(self) -> int:
        return -(-self.width // self.group)


@dataclass(frozen=True)
class DecodePlan:
    """Launch geometry of the lane-layout decode: `rows` query rows a team, `members` simdgroups a team, and so on."""

    rows: int
    keys: int
    members: int
    teams: int
    handover: int
    splits: int

    def threadgroup_bytes(self, k: Side, v: Side) -> int:
        span = self.handover * self.members
        per_team = span * v.groups * self.rows + span * self.rows + span * v.groups
        per_team += 2 * self.members * self.rows + v.groups * self.rows
        return 4 * (k.query * self.rows + k.groups * self.rows + self.teams * per_team)


def lane_rows(k: Side, v: Side) -> int:
    """Query rows per KV head that the lane layout can hold in registers."""
    return 16 if max(k.query, v.dim) <= 128 else 8


def plan_decode(
    k: Side, v: Side, rows: int, heads: int, tokens: int, tune: Tuning, n_cores: int, listed: bool = False
) -> DecodePlan:
    """Geometry for `rows` query rows per KV head, at most `lane_rows`, and `heads` KV heads (all sequences).

    `tokens` is the longest sequence, dense columns included; `listed`: they are read by a list of pages.
    """
    members = 1 if v.dim <= 128 else 2 if v.dim <= 256 else 4
    per_team = next(r for r in (1, 2, 4, 8, 16) if r >= rows)
    keys = tune.keys if per_team <= 8 else 1
    teams = tune.teams if members == 1 else 1
    handover = min(tune.handover, FLUSH // members) if listed else tune.handover  # all of one page
    tile = 32 * keys * members
    wanted = max(1, n_cores * tune.simdgroups // (heads * members * teams))
    useful = max(1, -(-tokens // (2 * tile * teams)))
    plan = DecodePlan(per_team, keys, members, teams, handover, min(wanted, useful, MAX_SPLITS // teams))
    while plan.threadgroup_bytes(k, v) > THREADGROUP_BYTES and (plan.handover > 4 or plan.teams > 1):
        if plan.handover > 4:
            plan = replace(plan, handover=plan.handover // 2)
        else:
            plan = replace(plan, teams=plan.teams // 2)
    return plan


@dataclass(frozen=True)
class MatrixPlan:
    """Launch geometry of the simdgroup-matrix kernel: tokens per tile, simdgroups, splits, and whose the tiles are."""

    tile: int
    simdgroups: int
    splits: int
    row_tiles: int
    own: bool

    def threadgroup_bytes(self, k: Side, v: Side, wide: bool) -> int:
        size = 4 if wide else 2
        tiles = (self.simdgroups if self.own else 1) * self.tile * (max(k.width, v.dim) + 8)
        return size * tiles + self.simdgroups * (8 * self.tile * (4 + size) + 256)


def plan_matrix(
    k: Side, v: Side, rows: int, heads: int, tokens: int, own: bool, wide: bool, tune: Tuning, n_cores: int
) -> MatrixPlan:
    """Geometry for `rows` query rows per KV head. `wide`: float tiles, for float32 queries."""
    simdgroups = 4
    row_tiles = -(-rows // (8 if own else 8 * simdgroups))
    wanted = max(1, n_cores * tune.simdgroups // (heads * row_tiles * simdgroups))
    plan = MatrixPlan(32, simdgroups, 1, row_tiles, own)
    while plan.threadgroup_bytes(k, v, wide) > THREADGROUP_BYTES * 3 // 4 and plan.tile > 8:
        plan = replace(plan, tile=plan.tile // 2)
    while plan.threadgroup_bytes(k, v, wide) > THREADGROUP_BYTES:
        plan = replace(plan, simdgroups=plan.simdgroups // 2)
    if not own:
        plan = replace(plan, row_tiles=-(-rows // (8 * plan.simdgroups)))
    pieces = plan.simdgroups if own else 1
    useful = max(1, -(-tokens // (2 * plan.tile * pieces)))
    return replace(plan, splits=min(wanted, useful, MAX_SPLITS // pieces))
