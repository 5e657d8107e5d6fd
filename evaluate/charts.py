"""Charts as data, with ticks and axis ranges. Charts are drawn in pages/: as SVG for a page, with matplotlib for a
paper.

Series differ in color and in shape or dashes. Color-blind readers can tell the colors apart.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

COLORS = ("#0072b2", "#d55e00", "#007a5a", "#b3508a", "#9a6a00", "#2b8cbe", "#6b4fa0", "#444a52")
MARKERS = "osD^vP*X"  # matplotlib's names
DASHES = ("", "6 3", "2 3", "8 3 2 3")  # as in SVG
Kind = Literal["points", "line", "both", "bars"]
MIN_VALUE, MAX_VALUE = 1e-100, 1e100  # the range that an axis can show
MAX_LINE_POINTS = 400  # per line; at the width of a chart, more points cannot be told apart
CHARACTER_WIDTH = 7  # approximate width of a character of a label, in pixels


@dataclass(frozen=True)
class Series:
    """Points (x, y).

    Attributes:
        spread: half the width of an interval around each y, drawn as an error bar at points or a band around a line.
        labels: a tooltip for each point.
        style: series with the same style share color and shape; defaults to the index of the series in its chart.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    kind: Kind = "points"
    spread: Sequence[float] = ()
    labels: Sequence[str] = ()
    style: int | None = None


@dataclass(frozen=True)
class Chart:
    """Series on common axes. `categories` are names for x = 0, 1, 2, ...; `note` is a sentence below the chart."""

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
        """The approximate width of the longest category name, in pixels."""
        return CHARACTER_WIDTH * max(map(len, self.categories), default=0)

    def slanted(self, width: float) -> bool:
        """Whether category names are too long to fit side by side in `width` pixels."""
        return self.longest * len(self.categories) > width

    def dodged(self, series: Series) -> list[float]:
        """The x values of a series, shifted so that the points of several series in one category lie side by side."""
        if not self.categories:
            return list(series.x)
        sharing = [[one for one in self.series if x in one.x] for x in series.x]
        steps = [min(0.8 / len(group), 0.15) for group in sharing]
        return [
            x + step * (next(n for n, one in enumerate(group) if one is series) - (len(group) - 1) / 2)
            for x, step, group in zip(series.x, steps, sharing, strict=True)
        ]


def ticks(low: float, high: float, log: bool = False, about: int = 5) -> list[float]:
    """At least three round numbers in [low, high]. `about` is their approximate number.

    On a linear axis, ticks are evenly spaced, and the step is 1, 2 or 5 times a power of ten. If `log` is true, the
    ticks themselves are 1, 2 or 5 times a power of ten, unless the range is less than a decade: the ticks are then
    evenly spaced, as on a linear axis.
    """
    if log and high / low >= 10:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for parts in ((1, 2, 5), (1,)):
            values = [part * 10.0**decade for decade in decades for part in parts]
            values = [value for value in values if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
            if len(values) <= 2 * about:
                return values
        return values[:: math.ceil(len(values) / about)]
    wanted = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(wanted))
    steps = [part * unit for part in (0.5, 1, 2, 5, 10)]
    finer, step = next(pair for pair in pairwise(steps) if pair[1] >= wanted * (1 - 1e-9))
    found = multiples(step, low, high)
    return found if len(found) > 2 else multiples(finer, low, high)


def multiples(step: float, low: float, high: float) -> list[float]:
    """The multiples of `step` in [low, high]."""
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """The labels of ticks, with as many digits as are needed to tell them apart."""
    for digits in range(4, 18):
        labels = [tick_label(value, digits) for value in values]
        if len(set(labels)) == len(values):
            return labels
    return [tick_label(value) for value in values]


def tick_label(value: float, digits: int = 4) -> str:
    """The label of a tick, such as 1e-05, 0.2, 20, 2k or 1.5M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit * (10 if name == "k" else 1):
            return f"{value / unit:.{digits}g}{name}"
    return f"{value:.{digits}g}"


def is_drawable(value: float, log: bool) -> bool:
    """Whether a number fits on an axis. Nothing that is trained or measured in float32 comes near the limits."""
    return MIN_VALUE <= value <= MAX_VALUE if log else abs(value) <= MAX_VALUE


def axis_range(values: Sequence[float], log: bool) -> tuple[float, float]:
    """The range of an axis: the range of the values plus a margin. If there are no values, the range is [0, 1], or
    [0.1, 1] on a log axis."""
    values = [value for value in values if is_drawable(value, log)]
    if not values:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = min(values), max(values)
    if log:
        factor = max((high / low) ** 0.06, 1.1)
        return low / factor, high * factor
    if max(abs(low), abs(high)) < MIN_VALUE:
        return -0.06, 1.0  # all values are 0; they are probably shares, whose range is 0 to 1
    margin = 0.06 * (high - low) or 0.06 * abs(high)
    return low - margin, high + margin


def axis_ranges(chart: Chart) -> tuple[tuple[float, float], tuple[float, float]]:
    """The ranges of x and y, which cover spreads and the edges of bars."""
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
        return ends or axis_range(with_bar_edges(x, chart.x_log), chart.x_log), (0.0, axis_range([*y, 0.0], False)[1])
    return ends or axis_range(x, chart.x_log), axis_range(y, chart.y_log)


def with_bar_edges(x: Sequence[float], log: bool) -> list[float]:
    """The centers of bars, and the edges of the outermost ones."""
    places = sorted({math.log(value) if log else value for value in x})
    half = min((b - a for a, b in pairwise(places)), default=0.0) / 2
    ends = [places[0] - half, places[-1] + half] if places else []
    return [*x, *(math.exp(end) if log else end for end in ends)]


def thin_out(series: Series) -> Series:
    """The series as it is drawn. If it is a line of more than MAX_LINE_POINTS points, at most that many points are
    kept: the ends, the peaks and the dips of the line.

    The points between the ends are split into equal parts, and each part keeps its smallest and its largest y, so that
    a spike of a single point is still seen.
    """
    if series.kind != "line" or len(series.x) <= MAX_LINE_POINTS:
        return series
    parts, inner = MAX_LINE_POINTS // 2 - 1, len(series.x) - 2
    kept = {0, len(series.x) - 1}
    for part in range(parts):
        among = range(1 + inner * part // parts, 1 + inner * (part + 1) // parts)
        finite = [place for place in among if math.isfinite(series.y[place])]
        if finite:
            kept |= {min(finite, key=series.y.__getitem__), max(finite, key=series.y.__getitem__)}
    places = sorted(kept)
    return replace(
        series,
        x=[series.x[place] for place in places],
        y=[series.y[place] for place in places],
        spread=[series.spread[place] for place in places if series.spread],
        labels=[series.labels[place] for place in places if series.labels],
    )


def marker_of(number: int) -> str:
    """The marker of style `number`. No two of the first 64 styles share both color and marker."""
    return MARKERS[(number + number // len(COLORS)) % len(MARKERS)]
