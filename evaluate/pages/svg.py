"""Draw a chart as inline SVG for an HTML page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from ..charts import (
    CHARACTER_WIDTH,
    COLORS,
    DASHES,
    Chart,
    Series,
    axis_ranges,
    is_drawable,
    marker_of,
    thin_out,
    tick_labels,
    ticks,
)
from .page import templates

CHART_SIZE = (440, 280)  # pixels: about the width of a column of a page, and readable on a phone
SHAPES = {  # the shape of each of matplotlib's markers, as an SVG path around (0, 0)
    "o": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z",
    "s": "M-3.5-3.5H3.5V3.5H-3.5Z",
    "D": "M0-5L5 0L0 5L-5 0Z",
    "^": "M0-5L4.6 3.5H-4.6Z",
    "v": "M0 5L4.6-3.5H-4.6Z",
    "P": "M-1.6-5H1.6V-1.6H5V1.6H1.6V5H-1.6V1.6H-5V-1.6H-1.6Z",
    "*": "M0-5.5L1.5-1.8L5.4-1.7L2.3 .8L3.4 4.6L0 2.4L-3.4 4.6L-2.3 .8L-5.4-1.7L-1.5-1.8Z",
    "X": "M-4.8-3.2L-3.2-4.8L0-1.6L3.2-4.8L4.8-3.2L1.6 0L4.8 3.2L3.2 4.8L0 1.6L-3.2 4.8L-4.8 3.2L-1.6 0Z",
}


@dataclass(frozen=True)
class Scale:
    """Maps values in [low, high] to pixels in [start, end]."""

    low: float
    high: float
    log: bool
    start: float
    end: float

    def position(self, value: float) -> float | None:
        """The pixel of a value; None if it cannot be drawn on the axis."""
        if not is_drawable(value, self.log):
            return None
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def draw_svg(chart: Chart, legend: bool = True, width: int = 620, height: int = 360) -> Markup:
    """The chart as an <svg> element that takes its colors from the page, in light or dark mode.

    Values that are not finite, and values <= 0 on a logarithmic axis, are left out. `height` includes neither the
    legend nor slanted category names. If `legend` is false, the page has to show a `shared_legend`.
    """
    chart = replace(chart, series=[thin_out(one) for one in chart.series])
    (x_low, x_high), (y_low, y_high) = axis_ranges(chart)
    y_ticks = ticks(y_low, y_high, chart.y_log)
    right, top, bottom = 12, 10, 46 if chart.x_title else 26
    left = max(64, 30 + round(CHARACTER_WIDTH * max(map(len, tick_labels(y_ticks)), default=0)))  # axis title, labels
    slanted = chart.slanted(width - left - right)
    if slanted:  # rotate by 45 degrees, so that a name ends at its tick
        reach = math.ceil(chart.longest * math.sqrt(0.5))
        left = max(left, reach - (width - left - right) // (2 * len(chart.categories)))
        bottom, height = bottom + reach, height + reach
    x_scale = Scale(x_low, x_high, chart.x_log, left, width - right)
    y_scale = Scale(y_low, y_high, chart.y_log, height - bottom, top)
    series = [draw_series(chart, one, number, x_scale, y_scale) for number, one in enumerate(chart.series)]
    names = [one.name for one in chart.series] if legend and len(chart.series) > 1 else []
    places = legend_places(names, width, left)
    categories = range(len(chart.categories))
    x_ticks = categories or ticks(x_low, x_high, chart.x_log, 4 if chart.x_log else 6)
    x_grid = [n + 0.5 for n in categories[:-1]] if chart.categories else x_ticks
    rows = 1 + max((row for _, row in places), default=-1)
    return Markup(
        templates().get_template("chart.svg").render(
            chart=chart, series=series, width=width, height=height, left=left, right=width - right, top=top,
            base=height - bottom, x_grid=list(map(x_scale.position, x_grid)), slanted=slanted,
            x_ticks=list(zip(map(x_scale.position, x_ticks), chart.categories or tick_labels(x_ticks), strict=True)),
            y_ticks=list(zip(map(y_scale.position, y_ticks), tick_labels(y_ticks), strict=True)),
            empty=not any(one["points"] for one in series), legend=places, whole=height + 18 * rows,
            bar=bar_width(series),
        )
    )  # fmt: skip


def draw_series(chart: Chart, series: Series, number: int, x_scale: Scale, y_scale: Scale) -> dict[str, Any]:
    """The template's data for one series: its style, its points (each with a tooltip), its line and its band."""
    points, line, upper, lower = [], [], [], []
    labels = [*series.labels, *[""] * len(series.x)]
    spreads = [spread if is_drawable(spread, False) else 0.0 for spread in (*series.spread, *[0.0] * len(series.x))]
    for x, dodged, y, label, spread in zip(series.x, chart.dodged(series), series.y, labels, spreads, strict=False):
        px, py = x_scale.position(dodged), y_scale.position(y)
        if px is None or py is None:
            continue
        low, high = py, py
        if spread:
            low, high = y_scale.position(y - spread) or y_scale.start, y_scale.position(y + spread) or py
        where = chart.categories[int(x)] if chart.categories else f"{x:.4g}"
        label = label or f"{series.name}: {where}, {y:.4g}" + (f" ± {spread:.2g}" if spread else "")
        points.append({"x": px, "y": py, "low": low, "high": high, "label": label})
        line.append((px, py))
        upper.append((px, high))
        lower.append((px, low))
    band = svg_path([*upper, *reversed(lower)]) + "Z" if series.kind == "line" and any(series.spread) and points else ""
    return {**style_of(series, number), "points": points, "path": svg_path(line), "band": band}


def svg_path(points: Sequence[tuple[float, float]]) -> str:
    """The `d` attribute of a path through points; empty for no points."""
    return "M" + "L".join(f"{x} {y}" for x, y in points) if points else ""


def bar_width(series: Sequence[dict[str, Any]]) -> float:
    """Nine tenths of the smallest distance between two bars, in pixels."""
    places = sorted({point["x"] for one in series if one["kind"] == "bars" for point in one["points"]})
    return 0.9 * min((b - a for a, b in pairwise(places)), default=20.0)


def shared_legend(charts: Sequence[Chart]) -> Markup:
    """One legend for charts in which each series has the same style: every series once, in the order of styles."""
    entries: dict[str, tuple[int, dict[str, Any]]] = {}
    for chart in charts:
        for number, series in enumerate(chart.series):
            style = style_of(series, number)
            if series.name in entries and entries[series.name][1]["kind"] != series.kind:
                style["kind"] = "both"
            entries[series.name] = number if series.style is None else series.style, style
    styles = [style for _, style in sorted(entries.values(), key=lambda entry: entry[0])]
    return Markup(templates().get_template("key.html").render(series=styles))


def style_of(series: Series, number: int) -> dict[str, Any]:
    """Name, kind, color, marker and dashes of a series; `number` is its index in the chart."""
    style = number if series.style is None else series.style
    return {
        "name": series.name, "kind": series.kind, "class": f"--c{style % len(COLORS)}",
        "shape": SHAPES[marker_of(style)], "dashes": DASHES[style // len(COLORS) % len(DASHES)],
    }  # fmt: skip


def legend_places(names: Sequence[str], width: int, left: int) -> list[tuple[int, int]]:
    """The (x, row) of each name, in as many columns as the longest name allows."""
    longest = max(map(len, names), default=0) * CHARACTER_WIDTH + 26
    columns = max(1, (width - left) // longest)
    return [(left + number % columns * longest, number // columns) for number in range(len(names))]
