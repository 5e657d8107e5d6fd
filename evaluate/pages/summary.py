"""The first part of an SAE's page: the answers to a reader's questions, and the comparisons behind them."""

from dataclasses import replace
from typing import Any

from ..answers import EXPLAINED, answer_questions
from ..charts import Chart, Series
from ..compare import ComparedSystem, Comparison, group_by_system
from ..compare_charts import frontiers
from ..compared_runs import ComparedRun
from ..frontier import FRONTIER_NUMBERS, PUBLISHED_NUMBER, find_column
from ..neighbours import RunsBeside, find_neighbours
from .probes import METRIC as PROBES
from .probes import probes_of_run
from .stability import METRIC as STABILITY
from .stability import stability_of_run
from .svg import CHART_SIZE, draw_svg, shared_legend

THIS_SAE = "this SAE"
L0_COLUMN = find_column("core", "l0")


def summary_section(run: ComparedRun) -> dict[str, Any]:
    """The values for the part of the template about a run: answers, frontier, sae_probes and stability."""
    near = find_neighbours(run)
    charts = frontier_charts(near)
    probed, stable = run.results.get(PROBES), run.results.get(STABILITY)
    return {
        "report": answer_questions(near),
        "explained": EXPLAINED,
        "published": any(has_published(chart) for chart in charts),
        "frontiers": [(chart, draw_svg(chart, False, *CHART_SIZE)) for chart in charts],
        "frontier_key": shared_legend(charts),
        "probed": probes_of_run(probed) if probed else None,
        "stable": stability_of_run(stable) if stable else None,
    }


def frontier_charts(near: RunsBeside) -> list[Chart]:
    """Core's numbers over L0: the run, other runs, references and published SAEs. Empty if there is nothing to compare
    with."""
    references = [ComparedSystem(run.name, [run]) for run in near.references]
    comparison = Comparison(group_by_system([near.run, *near.seeds, *near.others]), references, [])
    numbers = [one for one in (*FRONTIER_NUMBERS, PUBLISHED_NUMBER) if one in comparison.columns]
    charts = []
    for number, chart in zip(numbers, frontiers(comparison, numbers), strict=True):
        if sum(len(series.x) for series in chart.series) > 1:
            # A chart with published results shows only numbers over all rows, outlier rows included.
            charts.append(with_this(chart, near.run.on_all_rows() if has_published(chart) else near.run, *number))
    return charts


def has_published(chart: Chart) -> bool:
    return any(series.name.endswith("(published)") for series in chart.series)


def with_this(chart: Chart, run: ComparedRun, metric: str, column: Any) -> Chart:
    """The chart with the run itself as a separate series, drawn last."""
    l0, value = run.value(*L0_COLUMN), run.value(metric, column)
    if not l0 or value is None:
        return chart
    used = [place if series.style is None else series.style for place, series in enumerate(chart.series)]
    label = f"{run.name}: L0 {l0:.1f}, {value:.4g}"
    this = Series(THIS_SAE, [l0], [value], "points", labels=[label], style=max(used, default=-1) + 1)
    return replace(chart, series=[*chart.series, this])
