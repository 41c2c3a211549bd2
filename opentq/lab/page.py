"""`opentq lab report`: a Markdown page with a verdict for every hypothesis, and the graph that leads to the claims."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from .. import records
from .record import Finding, findings, sentence
from .study import Study


def markdown(study: Study, results: Path) -> str:
    """The page. Everything in it is computed from the results file."""
    rows = records.read([results]) if results.exists() else []
    trials = {r["key"]: r for r in rows if r["kind"] == "trial"}
    found = findings(results)
    kinds = Counter(r["settings"]["measure"] for r in trials.values())
    refused = sum("error" in r for r in trials.values())
    seconds = sum(r["seconds"] for r in trials.values())
    devices = sorted({r["device"] for r in trials.values()})
    counts = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
    parts = [
        f"# Study: {study.name}",
        f"{len(trials)} trials ({counts}; {refused} could not be run), {seconds / 60:.0f} minutes of work on "
        f"{'; '.join(devices) or 'no machine yet'}. Made by `opentq lab report {study.path}` from `{results.name}`.",
        "## Verdicts",
        "| expected | verdict | claim? | measured |\n| --- | --- | --- | --- |\n" + "\n".join(_row(f) for f in found),
        "A verdict is *supported* or *refuted* when the 95 % interval of the paired difference leaves out zero, else "
        "*open*. A claim came out the same way for every value of the setting that it was to be repeated over.",
        "## From hypotheses to claims",
        graph(found),
        "## Every insight",
        "\n".join(_details(f) for f in found),
    ]
    return "\n\n".join(parts) + "\n"


def _row(f: Finding) -> str:
    claim = f"yes, by {f.hypothesis['replicate']}" if f.claim else ""
    return f"| {f.hypothesis['says']} | {f.whole.verdict} | {claim} | {sentence(f, f.whole).partition(': ')[2]} |"


def _details(f: Finding) -> str:
    lines = [f"**{f.hypothesis['id']}**: {f.hypothesis['says']}", ""]
    lines += [f"- {sentence(f, part)}" for part in (f.whole, *f.parts)]
    return "\n".join(lines) + "\n"


def graph(found: list[Finding]) -> str:
    """A Mermaid graph: hypothesis -> insights (with their n) -> claim."""
    lines = ["```mermaid", "graph LR"]
    for i, f in enumerate(found):
        lines.append(f'  h{i}["{f.hypothesis["id"]}"]')
        for j, part in enumerate(f.parts):
            value = ", ".join(str(v) for v in part.where.values())
            lines.append(f'  h{i} --> i{i}_{j}["{value}: {part.verdict}, n = {part.n}"]')
            if f.claim:
                lines.append(f"  i{i}_{j} --> c{i}")
        if f.claim:
            lines.append(f'  c{i}(("{f.whole.verdict}"))')
    return "\n".join([*lines, "```"])
