"""The comparison of runs as a page."""

from datetime import date
from importlib.metadata import version

from ...common.formatting import format_count
from ..compare import Comparison, comparison_table, frontiers, paired_table, training_curves
from ..tables import notes
from .page import render_page
from .svg import draw_svg, shared_legend


def comparison_page(comparison: Comparison, against: str | None = None) -> str:
    """HTML: the table, the paired differences to the system `against`, what else differs, notes, the frontiers over L0 and the curves of training."""
    heads, lines = comparison_table(comparison)
    models = sorted({run.origin.get("model", {}).get("name", "?") for run in comparison.runs})
    layers = sorted({run.origin.get("layer", -1) for run in comparison.runs})
    over_l0, trained = frontiers(comparison), training_curves(comparison)
    return render_page(
        "compare.html",
        "sort.js",
        title=f"{format_count(len(comparison.runs), 'SAE')} of {', '.join(models)}, layer {', '.join(map(str, layers))}",
        lead=f"{len(comparison.systems)} systems; {', '.join(sorted({m for run in comparison.runs for m in run.results}))}.",
        heads=heads,
        lines=lines,
        paired=paired_table(comparison, against) if against else None,
        systems=len(comparison.systems),
        differences=comparison.differences,
        frontiers=[(chart, draw_svg(chart, legend=False)) for chart in over_l0],
        frontier_key=shared_legend(over_l0),
        curves=[(chart, draw_svg(chart, legend=False)) for chart in trained],
        curve_key=shared_legend(trained),
        notes=notes(comparison.runs),
        version=version("sae-pipeline"),
        date=date.today().isoformat(),
    )
