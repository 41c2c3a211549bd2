"""The record of a study: hypotheses, results, insights and claims, each linked to its evidence, with full-text search.

It is computed from the JSONL file, which is the truth, into an SQLite file that may be deleted at any time. An
*insight* is what a paired test over results says of a hypothesis: effect, 95 % interval, n. A *claim* is an insight
that came out the same way for at least two values of the setting that the hypothesis names (another seed, another
model).
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import records
from ..errors import UserError
from .study import Settings

SUPPORTED, REFUTED, OPEN = "supported", "refuted", "open"


@dataclass(frozen=True)
class Insight:
    """The test of one hypothesis over some of its results.

    Attributes:
        hypothesis: its id.
        where: the settings that the tested pairs share, `{}` for all of them.
        effect: mean of `a - factor * b` over pairs.
        low, high: its 95 % bootstrap interval.
        n: pairs.
        a, b: mean of the metric on both sides.
        verdict: supported, refuted or open (the interval holds 0, or fewer than two pairs).
        evidence: keys of the trials.
    """

    hypothesis: str
    where: Settings
    effect: float
    low: float
    high: float
    n: int
    a: float
    b: float
    verdict: str
    evidence: tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """A hypothesis with what was found: over everything, per value of its replication setting, and whether it holds."""

    hypothesis: dict[str, Any]
    whole: Insight
    parts: tuple[Insight, ...]
    claim: bool


def findings(path: Path) -> list[Finding]:
    """All hypotheses of a JSONL file, tested. Raises UserError when there is no such file."""
    if not path.exists():
        raise UserError(f"there are no results {path}; run opentq lab run first")
    rows = records.read([path])
    trials = list({r["key"]: r for r in rows if r["kind"] == "trial" and "error" not in r}.values())
    return [_finding(h, trials) for h in rows if h["kind"] == "hypothesis"]


def _finding(h: dict[str, Any], trials: Sequence[dict[str, Any]]) -> Finding:
    pairs = _pairs(h, trials)
    whole = _test(h, {}, pairs)
    values = list(dict.fromkeys(json.dumps(a["settings"].get(h["replicate"])) for a, _ in pairs))
    parts = tuple(
        _test(
            h, {h["replicate"]: json.loads(v)}, [p for p in pairs if json.dumps(p[0]["settings"][h["replicate"]]) == v]
        )
        for v in values
    )
    agree = [p for p in parts if p.verdict == whole.verdict]
    return Finding(h, whole, parts, whole.verdict != OPEN and len(agree) >= 2 and len(agree) == len(parts))


def _pairs(h: dict[str, Any], trials: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Trials of side a with the trial of side b that has the same settings otherwise."""
    told = {*h["a"], *h["b"]}

    def side(wanted: Settings) -> dict[str, dict[str, Any]]:
        every = {**h["where"], **wanted}
        rows = [t for t in trials if h["metric"] in t["result"] and matches(t["settings"], every)]
        return {json.dumps({k: v for k, v in t["settings"].items() if k not in told}, sort_keys=True): t for t in rows}

    left = side(h["a"])
    if h["than"] is not None:
        bar = {"result": {h["metric"]: h["than"]}, "key": f"the number {h['than']:g}"}
        return [(t, bar) for t in left.values()]
    right = side(h["b"])
    return [(left[k], right[k]) for k in left if k in right]


def matches(settings: Settings, wanted: Settings) -> bool:
    """Whether settings have all the wanted values; a list means one of them."""
    return all(settings.get(k) in v if isinstance(v, list) else settings.get(k) == v for k, v in wanted.items())


