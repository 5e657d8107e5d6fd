"""Tables of results: each number with its meaning, whether higher or lower is better, its range and uncertainty."""

import re
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from ..cache.models import model_label
from ..train.sae import read_run_record
from .control_shares import SHARE_NOTE, share_lines
from .metrics.base import OUTLIERS, MetricColumn, MetricResult
from .metrics.registry import METRICS, caveats
from .paired import SEED, RunBySeed, half_interval, metric_value, pair_runs, pair_systems
from .rows import EvalRow, MeasuredRun, digest_without_seed
from .statistics import Finding, PairedComparison, PairedDifferences, Verdict, default_margin, judge

# Flags that differ only in these parts are shown once: numbers, and a list of single letters that ends at a ")", as in
# "... a, b)".
VARYING = re.compile(r"[0-9.]+|\b[a-z](?:, [a-z])*(?=\))")
ARROWS = {"up": " ↑", "down": " ↓", "": ""}


def describe_model(record: Mapping[str, Any]) -> str:
    """A model as pages show it: its name and 8 digits of its revision, such as `gemma-2-mini (7637a2a4)`."""
    label, revision = model_label(record), str(record.get("revision") or "")[:8]
    return label if revision in label else f"{label} ({revision})"


def tables(rows: Sequence[EvalRow]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Yield (title, heads, lines) for each metric that was measured.

    A cell shows a number and, if the number has a 95 % interval, half the width of the interval. The cell is empty if
    the row has no such number. Columns without any number are left out. For each group of runs that differ only in
    their seed, there is a line with mean and standard deviation, and there are tests against the first such group. If
    there are no such groups, the last line is the smallest detectable difference.
    """
    for name, columns in shown_columns(rows).items():
        measured = [row for row in rows if name in row.results]
        counts = describe_counts([row.results[name] for row in measured])
        title = "; n = ".join(filter(None, [METRICS[name].title, counts]))
        lines = [[row.name, *(format_cell(row, name, column) for column in columns)] for row in measured]
        lines += seed_lines(measured, name, columns) or detectable_lines(measured, name, columns)
        lines += share_lines(systems_of(measured), [(name, column) for column in columns])
        yield title, ["run", *map(column_heading, columns)], lines


def shown_columns(rows: Sequence[MeasuredRun]) -> dict[str, list[MetricColumn]]:
    """Metrics that were measured -> the numbers that at least one row has."""
    return {
        name: [c for c in metric.columns if any(metric_value(row, name, c) is not None for row in rows)]
        for name, metric in METRICS.items()
        if any(name in row.results for row in rows)
    }


def systems_of(rows: Sequence[EvalRow]) -> dict[str, dict[Any, EvalRow]]:
    """The rows by label and seed. Runs that differ only in their seed share a label; every other row has its own."""
    groups = runs_by_seed(rows)
    grouped = [row for group in groups for row in group.values()]
    alone = [row for row in rows if not any(row is other for other in grouped)]
    return {group_label(group): group for group in groups} | {row.name: {seed_of(row): row} for row in alone}


def seed_of(row: EvalRow) -> Any:
    """The seed of a run; for a reference or an imported SAE, its name."""
    record = read_run_record(row.folder) if row.folder else None
    return row.name if record is None else record.get("seed", row.name)


def without_empty_columns(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """The headings and lines of a table, without the columns that are empty in every line."""
    kept = [place for place in range(len(heads)) if any(line[place] for line in lines)]
    return [heads[place] for place in kept], [[line[place] for place in kept] for line in lines]


def describe_counts(results: Sequence[MetricResult]) -> str:
    """The counts of what was measured, if they are the same for all results, and the number of outlier rows left
    out."""
    counts = {
        ", ".join(f"{n:,} {what.replace('_', ' ')}" for what, n in one.n.items() if n and what != OUTLIERS)
        for one in results
    }
    parts = list(counts) if len(counts) == 1 else []
    fewest, *_, most = sorted([one.n.get(OUTLIERS, 0) for one in results] * 2)
    if most:
        parts.append(f"{f'{fewest:,} to ' if fewest < most else ''}{most:,} outlier rows left out")
    return ", ".join(filter(None, parts))


def notes(rows: Sequence[MeasuredRun], shown: Collection[str] | None = None) -> list[str]:
    """The flags and notes of all runs as sentences. Flags that differ only in their numbers, or in listed letters,
    appear once.

    The flags are about the numbers that tables show, which are those without outlier rows. `shown` names the metrics
    that can be in tables (default: all). The caveats of measured metrics are included.
    """
    measured = dict.fromkeys(metric for row in rows for metric in row.results)
    shown = [metric for metric in measured if shown is None or metric in shown]
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for row in rows:
        for metric, result in row.results.items():
            for flag in () if row.is_reference or metric not in shown else result.sound.flags:
                groups.setdefault((metric, VARYING.sub("#", flag)), []).append((row.name, flag))
    sentences = []
    for (metric, _), flags in groups.items():
        name, flag = flags[0]
        others = f" and {len(flags) - 1} more" if len(flags) > 1 else ""
        sentences.append(f"{metric}, {name}{others}: {flag}")
    shares = [SHARE_NOTE] if any(row.is_control for row in rows) and not all(row.is_control for row in rows) else []
    beside = dict.fromkeys(note for row in rows for note in row.control_notes)  # shared by the runs of a system
    return [*sentences, *caveats(shown), *dict.fromkeys(note for row in rows for note in row.notes), *beside, *shares]


def column_heading(column: MetricColumn) -> str:
    """The name with an arrow in the better direction and, on the next line, the range of the number."""
    ends = ["" if end is None else f"{end:g}" for end in (column.floor, column.ceiling)]
    return column.heading + ARROWS[column.better] + (f"\n{ends[0]}..{ends[1]}" if any(ends) else "")


def metric_heading(metric: str, column: MetricColumn) -> str:
    """The column's heading; if the heading alone is ambiguous, the name of the metric is on the line above it."""
    names = {
        "absorption": "absorption",
        "sparse_probing": "probing",
        "sparse_probing_stdlib": "stdlib probing",
        "sae_probes": "sae-probes",
        "stability": "stability",
        "ravel": "RAVEL",
        "ravel_facts": "RAVEL, own facts",
    }
    name = names.get(metric, "stdlib" if metric.endswith("_stdlib") else "")
    return f"{name}\n{column_heading(column)}" if name else column_heading(column)


def number_name(metric: str, column: MetricColumn) -> str:
    """How a sentence names a number: by its heading, in one line and without the range."""
    return " ".join(line for line in metric_heading(metric, column).split("\n") if ".." not in line)


def format_cell(row: EvalRow, metric: str, column: MetricColumn) -> str:
    value = metric_value(row, metric, column)
    return "" if value is None else format_with_spread(value, half_interval(row, metric, column), column.format)


def format_with_spread(value: float, spread: float, form: str) -> str:
    return format(value, form) + (f" ±{format(spread, form).removeprefix('0')}" if spread > 0 else "")


def seed_lines(rows: Sequence[EvalRow], metric: str, columns: Sequence[MetricColumn]) -> list[list[str]]:
    """A line with mean and sd for each group of runs that differ only in their seed.

    For every group except the first, three lines follow: the group's difference from the first group, with half the
    width of its 95 % interval (runs with the same seed are paired); the smallest difference that these seeds can
    detect; and the verdict, based on p-values that are corrected for all comparisons of the table
    (docs/reference/statistics.md).
    """
    groups = runs_by_seed(rows)
    judged = judge_seeds(groups, metric, columns)
    lines: list[list[str]] = []
    for place, group in enumerate(groups):
        lines.append([f"{group_name(group)}, {len(group)} seeds ± sd", *mean_cells(group, metric, columns)])
        if any(one.differences for one, _ in judged.get(place, ())):
            minus = f"{group_name(group)} - {group_name(groups[0])}"
            pairs = [(*one, column) for one, column in zip(judged[place], columns, strict=True)]
            lines += [
                [f"{minus}, paired", *(format_difference(one.differences, column) for one, _, column in pairs)],
                ["smallest detectable", *(format_detectable(one.detectable, column) for _, one, column in pairs)],
                ["verdict", *(str(one.verdict) if tested.is_test else "" for tested, one, _ in pairs)],
            ]
    return lines


def judge_seeds(
    groups: Sequence[RunBySeed], metric: str, columns: Sequence[MetricColumn]
) -> dict[int, list[tuple[PairedComparison, Finding]]]:
    """Index of each group except the first -> its comparisons with the first group, one for each number. The p-values
    of all these comparisons are corrected together."""
    paired = {place: seed_differences(groups[place], groups[0], metric, columns) for place in range(1, len(groups))}
    findings = iter(judge([one for tests in paired.values() for one in tests]))
    return {place: [(one, next(findings)) for one in tests] for place, tests in paired.items()}


def seed_verdicts(rows: Sequence[EvalRow]) -> dict[tuple[str, str, str, MetricColumn], Verdict]:
    """The verdicts that the tables of these rows show on groups of runs that differ only in their seed: (group, first
    group, metric, column) -> verdict."""
    known = {}
    for metric, columns in shown_columns(rows).items():
        groups = runs_by_seed([row for row in rows if metric in row.results])
        for place, found in judge_seeds(groups, metric, columns).items():
            for (tested, finding), column in zip(found, columns, strict=True):
                if tested.is_test:
                    known[group_label(groups[place]), group_label(groups[0]), metric, column] = finding.verdict
    return known


def mean_cells(group: Mapping[int, EvalRow], metric: str, columns: Sequence[MetricColumn]) -> list[str]:
    """The mean and standard deviation of each number over the seeds of a group."""
    cells = []
    for column in columns:
        values = [v for row in group.values() if (v := metric_value(row, metric, column)) is not None]
        spread = statistics.stdev(values) if len(values) > 1 else 0
        cells.append(format_with_spread(statistics.mean(values), spread, column.format) if values else "")
    return cells


def seed_differences(
    group: RunBySeed, first: RunBySeed, metric: str, columns: Sequence[MetricColumn]
) -> list[PairedComparison]:
    """For each number, the comparison of two groups over the seeds that both groups have."""
    tests = []
    for column in columns:
        differences = pair_systems(group, first, metric, column).differences
        by_seed = differences if differences and differences.unit == SEED else None
        tests.append(PairedComparison(by_seed, column.better, default_margin(column.floor, column.ceiling)))
    return tests


def detectable_lines(rows: Sequence[EvalRow], metric: str, columns: Sequence[MetricColumn]) -> list[list[str]]:
    """A line with the smallest difference between two SAEs that this text can detect; no line if nothing is paired.

    The smallest detectable difference is computed for each comparison of the first SAE with another, at the level
    corrected for the number of comparisons, and the largest of these differences is shown.
    """
    saes = [row for row in rows if not row.is_reference]
    if len(saes) < 2:
        return []
    first, *others = saes
    spread = []
    for column in columns:
        found = [pair_runs(other, first, metric, column).differences for other in others if column.better]
        spread.append([one for one in found if one is not None and one.has_spread])
    tests = sum(map(len, spread))
    if not tests:
        return []
    (unit, *_) = [one.unit for some in spread for one in some]
    detectable = [max(one.detectable(tests) for one in some) if some else None for some in spread]
    cells = [format_detectable(value, column) for value, column in zip(detectable, columns, strict=True)]
    return [[f"smallest detectable, by {unit}", *cells]]


def runs_by_seed(rows: Sequence[EvalRow]) -> list[dict[int, EvalRow]]:
    """Groups of at least two runs that differ only in their seed, each as a mapping seed -> run."""
    groups: dict[str, dict[int, EvalRow]] = {}
    for row in rows:
        if row.folder:
            record = read_run_record(row.folder)
            if record is not None and "seed" in record:  # a reference or an imported SAE has none
                groups.setdefault(digest_without_seed(record), {})[record["seed"]] = row
    return [group for group in groups.values() if len(group) > 1]


def group_name(group: RunBySeed) -> str:
    return next(iter(group.values())).name.rsplit("-s", 1)[0]


def group_label(group: RunBySeed) -> str:
    return f"{group_name(group)} ({len(group)} seeds)"


def paired_difference(pairs: Sequence[tuple[MeasuredRun, MeasuredRun]], metric: str, column: MetricColumn) -> str:
    """The mean difference over pairs of runs, with half the width of its 95 % interval (Student's t); empty if there
    are fewer than two pairs."""
    values = [(metric_value(one, metric, column), metric_value(other, metric, column)) for one, other in pairs]
    differences = [one - other for one, other in values if one is not None and other is not None]
    return format_difference(PairedDifferences(differences, SEED) if len(differences) > 1 else None, column)


def format_difference(differences: PairedDifferences | None, column: MetricColumn) -> str:
    if differences is None:
        return ""
    low, high = differences.interval
    return format_with_spread(differences.mean, (high - low) / 2, column.format)


def format_detectable(difference: float | None, column: MetricColumn) -> str:
    """A smallest detectable difference as text; ">1" if it exceeds the whole range of a number between 0 and 1."""
    if difference is None:
        return ""
    span = None if column.floor is None or column.ceiling is None else column.ceiling - column.floor
    return f">{span:g}" if span is not None and difference > span else format(difference, column.format)
