"""Tables of the studies on the real network, SmolLM2-135M-Instruct, from what `docs/studies/real.py` has recorded."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Rows = list[dict[str, Any]]

RIVALS = ("q4_0", "mlx4")
LIMIT = 4.5
"""Bits that the goal allows."""
CODECS = """
mlx8 int8 k8v4:g64 tq6/tq3:nc:center:sink=4 int4 int4:sink=4 int4:center:sink=4 int4:norot mlx4 q4_0 q4_0:norot int4:g64
int4:g64:center:sink=4 tq5/tq3 tq5/tq3:nc tq5/tq3:nc:center tq5/tq3:nc:sink=4 tq5/tq3:nc:center:sink=4
tq5/tq3:nc:center:sink=16 tq5/tq3:nc:center:sink=4:last1=int8 tq5/tq3:nc:center:sink=4:first1=int8
tq5/tq3:nc:center:sink=4:recent=128 tq4:nc tq4:nc:center:sink=4 polar4 tq4/tq3:nc:center:sink=4 int3:g64 tq3 tq3:nc
tq3:nc:center tq3:nc:sink=4 tq3:nc:center:sink=4 tq3:skip=first1 tq3:skip=last1 tq3:out=2 tq4/tq3 tq3/tq4 tq4:haar tq3.5
tq2.5 int2 tq2 tq2:nc:center:sink=4
""".split()  # noqa: SIM905
NEGATIVE = """
qjl qjl2/int4 qjl4/int4:sketch=gauss qjl6/int4 int4:first2=qjl tq3p tq3p:sketch=orth tq3 tq3:nc polar4 int2 tq2 int4
mlx4
""".split()  # noqa: SIM905
RECIPE = Path(__file__).parents[1] / "docs" / "studies" / "smollm2.toml"
TEXTS = {"python-stdlib": "code", "python-reference": "prose"}
NONE = "No record yet: `python docs/studies/real.py --model smollm2` makes them."


def real(rows: Rows, kind: str) -> Rows:
    """The rows of one kind that were measured on SmolLM2, as it is, and in full."""
    found = [r for r in rows if r["settings"]["kind"] == kind and "smollm2" in r["settings"]["model"]["name"].lower()]
    return [r for r in found if "change" not in r["settings"]["model"]]


def key(r: dict[str, Any]) -> tuple[str, int, str]:
    s = r["settings"]
    return TEXTS.get(s["text"]["name"], s["text"]["name"]), s["depth"], s["spec"]


def fidelity(rows: Rows) -> tuple[dict[tuple[str, int, str], dict[str, Any]], list[int]]:
    """Rows by (text, depth, spec), and the depths; a text is the one with most rows of those that have its name."""
    kept = deepest(real(rows, "fidelity"))
    return {key(r): r for r in one_text(kept)}, sorted({r["settings"]["depth"] for r in kept})


def deepest(rows: Rows) -> Rows:
    """The rows of the protocol with most depths, which is the study's; of more than one."""
    most = max((len(r["settings"]["protocol"]["depths"]) for r in rows), default=0)
    return [r for r in rows if len(r["settings"]["protocol"]["depths"]) == most > 1]


def one_text(rows: Rows) -> Rows:
    """Of texts with one name (another Python's library is another text) that with most rows, of `native` first."""

    def text(r: dict[str, Any]) -> tuple[str, str]:
        return r["settings"]["text"]["name"], r["settings"]["text"].get("digest", "")

    whole, native = Counter(map(text, rows)), Counter(text(r) for r in rows if r["settings"]["spec"] == "native")
    chosen = dict(sorted(whole, key=lambda t: (native[t], whole[t])))
    return [r for r in rows if text(r)[1] == chosen[text(r)[0]]]


def footer(rows: Rows) -> str:
    """Where and when, for the line under a table."""
    last, devices = rows[-1], Counter(r["device"] for r in rows)
    names = " and ".join(name for name, _ in devices.most_common())
    return f"\n\n{names}, mlx {last['versions']['mlx']}, {last['date'][:10]}."


def short(x: float) -> str:
    return f"{x:.1e}" if x < 0.001 else f"{x:.4f}" if x < 0.1 else f"{x:.2f}"


def divergences(rows: Rows, specs: Sequence[str], markdown: Callable[..., str]) -> str:
    """KL of each spec on code and prose at every depth."""
    found, depths = fidelity(rows)
    if not found:
        return NONE
    body, shown = [], []
    for spec in specs:
        cells = [found.get((text, depth, spec)) for text in TEXTS.values() for depth in depths]
        shown += [c for c in cells if c]
        if any(cells):
            bits = next(c for c in cells if c)["bits"]
            body.append([label(spec), f"{bits:.3g}", *(short(c["kl_mean"][0]) if c else "" for c in cells)])
    heads = [f"{text} @{depth}" for text in TEXTS.values() for depth in depths]
    return markdown(["spec", "bits", *heads], body) + footer(shown)


