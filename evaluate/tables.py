"""Results as tables for a reader: which direction is better, the range, what was counted, and how sure a number is."""

import contextlib
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from scipy.stats import t

from ..common.errors import DamagedError
from ..common.files import digest_of, read_json
from .metrics.base import MetricColumn
from .metrics.registry import METRICS
from .rows import EvalRow

ARROWS = {"up": " ↑", "down": " ↓", "": ""}


def tables(rows: Sequence[EvalRow]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """For each metric that was measured: its title, heads and lines.

    A cell is a number and half its 95 % interval, where it has one; empty where a row has no such number. A number
    that no row has gets no column. Runs that differ in nothing but their seed get a line with their mean and standard
    deviation.
    """
    for name, metric in METRICS.items():
        measured = [row for row in rows if name in row.results]
        if measured:
            counted = {
                ", ".join(f"{n:,} {what.replace('_', ' ')}" for what, n in row.results[name].n.items() if n)
                for row in measured
            }
            title = f"{metric.title}; n = {counted.pop()}" if len(counted) == 1 and counted != {""} else metric.title
            numbers = [n for n in metric.columns if any(metric_value(row, name, n) is not None for row in measured)]
            lines = [[row.name, *(format_cell(row, name, number) for number in numbers)] for row in measured]
            yield title, ["run", *map(column_heading, numbers)], lines + seed_lines(measured, name, numbers)


def notes(rows: Sequence[EvalRow]) -> list[str]:
    """The flags of all runs, those that differ in nothing but their figures once."""
    told: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for row in rows:
        for name, result in row.results.items():
            for flag in () if row.target.reference else result.flags:
                told.setdefault((name, re.sub(r"[0-9.]+", "#", flag)), []).append((row.name, flag))
    return [
        f"{metric}, {found[0][0]}" + (f" and {len(found) - 1} more" if len(found) > 1 else "") + f": {found[0][1]}"
        for (metric, _), found in told.items()
    ]


def column_heading(number: MetricColumn) -> str:
    """The name with the better direction, and under it the least and the largest that the number can well be."""
    ends = ["" if end is None else f"{end:g}" for end in (number.floor, number.ceiling)]
    return number.heading + ARROWS[number.better] + (f"\n{ends[0]}..{ends[1]}" if any(ends) else "")


def metric_value(row: EvalRow, metric: str, number: MetricColumn) -> float | None:
    return row.results[metric].metrics.get(number.category, {}).get(number.name)


def format_cell(row: EvalRow, metric: str, number: MetricColumn) -> str:
    value = metric_value(row, metric, number)
    if value is None:
        return ""
    low, high = row.results[metric].intervals.get(number.category, {}).get(number.name) or (None, None)
    return format_with_spread(value, 0 if low is None or high is None else (high - low) / 2, number.format)


def format_with_spread(value: float, spread: float, form: str) -> str:
    return format(value, form) + (f" ±{format(spread, form).removeprefix('0')}" if spread > 0 else "")


def seed_lines(rows: Sequence[EvalRow], metric: str, numbers: Sequence[MetricColumn]) -> list[list[str]]:
    """Mean and sd of runs that differ in their seed alone; then what each such group has more than the first one.

    That difference is paired: of runs with the same seed, with half the 95 % interval of Student's t.
    """
    groups: dict[str, dict[int, EvalRow]] = {}
    for row in rows:
        if row.folder:
            with contextlib.suppress(DamagedError):  # a reference, or imported: it has no seed
                record = read_json(row.folder / "run.json", "seed")
                groups.setdefault(digest_without_seed(record), {})[record["seed"]] = row
    lines: list[list[str]] = []
    first: dict[int, EvalRow] = {}
    for group in groups.values():
        if len(group) < 2:
            continue
        name = group_name(group)
        found = [[v for row in group.values() if (v := metric_value(row, metric, n)) is not None] for n in numbers]
        spread = [statistics.stdev(values) if len(values) > 1 else 0 for values in found]
        cells = [
            format_with_spread(statistics.mean(values), sd, n.format) if values else ""
            for n, values, sd in zip(numbers, found, spread, strict=True)
        ]
        lines.append([f"{name}, {len(group)} seeds ± sd", *cells])
        first = first or group
        shared = sorted(first.keys() & group.keys())
        if group is not first and len(shared) > 1:
            cells = [paired_difference([(group[seed], first[seed]) for seed in shared], metric, n) for n in numbers]
            lines.append([f"{name} - {group_name(first)}, paired", *cells])
    return lines


# Of a run's record, what does not decide its result: runs of one recipe can come from several commands and machines.
IGNORED_KEYS = ("seed", "asked", "device", "environment", "versions", "threads", "cache_folders")


def digest_without_seed(record: Mapping[str, Any]) -> str:
    """The same for runs that differ in nothing but their seed."""
    return digest_of({name: value for name, value in record.items() if name not in IGNORED_KEYS})


def group_name(group: dict[int, EvalRow]) -> str:
    return next(iter(group.values())).name.rsplit("-s", 1)[0]


def paired_difference(pairs: Sequence[tuple[EvalRow, EvalRow]], metric: str, number: MetricColumn) -> str:
    values = [(metric_value(one, metric, number), metric_value(other, metric, number)) for one, other in pairs]
    differences = [one - other for one, other in values if one is not None and other is not None]
    if len(differences) < 2:
        return ""
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return format_with_spread(
        statistics.mean(differences), float(t.ppf(0.975, len(differences) - 1)) * error, number.format
    )
