"""Results as tables for a reader: which direction is better, the range, what was counted, and how sure a number is."""

import re
import statistics
from collections.abc import Iterator, Sequence

from ..cache.files import digest_of, read_json
from .metric import Number
from .run import METRICS, Row

ARROWS = {"up": " ↑", "down": " ↓", "": ""}


def tables(rows: Sequence[Row]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
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
            numbers = [n for n in metric.numbers if any(value_of(row, name, n) is not None for row in measured)]
            lines = [[row.name, *(cell(row, name, number) for number in numbers)] for row in measured]
            yield title, ["run", *map(head, numbers)], lines + over_seeds(measured, name, numbers)


def notes(rows: Sequence[Row]) -> list[str]:
    """The flags of all runs, those that differ in nothing but their figures once."""
    told: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for row in rows:
        for name, result in row.results.items():
            for flag in () if row.subject.reference else result.flags:
                told.setdefault((name, re.sub(r"[0-9.]+", "#", flag)), []).append((row.name, flag))
    return [
        f"{metric}, {found[0][0]}" + (f" and {len(found) - 1} more" if len(found) > 1 else "") + f": {found[0][1]}"
        for (metric, _), found in told.items()
    ]


def head(number: Number) -> str:
    """The name with the better direction, and under it the range, from useless to perfect."""
    ends = ["" if end is None else f"{end:g}" for end in (number.floor, number.ceiling)]
    return number.heading + ARROWS[number.better] + (f"\n{ends[0]}..{ends[1]}" if any(ends) else "")


def value_of(row: Row, metric: str, number: Number) -> float | None:
    value = row.results[metric].metrics.get(number.category, {}).get(number.name)
    return None if value == -1 else value


def cell(row: Row, metric: str, number: Number) -> str:
    value = value_of(row, metric, number)
    low, high = row.results[metric].intervals.get(number.category, {}).get(number.name) or (-1, -1)
    if value is None:
        return ""
    return with_spread(value, (high - low) / 2, number.form)


def with_spread(value: float, spread: float, form: str) -> str:
    return format(value, form) + (f" ±{format(spread, form).removeprefix('0')}" if spread > 0 else "")


def over_seeds(rows: Sequence[Row], metric: str, numbers: Sequence[Number]) -> list[list[str]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        path = row.folder / "run.json"
        if path.exists():
            groups.setdefault(digest_of({k: v for k, v in read_json(path).items() if k != "seed"}), []).append(row)
    lines = []
    for group in groups.values():
        if len(group) > 1:
            line = [f"{group[0].name.rsplit('-s', 1)[0]}, {len(group)} seeds ± sd"]
            for number in numbers:
                values = [value for row in group if (value := value_of(row, metric, number)) is not None]
                spread = statistics.stdev(values) if len(values) > 1 else 0
                line.append(with_spread(statistics.mean(values), spread, number.form) if values else "")
            lines.append(line)
    return lines
