"""A chart as data, drawn as inline SVG for a page or by matplotlib for a paper.

Series differ in colour and in shape or dashes: the colours are told apart by the colour-blind, the shapes by everyone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

COLOURS = ("#0072b2", "#d55e00", "#007a5a", "#b3508a", "#9a6a00", "#2b8cbe", "#6b4fa0", "#444a52")
MARKERS = "osD^vP*X"  # matplotlib's names; `SHAPES` draws the same
DASHES = ("", "6 3", "2 3", "8 3 2 3")
Kind = Literal["points", "line", "both", "bars"]
MIN_VALUE, MAX_VALUE = 1e-100, 1e100  # on an axis
CHARACTER_WIDTH = 7  # pixels that a letter of a label takes, about


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
        return CHARACTER_WIDTH * max(map(len, self.categories), default=0)

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


def tick_labels(places: Sequence[float]) -> list[str]:
    """The labels of ticks, of as many digits as tell them apart."""
    found = ([tick_label(value, digits) for value in places] for digits in range(4, 18))
    return next(
        (labels for labels in found if len(set(labels)) == len(places)), [tick_label(value) for value in places]
    )


def tick_label(value: float, digits: int = 4) -> str:
    """A tick's label: 1e-05, 0.2, 20, 2k, 1.5M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit * (10 if name == "k" else 1):
            return f"{value / unit:.{digits}g}{name}"
    return f"{value:.{digits}g}"


def is_drawable(value: float, log: bool) -> bool:
    """Whether a number has a place on an axis: nothing that trains or measures in float32 comes near the limits."""
    return MIN_VALUE <= value <= MAX_VALUE if log else abs(value) <= MAX_VALUE


def axis_range(values: Sequence[float], log: bool) -> tuple[float, float]:
    """What an axis covers: the values and a margin; [0, 1] where there are none."""
    found = [value for value in values if is_drawable(value, log)]
    if not found:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = min(found), max(found)
    if log:
        factor = max((high / low) ** 0.06, 1.1)
        return low / factor, high * factor
    if max(abs(low), abs(high)) < MIN_VALUE:
        return -0.06, 1.0  # a share, more likely than not, and none is below zero
    margin = 0.06 * (high - low) or 0.06 * abs(high)
    return low - margin, high + margin


def axis_ranges(chart: Chart) -> tuple[tuple[float, float], tuple[float, float]]:
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
    """The middles of bars, and the ends of the outermost ones."""
    places = sorted({math.log(value) if log else value for value in x})
    half = min((b - a for a, b in pairwise(places)), default=0.0) / 2
    ends = [places[0] - half, places[-1] + half] if places else []
    return [*x, *(math.exp(end) if log else end for end in ends)]


def marker_of(number: int) -> str:
    """So that no two of the first 64 series have the same colour and shape."""
    return MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
