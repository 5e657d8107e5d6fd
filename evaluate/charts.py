"""A chart as data, drawn as inline SVG for a page or by matplotlib for a paper.

Series differ in colour and in shape or dashes: the colours are told apart by the colour-blind, the shapes by everyone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from markupsafe import Markup

from ..common.errors import UnavailableError, UsageError
from .pages.page import templates

COLOURS = ("#0072b2", "#d55e00", "#007a5a", "#b3508a", "#9a6a00", "#2b8cbe", "#6b4fa0", "#444a52")
MARKERS = "osD^vP*X"  # matplotlib's names; `SHAPES` draws the same
DASHES = ("", "6 3", "2 3", "8 3 2 3")
Kind = Literal["points", "line", "both", "bars"]
LEAST, LARGEST = 1e-100, 1e100  # on an axis
LETTER = 7  # pixels that a letter of a label takes, about
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


@dataclass(frozen=True)
class Series:
    """Points (x, y); `spread` is half an interval of each y, `labels` what pointing at each tells.

    The spread of points is a bar through each, that of a line a band around it.
    Series of one `look` have the same colour and shape; without one, it is the place among the chart's series.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    kind: Kind = "points"
    spread: Sequence[float] = ()
    labels: Sequence[str] = ()
    look: int | None = None


@dataclass(frozen=True)
class Chart:
    """Series on common axes. `categories` are names for x = 0, 1, 2, ...; `note` is a sentence to stand under it."""

    title: str
    x_title: str
    y_title: str
    series: Sequence[Series]
    x_log: bool = False
    y_log: bool = False
    categories: Sequence[str] = ()
    note: str = ""

    @property
    def longest(self) -> float:
        """Pixels of the longest category's name, about."""
        return LETTER * max(map(len, self.categories), default=0)

    def slanted(self, width: float) -> bool:
        """Whether names of categories are too long to stand side by side in so many pixels."""
        return self.longest * len(self.categories) > width

    def dodged(self, series: Series) -> list[float]:
        """The series' x; where several series have a point in one category, side by side around its middle."""
        if not self.categories:
            return list(series.x)
        beside = [[one for one in self.series if x in one.x] for x in series.x]
        steps = [min(0.8 / len(sharing), 0.15) for sharing in beside]
        return [
            x + step * (next(n for n, one in enumerate(sharing) if one is series) - (len(sharing) - 1) / 2)
            for x, step, sharing in zip(series.x, steps, beside, strict=True)
        ]


def ticks(low: float, high: float, log: bool = False, about: int = 5) -> list[float]:
    """Round numbers inside [low, high]: steps of 1, 2 or 5 times a power of ten; with `log`, such numbers themselves.

    Of a logarithmic range under a decade the steps are even, too.
    """
    if log and high / low >= 10:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for parts in ((1, 2, 5), (1,)):
            found = [part * 10.0**decade for decade in decades for part in parts]
            found = [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
            if len(found) <= 2 * about:
                return found
        return found[:: math.ceil(len(found) / about)]
    step = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(step))
    step = next(part * unit for part in (1, 2, 5, 10) if part * unit >= step * (1 - 1e-9))
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def labelled(places: Sequence[float]) -> list[str]:
    """The labels of ticks, of as many digits as tell them apart."""
    found = ([written(value, digits) for value in places] for digits in range(4, 18))
    return next((labels for labels in found if len(set(labels)) == len(places)), [written(value) for value in places])


