"""The page of a comparison of runs."""

from datetime import date
from importlib.metadata import version

from ...common.formatting import format_count
from ..against import Against
from ..compare import SUMMARY_METRICS, Comparison, detectable_line, share_table, system_table
from ..compare_charts import frontiers, training_curves
from ..frontier import ON_FRONTIER, PUBLISHED_NOTE, PUBLISHED_NUMBER, frontier_table, heading
from ..metrics.base import MetricResult
from ..tables import describe_model, notes
from .page import render_page
from .probes import METRIC as PROBES
from .probes import probes_of_systems
from .stability import METRIC as STABILITY
from .stability import stability_of_systems
from .svg import CHART_SIZE, draw_svg, shared_legend


def comparison_page(comparison: Comparison, against: Against | None = None) -> str:
    """The HTML page: table, tests against one system, frontiers, sae_probes, stability, training curves and notes."""
    headings, lines = system_table(comparison)
    share_heads, share_lines = share_table(comparison)
    runs = comparison.runs
    models = sorted({describe_model(run.origin.get("model", {})) for run in runs})
    layers = sorted({run.origin.get("layer", -1) for run in runs})
    sites = sorted({run.origin.get("site", "resid_post") for run in runs} - {"resid_post"})
    where = f"layer {', '.join(map(str, [*layers, *sites]))}"
    metrics = sorted({metric for run in runs for metric in run.results})
    over_l0, curves = frontiers(comparison), training_curves(comparison)
    frontier_heads, frontier_lines = frontier_table(comparison)
    return render_page(
        "compare.html",
        ["sort.js"],
        title=f"{format_count(len(runs), 'SAE')} of {', '.join(models)}, {where}",
        lead=f"{format_count(len(comparison.systems), 'system')}, measured by {', '.join(metrics)}",
        heads=headings,
        lines=lines,
        detectable=detectable_line(comparison),
        share_heads=share_heads,
        share_lines=share_lines,
        against=against,
        systems=len(comparison.systems),
        differences=comparison.differences,
        on_frontier=ON_FRONTIER,
        frontier_heads=frontier_heads,
        frontier_lines=frontier_lines,
        published=PUBLISHED_NOTE if heading(*PUBLISHED_NUMBER) in frontier_heads else "",
        probed=probes_of_systems(results_by_system(comparison, PROBES)),
        stable=stability_of_systems(results_by_system(comparison, STABILITY)),
        frontiers=[(chart, draw_svg(chart, False, *CHART_SIZE)) for chart in over_l0],
        frontier_key=shared_legend(over_l0),
        curves=[(chart, draw_svg(chart, False, *CHART_SIZE)) for chart in curves],
        curve_key=shared_legend(curves),
        masked=comparison.masked_note,
        notes=[
            *(against.notes if against else ()),
            *notes(comparison.rows, SUMMARY_METRICS),
        ],
        version=version("sae-pipeline"),
        date=date.today().isoformat(),
    )


def results_by_system(comparison: Comparison, metric: str) -> dict[str, list[MetricResult]]:
    """The results of a metric, for each seed of each system."""
    return {
        system.label: [run.results[metric] for run in system.run_by_seed.values() if metric in run.results]
        for system in comparison.systems
    }
