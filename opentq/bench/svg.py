"""A chart as inline SVG, drawn by hand: no script, no library, and colours that follow the page's light or dark."""

from __future__ import annotations

import math
from html import escape
from itertools import zip_longest

from .chart import Chart

WIDTH, HEIGHT = 680, 380
LEFT, RIGHT, TOP, BOTTOM = 62, 170, 34, 46
COLOURS = 8
"""`--c0` to `--c7` of the page's style sheet."""
DASHES = ("none", "7 4", "2 3")
"""What tells series of one colour apart."""
ROW = 18
"""Height of a line of the key."""


class Axis:
    """Data values to pixels, linear or logarithmic, and where its ticks are."""

    def __init__(self, values: list[float], pixels: tuple[float, float], log: bool):
        self.log = log and min(values) > 0
        self.pixels = pixels
        if self.log:
            self.low, self.high = math.log10(min(values)), math.log10(max(values))
            if self.low == self.high:
                self.low, self.high = self.low - 0.5, self.high + 0.5
        else:
            self.low, self.high = min(0.0, *values), max(values) * 1.05 or 1.0

    def at(self, value: float) -> float:
        place = math.log10(value) if self.log else value
        start, end = self.pixels
        return start + (place - self.low) / (self.high - self.low) * (end - start)

    def ticks(self, powers_of_two: bool = False) -> list[float]:
        if not self.log:
            step = 10 ** math.floor(math.log10((self.high - self.low) / 2))
            step *= next(m for m in (1, 2, 5, 10) if (self.high - self.low) / (step * m) <= 6)
            first = math.ceil(self.low / step)
            return [step * i for i in range(first, math.floor(self.high / step) + 1)]
        if powers_of_two:
            exponents = range(
                math.ceil(self.low / math.log10(2) - 1e-9), math.floor(self.high / math.log10(2) + 1e-9) + 1
            )
            found = [2.0**e for e in exponents]
            return found[:: max(1, -(-len(found) // 8))]
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        found = [m * 10.0**d for d in decades for m in (1, 2, 5)]
        return [t for t in found if self.low - 1e-9 <= math.log10(t) <= self.high + 1e-9]


def draw(chart: Chart) -> str:
    """The chart as one `<svg>` element. Its style classes are those of report.css."""
    points = [p for s in chart.series for p in s.points]
    if not points:
        return "<p>no points</p>"
    height = max(HEIGHT, TOP + ROW * (len(chart.series) + 1))
    extra = [chart.limit[0]] if chart.limit else []
    x = Axis([p[0] for p in points], (LEFT, WIDTH - RIGHT), chart.log_x)
    y = Axis([p[1] for p in points] + extra, (height - BOTTOM, TOP), chart.log_y)
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(chart.title)}: {escape(chart.y)}">']
    parts.append(f'<text class="y" x="{LEFT}" y="{TOP - 14}">{escape(chart.y)}</text>')
    for tick in x.ticks(powers_of_two=True):
        at = x.at(tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{height - BOTTOM + 18}">{short(tick)}</text>')
    for tick in y.ticks():
        at = y.at(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="side" x="{LEFT - 8}" y="{at + 4:.1f}">{short(tick)}</text>')
    parts.append(f'<text class="tick" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{height - 8}">{escape(chart.x)}</text>')
    if chart.limit:
        at = y.at(chart.limit[0])
        parts.append(f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="y" x="{LEFT + 4}" y="{at - 4:.1f}">{escape(chart.limit[1])}</text>')
    for i, series in enumerate(chart.series):
        style, dash = f"c{i % COLOURS}", f'stroke-dasharray="{DASHES[i // COLOURS % len(DASHES)]}"'
        path = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in series.line)
        parts.append(f'<polyline class="line {style}" {dash} points="{path}"/>')
        for (a, b), name in zip_longest(series.points, series.names):
            title = f"<title>{escape(name or series.label)}: {a:g}, {b:.4g}</title>"
            parts.append(f'<circle class="{style}" cx="{x.at(a):.1f}" cy="{y.at(b):.1f}" r="3.5">{title}</circle>')
        labelled = [(p, n) for p, n in zip(series.points, series.names) if p in series.line] if not i else []
        for (a, b), name in labelled:
            parts.append(f'<text class="name" x="{x.at(a) + 5:.1f}" y="{y.at(b) - 5:.1f}">{escape(name)}</text>')
        row, left = TOP + 8 + ROW * i, WIDTH - RIGHT + 12
        parts.append(f'<line class="line {style}" {dash} x1="{left}" x2="{left + 26}" y1="{row}" y2="{row}"/>')
        parts.append(f'<circle class="{style}" cx="{left + 13}" cy="{row}" r="3.5"/>')
        parts.append(f'<text class="key" x="{left + 33}" y="{row + 4}">{escape(series.label)}</text>')
    return "".join([*parts, "</svg>"])


def short(value: float) -> str:
    if value >= 1024 and value % 1024 == 0:
        return f"{value / 1024:g}K"
    return f"{value:g}"
