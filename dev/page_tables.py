"""Tables of docs/studies/pages.md and calibration.md, from what `pages.py` and `calibration.py` there have recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from study_tables import Rows, footer, ratio, short

TEXTS = {"python-stdlib": "code", "python-reference-1": "prose"}
MAIN = ("oracle", "own: code", "own: prose", "own: prompt", "quest", "mean key")
BUDGETS = (512, 1024, 2048)
NONE = "No record yet: `python docs/studies/{}.py --model smollm2` makes them."
FREE = ":nc:center:sink=4"
Markdown = Callable[..., str]
Found = dict[tuple[Any, ...], dict[str, Any]]


def kind(rows: Rows, name: str, *keys: str) -> Found:
    """Rows of one kind on SmolLM2 by text and `keys` of their settings."""
    found = {}
    for r in rows:
        s = r["settings"]
        if s["kind"] == name and "smollm2" in s["model"]["name"].lower() and all(k in s for k in keys):
            found[(TEXTS.get(s["text"]["name"], s["text"]["name"]), *(s[k] for k in keys))] = r
    return found


def table(head: list[str], body: list[list[str]], rows: Found, markdown: Markdown, study: str = "pages") -> str:
    return markdown(head, body) + footer(list(rows.values())) if body else NONE.format(study)


def cells(found: Found, name: str, columns: list[tuple[Any, ...]], value: Callable[[dict], str]) -> list[str]:
    """One row: `name`'s values where the columns are (text, what follows the rule ...)."""
    return [value(found[key]) if (key := (text, name, *rest)) in found else "" for text, *rest in columns]


def missed(rows: Rows, markdown: Markdown) -> str:
    """The share of the softmax that is not read, by rule and budget, in pages of 64."""
    found = kind(rows, "pages-rules", "rule", "page", "budget")
    columns = [(text, 64, budget) for text in TEXTS.values() for budget in BUDGETS]
    names = dict.fromkeys(n for _, n, page, _ in found if page == 64 and not ("pairs" in n and "prose" in n))
    body = [[f"`{n}`", *cells(found, n, columns, lambda r: f"{r['missed']:.3f}")] for n in names]
    return table(["rule", *(f"{t}, {b:,}" for t, _, b in columns)], body, found, markdown)


def sizes(rows: Rows, markdown: Markdown) -> str:
    """The same by size of page at 1,024 tokens, and the divergence."""
    found, kl = (kind(rows, f"pages-{k}", "rule", "page", "budget") for k in ("rules", "fidelity"))
    columns = [(text, page, 1024) for text in TEXTS.values() for page in (16, 32, 64, 128)]
    body = []
    for n in MAIN[:-1]:
        body.append([f"`{n}`, missed", *cells(found, n, columns, lambda r: f"{r['missed']:.3f}")])
        body.append([f"`{n}`, KL", *cells(kl, n, columns, lambda r: short(r["kl_mean"][0]))])
    return table(["rule", *(f"{t}, {p}" for t, p, _ in columns)], body if found else [], found, markdown)


def divergence(rows: Rows, markdown: Markdown) -> str:
    """KL at the end of a long text by rule and budget, and its ratio to the oracle's at 1,024."""
    found = kind(rows, "pages-fidelity", "rule", "page", "budget")
    columns = [(text, 64, budget) for text in TEXTS.values() for budget in BUDGETS]
    body = []
    for n in dict.fromkeys(name for _, name, page, _ in found if page == 64):
        row = cells(found, n, columns, lambda r: short(r["kl_mean"][0]))
        pairs = [(found.get((t, n, 64, 1024)), found.get((t, "oracle", 64, 1024))) for t in TEXTS.values()]
        row += ["{:.2f} [{:.2f}, {:.2f}]".format(*ratio(a, b)) if a and b else "" for a, b in pairs]
        body.append([f"`{n}`", *row])
    head = [*(f"{t}, {b:,}" for t, _, b in columns), *(f"{t}: to the oracle" for t in TEXTS.values())]
    return table(["rule", *head], body, found, markdown)


def caches(rows: Rows, markdown: Markdown) -> str:
    """The same through the caches, token by token, and needles there."""
    found, asked = kind(rows, "pages-caches", "spec"), kind(rows, "pages-cache-needle", "spec")
    body = []
    for n in dict.fromkeys(name for _, name in found):
        row = cells(found, n, [(t,) for t in TEXTS.values()], lambda r: "{} [{}, {}]".format(*map(short, r["kl_mean"])))
        needle = asked.get(("code", n))
        right = f"{needle['correct']} of {needle['settings']['trials']}" if needle else ""
        size = next(r["cache_bytes"] for (_, name), r in found.items() if name == n)
        body.append([f"`{n}`", *row, f"{size / 1e6:.1f}", right])
    return table(["cache, calibrated on", "code", "prose", "MB", "facts, 1 of 4"], body, found, markdown)


def needles(rows: Rows, markdown: Markdown) -> str:
    """Facts found at a budget of 1,024, by rule."""
    found = kind(rows, "pages-needle", "facts", "length", "rule")
    columns = list(dict.fromkeys(key[1:3] for key in found))
    body = []
    for n in dict.fromkeys(key[3] for key in found):
        row = [found.get(("code", *c, n)) for c in columns]
        body.append(
            [f"`{n}`", *(str(r["correct"]) if r else "" for r in row), str(sum(r["correct"] for r in row if r))]
        )
    if not body:
        return NONE.format("pages")
    trials = next(iter(found.values()))["settings"]["trials"]
    head = [f"of {trials}", *(f"{facts}, {length:,}" for facts, length in columns), "all"]
    return table(head, body, found, markdown)


