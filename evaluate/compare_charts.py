"""The charts of a comparison: every metric plotted against L0, with published results, and the training curves."""

import math
import re
import tomllib
import warnings
from collections.abc import Container, Sequence
from dataclasses import replace
from pathlib import Path

from ..common.errors import DamagedError, LeftOutWarning
from ..common.files import parse_json, read_file
from ..common.formatting import format_count
from .charts import Chart, Series, axis_ranges
from .compare import L0, ComparedSystem, Comparison, metric_heading, sae_location
from .metrics.base import MetricColumn
from .metrics.registry import METRICS

CURVE_TITLES = {  # scalar in metrics.jsonl -> title; explained_variance is drawn as 1 - explained_variance
    "explained_variance": "variance unexplained",
    "l0": "L0",
    "dead": "dead",
    "loss": "loss",
}
LOG_SCALE_CURVES = ("explained_variance", "loss")
ALL_ROWS_NOTE = "SAEBench's numbers over all rows, outlier rows included, like the published ones."
FRAMING_REFERENCE = "pca"  # the PCA has the same L0 as the SAEs; other references may lie far from them
PUBLISHED = Path(__file__).parent / "published.toml"


def frontiers(comparison: Comparison, numbers: Sequence[tuple[str, MetricColumn]] | None = None) -> list[Chart]:
    """One chart against L0 for each of `numbers` (default: each column of the comparison).

    Each recipe is drawn as a line through its systems in order of L0, and each reference as a point. The axes cover the
    SAEs and the PCA only: if they also covered the identity, whose L0 is d_in, nearly equal SAEs would be drawn in the
    same place. Points far outside the axes are named in the chart's note. Charts with published results show SAEBench's
    numbers, which include outlier rows, as the published results do; the note says so.
    """
    l0 = next(column for column in METRICS[L0[0]].columns if column.name == L0[1])
    systems = [*comparison.systems, *comparison.references]
    names = list(dict.fromkeys(series_name(system, comparison) for system in systems))
    masks_rows, on_all_rows = any(run.masks_rows for run in comparison.runs), comparison.on_all_rows()
    charts = []
    for metric, column in comparison.columns if numbers is None else numbers:
        if (metric, column.name) == L0:
            continue
        published = published_series(comparison, metric, column)
        source = on_all_rows if published else comparison
        systems = [*source.systems, *source.references]
        points: dict[str, list[tuple[float, float, float, str]]] = {}
        for system in systems:
            x, y = system.mean_and_spread("core", l0), system.mean_and_spread(metric, column)
            if x and y and x[0] > 0:
                label = f"{system.label}: L0 {x[0]:.1f}, {y[0]:.4g}"
                points.setdefault(series_name(system, comparison), []).append((x[0], *y, label))
        series = [frontier_series(name, sorted(some), names.index(name)) for name, some in points.items()]
        title = metric_heading(metric, column).split("\n0")[0].replace("\n", " ")
        note = ALL_ROWS_NOTE if published and masks_rows else ""
        chart = Chart(title, "L0", title, series + published, x_log=True, note=note)
        references = {series_name(system, comparison) for system in comparison.references} - {FRAMING_REFERENCE}
        charts.append(without_far_series(chart, references))
    return charts


def without_far_series(chart: Chart, names: Container[str]) -> Chart:
    """The chart without those series in `names` that lie far from the other series. Its note lists their points."""
    kept = [series for series in chart.series if series.name not in names]
    if not kept:
        return chart
    frame = axis_ranges(replace(chart, series=kept))
    points = {series.name: list(zip(series.x, series.y, strict=True)) for series in chart.series}
    near = [one for one in chart.series if one in kept or all(in_frame(frame, *xy) for xy in points[one.name])]
    far = [label.partition(": ") for series in chart.series if series not in near for label in series.labels]
    outside = f"Outside this chart: {'; '.join(f'{name} ({point})' for name, _, point in far)}." if far else ""
    return replace(chart, series=near, note=" ".join(filter(None, [chart.note, outside])))


