"""Tables and pictures of the studies, from the records in results/*.jsonl.

    python docs/studies/draw.py

Prints the tables in Markdown and writes the PNGs beside this file. Needs matplotlib (`pip install 'opentq[plot]'`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from opentq.evaluate.plot import heat_map
from opentq.evaluate.show import table
from opentq.plots import pyplot
from opentq.records import Record, Records

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "results"
MODELS = ("tiny-llama", "tiny-gemma", "tiny-qwen")


def lines(
    series: dict[str, tuple[Sequence[float], Sequence[float]]],
    path: Path,
    xlabel: str,
    ylabel: str,
    log_x: bool = False,
    log_y: bool = False,
    title: str = "",
    labels: dict[str, list[str]] | None = None,
    points: bool = False,
) -> None:
    """One line (or cloud of points) per name; `labels` writes a word at each point of a series."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 4.6))
    for name, (x, y) in series.items():
        axis.plot(x, y, "o" if points else "o-", label=name, markersize=4, linewidth=1.2)
        for word, a, b in zip((labels or {}).get(name, []), x, y):
            axis.annotate(word, (a, b), textcoords="offset points", xytext=(4, 3), fontsize=7)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    if log_x:
        axis.set_xscale("log")
    if log_y:
        axis.set_yscale("log")
    axis.set_title(title, fontsize=10)
    axis.grid(True, alpha=0.3)
    if len(series) > 1:
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def of(name: str, kind: str = "") -> list[Record]:
    """The records of one file (of one kind, where it holds several)."""
    return [r for r in Records(RESULTS / f"{name}.jsonl").all if not kind or r["settings"]["kind"] == kind]


def mean(rows: list[Record], key: str) -> float:
    return sum(r[key][0] if isinstance(r[key], list) else r[key] for r in rows) / len(rows)


def codecs() -> None:
    """One table per model, sorted by size, and the front of bits against divergence."""
    for model in MODELS:
        rows: dict[str, list[Record]] = {}
        for r in of("fidelity"):
            if r["settings"]["model"]["name"] == model and r["settings"]["spec"] not in ("native", "f16"):
                rows.setdefault(r["settings"]["spec"], []).append(r)
        cells = []
        for spec, found in sorted(rows.items(), key=lambda item: (item[1][0]["bits"], mean(item[1], "kl_mean"))):
            found.sort(key=lambda r: r["settings"]["depth"])
            kls = [f"{r['kl_mean'][0]:.1e} [{r['kl_mean'][1]:.0e}, {r['kl_mean'][2]:.0e}]" for r in found]
            shares = [f"{100 * r['top1'][0]:.1f}" for r in found]
            cells.append([spec, f"{found[0]['bits']:.3g}", *kls, f"{found[-1]['kl_p99'][0]:.2g}", *shares])
        print(f"\n### {model}\n")
        head = ["spec", "bits", "KL @1024", "KL @4096", "99 % @4096", "top-1 % @1024", "top-1 % @4096"]
        print(table(head, [c for c in cells if len(c) == len(head)], "md"))
        kinds = {"codebook (tq)": [], "integer": [], "rivals": [], "sketch, polar": [], "centred": []}
        for spec, found in rows.items():
            kinds[_kind(spec)].append((found[0]["bits"], mean(found, "kl_mean"), spec))
        series = {k: ([p[0] for p in v], [p[1] for p in v]) for k, v in kinds.items() if v}
        words = {k: [p[2] for p in v] for k, v in kinds.items() if v}
        lines(
            series, HERE / f"codecs-{model}.png", "bits per value, metadata included", "mean KL to the fp16 cache",
            log_y=True, title=f"{model}, depths 1024 and 4096", labels=words, points=True,
        )  # fmt: skip


def _kind(spec: str) -> str:
    if "center" in spec:
        return "centred"
    if spec.startswith(("mlx", "q4_0")):
        return "rivals"
    if "qjl" in spec or "p/" in spec or spec.startswith("polar"):
        return "sketch, polar"
    return "codebook (tq)" if "tq" in spec else "integer"


def constructed() -> None:
    """Attention divergence against half the variance of the logit error, and a table of the codecs that matter."""
    records = of("constructed")
    series: dict[str, tuple[list[float], list[float]]] = {}
    for r in records:
        x, y = series.setdefault(r["settings"]["keys"], ([], []))
        x.append(r["logit_error_var"] / 2)
        y.append(r["attention_kl"])
    series["equal"] = ([1e-7, 10], [1e-7, 10])
    labels = "half the variance of the logit error", "KL of attention weights"
    lines(series, HERE / "variance.png", *labels, log_x=True, log_y=True, points=True)
    kinds = ("gaussian", "outliers", "offset outliers")
    by = {(r["settings"]["spec"], r["settings"]["keys"]): r for r in records}
    specs = sorted({s for s, _ in by if s != "f16"}, key=lambda s: by[s, "gaussian"]["bits"])
    rows = [[s, f"{by[s, kinds[0]]['bits']:.4g}"] + [f"{by[s, k]['key_cosine']:.4f} / {by[s, k]['attention_kl']:.2g}" for k in kinds] for s in specs]  # fmt: skip # noqa: E501
    print("\n### Constructed keys: key cosine / KL of attention\n")
    print(table(["spec", "bits", *kinds], rows, "md"))


