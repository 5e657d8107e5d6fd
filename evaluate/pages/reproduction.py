"""The page of a paper's reproduction."""

from collections.abc import Container, Sequence
from datetime import date
from importlib.metadata import version

from markupsafe import Markup

from ..charts import Chart
from ..metrics.registry import METRICS, caveats
from ..papers.figures import letters, paper_figures
from ..papers.report import PaperReport, describe_system, runs_by_system, shown_layer, unreported_table
from ..papers.settings import compare_settings
from ..papers.verdict import MEANINGS, WORST_FIRST, Verdict
from ..tables import describe_model
from .page import render_page
from .svg import CHART_SIZE, draw_svg, shared_legend

MIN_WIDE_CATEGORIES = 16  # a chart with more categories takes the full width of the page
WIDE = (1240, 460)  # pixels


def reproduction_page(report: PaperReport, model: str) -> str:
    """The HTML page: claims with verdicts, gates, the paper's contradictions, what was run, and figures.

    `model` is shown if no run records a model.
    """
    paper, systems = report.paper, runs_by_system(report)
    models = sorted({describe_model(run.run.origin["model"]) for run in report.runs if "model" in run.run.origin})
    return render_page(
        "report.html",
        title=f"{paper.number} {paper.title}",
        verdict_class=verdict_class,
        report=report,
        paper=paper,
        model=", ".join(models) or model,
        setting=describe_runs(report),
        systems=[(system, describe_system(system)) for system in paper.systems.values()],
        settings=compare_settings(paper, report.runs),
        meanings={verdict: MEANINGS[verdict] for verdict in shown_verdicts(report)},
        figures={heading: draw_charts(charts, systems) for heading, charts in paper_figures(report).items()},
        drawn_layer=shown_layer(report),
        several_seeds=any(len(runs) > 1 for runs in systems.values()),
        letters=letters(report),
        unreported=unreported_table(report),
        caveats=caveats(
            metric for metric in METRICS if metric in {claim.metric.split(".")[0] for claim in paper.claims}
        ),
        version=version("sae-pipeline"),
        date=date.today().isoformat(),
    )


def describe_runs(report: PaperReport) -> str:
    """Layers, seeds and sizes of our runs."""
    if not report.runs:
        return "none yet"
    layers = ", ".join(map(str, sorted({run.layer for run in report.runs})))
    seeds = sorted({run.seed for run in report.runs})
    named = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    records = [run.run.record for run in report.runs]
    sizes = sorted({(record["d_sae"], record["steps"], record["batch_size"]) for record in records})
    shown = ", ".join(f"{d_sae:,} latents, {steps:,} steps of {batch:,} tokens" for d_sae, steps, batch in sizes)
    return f"layer {layers}, {named}; {shown}"


def shown_verdicts(report: PaperReport) -> list[Verdict]:
    """The verdicts that occur on the page, best first."""
    found = {row.verdict for row in report.rows}
    return [verdict for verdict in reversed(WORST_FIRST) if verdict in found]


def verdict_class(verdict: str) -> str:
    """The class in page.css for a verdict."""
    return verdict.replace("'", "").replace(" ", "-")


def draw_charts(charts: Sequence[Chart], systems: Container[str]) -> tuple[Markup, list[tuple[Chart, Markup, bool]]]:
    """The shared legend of the systems, and a tuple (chart, drawing, whether it is wide) for each chart.

    The shared legend covers only charts whose axis does not name the systems. A chart whose series are not systems has
    its own legend.
    """
    sharing = [
        chart
        for chart in charts
        if all(series.name in systems and series.name not in chart.categories for series in chart.series)
    ]
    figures = []
    for chart in charts:
        has_legend = any(series.name not in systems for series in chart.series)
        is_wide = len(chart.categories) > MIN_WIDE_CATEGORIES
        width, height = WIDE if is_wide else CHART_SIZE
        figures.append((chart, draw_svg(chart, has_legend, width, height), is_wide))
    return shared_legend(sharing), figures
