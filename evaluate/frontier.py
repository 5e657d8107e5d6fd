"""The frontier of a number over L0: which other SAEs are better at the same or a lower L0."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from .compare import L0, ComparedSystem, Comparison, metric_heading
from .compare_charts import published_series
from .metrics.base import MetricColumn
from .metrics.registry import METRICS

SAME_L0 = 1.01  # L0 values count as equal up to this ratio: thresholds reach a target L0 only approximately
ON_FRONTIER = "on the frontier"
PUBLISHED_NOTE = (
    "Published results were measured by others, on other text and over all rows. They are interpolated over "
    "log L0 to the L0 of the system."
)

Number = tuple[str, MetricColumn]  # (name of the metric, column)


def find_column(metric: str, name: str) -> Number:
    """A number by its name."""
    return metric, next(column for column in METRICS[metric].columns if column.name == name)


# Higher is better in each of these.
FRONTIER_NUMBERS = (find_column("core", "kl_div_score"), find_column("core", "fve"))
PUBLISHED_NUMBER = find_column("core", "ce_loss_score")  # the reconstruction number in published.toml


class Published(NamedTuple):
    """A published result at an SAE's L0, interpolated over log L0 between the published points on either side."""

    name: str
    value: float


def l0_of(system: ComparedSystem) -> float | None:
    """The mean L0 of a system over its seeds; None if it is not known."""
    found = system.mean_and_spread(*find_column(*L0))
    return found[0] if found else None


def best_rival(
    system: ComparedSystem, others: Iterable[ComparedSystem], metric: str, column: MetricColumn
) -> ComparedSystem | None:
    """Of the other systems whose L0 is not above this system's, the one with the best value of a number (the first, if
    several are equally good). None if there is no such system."""
    own = l0_of(system)
    if own is None:
        return None
    measured = [
        (found[0], -place, other)
        for place, other in enumerate(others)
        if (l0 := l0_of(other)) and l0 <= SAME_L0 * own and (found := other.mean_and_spread(metric, column))
    ]
    return max(measured)[2] if measured else None


def published_at(system: ComparedSystem, metric: str, column: MetricColumn) -> list[Published]:
    """The published results for the system's model and layer, interpolated to the system's L0, the best first. Empty if
    that L0 lies outside the range of the published L0 values.

    Published results include outlier rows, so pass the system that `on_all_rows` returns: its L0 includes them too.
    """
    own = l0_of(system)
    if own is None:
        return []
    found = []
    for series in published_series(Comparison([system], [], []), metric, column):
        if min(series.x) <= own <= max(series.x):
            order = np.argsort(series.x)
            value = np.interp(math.log(own), np.log(np.take(series.x, order)), np.take(series.y, order))
            found.append(Published(series.name.removesuffix(" (published)"), float(value)))
    return sorted(found, key=lambda one: one.value, reverse=True)


def frontier_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Headings, and a line for each system. The line shows published results, and how far the system is behind the best
    system whose L0 is no higher.

    Returns only headings if fewer than two systems can be compared and no results are published for their model and
    layer.
    """
    numbers = [one for one in FRONTIER_NUMBERS if one in comparison.columns]
    all_rows = comparison.on_all_rows().systems
    has_published = PUBLISHED_NUMBER in comparison.columns and any(
        published_at(system, *PUBLISHED_NUMBER) for system in all_rows
    )
    heads = ["system", "L0", *(heading(*number) for number in numbers)]
    if has_published:
        heads += [heading(*PUBLISHED_NUMBER), "best published\nat this L0", "lower\npublished"]
    measured = [system for system in comparison.systems if l0_of(system)]
    if not has_published and (len(measured) < 2 or not numbers):
        return heads, []
    lines = []
    for system, on_all_rows in zip(comparison.systems, all_rows, strict=True):
        if system in measured:
            line = [system.label, f"{l0_of(system):.1f}"]
            line += [behind(system, comparison.systems, *number) for number in numbers]
            lines.append([*line, *(published_cells(on_all_rows) if has_published else ())])
    return heads, lines


def heading(metric: str, column: MetricColumn) -> str:
    return metric_heading(metric, column).split("\n")[0]


def behind(system: ComparedSystem, systems: Sequence[ComparedSystem], metric: str, column: MetricColumn) -> str:
    """A cell: the system's number, and how far it is behind the best number of the other systems whose L0 is no
    higher."""
    own = system.mean_and_spread(metric, column)
    if own is None:
        return ""
    rival = best_rival(system, systems, metric, column)
    theirs = rival.mean_and_spread(metric, column) if rival else None
    shown = ON_FRONTIER
    if rival and theirs and theirs[0] > own[0]:
        shown = f"{own[0] - theirs[0]:+{column.format}} from {rival.label}"
    return f"{own[0]:{column.format}}, {shown}"


def published_cells(system: ComparedSystem) -> list[str]:
    """Three cells: the system's number over all rows (including outlier rows), the best published number at the same
    L0, and how many of the published numbers are lower."""
    own, (_, column) = system.mean_and_spread(*PUBLISHED_NUMBER), PUBLISHED_NUMBER
    published = published_at(system, *PUBLISHED_NUMBER)
    if own is None or not published:
        return ["" if own is None else format(own[0], column.format), "", ""]
    less = sum(one.value < own[0] for one in published)
    best = published[0]
    return [format(own[0], column.format), f"{best.value:{column.format}} {best.name}", f"{less} of {len(published)}"]