def _test(h: dict[str, Any], where: Settings, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> Insight:
    sides = np.array([[p["result"][h["metric"]] for p in pair] for pair in pairs], float).reshape(-1, 2)
    evidence = tuple(dict.fromkeys(t["key"] for pair in pairs for t in pair))
    if not len(sides):
        return Insight(h["id"], where, 0.0, 0.0, 0.0, 0, 0.0, 0.0, OPEN, ())
    differences = sides[:, 0] - h["factor"] * sides[:, 1]
    draws = np.random.default_rng(0).choice(differences, (2000, len(differences))).mean(1)
    low, high = (float(x) for x in np.percentile(draws, [2.5, 97.5]))
    sign = 1 if h["relation"] == ">" else -1
    verdict = OPEN
    if len(sides) >= 2 and low * high > 0:
        verdict = SUPPORTED if low * sign > 0 else REFUTED
    a, b = (float(x) for x in sides.mean(0))
    return Insight(h["id"], where, float(differences.mean()), low, high, len(sides), a, b, verdict, evidence)


# ---- full-text search


def index(path: Path, database: Path) -> None:
    """Write the record of a JSONL file into a fresh SQLite file with a full-text table and links."""
    database.unlink(missing_ok=True)
    with sqlite3.connect(database) as db:
        db.execute("create virtual table entries using fts5(id unindexed, kind, text)")
        db.execute("create table links (source text, target text)")
        for row in records.read([path]) if path.exists() else []:
            if row["kind"] == "trial":
                words = " ".join(f"{k} {v}" for k, v in row["settings"].items())
                db.execute("insert into entries values (?, 'result', ?)", (row["key"], f"{words} {_numbers(row)}"))
        for f in findings(path):
            name = f.hypothesis["id"]
            text = f"{f.hypothesis['says']} {name}"
            db.execute("insert into entries values (?, 'hypothesis', ?)", (f"hypothesis:{name}", text))
            for part in (f.whole, *f.parts):
                own = f"insight:{name}:{json.dumps(part.where)}"
                db.execute("insert into entries values (?, 'insight', ?)", (own, f"{text} {sentence(f, part)}"))
                links = [(own, f"hypothesis:{name}"), *((own, e) for e in part.evidence)]
                db.executemany("insert into links values (?, ?)", links)
            if f.claim:
                own = f"claim:{name}"
                db.execute("insert into entries values (?, 'claim', ?)", (own, f"{text} {sentence(f, f.whole)}"))
                links = [(own, f"insight:{name}:{json.dumps(p.where)}") for p in f.parts]
                db.executemany("insert into links values (?, ?)", links)


def ask(database: Path, question: str, limit: int = 10) -> list[tuple[str, str, str]]:
    """(kind, id, text) of the entries that match a question best; claims and insights before bare results."""
    words = re.findall(r"[\w.]+", question)
    if not words:
        raise UserError("ask something: words that hypotheses or settings contain")
    match = " OR ".join(f'"{w}"' for w in words)
    order = "case kind when 'claim' then 0 when 'insight' then 1 when 'hypothesis' then 2 else 3 end"
    with sqlite3.connect(database) as db:
        query = f"select kind, id, text from entries where entries match ? order by {order}, rank limit ?"
        return list(db.execute(query, (f"text : ({match})", limit)))


def sentence(f: Finding, part: Insight) -> str:
    """`supported: kl_mean 0.31 against 0.02 (difference 0.29, 95 % 0.21 to 0.38, n = 8), model tiny-gemma`."""
    h = f.hypothesis
    if not part.n:
        return f"open: no pairs of trials yet for {h['metric']}"
    factor = f" times {h['factor']:g}" if h["factor"] != 1 else ""
    where = "".join(f", {k} {v}" for k, v in part.where.items())
    return (
        f"{part.verdict}: {h['metric']} {part.a:.4g} against {part.b:.4g}{factor} (difference {part.effect:.3g}, "
        f"95 % {part.low:.3g} to {part.high:.3g}, n = {part.n}){where}"
    )


def _numbers(row: dict[str, Any]) -> str:
    return " ".join(f"{k} {v:.4g}" for k, v in row["result"].items() if isinstance(v, int | float))
