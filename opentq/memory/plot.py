"""Memory against context, one line per KV spec, the machine's limit as a dashed line. Needs the extra `plot`."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from ..plots import pyplot
from .device import GIB
from .forecast import Forecast, short

FORMATS = (".png", ".svg", ".pdf")


def draw(forecast: Forecast, path: Path) -> None:
    """Write the plot of `forecast` to `path`. Raises UserError without matplotlib or for another kind of file."""
    if path.suffix not in FORMATS:
        raise UserError(f"--plot {path}: the name must end in {', '.join(FORMATS)}")
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for spec in dict.fromkeys(row.spec for row in forecast.rows):
        points = sorted((r.estimate.tokens, r.estimate.total / GIB) for r in forecast.rows if r.spec == spec)
        axes.plot(*zip(*points), marker="o", label=spec)
    limits = {forecast.device.usable: "usable as it comes", forecast.device.ceiling: "with the wired limit raised"}
    for limit, words in limits.items():
        axes.axhline(limit / GIB, linestyle="--", color="tab:red", linewidth=1)
        axes.annotate(words, (0.01, limit / GIB), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
    ticks = sorted({r.estimate.tokens for r in forecast.rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [short(t) for t in ticks])
    axes.set_ylim(0)
    axes.set(
        xlabel="context, tokens", ylabel="memory, GiB", title=f"{forecast.skeleton.name} on {forecast.device.name}"
    )
    axes.legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)