def command(rows: Rows, markdown: Callable[..., str]) -> str:
    """What `opentq eval fidelity smollm2` measures in its default protocol, with the intervals that it prints."""
    kept = [r for r in real(rows, "fidelity") if r["settings"]["protocol"]["depths"] == [512, 2048, 4096]]
    if not kept:
        return "No record yet."
    found = {(r["settings"]["spec"], r["settings"]["depth"]): r for r in kept}
    body = []
    for spec in dict.fromkeys(spec for spec, _ in found):
        cells = [found.get((spec, depth)) for depth in (512, 2048, 4096)]
        kls = ["{} [{}, {}]".format(*map(short, c["kl_mean"])) if c else "" for c in cells]
        body.append([f"`{spec}`", f"{next(c for c in cells if c)['bits']:.3g}", *kls])
    return markdown(["spec", "bits", "KL @512", "KL @2048", "KL @4096"], body) + footer(kept)


def headline(rows: Rows, markdown: Callable[..., str]) -> str:
    """What README says of the real network: a few caches after the most tokens."""
    found, depths = fidelity(rows)
    names = {"mlx4": "mlx-lm `--kv-bits 4`", "q4_0": "llama.cpp's q4_0, rotated"}
    body, shown = [], []
    for spec in ("mlx4", "q4_0", "int4", "tq5/tq3:nc:center:sink=4"):
        cells = [found[text, depths[-1], spec] for text in TEXTS.values()]
        shown += cells
        body.append([names.get(spec, f"opentq `{spec}`"), f"{cells[0]['bits']:.3g}"])
        body[-1] += [f"{short(c['kl_mean'][0])} ({100 * c['top1'][0]:.1f} %)" for c in cells]
    heads = [f"{text}: KL to fp16 (same top token)" for text in TEXTS.values()]
    return markdown([f"SmolLM2-135M after {depths[-1]:,} tokens", "bits", *heads], body) + footer(shown)


def ratio(a: dict[str, Any], b: dict[str, Any]) -> tuple[float, float, float]:
    """KL of `a` over that of `b` on the same tokens, with the interval of a bootstrap over pairs of blocks."""
    x, y = np.array(a["kl_blocks"]), np.array(b["kl_blocks"])
    picks = np.random.RandomState(0).randint(0, len(x), (2000, len(x)))
    low, high = np.percentile(x[picks].mean(1) / y[picks].mean(1), [2.5, 97.5])
    return x.mean() / y.mean(), low, high


def held(row: dict[str, Any]) -> float:
    """Bits per value with the first and the newest tokens that a spec keeps in fp16 whatever the length."""
    spec, depth = row["settings"]["spec"], row["settings"]["depth"]
    tokens = sum(int(n) for n in re.findall(r":(?:sink|recent)=(\d+)", spec)) / len(spec.split("|"))
    return row["bits"] + (16 - row["bits"]) * min(1.0, tokens / depth)


def label(spec: str) -> str:
    """A spec as tables show it; of a recipe how many layers have which, or how many kinds there are."""
    layers = Counter(spec.split("|"))
    if len(layers) > 4:
        return f"a recipe of {len(layers)} specs"
    return f"`{spec}`" if len(layers) == 1 else " + ".join(f"{n} x `{layer}`" for layer, n in layers.most_common())


def best(found: dict[tuple[str, int, str], dict[str, Any]], cells: Sequence[tuple[str, int]]) -> str:
    """The spec of at most `LIMIT` bits with the least divergence (geometric mean) over `cells`; "" without one.

    Recipes, which have a spec for every layer, are left out.
    """
    specs = {spec for *_, spec in found if "|" not in spec and not spec.startswith((*RIVALS, "mlx", "native"))}
    whole = [s for s in specs if all((*cell, s) in found and held(found[(*cell, s)]) <= LIMIT for cell in cells)]
    return min(whole, key=lambda s: np.mean([np.log(found[(*c, s)]["kl_mean"][0]) for c in cells]), default="")


def goal(rows: Rows, markdown: Callable[..., str]) -> str:
    """The best spec of at most 4.5 bits at every depth against its rivals, in pairs."""
    found, depths = fidelity(rows)
    asked = [(t, d) for t in TEXTS.values() for d in depths if all((t, d, rival) in found for rival in RIVALS)]
    own = {text: cells for text, cells in texts(rows).items() if text in TEXTS.values()}
    return beside(own, best(found, asked) if asked else "", markdown)


