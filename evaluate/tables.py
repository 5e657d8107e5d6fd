"""Results as tables: what each number is, which direction is better, its range, and how certain it is."""

import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from scipy.stats import t

from ..cache.models import model_label
from ..train.sae import read_run_record
from .control_shares import SHARE_NOTE, share_lines
from .metrics.base import OUTLIERS, MetricColumn, MetricResult
from .metrics.registry import METRICS
from .rows import EvalRow, MeasuredRun, digest_without_seed

ARROWS = {"up": " ↑", "down": " ↓", "": ""}


def describe_model(record: Mapping[str, Any]) -> str:
    """A model as pages show it: its name and 8 digits of its revision, such as `gemma-2-mini (7637a2a4)`."""
    label, revision = model_label(record), str(record.get("revision") or "")[:8]
    return label if revision in label else f"{label} ({revision})"


def tables(rows: Sequence[EvalRow]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Yield (title, heads, lines) for each metric that was measured.

    A cell is a number, with half its 95 % interval if it has one, and empty where a row has no such number. A number
    that no row has gets no column. Runs that differ only in their seed get a line with mean and standard deviation.
    """
    for name, metric in METRICS.items():
        measured = [row for row in rows if name in row.results]
        if not measured:
            continue
        title = "; n = ".join(filter(None, [metric.title, describe_counts([row.results[name] for row in measured])]))
        columns = [c for c in metric.columns if any(metric_value(row, name, c) is not None for row in measured)]
        lines = [[row.name, *(format_cell(row, name, column) for column in columns)] for row in measured]
        lines += seed_lines(measured, name, columns)
        lines += share_lines(systems_of(measured), [(name, column) for column in columns])
        yield title, ["run", *map(column_heading, columns)], lines


def systems_of(rows: Sequence[EvalRow]) -> dict[str, list[EvalRow]]:
    """The rows by label: runs that differ only in their seed together, every other row by itself."""
    groups = [list(group.values()) for group in runs_by_seed(rows)]
    grouped = [row for group in groups for row in group]
    systems = {f"{group_name(dict(enumerate(group)))} ({len(group)} seeds)": group for group in groups}
    return systems | {row.name: [row] for row in rows if not any(row is other for other in grouped)}


def without_empty_columns(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """A table, given by its headings and lines, less the columns in which no line has anything."""
    kept = [place for place in range(len(heads)) if any(line[place] for line in lines)]
    return [heads[place] for place in kept], [[line[place] for place in kept] for line in lines]


def describe_counts(results: Sequence[MetricResult]) -> str:
    """How much was measured, where it is the same for all results, and how many outlier rows were left out."""
    counts = {
        ", ".join(f"{n:,} {what.replace('_', ' ')}" for what, n in one.n.items() if n and what != OUTLIERS)
        for one in results
    }
    parts = list(counts) if len(counts) == 1 else []
    fewest, *_, most = sorted([one.n.get(OUTLIERS, 0) for one in results] * 2)
    if most:
        parts.append(f"{f'{fewest:,} to ' if fewest < most else ''}{most:,} outlier rows left out")
    return ", ".join(filter(None, parts))


def notes(rows: Sequence[MeasuredRun]) -> list[str]:
    """The flags and notes of all runs as sentences. Flags that differ only in their numbers are given once.

    They are about the numbers that tables show, without outlier rows.
    """
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for row in rows:
        for metric, result in row.results.items():
            for flag in () if row.is_reference else result.sound.flags:
                groups.setdefault((metric, re.sub(r"[0-9.]+", "#", flag)), []).append((row.name, flag))
    sentences = []
    for (metric, _), flags in groups.items():
        name, flag = flags[0]
        others = f" and {len(flags) - 1} more" if len(flags) > 1 else ""
        sentences.append(f"{metric}, {name}{others}: {flag}")
    shares = [SHARE_NOTE] if any(row.is_control for row in rows) and not all(row.is_control for row in rows) else []
    return [*sentences, *(note for row in rows for note in row.notes), *shares]


def column_heading(column: MetricColumn) -> str:
    """The name with an arrow in the better direction; below it the range of the number."""
    ends = ["" if end is None else f"{end:g}" for end in (column.floor, column.ceiling)]
    return column.heading + ARROWS[column.better] + (f"\n{ends[0]}..{ends[1]}" if any(ends) else "")


def metric_value(row: MeasuredRun, metric: str, column: MetricColumn) -> float | None:
    """A number of a row, without outlier rows where there were any."""
    return row.results[metric].sound.metrics.get(column.category, {}).get(column.name)


def half_interval(row: MeasuredRun, metric: str, column: MetricColumn) -> float:
    """Half the 95 % interval of a number over the text; 0 if it has none."""
    low, high = row.results[metric].sound.intervals.get(column.category, {}).get(column.name) or (None, None)
    return 0.0 if low is None or high is None else (high - low) / 2


def format_cell(row: EvalRow, metric: str, column: MetricColumn) -> str:
    value = metric_value(row, metric, column)
    return "" if value is None else format_with_spread(value, half_interval(row, metric, column), column.format)


def format_with_spread(value: float, spread: float, form: str) -> str:
    return format(value, form) + (f" ±{format(spread, form).removeprefix('0')}" if spread > 0 else "")


def seed_lines(rows: Sequence[EvalRow], metric: str, columns: Sequence[MetricColumn]) -> list[list[str]]:
    """A line with mean and sd for each group of runs that differ only in their seed.

    From the second group on, this line is followed by the group's difference from the first group: paired over runs
    with the same seed, with half the 95 % interval of Student's t.
    """
    lines: list[list[str]] = []
    first: dict[int, EvalRow] = {}
    for group in runs_by_seed(rows):
        name = group_name(group)
        cells = []
        for column in columns:
            values = [v for row in group.values() if (v := metric_value(row, metric, column)) is not None]
            spread = statistics.stdev(values) if len(values) > 1 else 0
            cells.append(format_with_spread(statistics.mean(values), spread, column.format) if values else "")
        lines.append([f"{name}, {len(group)} seeds ± sd", *cells])
        first = first or group
        shared = sorted(first.keys() & group.keys())
        if group is not first and len(shared) > 1:
            pairs = [(group[seed], first[seed]) for seed in shared]
            cells = [paired_difference(pairs, metric, column) for column in columns]
            lines.append([f"{name} - {group_name(first)}, paired", *cells])
    return lines


def runs_by_seed(rows: Sequence[EvalRow]) -> list[dict[int, EvalRow]]:
    """The groups of at least two runs that differ only in their seed, as seed -> run."""
    groups: dict[str, dict[int, EvalRow]] = {}
    for row in rows:
        if row.folder:
            record = read_run_record(row.folder)
            if record is not None and "seed" in record:  # a reference or an imported SAE has none
                groups.setdefault(digest_without_seed(record), {})[record["seed"]] = row
    return [group for group in groups.values() if len(group) > 1]


def group_name(group: dict[int, EvalRow]) -> str:
    return next(iter(group.values())).name.rsplit("-s", 1)[0]


def paired_difference(pairs: Sequence[tuple[MeasuredRun, MeasuredRun]], metric: str, column: MetricColumn) -> str:
    """The mean difference of pairs of runs, with half its 95 % interval by Student's t; empty for under two pairs."""
    values = [(metric_value(one, metric, column), metric_value(other, metric, column)) for one, other in pairs]
    differences = [one - other for one, other in values if one is not None and other is not None]
    if len(differences) < 2:
        return ""
    error = statistics.stdev(differences) / len(differences) ** 0.5
    half = float(t.ppf(0.975, len(differences) - 1)) * error
    return format_with_spread(statistics.mean(differences), half, column.format)