def in_frame(frame: tuple[tuple[float, float], tuple[float, float]], l0: float, y: float) -> bool:
    """Whether a point lies within the ranges of the axes, or outside a range by at most a quarter of its length."""
    (x_low, x_high), (y_low, y_high) = frame
    x_room, y_room = (x_high / x_low) ** 0.25, (y_high - y_low) / 4
    return x_low / x_room <= l0 <= x_high * x_room and y_low - y_room <= y <= y_high + y_room


def frontier_series(name: str, points: Sequence[tuple[float, float, float, str]], style: int) -> Series:
    x, y, spread, labels = zip(*points, strict=True)
    return Series(name, x, y, "both" if len(points) > 1 else "points", spread, labels, style)


def series_name(system: ComparedSystem, comparison: Comparison) -> str:
    """The recipe, with its width if widths differ; for references, the name without rank or L0, such as "pca"."""
    if system.runs[0].is_reference:
        return re.sub(r"-\d.*", "", system.label)
    record = system.runs[0].record
    widths = {run.record.get("d_sae") for run in comparison.runs}
    width = f" {record['d_sae']}" if len(widths) > 1 and record.get("d_sae") else ""
    return f"{record.get('variant', system.label)}{width}"


def published_series(comparison: Comparison, metric: str, column: MetricColumn) -> list[Series]:
    """Published results for the same number at the same layer of the same model."""
    key = (*sae_location(comparison.runs[0]).values(), metric, column.name)
    series = []
    for one in tomllib.loads(PUBLISHED.read_text())["series"]:
        if (one["model"], one["layer"], "resid_post", one["metric"], one["number"]) == key:
            x, y = zip(*one["points"], strict=True)
            labels = [f"{one['name']}, published: L0 {at}, {value}" for at, value in one["points"]]
            series.append(Series(f"{one['name']} (published)", x, y, "both", labels=labels))
    return series


def training_curves(comparison: Comparison) -> list[Chart]:
    """The values logged during training, plotted against the number of tokens, with one line for each run."""
    logs = {run.name: read_metrics_log(run.folder) for run in comparison.runs}
    charts = []
    for name, title in CURVE_TITLES.items():
        series = []
        for style, (run, log) in enumerate(logs.items()):
            points = [(line["tokens"], line[name]) for line in log if "tokens" in line and name in line]
            y = [1 - value if name == "explained_variance" else value for _, value in points]
            series.append(Series(run, [tokens for tokens, _ in points], y, "line", style=style))
        if any(one.x for one in series):
            charts.append(Chart(title, "tokens", title, series, y_log=name in LOG_SCALE_CURVES))
    return charts


def read_metrics_log(folder: Path) -> list[dict[str, float]]:
    """The numbers in each line of metrics.jsonl; an empty list if there is no such file.

    A last line that was cut off by a kill is skipped; a warning gives the number of other lines that cannot be read.
    """
    path = folder / "metrics.jsonl"
    texts = read_file(path).split(b"\n") if path.exists() else []
    read = [numbers_in_line(text, path) for text in texts]
    if damaged := sum(numbers is None for numbers in read[:-1]):
        warnings.warn(f"Left out: {format_count(damaged, 'line')} of {path} that cannot be read.", LeftOutWarning, 2)
    return [numbers for numbers in read if numbers is not None]


def numbers_in_line(text: bytes, path: Path) -> dict[str, float] | None:
    """The numbers of a JSON object, which must have a finite "step"; None if the text is not such an object."""
    try:
        line = parse_json(text, path)
        numbers = {name: float(value) for name, value in line.items() if type(value) in (int, float)}
    except (DamagedError, AttributeError, OverflowError):
        return None
    return numbers if math.isfinite(numbers.get("step", math.nan)) else None
