"""Pictures of records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..plots import pyplot
from ..records import Record
from .show import grouped


def heat_map(records: Sequence[Record], path: Path) -> None:
    """Needle accuracy as one panel per spec, lengths down and depths across."""
    plt = pyplot()
    groups = grouped(records)
    columns = min(4, len(groups))
    rows = -(-len(groups) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.2 * columns, 2.6 * rows), squeeze=False)
    for axis in axes.flat[len(groups) :]:
        axis.axis("off")
    for axis, (spec, group) in zip(axes.flat, groups.items()):
        lengths = sorted({r["settings"]["length"] for r in group})
        depths = sorted({r["settings"]["depth"] for r in group})
        grid = [[float("nan")] * len(depths) for _ in lengths]
        for r in group:
            row, column = lengths.index(r["settings"]["length"]), depths.index(r["settings"]["depth"])
            grid[row][column] = r["accuracy"][0]
            axis.text(column, row, f"{100 * r['accuracy'][0]:.0f}", ha="center", va="center", fontsize=7)
        axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_xticks(range(len(depths)), [f"{100 * d:.0f}" for d in depths], fontsize=7)
        axis.set_yticks(range(len(lengths)), [str(n) for n in lengths], fontsize=7)
        axis.set_title(f"{spec} ({group[0]['bits']:.3g} bits)", fontsize=9)
    axes[-1][0].set_xlabel("depth, %", fontsize=8)
    axes[0][0].set_ylabel("tokens", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
