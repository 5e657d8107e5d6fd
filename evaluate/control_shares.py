"""The share of a system's numbers that its controls already reach."""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .metrics.base import MetricColumn
from .paired import RunBySeed, half_interval, metric_value, pair_values
from .rows import MeasuredRun
from .statistics import Interval, fieller_interval

SHARE_NOTE = (
    "share lines: the share of a run's number above its floor (chance, or a useless SAE) that a control "
    "reaches, (control - floor) / (run - floor), with its 95 % interval over the pairs. A control is one "
    "seed, unless its row shows more"
)
NOT_OF_FEATURES = ("llm", "misc_metrics")  # the model's own numbers, and the share of alive latents

Columns = Sequence[tuple[str, MetricColumn]]  # (name of the metric, column)
Systems = Mapping[str, RunBySeed]  # label -> runs that differ only in their seed; references are systems too


class Share(NamedTuple):
    """The share of a system's number that a control reaches, and its 95 % interval (None where nothing was paired)."""

    part: float
    interval: Interval | None = None

    def __str__(self) -> str:
        ends = [f"{100 * end:.0f}" for end in self.interval or ()]
        return f"{self.part:.0%}" + (f" ({' to '.join(ends)})" if ends else "")


def find_share(system: RunBySeed, control: RunBySeed, metric: str, column: MetricColumn) -> Share | None:
    """(control - floor) / (system - floor), for the means over the paired units, with Fieller's interval.

    If nothing can be paired, the means over the runs are used. None if lower is better, if the number has no usable
    floor, or if the 95 % interval of the system itself includes the floor: the share could then be any number.
    """
    floor = column.floor
    if column.better != "up" or floor is None or not column.shared or column.category in NOT_OF_FEATURES:
        return None
    paired = pair_values(system, control, metric, column)
    if paired.unit:
        ours, theirs = ([value - floor for value in values] for values in (paired.ours, paired.theirs))
        interval, above = fieller_interval(theirs, ours), 0.0
        if interval is None:
            return None
    else:
        ours, theirs = ([value - floor for value in numbers(runs, metric, column)] for runs in (system, control))
        if not ours or not theirs:
            return None
        interval = None
        above = max(half_interval(run, metric, column) for run in system.values() if metric in run.results)
    own = statistics.mean(ours)
    return Share(statistics.mean(theirs) / own, interval) if own > max(above, 1e-12) else None


def numbers(runs: RunBySeed, metric: str, column: MetricColumn) -> list[float]:
    return [value for run in runs.values() if (value := metric_value(run, metric, column)) is not None]


def share_lines(systems: Systems, columns: Columns) -> list[list[str]]:
    """A table line for each pair of a system and one of its controls. For each of the system's numbers, the line shows
    the share that the control reaches.

    The first cell names the pair; each of the other cells belongs to one number in `columns`.
    """
    return [
        [f"share of {label} that {control} has", *cells] for label, control, *cells in share_cells(systems, columns)
    ]


def share_cells(systems: Systems, columns: Columns) -> list[list[str]]:
    """For each pair of a system and one of its controls: their labels and, for each of the system's numbers, the share
    that the control reaches."""
    lines = []
    for label, runs in systems.items():
        for control, control_runs in controls_of(runs, systems).items():
            shares = [find_share(runs, control_runs, metric, column) for metric, column in columns]
            if any(shares):
                lines.append([label, control, *("" if s is None else str(s) for s in shares)])
    return lines


def controls_of(system: RunBySeed, systems: Systems) -> dict[str, RunBySeed]:
    """The controls of a system: trained on the same rows, at the same width and L0, for the same number of steps.

    If some of them are built from the base recipe chosen for this system, only those are returned.
    """
    run = first_of(system)
    found = {label: runs for label, runs in systems.items() if is_control_of(first_of(runs), run)}
    return {label: runs for label, runs in found.items() if first_of(runs).base == run.base} or found


def first_of(system: RunBySeed) -> MeasuredRun:
    return next(iter(system.values()))


def is_control_of(control: MeasuredRun, run: MeasuredRun) -> bool:
    return control.is_control and not run.is_control and bool(run.conditions) and control.conditions == run.conditions
