"""Records as tables and as pictures made of characters."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ..errors import UserError
from ..records import Record

FORMATS = ("text", "md", "json")
SHADES = " ░▒▓█"


def check_format(name: str) -> None:
    """Raise UserError for an output format that does not exist."""
    if name not in FORMATS:
        raise UserError(f"output format {name!r} is not known; choose one of {', '.join(FORMATS)}")


def fidelity(records: Sequence[Record], style: str) -> str:
    """One row per spec and depth, statistics with their 95 % intervals."""
    head = ["spec", "bits", "depth", "KL mean", "KL median", "KL 99 %", "top-1 %", "ppl / fp16 cache", "cache MiB"]
    rows = []
    for r in records:
        settings = r["settings"]
        kls = [_interval(r[k], _short) for k in ("kl_mean", "kl_median", "kl_p99")]
        top = _interval(r["top1"], lambda x: f"{100 * x:.2f}")
        ratio = _interval(r["ppl_ratio"], lambda x: f"{x:.4f}")
        size = f"{r['cache_bytes'] / 2**20:.2f}"
        rows.append([settings["spec"], f"{r['bits']:.3g}", str(settings["depth"]), *kls, top, ratio, size])
    text = table(head, rows, style, records)
    if style == "json" or not any("reference" in r for r in records):
        return text
    rivals = [r["settings"]["spec"] for r in records if r["settings"]["protocol"]["simulate"]]
    names = ", ".join(dict.fromkeys(["fp16", *rivals]))
    return (
        f"{text}\n\nSimulated, because MLX attends to them slowly on a CPU: {names}. Decoded values are kept in fp16."
    )


def needle(records: Sequence[Record], style: str) -> str:
    """A grid per spec, lengths down and depths across, in per cent; the mean of all cells beside the name."""
    if style == "json":
        return _lines(records)
    parts = []
    for spec, group in grouped(records).items():
        depths = sorted({r["settings"]["depth"] for r in group})
        correct = sum(r["correct"] for r in group)
        asked = sum(r["settings"]["trials"] for r in group)
        title = f"{spec} ({group[0]['bits']:.3g} bits): {correct} of {asked} found"
        rows = [
            [str(length)] + [_cell(_at(group, length, depth), style) for depth in depths]
            for length in sorted({r["settings"]["length"] for r in group})
        ]
        head = ["tokens"] + [f"{100 * d:.0f} %" for d in depths]
        parts.append(title + "\n\n" + table(head, rows, style, group))
    return "\n\n".join(parts)


def agreement(records: Sequence[Record], style: str) -> str:
    """One row per spec: tokens of exact agreement, whole agreements, exact answers by kind."""
    kinds = list(records[0].get("recall", {})) if records else []
    head = ["spec", "bits", "tokens until different", "identical", *kinds]
    rows = []
    for r in records:
        task = r["settings"]["task"]
        same = f"{r['identical']}/{task['prompts']}"
        recall = [f"{r['recall'][k]}/{task['questions']}" for k in kinds]
        until = _interval(r["agreement"], lambda x: f"{x:.1f}")
        rows.append([r["settings"]["spec"], f"{r['bits']:.3g}", until, same, *recall])
    return table(head, rows, style, records)


def use(records: Sequence[Record], style: str) -> str:
    """One row per spec: answers equal to the end, tokens before the first difference."""
    head = ["spec", "bits", "answers", "equal, %", "before the first difference, %", "median token of difference"]
    rows = []
    for r in records:
        equal, share = (_interval(r[k], lambda x: f"{100 * x:.1f}") for k in ("equal", "share_before_divergence"))
        at = "-" if r["diverged_at_median"] is None else f"{r['diverged_at_median']:g}"
        rows.append([r["settings"]["spec"], f"{r['bits']:.3g}", str(len(r["lengths"])), equal, share, at])
    return table(head, rows, style, records)


def tasks(records: Sequence[Record], style: str) -> str:
    """One row per spec, the model's own cache first: accuracy, and the paired difference to it."""
    head = ["spec", "bits", "right, %", "read, %", "known, %", "difference, points", "lost / won", "McNemar p"]
    rows = []
    for r in records:
        right = _interval(r["accuracy"], lambda x: f"{100 * x:.1f}")
        kinds = [f"{100 * r[k][0]:.1f}" if r[k] else "-" for k in ("read", "known")]
        paired = ["", "", ""]
        if "difference" in r:
            difference = _interval(r["difference"], lambda x: f"{100 * x:+.1f}")
            paired = [difference, f"{r['lost']} / {r['won']}", f"{r['mcnemar_p']:.2g}"]
        rows.append([r["settings"]["spec"], f"{r['bits']:.3g}", right, *kinds, *paired])
    return table(head, rows, style, records)


