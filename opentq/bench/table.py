"""Tables from records: llama-bench's Markdown, CSV, JSON and JSONL; the columns are chosen by the kind of record."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence

from ..errors import UserError
from ..records import Record

FORMATS = ("md", "csv", "json", "jsonl")


def render(records: Sequence[Record], form: str) -> str:
    """Records as text in one of `FORMATS`."""
    if form == "json":
        return json.dumps(list(records), indent=1)
    if form == "jsonl":
        return "\n".join(json.dumps(r) for r in records)
    if form == "csv":
        return _csv(records)
    if form == "md":
        kinds = dict.fromkeys(r["kind"] for r in records)
        return "\n\n".join(markdown([r for r in records if r["kind"] == kind]) for kind in kinds)
    raise UserError(f"output format {form!r} is not known: use {', '.join(FORMATS)}")


def _csv(records: Sequence[Record]) -> str:
    flat = [{k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in r.items()} for r in records]
    names = list(dict.fromkeys(k for r in flat for k in r))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue().rstrip("\n")


def markdown(records: Sequence[Record]) -> str:
    """One Markdown table for records of one kind."""
    mlx = [r for r in records if (r.get("engine"), r.get("kv")) == ("mlx", "f16")]
    fp16 = {(tuple(r["shape"]), r["context"]): r["ms"] for r in mlx}  # what MLX's own attention over fp16 took there
    if fp16:
        records = [{**r, "fp16_ms": fp16.get((tuple(r["shape"]), r["context"]))} for r in records]
    columns = COLUMNS[records[0]["kind"]]
    aligned = ["---" if column in LEFT else "---:" for column in columns]
    lines = [list(columns), aligned, *([cell(r) for cell in columns.values()] for r in records)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


Cell = Callable[[Record], str]


def _text(key: str) -> Cell:
    return lambda r: str(r.get(key) or "")


def _figure(key: str, form: str, unit: float = 1) -> Cell:
    """A number in some unit; nothing where it was not measured."""
    return lambda r: "" if r[key] is None else f"{r[key] if unit == 1 else r[key] / unit:{form}}"


def _spread(key: str, form: str, otherwise: Cell = lambda r: "") -> Cell:
    """A number with its standard deviation."""
    return lambda r: otherwise(r) if r[key] is None else f"{r[key]:{form}} ± {r[f'{key}_sd']:{form}}"


def _ratio(value: float | None, base: float | None = 1.0) -> str:
    return f"{value / base:.2f}x" if value and base else ""


def _judged(key: str) -> Cell:
    """What a verdict says; of a kernel that failed nothing."""
    return lambda r: "" if "failure" in r else f"{r[key]:.1e}"


LEFT = (
    *("engine", "kv", "model", "backend", "fill", "served by", "test", "arm", "needle", "note"),
    *("what", "variant", "shape", "dtype", "passed"),
)
"""Columns of words."""

CONTEXT = {"context": _figure("context", ",")}
MEMORY = {"KV GB": _figure("kv_bytes", ".3f", 1e9), "peak GB": _figure("peak_bytes", ".2f", 1e9)}

COLUMNS: dict[str, dict[str, Cell]] = {
    "kernel": {
        "engine": _text("engine"),
        "kv": lambda r: " ".join((r["kv"], r.get("variant", ""))).strip(),
        **CONTEXT,
        "ms": _spread("ms", ".3f"),
        "of MLX's": lambda r: _ratio(r["ms"], r.get("fp16_ms")),
        "GB/s": _figure("gb_per_s", ".1f"),
        "of bandwidth": lambda r: "" if r["ms"] is None else f"{100 * r['bandwidth_share']:.0f} %",
        "error": _figure("error", ".1e"),
        "with codec": _figure("error_with_codec", ".1e"),
        "MB": _figure("bytes", ".1f", 1e6),
        "scratch MB": _figure("scratch_bytes", ".1f", 1e6),
        "served by": _text("served_by"),
        "note": _text("note"),
    },
    "model": {
        "model": _text("model"),
        "size GB": _figure("weight_bytes", ".2f", 1e9),
        "backend": _text("backend"),
        "kv": _text("kv"),
        "test": lambda r: r["test"] + (f" @ d{r['depth']}" if r["depth"] else ""),
        "t/s": _spread("tokens_per_s", ".2f", _text("note")),
        "peak GB": MEMORY["peak GB"],
        "KV GB": MEMORY["KV GB"],
        "vs native": lambda r: _ratio(r.get("vs_native", r.get("vs_f16"))),  # its name in older records
        "fill": _text("fill"),
    },
    "long": {
        "arm": _text("arm"),
        **CONTEXT,
        "prefill t/s": _figure("prefill_per_s", ".1f"),
        "decode t/s": _figure("decode_per_s", ".1f"),
        **MEMORY,
        "needle": lambda r: {True: "found", False: "missed", None: ""}[r["needle"]],
        "note": _text("note"),
    },
    "call": {
        "what": _text("what"),
        "kv": _text("kv"),
        **CONTEXT,
        "tokens": _figure("tokens", ","),
        "ms": _spread("ms", ".3f"),
    },
    # A verdict of `opentq doctor --bench`: its largest error, that of naive attention, and what compiling took.
    "conformance": {
        "kv": _text("kv"),
        "served by": _text("served_by"),
        "variant": _text("variant"),
        "shape": lambda r: "/".join(map(str, r["shape"])),
        "tokens": _text("length"),
        "dtype": _text("dtype"),
        "window": lambda r: str(r["window"]),
        "passed": lambda r: r["failure"].splitlines()[0] if "failure" in r else "yes" if r["ok"] else "NO",
        "error": _judged("max_error"),
        "naive": _judged("naive_error"),
        "compile s": lambda r: "" if "failure" in r else f"{max(0.0, r['first_seconds'] - r['again_seconds']):.2f}",
    },
}
"""Of every kind of record, the columns of its table: heads and what stands below them."""