def heads(rows: Rows, markdown: Markdown) -> str:
    """The heads for which sketches miss most beyond the oracle, and what goes with it."""
    found = kind(rows, "pages-rules", "rule", "page", "budget")
    done = kind(rows, "pages-rules", "done")
    if not done:
        return NONE.format("pages")
    excess, oracle = [], []
    for text, _ in done:
        own, best = (np.array(found[text, n, 64, 1024]["by_head"]) for n in ("own: code", "oracle"))
        excess.append(own - best)
        oracle.append(best)
    gap, lost = np.mean(excess, axis=0), np.mean(oracle, axis=0)
    spread, energy = (np.mean([np.array(r[k]) for r in done.values()], axis=0) for k in ("spread", "energy"))
    order = np.argsort(-gap, axis=None)
    body = []
    for flat in order[:8]:
        at = np.unravel_index(flat, gap.shape)
        values = (f"{lost[at]:.3f}", f"{lost[at] + gap[at]:.3f}", f"{spread[at]:.0f}", f"{100 * energy[at]:.0f}")
        body.append([f"layer {at[0]}, head {at[1]}", *values])
    for title, some in (("the worst tenth", order[: gap.size // 10]), ("all", order)):
        mean = [a.reshape(-1)[some].mean() for a in (lost, lost + gap, spread, 100 * energy)]
        body.append([title, f"{mean[0]:.3f}", f"{mean[1]:.3f}", f"{mean[2]:.0f}", f"{mean[3]:.0f}"])
    share = gap.reshape(-1)[order[: gap.size // 10]].sum() / gap.sum()
    links = [np.corrcoef(gap.reshape(-1), a.reshape(-1))[0, 1] for a in (spread, energy, lost)]
    head = ["KV head", "missed by the oracle", "by sketches", "pages looked at", "energy in the sketch, %"]
    note = (
        f"\n\nThe worst tenth of the heads has {100 * share:.0f} % of what sketches miss beyond the oracle. It goes"
        f" with the pages looked at by {links[0]:.2f}, the energy in the sketch by {links[1]:.2f}, and what the oracle"
        f" misses by {links[2]:.2f} (correlation)."
    )
    return table(head, body, done, markdown) + note


def bits(rows: Rows, markdown: Markdown) -> str:
    """Divergence of every spec and codec, and the bits that it saves beside the front of uniform specs."""
    found = kind(rows, "calibration", "spec")
    body = []
    for n in dict.fromkeys(name for _, name in found):
        texts = [t for t in TEXTS.values() if (t, n) in found]
        size, saved = found[texts[0], n]["bits"], ""
        if not n.endswith(FREE):
            uniform = {u: found[texts[0], u]["bits"] for _, u in found if u.endswith(FREE)}
            front = lower([(level(found, u, texts), size) for u, size in uniform.items()])
            saved = f"{needed(front, level(found, n, texts)) - size:+.2f}"
        ks = [f"{np.exp(level(found, n, [t])):.4f}" if t in texts else "" for t in TEXTS.values()]
        body.append([f"`{n}`", f"{size:.2f}", *ks, saved])
    return table(["spec: keys / values", "bits", "code", "prose", "bits saved"], body, found, markdown, "calibration")


def level(found: Found, name: str, texts: list[str]) -> float:
    """Mean log KL over texts and depths."""
    return float(np.mean([np.log(k[0]) for t in texts for k in found[t, name]["kl"]]))


Point = tuple[float, float]


def lower(points: list[Point]) -> list[Point]:
    """The lower convex hull of (log KL, bits), by rising KL: mixtures of two specs reach what lies on its lines."""
    hull: list[Point] = []
    for x, y in sorted(points):
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    return hull


def needed(front: list[Point], wanted: float) -> float:
    """Bits at which the front has this log KL: between neighbours, or beyond its ends by their slope."""
    at = min(max(sum(kl < wanted for kl, _ in front), 1), len(front) - 1)
    (x0, y0), (x1, y1) = front[at - 1], front[at]
    return y0 + (y1 - y0) * (wanted - x0) / (x1 - x0)


def speed(rows: Rows, markdown: Markdown) -> str:
    """One layer's attention with and without pages, by context, and what the goals of it came to."""
    found = {(r["device"], *r["shape"], r["context"], "pages=" in r["kv"]): r for r in rows if r["ms"]}
    body = []
    for device, *shape in dict.fromkeys(key[:4] for key in found):
        times = {key[4]: r["ms"] for key, r in found.items() if key[:4] == (device, *shape) and key[5]}
        for context, ms in sorted(times.items()):
            whole = found.get((device, *shape, context, False))
            exact, factor = (f"{whole['ms']:.2f}", f"{whole['ms'] / ms:.1f}") if whole else ("", "")
            growth = f"{ms / times[1 << 17]:.1f}" if 1 << 17 in times else ""
            cells = [f"{context // 1024:,}K", exact, f"{ms:.2f}", factor, growth]
            body.append([f"{device}, {'/'.join(map(str, shape))}", *cells])
    head = ["device, shape", "context", "everything, ms", "by pages, ms", "times as fast", "times that at 128K"]
    return markdown(head, body) + footer(rows) if body else "No record yet."


TABLES = {
    "pages_missed": ("pages", missed),
    "pages_sizes": ("pages", sizes),
    "pages_divergence": ("pages", divergence),
    "pages_caches": ("pages", caches),
    "pages_needles": ("pages", needles),
    "pages_heads": ("pages", heads),
    "pages_speed": ("kernel-pages", speed),
    "calibration_bits": ("calibration", bits),
}
"""By the name of the table: whose records, and what makes it."""
