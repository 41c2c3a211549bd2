"""Charts from records: what to draw, apart from how (`svg.py` for pages, `plot.py` for PNG and SVG files)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Series:
    """One line: a label and its points, by rising x; or points with names of their own, and a line through some."""

    label: str
    points: tuple[tuple[float, float], ...]
    names: tuple[str, ...] = ()

    @property
    def line(self) -> tuple[tuple[float, float], ...]:
        """What is joined: all points, or the lower front of named ones (none to the left of a point is lower)."""
        if not self.names:
            return self.points
        front: list[tuple[float, float]] = []
        for point in self.points:
            if not front or point[1] < front[-1][1]:
                front.append(point)
        return tuple(front)


@dataclass(frozen=True)
class Chart:
    """Lines over one pair of axes. `limit` is a dashed horizontal line with its label."""

    name: str
    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    log_x: bool = True
    log_y: bool = False
    limit: tuple[float, str] | None = None


def charts(records: Sequence[Record]) -> list[tuple[Chart, list[Record]]]:
    """Every chart that the records are enough for, with the records behind it."""
    return [*_kernel(records), *_call(records), *_model(records), *_long(records), *_quality(records)]


def _series(rows: Sequence[Record], label: Any, x: Any, y: Any) -> tuple[Series, ...]:
    """Lines by label; a later record of the same point replaces an earlier one."""
    lines: dict[str, dict[float, float]] = {}
    for row in rows:
        if y(row) is not None:
            lines.setdefault(label(row), {})[x(row)] = y(row)
    return tuple(Series(name, tuple(sorted(points.items()))) for name, points in lines.items())


def _groups(records: Sequence[Record], kind: str, key: Any) -> dict[Any, list[Record]]:
    found: dict[Any, list[Record]] = {}
    for record in records:
        if record.get("kind") == kind:
            found.setdefault(key(record), []).append(record)
    return found


def _kernel(records: Sequence[Record]) -> list[tuple[Chart, list[Record]]]:
    out = []
    for (shape, device), rows in _groups(records, "kernel", lambda r: (tuple(r["shape"]), r["device"])).items():
        title = f"Attention of one layer, {shape[0]} query and {shape[1]} KV heads, D={shape[2]}, on {device}"
        lines = _series(rows, _arm, lambda r: r["context"], lambda r: r["ms"])
        name = f"kernel-{'-'.join(map(str, shape))}"
        out.append((Chart(name, title, "context, tokens", "milliseconds per call", lines, log_y=True), rows))
    return out


def _arm(r: Record) -> str:
    """Engine, format, and the kernel where several are compared."""
    return " ".join(part for part in (r["engine"], r["kv"], r.get("variant", "")) if part)


def _call(records: Sequence[Record]) -> list[tuple[Chart, list[Record]]]:
    """Prompt chunks at the end of a context, from `opentq doctor --bench`."""
    out = []
    chunks = [r for r in records if r.get("what") == "prefill"]
    for (shape, device), rows in _groups(chunks, "call", lambda r: (tuple(r["shape"]), r["device"])).items():
        title = f"Attention of {rows[0]['tokens']} prompt tokens, {shape[0]} query and {shape[1]} KV heads, on {device}"
        lines = _series(rows, lambda r: r["kv"], lambda r: r["context"], lambda r: r["ms"])
        name = f"prefill-{'-'.join(map(str, shape))}"
        out.append((Chart(name, title, "context, tokens", "milliseconds per chunk", lines, log_y=True), rows))
    return out


def _model(records: Sequence[Record]) -> list[tuple[Chart, list[Record]]]:
    out = []
    for (model, device), rows in _groups(records, "model", lambda r: (r["model"], r["device"])).items():
        name = "".join(c if c.isalnum() else "-" for c in model)
        for test in dict.fromkeys(r["test"] for r in rows):
            own = [r for r in rows if r["test"] == test]
            title = f"{model}, {test}, on {device}"
            for key, label, unit in (("tokens_per_s", "tokens per second", 1.0), ("peak_bytes", "peak, GB", 1e9)):
                lines = _series(
                    own,
                    lambda r: r["kv"],
                    lambda r: max(r["depth"], 1),
                    lambda r, key=key, unit=unit: None if r[key] is None else r[key] / unit,
                )
                log = key == "tokens_per_s"
                out.append((Chart(f"{name}-{test}-{key}", title, "depth, tokens", label, lines, log_y=log), own))
    return out


def _long(records: Sequence[Record]) -> list[tuple[Chart, list[Record]]]:
    out = []
    for (model, device), rows in _groups(records, "long", lambda r: (r["model"], r["device"])).items():
        name = "long-" + "".join(c if c.isalnum() else "-" for c in model)
        for key, label, unit, log in (
            ("decode_per_s", "decode, tokens per second", 1.0, True),
            ("prefill_per_s", "prefill, tokens per second", 1.0, True),
            ("peak_bytes", "peak memory, GB", 1e9, False),
        ):
            lines = _series(
                rows,
                lambda r: r["arm"],
                lambda r: r["context"],
                lambda r, key=key, unit=unit: None if r[key] is None else r[key] / unit,
            )
            out.append(
                (Chart(f"{name}-{key}", f"{model} on {device}", "context, tokens", label, lines, log_y=log), rows)
            )
    return out


def _quality(records: Sequence[Record]) -> list[tuple[Chart, list[Record]]]:
    """Mean KL against bits per value, from `opentq eval fidelity`'s records: a point per spec, a front per depth."""
    rows = [r for r in records if (r.get("settings") or {}).get("kind") == "fidelity"]
    out = []
    for model in dict.fromkeys(r["settings"]["model"]["name"] for r in rows):
        own = [r for r in rows if r["settings"]["model"]["name"] == model and r["kl_mean"][0] > 0]
        found: dict[int, dict[str, tuple[float, float]]] = {}
        for r in own:
            point = r["bits"], r["kl_mean"][0]
            found.setdefault(r["settings"]["depth"], {})[r["settings"]["spec"]] = point
        lines = []
        for depth, specs in sorted(found.items()):
            names, points = zip(*sorted(specs.items(), key=lambda item: item[1]))
            lines.append(Series(f"{depth:,} tokens", points, names))
        chart = Chart(
            f"quality-{model}",
            f"Quality of {model}",
            "bits per value",
            "mean KL to fp16, nats",
            tuple(lines),
            False,
            True,
        )
        out.append((chart, own))
    return out
