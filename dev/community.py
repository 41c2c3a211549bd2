"""Files of `opentq doctor --bench` that people sent in: `python dev/community.py` checks those in results/community/.

A file is taken as the command wrote it: fields that it does not write, paths and addresses are refused, so that nothing
of its owner comes along; so is what can't be, such as more bytes a second than the machine reads.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opentq.errors import UserError
from opentq.records import read

FOLDER = Path(__file__).parents[1] / "results" / "community"
Record = dict[str, Any]

COMMON = {"kind", "device", "backend", "system", "versions", "commit", "threads", "command", "date", "kernels"}
CASE = {"kv", "shape", "length", "dtype", "window", "served_by", "variant", "ok"}
FIELDS = {
    "device": {"device_info", "os", "gpu_cores", "virtual", "backend_kernels", "tuning"}
    | {"read_bandwidth", "copy_bandwidth"},
    "conformance": CASE | {"max_error", "naive_error", "first_seconds", "again_seconds", "failure"},
    "pack": {"ok", "codec", "dim", "identical", "error", "failure"},
    "pages": {"ok", "by", "kv", "dim", "failure"},
    "kernel": {
        "shape",
        "context",
        "engine",
        "kv",
        "variant",
        "ms",
        "ms_sd",
        "windows_ms",
        "stolen",
        "bytes",
        "gb_per_s",
    }
    | {"bandwidth_share", "read_bandwidth", "error", "error_with_codec", "checked_heads", "scratch_bytes"}
    | {"served_by", "note"},
    "call": {"what", "kv", "shape", "context", "tokens", "ms", "ms_sd"},
    "times": {"ok", "failure"},
}
PRIVATE = re.compile(r"/Users/|/home/|/root/|/Volumes/|[\w.]+@[\w-]+\.\w|\b[A-Z]:\\")
CACHED = 64 << 20
"""Fewer bytes than this may come from a cache, faster than memory."""
SAME = ("device", "backend", "system", "versions", "commit", "kernels")


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def problems(file: Path, records: Sequence[Record]) -> list[str]:
    """What is wrong with a file, in words; [] for one that can be taken."""
    if not records or records[0].get("kind") != "device":
        return ["it does not begin with the record of a device: is it from opentq doctor --bench?"]
    first, found = records[0], []
    if slug(str(first["device"])) not in file.name or str(first["date"])[:10] not in file.name:
        found.append(f"its name must have device and date: opentq-{slug(first['device'])}-{first['date'][:10]}.jsonl")
    if not first["commit"] or first["commit"].endswith("+"):
        found.append(f"commit {first['commit']!r}: it must come from a commit of this project, not from changed source")
    if first["kernels"]:
        found.append(f"it was made with OPENTQ_KERNELS={first['kernels']}: leave that unset")
    for number, record in enumerate(records, 1):
        found += [f"line {number}: {problem}" for problem in _line(record, first)]
    return found


def _line(r: Record, first: Record) -> list[str]:
    kind = r.get("kind")
    if kind not in FIELDS:
        return [f"kind {kind!r} is not one of {', '.join(FIELDS)}"]
    found = [f"unknown field {name!r}" for name in sorted(set(r) - FIELDS[kind] - COMMON)]
    found += [f"{text!r} has a path or an address in it" for text in _strings(r) if PRIVATE.search(text)]
    if any(r.get(name) != first.get(name) for name in SAME):
        found.append("a file is of one machine, one commit and one set of versions")
    if kind == "conformance" and r["ok"] and "max_error" not in r:
        found.append("ok without an error that was measured")
    if kind == "conformance" and not r["ok"] and "failure" not in r and r["max_error"] <= 2 * r["naive_error"]:
        found.append("ok is false, but its error is not")
    if kind == "kernel" and r["ms"] is not None:
        if r["bytes"] >= CACHED and r["gb_per_s"] * 1e9 > 1.2 * r["read_bandwidth"]:
            found.append(f"{r['gb_per_s']:.0f} GB/s is faster than the memory of this machine")
        if not r["error"] < 1e-2:
            found.append(f"an arm that is wrong (error {r['error']:.1e}) has no time")
    return found


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for v in value.values() for text in _strings(v)]
    if isinstance(value, list):
        return [text for v in value for text in _strings(v)]
    return [value] if isinstance(value, str) else []


def table(files: Sequence[Sequence[Record]], context: int = 32768) -> str:
    """The table of Macs: one layer's attention of one token, ours by the faster kernel, beside MLX's own."""
    rows = [row for records in files for row in _row(records, context)]
    if not rows:
        return (
            "None yet. [Three commands](metal.md#what-a-mac-owner-does) make the file that fills this table; "
            "hosted Macs compile and judge every kernel, but their times are a virtual machine's."
        )
    head = ["chip", "`int4`, ms", "MLX fp16 / `int4`", "`tq5/tq3:nc`, ms", "MLX fp16, ms", "mlx-lm 4 bits, ms", "GB/s"]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{text}\n\nOne layer, 32 query and 8 KV heads, D 128, one token at {context:,}; `opentq doctor --bench`."


def _row(records: Sequence[Record], context: int) -> list[list[str]]:
    first = records[0]
    if first["backend"] != "mac" or first.get("virtual"):
        return []
    timed = [r for r in records if r["kind"] == "kernel" and r["context"] == context and r["ms"] is not None]

    def best(engine: str, kv: str) -> Record | None:
        found = [r for r in timed if (r["engine"], r["kv"]) == (engine, kv)]
        return min(found, key=lambda r: r["ms"]) if found else None

    def cell(r: Record | None) -> str:
        return "" if r is None else f"{r['ms']:.2f}" + (f" ({r['variant']})" if r.get("variant") else "")

    ours, fp16 = best("opentq", "int4"), best("mlx", "f16")
    if ours is None or fp16 is None:
        return []
    others = [cell(best("opentq", "tq5/tq3:nc")), cell(fp16), cell(best("mlx-lm", "kv-bits 4"))]
    name = f"{first['device']}, {first['gpu_cores']} cores" if first.get("gpu_cores") else first["device"]
    return [[name, cell(ours), f"{fp16['ms'] / ours['ms']:.2f}x", *others, f"{ours['gb_per_s']:.0f}"]]


def main(paths: Sequence[str]) -> int:
    bad = 0
    for file in [Path(p) for p in paths] or sorted(FOLDER.glob("*.jsonl")):
        try:
            found = problems(file, read([file]))
        except UserError as error:
            found = [str(error)]
        bad += bool(found)
        for problem in found:
            print(f"{file.name}: {problem}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
