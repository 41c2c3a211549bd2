"""Tables from records: llama-bench's Markdown, CSV, JSON and JSONL; the columns are chosen by the kind of record."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from ..errors import UserError

FORMATS = ("md", "csv", "json", "jsonl")
Record = dict[str, Any]


def render(records: Sequence[Record], form: str) -> str:
    """Records as text in one of `FORMATS`."""
    if form == "json":
        return json.dumps(list(records), indent=1)
    if form == "jsonl":
        return "\n".join(json.dumps(r) for r in records)
    if form == "csv":
        return _csv(records)
    if form == "md":
        return "\n\n".join(markdown([r for r in records if r["kind"] == kind]) for kind in _kinds(records))
    raise UserError(f"output format {form!r} is not known: use {', '.join(FORMATS)}")


def _kinds(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(r["kind"] for r in records))


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
    fp16 = {(tuple(r["shape"]), r["context"]): r["ms"] for r in mlx}

    def kernel(r: Record) -> list[str]:
        return _kernel(r, fp16.get((tuple(r["shape"]), r["context"])))

    head, row = {
        "kernel": (KERNEL, kernel),
        "model": (MODEL, _model),
        "long": (LONG, _long),
        "call": (CALL, _call),
        "conformance": (JUDGED, _judged),
    }[records[0]["kind"]]
    aligned = ["---" if column in LEFT else "---:" for column in head]
    lines = [head, aligned, *(row(r) for r in records)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


LEFT = (
    *("engine", "kv", "model", "backend", "fill", "served by", "test", "arm", "needle", "note"),
    *("what", "variant", "shape", "dtype", "passed"),
)
KERNEL = [
    "engine",
    "kv",
    "context",
    "ms",
    "of MLX's",
    "GB/s",
    "of bandwidth",
    "error",
    "with codec",
    "MB",
    "scratch MB",
    "served by",
    "note",
]
MODEL = ["model", "size GB", "backend", "kv", "test", "t/s", "peak GB", "KV GB", "vs native", "fill"]
LONG = ["arm", "context", "prefill t/s", "decode t/s", "KV GB", "peak GB", "needle", "note"]


CALL = ["what", "kv", "context", "tokens", "ms"]
JUDGED = ["kv", "served by", "variant", "shape", "tokens", "dtype", "window", "passed", "error", "naive", "compile s"]


def _call(r: Record) -> list[str]:
    return [r["what"], r["kv"], f"{r['context']:,}", f"{r['tokens']:,}", f"{r['ms']:.3f} ± {r['ms_sd']:.3f}"]


def _judged(r: Record) -> list[str]:
    """A verdict of `opentq doctor --bench`: its largest error, that of naive attention, and what compiling took."""
    shape = "/".join(map(str, r["shape"]))
    case = [r["kv"], r["served_by"], r["variant"], shape, str(r["length"]), r["dtype"], str(r["window"])]
    if "failure" in r:
        return [*case, r["failure"].splitlines()[0], "", "", ""]
    compiled = max(0.0, r["first_seconds"] - r["again_seconds"])
    return [*case, "yes" if r["ok"] else "NO", f"{r['max_error']:.1e}", f"{r['naive_error']:.1e}", f"{compiled:.2f}"]


def _kernel(r: Record, fp16: float | None) -> list[str]:
    """A row; `fp16` is what MLX's own attention over fp16 took there, in ms."""
    note = r.get("note", "")
    if r["ms"] is None:
        return [r["engine"], r["kv"], f"{r['context']:,}", *[""] * (len(KERNEL) - 4), note]
    return [
        r["engine"],
        " ".join((r["kv"], r.get("variant", ""))).strip(),
        f"{r['context']:,}",
        f"{r['ms']:.3f} ± {r['ms_sd']:.3f}",
        f"{r['ms'] / fp16:.2f}x" if fp16 else "",
        f"{r['gb_per_s']:.1f}",
        f"{100 * r['bandwidth_share']:.0f} %",
        f"{r['error']:.1e}",
        f"{r['error_with_codec']:.1e}",
        f"{r['bytes'] / 1e6:.1f}",
        "" if r["scratch_bytes"] is None else f"{r['scratch_bytes'] / 1e6:.1f}",
        r["served_by"],
        note,
    ]


def _model(r: Record) -> list[str]:
    test = r["test"] + (f" @ d{r['depth']}" if r["depth"] else "")
    speed = r["note"] if r["tokens_per_s"] is None else f"{r['tokens_per_s']:.2f} ± {r['tokens_per_s_sd']:.2f}"
    return [
        r["model"],
        f"{r['weight_bytes'] / 1e9:.2f}",
        r["backend"],
        r["kv"],
        test,
        speed,
        "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e9:.2f}",
        "" if r["kv_bytes"] is None else f"{r['kv_bytes'] / 1e9:.3f}",
        f"{ratio:.2f}x" if (ratio := r.get("vs_native", r.get("vs_f16"))) else "",  # its name in older records
        r["fill"],
    ]


def _long(r: Record) -> list[str]:
    def number(key: str, scale: float = 1.0, digits: int = 1) -> str:
        return "" if r[key] is None else f"{r[key] / scale:.{digits}f}"

    return [
        r["arm"],
        f"{r['context']:,}",
        number("prefill_per_s"),
        number("decode_per_s"),
        number("kv_bytes", 1e9, 3),
        number("peak_bytes", 1e9, 2),
        {True: "found", False: "missed", None: ""}[r["needle"]],
        r["note"],
    ]