def written(value: float, digits: int = 4) -> str:
    """A tick's label: 1e-05, 0.2, 20, 2k, 1.5M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit * (10 if name == "k" else 1):
            return f"{value / unit:.{digits}g}{name}"
    return f"{value:.{digits}g}"


def drawable(value: float, log: bool) -> bool:
    """Whether a number has a place on an axis: nothing that trains or measures in float32 comes near the limits."""
    return LEAST <= value <= LARGEST if log else abs(value) <= LARGEST


def span(values: Sequence[float], log: bool) -> tuple[float, float]:
    """What an axis covers: the values and a margin; [0, 1] where there are none."""
    found = [value for value in values if drawable(value, log)]
    if not found:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = min(found), max(found)
    if log:
        factor = max((high / low) ** 0.06, 1.1)
        return low / factor, high * factor
    if max(abs(low), abs(high)) < LEAST:
        return -0.06, 1.0  # a share, more likely than not, and none is below zero
    margin = 0.06 * (high - low) or 0.06 * abs(high)
    return low - margin, high + margin


def spans(chart: Chart) -> tuple[tuple[float, float], tuple[float, float]]:
    x = [value for series in chart.series for value in series.x]
    ends = (-0.5, len(chart.categories) - 0.5) if chart.categories else None
    y = [value for series in chart.series for value in series.y]
    y += [
        v + sign * s
        for series in chart.series
        for v, s in zip(series.y, series.spread, strict=False)
        for sign in (-1, 1)
    ]
    if any(series.kind == "bars" for series in chart.series):
        return ends or span(with_bars(x, chart.x_log), chart.x_log), (0.0, span([*y, 0.0], False)[1])
    return ends or span(x, chart.x_log), span(y, chart.y_log)


def with_bars(x: Sequence[float], log: bool) -> list[float]:
    """The middles of bars, and the ends of the outermost ones."""
    places = sorted({math.log(value) if log else value for value in x})
    half = min((b - a for a, b in pairwise(places)), default=0.0) / 2
    ends = [places[0] - half, places[-1] + half] if places else []
    return [*x, *(math.exp(end) if log else end for end in ends)]


def svg(chart: Chart, legend: bool = True, width: int = 620, height: int = 360) -> Markup:
    """The chart as an <svg> that takes its colours from the page, light or dark; without `legend` the page has a `key`.

    Points outside a logarithmic axis and those that are no numbers are left out. `height` is without the room that a
    legend takes, and slanted names of categories.
    """
    (x_low, x_high), (y_low, y_high) = spans(chart)
    y_ticks = ticks(y_low, y_high, chart.y_log)
    right, top, bottom = 12, 10, 46 if chart.x_title else 26
    left = max(64, 30 + round(LETTER * max(map(len, labelled(y_ticks)), default=0)))  # the axis' title, and its labels
    slanted = chart.slanted(width - left - right)
    if slanted:  # by 45 degrees, a name's end at its tick
        reach = math.ceil(chart.longest * math.sqrt(0.5))
        left = max(left, reach - (width - left - right) // (2 * len(chart.categories)))
        bottom, height = bottom + reach, height + reach

    def place(value: float, low: float, high: float, log: bool) -> float | None:
        if not drawable(value, log):
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
        spreads = [spread if drawable(spread, False) else 0.0 for spread in (*series.spread, *[0.0] * len(series.x))]
        for x, at, y, label, spread in zip(series.x, chart.dodged(series), series.y, labels, spreads, strict=False):
            px, py = at_x(at), at_y(y)
            if px is not None and py is not None:
                low, high = (at_y(y - spread) or height - bottom, at_y(y + spread) or py) if spread else (py, py)
                where = chart.categories[int(x)] if chart.categories else f"{x:.4g}"
                label = label or f"{series.name}: {where}, {y:.4g}" + (f" ± {spread:.2g}" if spread else "")
                points.append({"x": px, "y": py, "low": low, "high": high, "label": label})
        path = through([(point["x"], point["y"]) for point in points])
        around = [(one["x"], one["high"]) for one in points] + [(one["x"], one["low"]) for one in reversed(points)]
        band = through(around) + "Z" if series.kind == "line" and any(series.spread) and points else ""
        drawn.append({**look_of(series, number), "points": points, "path": path, "band": band})
    named = [series.name for series in chart.series] if legend and len(chart.series) > 1 else []
    places = legend_places(named, width, left)
    x_ticks = range(len(chart.categories)) or ticks(x_low, x_high, chart.x_log, 4 if chart.x_log else 6)
    rows = 1 + max((row for _, row in places), default=-1)
    return Markup(
        templates().get_template("chart.svg").render(
            chart=chart, series=drawn, width=width, height=height, left=left, right=width - right, top=top, base=height - bottom,
            x_grid=[at_x(n + 0.5) for n in range(len(chart.categories) - 1)] if chart.categories else [at_x(v) for v in x_ticks],
            x_ticks=list(zip(map(at_x, x_ticks), chart.categories or labelled(x_ticks), strict=True)), slanted=slanted,
            y_ticks=list(zip(map(at_y, y_ticks), labelled(y_ticks), strict=True)),
            empty=not any(one["points"] for one in drawn), legend=places, whole=height + 18 * rows, bar=bar_width(drawn),
        )
    )  # fmt: skip


def through(points: Sequence[tuple[float, float]]) -> str:
    """An SVG path through points; nothing through none."""
    return "M" + "L".join(f"{x} {y}" for x, y in points) if points else ""


def marker_of(number: int) -> str:
    """So that no two of the first 64 series have the same colour and shape."""
    return MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]


def bar_width(drawn: Sequence[dict[str, Any]]) -> float:
    """Nine tenths of the least distance of two bars."""
    places = sorted({point["x"] for series in drawn if series["kind"] == "bars" for point in series["points"]})
    return 0.9 * min((b - a for a, b in pairwise(places)), default=20.0)


def key(charts: Sequence[Chart]) -> Markup:
    """One legend for charts that share their looks: every series of theirs once, in the order of looks."""
    found: dict[str, tuple[int, dict[str, Any]]] = {}
    for chart in charts:
        for number, one in enumerate(chart.series):
            look = look_of(one, number)
            if one.name in found and found[one.name][1]["kind"] != one.kind:
                look["kind"] = "both"
            found[one.name] = number if one.look is None else one.look, look
    series = [look for _, look in sorted(found.values(), key=lambda entry: entry[0])]
    return Markup(templates().get_template("key.html").render(series=series))


def look_of(series: Series, number: int) -> dict[str, Any]:
    number = number if series.look is None else series.look
    return {
        "name": series.name, "kind": series.kind, "class": f"--c{number % len(COLOURS)}",
        "shape": SHAPES[marker_of(number)], "dashes": DASHES[number // len(COLOURS) % len(DASHES)],
    }  # fmt: skip


def legend_places(names: Sequence[str], width: int, left: int) -> list[tuple[int, int]]:
    """(x, row) of each name, in as many columns as the longest one allows."""
    longest = max(map(len, names), default=0) * LETTER + 26
    columns = max(1, (width - left) // longest)
    return [(left + number % columns * longest, number // columns) for number in range(len(names))]


def save(chart: Chart, path: Path) -> None:
    """Draw the chart with matplotlib; the file's ending decides the format (.svg, .png, .pdf).

    Raises OutsideError without matplotlib, UsageError for an ending that it does not write.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnavailableError("Plots for papers need matplotlib: pip install 'sae-pipeline[plots]'.") from error
    with rc_context({"svg.hashsalt": "sae", "svg.fonttype": "none"}):  # the same chart, the same bytes
        figure = Figure(figsize=(6.2, 4.2), layout="constrained")
        axes = figure.add_subplot(
            title=chart.title, xlabel=chart.x_title, ylabel=chart.y_title,
            xscale="log" if chart.x_log else "linear", yscale="log" if chart.y_log else "linear",
        )  # fmt: skip
        for place, series in enumerate(chart.series):
            number = place if series.look is None else series.look
            colour, marker, x = COLOURS[number % len(COLOURS)], marker_of(number), chart.dodged(series)
            if series.kind == "bars":
                step = min((b - a for a, b in pairwise(series.x)), default=1.0)
                axes.bar(x, series.y, 0.9 * step, color=colour, label=series.name)
                continue
            banded = series.kind == "line" and any(series.spread)
            if banded:
                low, high = zip(*((y - s, y + s) for y, s in zip(series.y, series.spread, strict=True)), strict=True)
                axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
            dashes = ("-", "--", ":", "-.")[number // len(COLOURS) % len(DASHES)] if series.kind != "points" else "none"
            axes.errorbar(
                x, series.y, yerr=None if banded else series.spread or None, label=series.name, color=colour, ls=dashes,
                marker=marker if series.kind != "line" else "none", ms=5, lw=1.4,
            )  # fmt: skip
        if chart.categories:
            turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if chart.slanted(400) else {}
            axes.set_xticks(range(len(chart.categories)), chart.categories, **turned)
            axes.set_xlim(-0.5, len(chart.categories) - 0.5)
        axes.grid(alpha=0.25)
        if len(chart.series) > 1:
            axes.legend(fontsize=7, ncols=1 + len(chart.series) // 12)
        try:
            figure.savefig(path, dpi=200, metadata={"Date": None} if path.suffix == ".svg" else None)
        except ValueError as error:
            raise UsageError(
                f"{path}: matplotlib writes no {path.suffix or 'file without an ending'}. Give .svg, .png or .pdf."
            ) from error
