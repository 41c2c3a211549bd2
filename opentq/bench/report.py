"""`opentq bench report`: records in, one page out. Tables, charts with their records, light and dark, no script."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import svg, table
from .chart import Chart, charts

STYLE = Path(__file__).with_name("report.css").read_text() + "".join(
    f".c{i} {{ fill: var(--c{i}); stroke: var(--c{i}); }}\n" for i in range(svg.COLOURS)
)


def page(records: Sequence[dict[str, Any]], title: str = "opentq benchmarks") -> str:
    """One self-contained HTML page. Raises UserError when there is nothing in the records that it knows."""
    drawn = charts(records)
    kinds = [k for k in ("kernel", "call", "model", "long", "conformance") if any(r.get("kind") == k for r in records)]
    if not drawn and not kinds:
        raise UserError("these files hold no benchmark or fidelity records; make some with opentq bench --results FILE")
    parts = [f"<h1>{escape(title)}</h1>", _where(records)]
    parts += [_figure(chart, behind) for chart, behind in drawn]
    for kind in kinds:
        rows = [r for r in records if r.get("kind") == kind]
        parts.append(f"<h2>{kind}: every row</h2>{_verdict(rows)}{_table(table.markdown(rows))}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Of rows that pass or fail, how many did."""
    judged = [r["ok"] for r in rows if "ok" in r]
    return f"<p>{sum(judged)} of {len(judged)} passed</p>" if judged else ""


def _where(records: Sequence[dict[str, Any]]) -> str:
    """Devices, versions and commands, each once."""
    lines = []
    for key, label in (("device", "Measured on"), ("date", "Between"), ("commit", "Commit")):
        found = sorted({str(r[key]) for r in records if r.get(key)})
        if key == "date" and found:
            found = [found[0], found[-1]] if found[0] != found[-1] else found[:1]
        if found:
            lines.append(f"{label}: " + "; ".join(map(escape, found)))
    versions = {name: v for r in records for name, v in (r.get("versions") or {}).items()}
    for r in records:
        if r.get("kind") == "device":
            lines.append(escape(_machine(r)))
    lines.append(", ".join(f"{name} {v}" for name, v in sorted(versions.items())))
    commands = sorted({str(r["command"]) for r in records if r.get("command")})
    listed = (
        f"<details><summary>{len(commands)} commands</summary><pre>{escape(chr(10).join(commands))}</pre></details>"
    )
    return f"<p>{'<br>'.join(lines)}</p>{listed if commands else ''}"


def _machine(r: dict[str, Any]) -> str:
    """The device record of `opentq doctor --bench` in a line."""
    cores = f", {r['gpu_cores']} GPU cores" if r.get("gpu_cores") else ""
    kind = ", a virtual machine: its times are its own" if r.get("virtual") else ""
    read, copied = (f"{r[k] / 1e9:.0f} GB/s" for k in ("read_bandwidth", "copy_bandwidth"))
    return f"{r['device']}{cores}, {r['os']}{kind}; reads {read}, copies {copied}; kernels: {r['backend_kernels']}"


def _figure(chart: Chart, behind: list[dict[str, Any]]) -> str:
    lines = "\n".join(escape(json.dumps(r)) for r in behind)
    return (
        f"<figure id={escape(json.dumps(chart.name))}><figcaption>{escape(chart.title)}</figcaption>{svg.draw(chart)}"
        f"<details><summary>{len(behind)} records</summary><pre>{lines}</pre></details></figure>"
    )


def _table(markdown: str) -> str:
    """A Markdown table as HTML."""
    head, marks, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines())
    classes = ["" if mark.endswith(":") else ' class="text"' for mark in marks]

    def row(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}{c}>{escape(x)}</{tag}>" for x, c in zip(cells, classes)) + "</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return f'<div class="wide"><table><thead>{row(head, "th")}</thead><tbody>{body}</tbody></table></div>'


def export(records: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Every chart as PNG and SVG files (needs the extra `plot`); returns what was written."""
    from .plot import save

    return [
        save(chart, folder / f"{chart.name}{ending}") for chart, _ in charts(records) for ending in (".png", ".svg")
    ]