LAYER_COLUMNS = {
    "key cos": "key_cosine",
    "value cos": "value_cosine",
    "logit std": "logit_std",
    "logit err var": "logit_error_var",
    "attn KL": "attention_kl",
    "out err K": "output_error_keys",
    "out err V": "output_error_values",
    "out err": "output_error",
    "passed q err": "query_error",
    "passed out err": "passed_output_error",
}


def layers(records: Sequence[Record], style: str) -> str:
    """One row per spec and layer."""
    head = ["spec", "layer", *LAYER_COLUMNS]
    rows = []
    for r in records:
        numbers = [f"{r[field]:.4g}" for field in LAYER_COLUMNS.values()]
        rows.append([r["settings"]["spec"], str(r["settings"]["layer"]), *numbers])
    return table(head, rows, style, records)


def grouped(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by spec, in order of appearance."""
    groups: dict[str, list[Record]] = {}
    for r in records:
        groups.setdefault(r["settings"]["spec"], []).append(r)
    return groups


def harness(records: Sequence[Record], style: str) -> str:
    """One row per task and spec: the task's metrics, with standard errors."""
    rows = []
    for r in records:
        shown = (_metric(k, r["metrics"]) for k in r["metrics"] if "stderr" not in k)
        rows.append([r["settings"]["task"]["name"], r["settings"]["spec"], f"{r['bits']:.3g}", ", ".join(shown)])
    return table(["task", "spec", "bits", "metrics"], rows, style, records)


def _metric(key: str, metrics: dict[str, float]) -> str:
    """One of the harness's METRIC or METRIC,FILTER, with its standard error if it has one."""
    name, comma, kind = key.partition(",")
    error = metrics.get(f"{name}_stderr{comma}{kind}")
    return f"{key} {metrics[key]:.4g}" + ("" if error is None else f" ± {error:.2g}")


def table(head: list[str], rows: list[list[str]], style: str, records: Sequence[Record] = ()) -> str:
    """Aligned columns: as Markdown (`md`), plain (`text`), or the records themselves, one per line (`json`)."""
    if style == "json":
        return _lines(records)
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]

    def line(cells: list[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths))]
        return "| " + " | ".join(padded) + " |" if style == "md" else "  ".join(padded).rstrip()

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(head)] + ([rule] if style == "md" else []) + [line(r) for r in rows])


def _lines(records: Sequence[Record]) -> str:
    return "\n".join(json.dumps(r) for r in records)


def _interval(triple: Sequence[float], form) -> str:
    value, low, high = triple
    return f"{form(value)} [{form(low)}, {form(high)}]"


def _short(x: float) -> str:
    """Three digits: 0.0123 and 1.2e-05."""
    return "0" if x == 0 else f"{x:.3f}" if x >= 1 else f"{x:.4f}" if x >= 0.01 else f"{x:.1e}"


def _at(group: Sequence[Record], length: int, depth: float) -> Record | None:
    return next((r for r in group if (r["settings"]["length"], r["settings"]["depth"]) == (length, depth)), None)


def _cell(record: Record | None, style: str) -> str:
    if record is None:
        return "-"
    share = record["accuracy"][0]
    text = f"{100 * share:.0f}"
    return text if style == "md" else f"{text} {SHADES[round(share * (len(SHADES) - 1))] * 2}"