def tuned(rows: Rows, markdown: Callable[..., str]) -> str:
    """The recipe of docs/studies/smollm2.toml against the same rivals, on every text."""
    return beside(texts(rows), "|".join(tomllib.loads(RECIPE.read_text())["layers"]), markdown)


def texts(rows: Rows) -> dict[str, dict[tuple[int, str], dict[str, Any]]]:
    """Rows of the study's protocol by text, which may be another of the name, and by (depth, spec)."""
    whole = deepest(real(rows, "fidelity"))
    first = set(map(id, one_text(whole)))
    found: dict[str, dict[tuple[int, str], dict[str, Any]]] = {}
    for r in sorted(whole, key=lambda r: id(r) not in first):
        text, at, spec = key(r)
        found.setdefault(text if id(r) in first else f"other {text}", {})[at, spec] = r
    return found


def beside(found: dict[str, dict[tuple[int, str], dict[str, Any]]], spec: str, markdown: Callable[..., str]) -> str:
    """A spec and its rivals at every depth of every text, with the ratios in pairs."""
    body, shown = [], []
    for text, cells in found.items():
        for depth in sorted({at for at, _ in cells}):
            three = [cells.get((depth, name)) for name in (spec, *RIVALS)]
            if not all(three):
                continue
            shown += three
            own, *others = three
            ratios = ["{:.3f} [{:.3f}, {:.3f}]".format(*ratio(own, other)) for other in others]
            kls = ["{} [{}, {}]".format(*map(short, c["kl_mean"])) for c in three]
            body.append([f"{text}, {depth:,} tokens", *kls, *ratios])
    if not body:
        return NONE
    head = [f"{label(spec)}, {shown[0]['bits']:.3g} bits", "`q4_0` rotated, 4.5", "mlx-lm `--kv-bits 4`, 4.5"]
    return markdown(["", *head, "to q4_0", "to mlx-lm"], body) + footer(shown)


def recipes(rows: Rows, markdown: Callable[..., str]) -> str:
    """What other bits in some layers give: mean KL on every text, and the largest ratio to q4_0 at a depth."""
    found = texts(rows)
    whole = [r for cells in found.values() for r in cells.values()]
    bits = {r["settings"]["spec"]: r["bits"] for r in whole}
    plain = ("q4_0", "tq4/tq3:nc:center:sink=4", "tq5/tq3:nc:center:sink=4", "tq5/tq4:nc:center:sink=4")
    body = []
    for spec in sorted((s for s in bits if s in plain or re.search(r"\||(first|last)9", s)), key=bits.__getitem__):
        row = []
        for cells in found.values():
            kl = {depth: r["kl_mean"][0] for (depth, name), r in cells.items() if name == spec}
            mean = short(float(np.exp(np.mean(np.log(list(kl.values())))))) if kl else ""
            row.append(mean and f"{mean} ({max(x / cells[d, 'q4_0']['kl_mean'][0] for d, x in kl.items()):.2f})")
        body.append([label(spec), f"{bits[spec]:.3g}", *row])
    return markdown(["spec", "bits", *found], body) + footer(whole) if body else NONE


def needles(rows: Rows, markdown: Callable[..., str]) -> str:
    kept = one_text([r for r in real(rows, "needle") if r["settings"]["trials"] > 1])
    lengths = sorted({r["settings"]["length"] for r in kept})
    body = []
    for spec in dict.fromkeys(r["settings"]["spec"] for r in kept):
        own = [r for r in kept if r["settings"]["spec"] == spec]
        cells = []
        for length in lengths:
            at = [r for r in own if r["settings"]["length"] == length]
            cells.append(f"{sum(r['correct'] for r in at)} of {sum(r['settings']['trials'] for r in at)}")
        body.append([f"`{spec}`", f"{own[0]['bits']:.3g}", *cells])
    return markdown(["spec", "bits", *(f"{n:,} tokens" for n in lengths)], body) + footer(kept) if body else NONE


def use(rows: Rows, markdown: Callable[..., str]) -> str:
    kept = [r for r in real(rows, "use") if r["settings"]["task"]["prompts"] >= 100]
    body = [
        [
            f"`{r['settings']['spec']}`",
            f"{r['bits']:.3g}",
            percent(r["equal"]),
            percent(r["share_before_divergence"]),
            "-" if r["diverged_at_median"] is None else f"{r['diverged_at_median']:g}",
        ]
        for r in sorted(kept, key=lambda r: -r["equal"][0])
    ]
    head = ["spec", "bits", "equal answers, %", "of an answer before the first difference, %", "median token of it"]
    return markdown(head, body) + footer(kept) if body else NONE


