"""Results as tables for a reader: which direction is better, the range, what was counted, and how sure a number is."""

import statistics
from collections.abc import Iterator, Sequence

from ..cache.files import digest_of, read_json
from .metric import Metric, Number
from .run import METRICS, Row

ARROWS = {"up": " ↑", "down": " ↓", "": ""}


def tables(rows: Sequence[Row]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """For each metric that was measured: its title, heads and lines.

    A cell is a number and half its 95 % interval, where it has one; empty where a row has no such number. Runs that
    differ in nothing but their seed get a line with their mean and standard deviation.
    """
    for name, metric in METRICS.items():
        measured = [row for row in rows if name in row.results]
        if measured:
            counted = {", ".join(f"{n:,} {what}" for what, n in row.results[name].n.items()) for row in measured}
            title = f"{metric.title}; n = {counted.pop()}" if len(counted) == 1 and counted != {""} else metric.title
            lines = [[row.name, *(cell(row, name, number) for number in metric.numbers)] for row in measured]
            yield title, ["run", *map(head, metric.numbers)], lines + over_seeds(measured, metric)


def head(number: Number) -> str:
    """The name with the better direction, and under it the least and the largest that the number can well be."""
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


def over_seeds(rows: Sequence[Row], metric: type[Metric]) -> list[list[str]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        path = row.folder / "run.json"
        if path.exists():
            groups.setdefault(digest_of({k: v for k, v in read_json(path).items() if k != "seed"}), []).append(row)
    lines = []
    for group in groups.values():
        if len(group) > 1:
            line = [f"{group[0].name.rsplit('-s', 1)[0]}, {len(group)} seeds ± sd"]
            for number in metric.numbers:
                values = [value for row in group if (value := value_of(row, metric.name, number)) is not None]
                spread = statistics.stdev(values) if len(values) > 1 else 0
                line.append(with_spread(statistics.mean(values), spread, number.form) if values else "")
            lines.append(line)
    return lines
