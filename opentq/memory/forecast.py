"""What `opentq plan` foresees: rows for every spec and context, what fits, and what to do when it almost fits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from ..spec.text import Spec, name
from . import device as machines
from . import source
from .device import GIB, Device
from .plan import Estimate, largest_context, predict
from .skeleton import Skeleton, build


@dataclass(frozen=True)
class Row:
    """One spec at one context: its estimate and whether it fits (`yes`, `raised` with a raised wired limit, `no`)."""

    spec: str
    estimate: Estimate
    fits: str


@dataclass(frozen=True)
class Forecast:
    """Everything that `opentq plan` says; `table()` for people, `record()` for programs."""

    skeleton: Skeleton
    weights_said: str
    device: Device
    rows: tuple[Row, ...]
    largest: dict[str, tuple[int, int]]  # spec -> tokens (as it comes, with the wired limit raised)
    layers: str
    notes: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        return {
            "model": self.skeleton.name,
            "parameters": self.skeleton.parameters,
            "layers": self.layers,
            "weights": self.weights_said,
            "context_limit": self.skeleton.context_limit,
            "device": {"name": self.device.name, "memory": self.device.memory, "usable": self.device.usable},
            "rows": [{"spec": r.spec, **r.estimate.record(), "fits": r.fits} for r in self.rows],
            "largest": {s: {"default": a, "wired_limit_raised": b} for s, (a, b) in self.largest.items()},
            "sysctl": self.sysctl,
            "notes": list(self.notes),
        }

    @property
    def sysctl(self) -> str | None:
        """The line that raises the wired limit far enough for every row that needs it."""
        needed = max((r.estimate.total for r in self.rows if r.fits == "raised"), default=0)
        return self.device.sysctl(needed) if needed else None

    def table(self) -> str:
        limit = self.skeleton.context_limit
        lines = [
            f"{self.skeleton.name}: {self.skeleton.parameters / 1e9:.2f} B parameters, "
            + (f"made for {limit:,} tokens" if limit else "context limit not stated"),
            f"layers: {self.layers}",
            f"weights: {self.weights_said}",
            f"machine: {self._machine()}",
            "",
            "| kv | context | weights | KV | slack | prefill | reserve | total GiB | fits? |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
        ]
        for row in self.rows:
            e = row.estimate
            cells = (e.weights, e.kv, e.slack, e.prefill, e.reserve, e.total)
            beyond = f"; beyond the model's {short(limit)}" if limit and e.tokens > limit else ""
            word = {"yes": "yes", "no": "no", "raised": "with the wired limit raised"}[row.fits]
            figures = " | ".join(f"{c / GIB:.2f}" for c in cells)
            lines.append(f"| {row.spec} | {short(e.tokens)} | {figures} | {word}{beyond} |")
        lines.append("")
        for spec, (default, raised) in self.largest.items():
            more = f", {short(raised)} with the wired limit raised" if raised > default else ""
            beyond = f" (the model was made for {short(limit)})" if limit and max(default, raised) > limit else ""
            lines.append(f"largest context with {spec}: {short(default)}{more}{beyond}")
        if self.sysctl:
            lines += [
                "",
                f"The GPU of this Mac may use {self.device.usable / GIB:.0f} GB by default. To raise it until the next "
                "restart (it is not persistent):",
                f"  {self.sysctl}",
            ]
        lines += ["", *self.notes] if self.notes else []
        return "\n".join(lines)

    def _machine(self) -> str:
        d = self.device
        text = f"{d.name}, {d.usable / GIB:.1f} GiB usable"
        return text + (f", {d.ceiling / GIB:.1f} GiB with the wired limit raised" if d.ceiling > d.usable else "")


def forecast(
    model: str,
    specs: Sequence[Spec | None],
    contexts: Sequence[int] = (),
    memory: str = "",
    device: str = "mac",
    weights: str = "",
    step: int = 2048,
) -> Forecast:
    """Plan `model` for each spec (None: the host's own cache) and context. Raises UserError for what makes no sense."""
    machine = machines.assumed(machines.parse_memory(memory), device) if memory else machines.here()
    origin = source.find(model)
    skeleton = build(origin.config, origin.name, machine.float_bytes)
    size, said = _weights(origin, skeleton, weights, machine)
    contexts = contexts or _doublings(skeleton.context_limit or 1 << 17)
    rows, largest = [], {}
    notes = list(skeleton.notes)
    for spec in specs:
        plans = skeleton.plans(spec)
        for tokens in contexts:
            e = predict(skeleton, plans, tokens, size, machine, step)
            fits = "yes" if e.total <= machine.usable else "raised" if e.total <= machine.ceiling else "no"
            rows.append(Row(name(spec), e, fits))
        limits = (machine.usable, machine.ceiling)
        found = [largest_context(skeleton, plans, size, machine, limit, step) for limit in limits]
        largest[name(spec)] = (found[0], found[1])
    if size > machine.ceiling:
        notes.append(f"The weights alone ({size / GIB:.1f} GiB) are more than this machine can use: no context fits.")
    return Forecast(skeleton, said, machine, tuple(rows), largest, _layers(skeleton, specs[-1]), tuple(notes))


def _weights(origin: source.Source, skeleton: Skeleton, asked: str, machine: Device) -> tuple[int, str]:
    """Bytes of the weights, and how they are known."""
    float_bytes = machine.float_bytes
    if asked:
        found = re.fullmatch(r"(\d+)[-_ ]?bit|bf16|fp16|f16", asked.lower())
        if not found or (found[1] and int(found[1]) not in (2, 3, 4, 5, 6, 8, 16)):
            raise UserError(f"--weights {asked!r} is not known: use 4bit, 8bit (2, 3, 5 and 6 too) or bf16")
        bits, group, how = int(found[1] or 16), 64, "as asked"
    else:
        stored = origin.weight_bytes(float_bytes)
        decoded = source.decoded_bytes(skeleton, machine)
        if stored is not None and decoded <= stored:
            return stored, f"{stored / GIB:.2f} GiB, from the files"
        if decoded:
            return decoded, f"{decoded / GIB:.2f} GiB: a CPU decodes quantised weights that fit to float32"
        bits, group = origin.quantization or (4, 64)
        how = "as its name or config says" if origin.quantization else "assumed; say --weights 8bit or bf16"
    size = skeleton.weight_bytes(bits, group, float_bytes)
    form = f"{bits}-bit in groups of {group}" if bits < 16 else f"{8 * float_bytes}-bit floats"
    return size, f"{size / GIB:.2f} GiB = {size / 1e9:.1f} GB decimal, {form} ({how})"


def _layers(skeleton: Skeleton, spec: Spec | None) -> str:
    """`10 full attention 4x512 (int4), 50 RotatingKVCache 16x256 (sliding window, bounded at 1024 tokens)`."""
    plans = skeleton.plans(spec)
    kinds = Counter((p.kind, p.kv_heads, p.key_dim, p.value_dim, p.codec, p.reason) for p in plans)
    parts = []
    for (kind, heads, key_dim, value_dim, codec, reason), count in kinds.items():
        dims = f" {heads} x {key_dim}" + (f"/{value_dim}" if value_dim != key_dim else "") if heads else ""
        parts.append(f"{count} {kind}{dims} ({reason or codec})")
    return ", ".join(parts)


def _doublings(limit: int) -> list[int]:
    start = min(8192, limit)
    out = []
    while start < limit:
        out.append(start)
        start *= 2
    return [*out, limit]


def short(tokens: int) -> str:
    """131072 -> 128K."""
    return f"{tokens // 1024:,}K" if tokens % 1024 == 0 and tokens else f"{tokens:,}"