def tasks(rows: Rows, markdown: Callable[..., str]) -> str:
    kept = [r for r in real(rows, "tasks") if r["settings"]["task"]["questions"] >= 100]
    body = []
    for r in kept:
        kinds = [f"{100 * r[k][0]:.1f}" for k in ("read", "known")]
        pair = ["", "", ""]
        if "difference" in r:
            value, low, high = (100 * x for x in r["difference"])
            pair = [f"{value:+.1f} [{low:+.1f}, {high:+.1f}]", f"{r['lost']} / {r['won']}", f"{r['mcnemar_p']:.2g}"]
        body.append([f"`{r['settings']['spec']}`", f"{r['bits']:.3g}", percent(r["accuracy"]), *kinds, *pair])
    head = ["spec", "bits", "right, %", "read, %", "known, %", "points to fp16", "lost / won", "McNemar p"]
    return markdown(head, body) + footer(kept) if body else NONE


def percent(triple: Sequence[float]) -> str:
    return "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in triple))


def depth(rows: Rows, markdown: Callable[..., str]) -> str:
    """How far outputs agree in one layer, and what has piled up at the last."""
    kept = [r for r in real(rows, "layers") if r["settings"]["view"]["context"] > 1000]
    body = []
    for spec in dict.fromkeys(r["settings"]["spec"] for r in kept):
        by = {r["settings"]["layer"]: r for r in kept if r["settings"]["spec"] == spec}
        local = sum(r["output_cosine"] for r in by.values()) / len(by)
        worst = max(by.values(), key=lambda r: r["query_error"])
        body.append(
            [
                f"`{spec}`",
                str(len(by)),
                f"{local:.4f}",
                f"{local ** len(by):.2g}",
                f"{by[max(by)]['query_cosine']:.4f}",
                f"{worst['query_error']:.3f} (layer {worst['settings']['layer']})",
            ]
        )
    head = [
        "spec",
        "layers",
        "output cosine of one layer",
        "to the power of the layers",
        "query cosine at the last layer",
    ]
    return markdown([*head, "largest query error"], body) if body else NONE


def scale(rows: Rows, markdown: Callable[..., str]) -> str:
    """Attention scale and query gain, as in the table of the small network."""
    changed = [r for r in rows if "smollm2" in r["settings"]["model"]["name"].lower()]
    changed = [r for r in changed if (r["settings"].get("view") or {"context": 1024})["context"] == 1024]
    probes = [r for r in changed if r["settings"]["kind"] == "layers"]
    body = []
    for r in changed:
        s = r["settings"]
        own = [p for p in probes if p["settings"]["model"] == s["model"] and p["settings"]["spec"] == s["spec"]]
        if s["kind"] != "fidelity" or s["depth"] != 1024 or not own:
            continue
        variance, attention = (sum(p[k] for p in own) / len(own) for k in ("logit_error_var", "attention_kl"))
        kl = "{:.2e} [{:.1e}, {:.1e}]".format(*r["kl_mean"])
        cells = [f"{s['model']['alpha']:g}", s["spec"], f"{variance:.2e}", f"{attention:.2e}", kl]
        body.append([s["model"]["change"], *cells])
    body.sort(key=lambda row: row[2])
    head = ["change", "scale x", "spec", "variance of logit error", "KL of attention", "KL of predictions, 95 %"]
    return markdown(head, body) if body else NONE


def cpu(rows: Rows, markdown: Callable[..., str]) -> str:
    """`opentq bench model --against llama.cpp`: tokens per second at depth."""
    if not rows:
        return "No record yet: `opentq bench model smollm2 --against llama.cpp` makes them."
    found = {(r["kv"], r["test"], r["depth"]): r for r in rows if r["tokens_per_s"]}
    columns = sorted({(test, at) for _, test, at in found})
    body = []
    for kv in dict.fromkeys(name for name, *_ in found):
        cells = [found.get((kv, *column)) for column in columns]
        label = "mlx-lm, float32" if kv in ("f16", "native") else kv if kv.startswith("llama.cpp") else f"opentq `{kv}`"
        body.append([label, *(f"{c['tokens_per_s']:.1f}" if c else "" for c in cells)])
    last = rows[-1]
    text = markdown(["tokens/s, SmolLM2-135M Q4_1", *(f"{test} @{at:,}" for test, at in columns)], body)
    return f"{text}\n\n{last['device']}, {last['threads']} threads, {last['date'][:10]}; `{last['command']}`."
