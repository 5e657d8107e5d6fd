"""Results as tables for a reader: heads with the direction that is better and the range, one line a row."""

from collections.abc import Iterator, Sequence

from .metric import Metric, Number
from .run import METRICS, Row

ARROWS = {"up": " ↑", "down": " ↓", "": ""}


def tables(rows: Sequence[Row]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """For each metric that was measured: its title, heads and lines. A cell is empty where a row has no such number."""
    for name, metric in METRICS.items():
        measured = [row for row in rows if name in row.results]
        if measured:
            heads = ["run", *map(head, metric.numbers)]
            yield metric.title, heads, [[row.name, *cells(row, metric)] for row in measured]


def head(number: Number) -> str:
    return number.heading + ARROWS[number.better]


def cells(row: Row, metric: type[Metric]) -> list[str]:
    return [cell(row, metric.name, number) for number in metric.numbers]


def cell(row: Row, metric: str, number: Number) -> str:
    value = row.results[metric].metrics.get(number.category, {}).get(number.name)
    return "" if value in (None, -1) else format(value, number.form)
