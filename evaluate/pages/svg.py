"""Draw a chart as inline SVG for an HTML page."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from ..charts import (
    CHARACTER_WIDTH,
    COLOURS,
    DASHES,
    Chart,
    Series,
    axis_ranges,
    is_drawable,
    marker_of,
    tick_labels,
    ticks,
)
from .page import templates

SHAPES = {
    "o": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z",
    "s": "M-3.5-3.5H3.5V3.5H-3.5Z",
    "D": "M0-5L5 0L0 5L-5 0Z",
    "^": "M0-5L4.6 3.5H-4.6Z",
    "v": "M0 5L4.6-3.5H-4.6Z",
    "P": "M-1.6-5H1.6V-1.6H5V1.6H1.6V5H-1.6V1.6H-5V-1.6H-1.6Z",
    "*": "M0-5.5L1.5-1.8L5.4-1.7L2.3 .8L3.4 4.6L0 2.4L-3.4 4.6L-2.3 .8L-5.4-1.7L-1.5-1.8Z",
    "X": "M-4.8-3.2L-3.2-4.8L0-1.6L3.2-4.8L4.8-3.2L1.6 0L4.8 3.2L3.2 4.8L0 1.6L-3.2 4.8L-4.8 3.2L-1.6 0Z",
}


def draw_svg(chart: Chart, legend: bool = True, width: int = 620, height: int = 360) -> Markup:
    """The chart as an <svg> that takes its colours from the page, light or dark; without `legend` the page has a `key`.

    Points outside a logarithmic axis and those that are no numbers are left out. `height` is without the room that a
    legend takes, and slanted names of categories.
    """
    (x_low, x_high), (y_low, y_high) = axis_ranges(chart)
    y_ticks = ticks(y_low, y_high, chart.y_log)
    right, top, bottom = 12, 10, 46 if chart.x_title else 26
    left = max(
        64, 30 + round(CHARACTER_WIDTH * max(map(len, tick_labels(y_ticks)), default=0))
    )  # the axis' title, and its labels
    slanted = chart.slanted(width - left - right)
    if slanted:  # by 45 degrees, a name's end at its tick
        reach = math.ceil(chart.longest * math.sqrt(0.5))
        left = max(left, reach - (width - left - right) // (2 * len(chart.categories)))
        bottom, height = bottom + reach, height + reach

    def place(value: float, low: float, high: float, log: bool) -> float | None:
        if not is_drawable(value, log):
            return None
        return (math.log(value / low) / math.log(high / low)) if log else (value - low) / (high - low)

    def at_x(value: float) -> float | None:
        share = place(value, x_low, x_high, chart.x_log)
        return None if share is None else round(left + share * (width - left - right), 1)

    def at_y(value: float) -> float | None:
        share = place(value, y_low, y_high, chart.y_log)
        return None if share is None else round(height - bottom - share * (height - top - bottom), 1)

    drawn = []
    for number, series in enumerate(chart.series):
        points = []
        labels = [*series.labels, *[""] * len(series.x)]
        spreads = [spread if is_drawable(spread, False) else 0.0 for spread in (*series.spread, *[0.0] * len(series.x))]
        for x, at, y, label, spread in zip(series.x, chart.dodged(series), series.y, labels, spreads, strict=False):
            px, py = at_x(at), at_y(y)
            if px is not None and py is not None:
                low, high = (at_y(y - spread) or height - bottom, at_y(y + spread) or py) if spread else (py, py)
                where = chart.categories[int(x)] if chart.categories else f"{x:.4g}"
                label = label or f"{series.name}: {where}, {y:.4g}" + (f" ± {spread:.2g}" if spread else "")
                points.append({"x": px, "y": py, "low": low, "high": high, "label": label})
        path = svg_path([(point["x"], point["y"]) for point in points])
        around = [(one["x"], one["high"]) for one in points] + [(one["x"], one["low"]) for one in reversed(points)]
        band = svg_path(around) + "Z" if series.kind == "line" and any(series.spread) and points else ""
        drawn.append({**style_of(series, number), "points": points, "path": path, "band": band})
    named = [series.name for series in chart.series] if legend and len(chart.series) > 1 else []
    places = legend_places(named, width, left)
    x_ticks = range(len(chart.categories)) or ticks(x_low, x_high, chart.x_log, 4 if chart.x_log else 6)
    rows = 1 + max((row for _, row in places), default=-1)
    return Markup(
        templates().get_template("chart.svg").render(
            chart=chart, series=drawn, width=width, height=height, left=left, right=width - right, top=top, base=height - bottom,
            x_grid=[at_x(n + 0.5) for n in range(len(chart.categories) - 1)] if chart.categories else [at_x(v) for v in x_ticks],
            x_ticks=list(zip(map(at_x, x_ticks), chart.categories or tick_labels(x_ticks), strict=True)), slanted=slanted,
            y_ticks=list(zip(map(at_y, y_ticks), tick_labels(y_ticks), strict=True)),
            empty=not any(one["points"] for one in drawn), legend=places, whole=height + 18 * rows, bar=bar_width(drawn),
        )
    )  # fmt: skip


def svg_path(points: Sequence[tuple[float, float]]) -> str:
    """An SVG path through points; nothing through none."""
    return "M" + "L".join(f"{x} {y}" for x, y in points) if points else ""


def bar_width(drawn: Sequence[dict[str, Any]]) -> float:
    """Nine tenths of the least distance of two bars."""
    places = sorted({point["x"] for series in drawn if series["kind"] == "bars" for point in series["points"]})
    return 0.9 * min((b - a for a, b in pairwise(places)), default=20.0)


def shared_legend(charts: Sequence[Chart]) -> Markup:
    """One legend for charts that share their looks: every series of theirs once, in the order of looks."""
    found: dict[str, tuple[int, dict[str, Any]]] = {}
    for chart in charts:
        for number, one in enumerate(chart.series):
            look = style_of(one, number)
            if one.name in found and found[one.name][1]["kind"] != one.kind:
                look["kind"] = "both"
            found[one.name] = number if one.look is None else one.look, look
    series = [look for _, look in sorted(found.values(), key=lambda entry: entry[0])]
    return Markup(templates().get_template("key.html").render(series=series))


def style_of(series: Series, number: int) -> dict[str, Any]:
    number = number if series.look is None else series.look
    return {
        "name": series.name, "kind": series.kind, "class": f"--c{number % len(COLOURS)}",
        "shape": SHAPES[marker_of(number)], "dashes": DASHES[number // len(COLOURS) % len(DASHES)],
    }  # fmt: skip


def legend_places(names: Sequence[str], width: int, left: int) -> list[tuple[int, int]]:
    """(x, row) of each name, in as many columns as the longest one allows."""
    longest = max(map(len, names), default=0) * CHARACTER_WIDTH + 26
    columns = max(1, (width - left) // longest)
    return [(left + number % columns * longest, number // columns) for number in range(len(names))]
