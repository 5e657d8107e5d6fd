"""A paper's report as a page."""

from collections.abc import Container, Sequence
from datetime import date
from importlib.metadata import version

from markupsafe import Markup

from ..charts import Chart
from ..papers.figures import letters, paper_figures
from ..papers.report import PaperReport, describe_system, runs_by_system, shown_layer, unreported_table
from .page import render_page
from .svg import draw_svg, shared_legend

MIN_WIDE_CATEGORIES = 16  # categories over which a chart has the whole width of the page


def reproduction_page(report: PaperReport, model: str, reading: str) -> str:
    """HTML: every claim with its verdict, the gates, the paper's contradictions, what was run, figures."""
    paper = report.paper
    systems = runs_by_system(report)
    layers = sorted({run.layer for run in report.runs})
    seeds = sorted({run.seed for run in report.runs})
    sizes = sorted({(run.run.run["d_sae"], run.run.run["steps"], run.run.run["batch_size"]) for run in report.runs})
    wide = ", ".join(f"{d_sae:,} latents, {steps:,} steps of {batch:,} tokens" for d_sae, steps, batch in sizes)
    ran = paper.ran
    return render_page(
        "report.html",
        title=f"{paper.number} {paper.title}",
        report=report,
        paper=paper,
        model=model,
        setting=f"layer {', '.join(map(str, layers))}, seeds {', '.join(map(str, seeds))}; {wide}" if report.runs else "none yet",
        systems=[(system, describe_system(system)) for system in paper.systems.values()],
        ran=f"{ran.model}, {ran.dataset}, layer {', '.join(map(str, ran.layers))}, {ran.d_sae:,} latents, {ran.steps:,} steps of {ran.batch_size:,}, rate {ran.lr:g}, penalty {ran.l1:.3g}, {ran.optimizer}",
        used=reading,
        figures={heading: draw_charts(charts, systems) for heading, charts in paper_figures(report).items()},
        drawn_layer=shown_layer(report),
        several_seeds=any(len(runs) > 1 for runs in systems.values()),
        letters=letters(report),
        unreported=unreported_table(report),
        version=version("sae-pipeline"),
        date=date.today().isoformat(),
    )  # fmt: skip


def draw_charts(charts: Sequence[Chart], systems: Container[str]) -> tuple[Markup, list[tuple[Chart, Markup, bool]]]:
    """The key of the systems that no axis names; and each chart, drawn, and whether it is wide.

    A chart of other series than systems has a legend of its own.
    """
    keyed = [
        one
        for one in charts
        if all(series.name in systems and series.name not in one.categories for series in one.series)
    ]
    figures = []
    for chart in charts:
        legend, wide = (
            any(series.name not in systems for series in chart.series),
            len(chart.categories) > MIN_WIDE_CATEGORIES,
        )
        size = (1240, 460) if wide else (500, 320)  # small enough to be read on a telephone
        figures.append((chart, draw_svg(chart, legend, *size), wide))
    return shared_legend(keyed), figures