def scale() -> None:
    """Divergence against logit spread, at moved and at fixed attention scale."""
    rows = []
    spread: dict[str, tuple[list[float], list[float]]] = {}
    for r in of("scale", "fidelity"):
        change, spec = r["settings"]["model"], r["settings"]["spec"]
        if change["name"] != "tiny-gemma":
            continue
        probes = [
            p for p in of("scale", "layers") if p["settings"]["model"] == change and p["settings"]["spec"] == spec
        ]
        deviation, variance = mean(probes, "logit_std"), mean(probes, "logit_error_var")
        rows.append([change["change"], f"{change['alpha']:g}", spec, f"{deviation:.2f}", f"{variance:.2e}", f"{mean(probes, 'attention_kl'):.2e}", f"{r['kl_mean'][0]:.2e} [{r['kl_mean'][1]:.1e}, {r['kl_mean'][2]:.1e}]"])  # fmt: skip # noqa: E501
        x, y = spread.setdefault(spec, ([], []))
        x.append(variance)
        y.append(r["kl_mean"][0])
    rows.sort(key=lambda row: row[2])
    head = ["change", "scale", "spec", "logit std", "logit error var", "attention KL", "KL of predictions"]
    print("\n### Attention scale and logit spread, tiny-gemma\n")
    print(table(head, rows, "md"))
    ordered = {k: tuple(zip(*sorted(zip(*v)))) for k, v in spread.items()}
    labels = "variance of the logit error (mean over layers)", "mean KL of predictions"
    lines(ordered, HERE / "attn_scale.png", *labels, log_x=True, log_y=True)  # type: ignore[arg-type]


def depth() -> None:
    """Error of what enters attention, per layer."""
    records = of("layers")
    names = sorted({r["settings"]["model"]["name"] for r in records})
    rows = []
    for name in names:
        series: dict[str, tuple[list[float], list[float]]] = {}
        for r in (r for r in records if r["settings"]["model"]["name"] == name):
            x, y = series.setdefault(r["settings"]["spec"], ([], []))
            x.append(r["settings"]["layer"])
            y.append(r["query_error"])
        last = max(r["settings"]["layer"] for r in records if r["settings"]["model"]["name"] == name)
        for spec in series:
            at = {r["settings"]["layer"]: r for r in records if r["settings"]["model"]["name"] == name and r["settings"]["spec"] == spec}  # fmt: skip # noqa: E501
            local = sum(r["output_cosine"] for r in at.values()) / len(at)
            rows.append([name, spec, str(last + 1), f"{local:.4f}", f"{local ** len(at):.1e}", f"{at[last]['query_cosine']:.4f}", f"{at[last]['query_error']:.3f}"])  # fmt: skip # noqa: E501
        lines(series, HERE / f"depth-{name}.png", "layer", "relative error of queries", title=name)
    head = ["network", "spec", "layers", "output cosine of one layer", "its power", "query cosine at the last", "error"]
    print("\n### Depth\n")
    print(table(head, rows, "md"))


def needles() -> None:
    """Heat maps and totals."""
    records = of("needle")
    rows = []
    for model in MODELS:
        own = [r for r in records if r["settings"]["model"]["name"] == model]
        if not own:
            continue
        heat_map(own, HERE / f"needle-{model}.png")
        for spec in dict.fromkeys(r["settings"]["spec"] for r in own):
            cells = [r for r in own if r["settings"]["spec"] == spec]
            asked = sum(r["settings"]["trials"] for r in cells)
            lengths = sorted({r["settings"]["length"] for r in cells})
            shares = ", ".join(
                f"{sum(r['correct'] for r in cells if r['settings']['length'] == n)}"
                f"/{sum(r['settings']['trials'] for r in cells if r['settings']['length'] == n)} at {n}"
                for n in lengths
            )
            rows.append([model, spec, f"{cells[0]['bits']:.3g}", f"{100 * sum(r['correct'] for r in cells) / asked:.1f}", shares])  # fmt: skip # noqa: E501
    print("\n### Needles\n")
    print(table(["model", "spec", "bits", "found, %", "found by length"], rows, "md"))


if __name__ == "__main__":
    for draw in (codecs, constructed, scale, depth, needles):
        draw()
