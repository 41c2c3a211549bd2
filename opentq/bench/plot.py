"""Charts as PNG and SVG files, by matplotlib (extra `plot`)."""

from __future__ import annotations

from pathlib import Path

from ..plots import pyplot
from .chart import Chart
from .svg import Axis, short


def save(chart: Chart, path: Path) -> Path:
    """Draw `chart` into `path`. Raises UserError without matplotlib."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for i, series in enumerate(chart.series):
        style = ("-", "--", ":")[i // 10 % 3]  # matplotlib has ten colours
        (line,) = axes.plot(*zip(*series.line), style, marker="o", markersize=4, label=series.label)
        axes.plot(*zip(*series.points), "o", markersize=2.5, color=line.get_color())
    if chart.limit:
        axes.axhline(chart.limit[0], linestyle="--", color="tab:red", linewidth=1, label=chart.limit[1])
    if chart.log_x:
        axes.set_xscale("log", base=2)
        ticks = Axis([x for s in chart.series for x, _ in s.points], (0, 1), True).ticks(powers_of_two=True)
        axes.set_xticks(ticks, [short(t) for t in ticks])
    axes.set_yscale("log" if chart.log_y else "linear")
    if not chart.log_y:
        axes.set_ylim(0)
    axes.set(xlabel=chart.x, ylabel=chart.y, title=chart.title)
    axes.title.set_fontsize(8)
    axes.grid(alpha=0.3)
    figure.legend(handlelength=3.2, loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=160)
    plt.close(figure)
    return path
