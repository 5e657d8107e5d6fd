"""How much of a number the controls of a run already have, and where a control is as good as the run or better."""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence

from .metrics.base import MetricColumn
from .metrics.registry import METRICS
from .rows import NEAR_L0, MeasuredRun, core_numbers

SHARE_NOTE = (
    "share lines: how much of a number above its floor (chance, or a useless SAE) a control already has, "
    "(control - floor) / (run - floor)"
)
NOT_OF_FEATURES = ("llm", "misc_metrics")  # categories of numbers that no SAE is praised for: the model's own, alive

Columns = Sequence[tuple[str, MetricColumn]]  # with the name of the metric
Number = tuple[float, float]  # a value, and half its 95 % interval or 0


def share(run: float, control: float, column: MetricColumn, half: float = 0.0) -> float | None:
    """(control - floor) / (run - floor): the part of a run's number that its control has.

    None where lower is better or the number has no floor, and where the run itself is not above the floor by more than
    `half`, half its 95 % interval: a share of nothing would be any number.
    """
    if column.better != "up" or column.floor is None or not column.shared or not run - column.floor > max(half, 1e-12):
        return None
    return (control - column.floor) / (run - column.floor)


def share_lines(systems: Mapping[str, Sequence[MeasuredRun]], columns: Columns) -> list[list[str]]:
    """A line of a table for each system and each of its controls: the shares of its numbers, as percentages.

    Args:
        systems: label -> runs that differ in their seed alone; references and controls are systems too. A system's
            number is the mean over its runs.
        columns: the columns of the table after the first.
    """
    lines = []
    for label, runs in systems.items():
        if runs[0].is_reference or runs[0].is_control:
            continue
        for control, control_runs in controls_of(runs[0], systems).items():
            cells = [format_share(runs, control_runs, metric, column) for metric, column in columns]
            if any(cells):
                lines.append([f"share of {label} that {control} has", *cells])
    return lines


def controls_of(run: MeasuredRun, systems: Mapping[str, Sequence[MeasuredRun]]) -> dict[str, Sequence[MeasuredRun]]:
    """The controls of a run among systems: those trained on its rows, at its width and L0, as long as it."""
    return {label: runs for label, runs in systems.items() if is_control_of(runs[0], run)}


def is_control_of(control: MeasuredRun, run: MeasuredRun) -> bool:
    return control.is_control and not run.is_control and bool(run.conditions) and control.conditions == run.conditions


def format_share(
    runs: Sequence[MeasuredRun], control_runs: Sequence[MeasuredRun], metric: str, column: MetricColumn
) -> str:
    if column.category in NOT_OF_FEATURES:
        return ""
    ours, theirs = (mean_number(some, metric, column) for some in (runs, control_runs))
    part = share(ours[0], theirs[0], column, ours[1]) if ours and theirs else None
    return "" if part is None else f"{part:.0%}"


def mean_number(runs: Sequence[MeasuredRun], metric: str, column: MetricColumn) -> Number | None:
    """The mean over the runs that have a number, and the largest half interval among them."""
    numbers = [number for run in runs if (number := number_of(run, metric, column))]
    return (statistics.mean(n[0] for n in numbers), max(n[1] for n in numbers)) if numbers else None


def number_of(run: MeasuredRun, metric: str, column: MetricColumn) -> Number | None:
    """A number of a run without outlier rows, and half its interval."""
    if metric not in run.results:
        return None
    sound = run.results[metric].sound
    value = sound.metrics.get(column.category, {}).get(column.name)
    low, high = sound.intervals.get(column.category, {}).get(column.name) or (None, None)
    return None if value is None else (value, 0.0 if low is None or high is None else (high - low) / 2)


def control_notes(run: MeasuredRun, rows: Iterable[MeasuredRun]) -> list[str]:
    """Sentences about a run beside its controls among `rows`: where it is no better than one, and at unlike L0.

    A control is as good if the run is not better by more than half the interval of their difference. The two intervals
    are taken as independent; measured on one text they are not, so sooner too much is said than too little.
    """
    controls = [row for row in rows if is_control_of(row, run)]
    matched = [text for metric, column in compared_columns() if (text := describe_match(run, controls, metric, column))]
    notes = []
    if matched:
        notes.append(
            f"{run.name} cannot be told from a control, or is below it, in {'; '.join(matched)}. A control keeps part "
            "of its random start, so these numbers do not show that training that part has brought anything."
        )
    return [*notes, *unlike_l0(run, controls)]


def compared_columns() -> Iterator[tuple[str, MetricColumn]]:
    for name, metric in METRICS.items():
        for column in metric.columns:
            if column.better and column.category not in NOT_OF_FEATURES:
                yield name, column


def describe_match(run: MeasuredRun, controls: Sequence[MeasuredRun], metric: str, column: MetricColumn) -> str:
    """The best control that is as good as the run in a number, or better, with both numbers; "" if there is none."""
    ours, sign = number_of(run, metric, column), 1 if column.better == "up" else -1
    if ours is None:
        return ""
    as_good = []
    for control in controls:
        theirs = number_of(control, metric, column)
        if theirs and sign * (ours[0] - theirs[0]) <= math.hypot(ours[1], theirs[1]):
            as_good.append((sign * theirs[0], control.name, theirs[0]))
    if not as_good:
        return ""
    _, name, value = max(as_good)
    return f"{metric} {column.heading} ({ours[0]:{column.format}}; {name} {value:{column.format}})"


def unlike_l0(run: MeasuredRun, controls: Iterable[MeasuredRun]) -> Iterator[str]:
    """A sentence for each control whose L0 differs from the run's by more than a tenth, on this text."""
    ours = core_numbers(run)
    for control in controls:
        theirs = core_numbers(control)
        if ours and theirs and not theirs[0] / NEAR_L0 <= ours[0] <= theirs[0] * NEAR_L0:
            yield (
                f"{control.name} has L0 {theirs[0]:.1f} on this text and {run.name} {ours[0]:.1f}: the shares "
                "include the effect of that difference."
            )
