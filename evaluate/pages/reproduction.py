"""A paper's report as a page."""

from datetime import date
from importlib.metadata import version

from ..report import Report, described, figures, letters, unreported
from .charts import key, svg
from .page import page


def reproduction_page(report: Report, model: str, reading: str) -> str:
    """HTML: every claim with its verdict, the gates, the paper's contradictions, what was run, figures."""
    paper = report.paper
    drawn = figures(report)
    layers = sorted({run.layer for run in report.runs})
    seeds = sorted({run.seed for run in report.runs})
    sizes = sorted({(run.run.run["d_sae"], run.run.run["steps"], run.run.run["batch_size"]) for run in report.runs})
    wide = ", ".join(f"{d_sae:,} latents, {steps:,} steps of {batch:,} tokens" for d_sae, steps, batch in sizes)
    ran = paper.ran
    return page(
        "report.html",
        title=f"{paper.number} {paper.title}",
        report=report,
        paper=paper,
        model=model,
        setting=f"layer {', '.join(map(str, layers))}, seeds {', '.join(map(str, seeds))}; {wide}" if report.runs else "none yet",
        systems=[(system, described(system)) for system in paper.systems.values()],
        ran=f"{ran.model}, {ran.dataset}, layer {', '.join(map(str, ran.layers))}, {ran.d_sae:,} latents, {ran.steps:,} steps of {ran.batch_size:,}, rate {ran.lr:g}, penalty {ran.l1:.3g}, {ran.optimizer}",
        used=reading,
        figures=[(chart, svg(chart, legend=False)) for chart in drawn],
        key=key(drawn),
        letters=letters(report),
        unreported=unreported(report),
        version=version("sae-pipeline"),
        date=date.today().isoformat(),
    )  # fmt: skip
