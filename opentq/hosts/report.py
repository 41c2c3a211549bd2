"""What is really in use: one row per kind of layer, from the plans of `compress` and the calls that were counted."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ..caches.step import LayerStats
from . import hooks
from .plan import LayerPlan


@dataclass(frozen=True)
class ReportRow:
    """One layer: its plan, how many attention calls it served compressed, by which function, and, of layers that read
    in pages, how many of how many packed tokens decode steps read.
    """

    plan: LayerPlan
    calls: int
    served_by: str
    read: int = 0
    held: int = 0


@dataclass(frozen=True)
class Report:
    """`str(report)` is the table; `rows` are the layers."""

    spec: str
    rows: tuple[ReportRow, ...]

    @property
    def bytes_per_token(self) -> float:
        """Bytes that one more token takes in all compressed layers."""
        return sum(r.plan.bytes_per_token() for r in self.rows if r.plan.compressed)

    def __str__(self) -> str:
        lines = [f"KV cache: {self.spec}"]
        for (kind, codec, reason, served), group in groupby(self.rows, key=_kind):
            rows = list(group)
            first, last = rows[0].plan, rows[-1].plan
            layers = f"{first.index}" if first.index == last.index else f"{first.index}-{last.index}"
            if first.compressed:
                calls = sum(r.calls for r in rows)
                indexer = f" ({first.beside:.0f} of them the indexer's)" if first.beside else ""
                detail = (
                    f"{first.bytes_per_token():.0f} bytes/token/layer{indexer}, attention by {served}, {calls} calls"
                )
                if first.whole:
                    detail += f"; no pages: {first.whole}"
                elif held := sum(r.held for r in rows):
                    detail += f"; decode read {100 * sum(r.read for r in rows) / held:.0f} % of packed tokens"
            else:
                detail = f"native: {reason}"
            lines.append(f"  layers {layers:>7}  {kind:<16} {codec:<12} {detail}")
        return "\n".join(lines)


def report(model: Any) -> Report:
    """What `compress` did to this model and what has happened since. Raises ValueError if it is not compressed."""
    record = hooks.installed(model)
    if record is None:
        raise ValueError("this model has no compressed cache: call opentq.compress(model, 'int4') first")
    rows = []
    for plan in record.plans:
        stats = record.stats.get((plan.index, plan.part))
        stats = stats or LayerStats()
        rows.append(ReportRow(plan, stats.calls, stats.served_by, stats.read, stats.held))
    return Report(str(record.spec), tuple(rows))


def _kind(row: ReportRow) -> tuple[str, str, str, str]:
    return row.plan.kind, row.plan.codec, row.plan.reason, row.served_by
