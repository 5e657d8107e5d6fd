"""A paper's figures, redrawn from our runs, and additional charts of values that its mechanisms log.

Each series is one system of the paper at one layer: of the layers in our runs, the first that the paper also uses, or
the first of all if the paper uses none of them. Charts of training curves include every run; charts of measurements
include only runs that pass the gates. Charts without data are left out.

Paper: only the captions of the figures are available, not the figures and their axes. Three choices are therefore ours:
the metrics in figure 1 of 004, explained variance as the reconstruction in figure 1 (a) of 001, and tokens as the time
axis of 001 and 003.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import mean, stdev
from typing import Any

from ..charts import Chart, Kind, Series
from ..metrics.base import MetricResult
from .report import PaperReport, metric_values, runs_by_system, uses_stand_in
from .runs import SystemRun
from .verdict import entry_label

PAPER_HEADING = "The paper's figures and tables"
EXTRA_HEADING = "Training and mechanisms, without a figure in the paper"
KS = (1, 2, 5, 10, 20, 50)
L0 = "core.sparsity.l0"
VARIANCE = "core.reconstruction_quality.explained_variance"
KL = "core.model_behavior_preservation.kl_div_with_sae"
KL_SCORE = "core.model_behavior_preservation.kl_div_score"
MSE = "core.reconstruction_quality.mse"
ABSORPTION = "absorption.mean.mean_absorption_score"
SPLIT = "absorption.mean.mean_num_split_features"
SCR = "scr.scr_metrics.scr_metric_threshold_2"
Draw = Callable[[PaperReport, str], Chart]  # called with a report and a title
Values = dict[float, list[float]]  # x -> the value of each run at x
STAND_IN_NOTE = "Measured on the standard-library substitute of the dataset."


def paper_figures(report: PaperReport) -> dict[str, list[Chart]]:
    """Charts by heading: the paper's own figures, and other charts."""
    by_heading = {
        PAPER_HEADING: PAPER_FIGURES.get(report.paper.number, {}),
        EXTRA_HEADING: MECHANISM_FIGURES.get(report.paper.number, {}) | COMMON_FIGURES,
    }
    charts = {heading: [draw(report, title) for title, draw in draws.items()] for heading, draws in by_heading.items()}
    drawn = {heading: [chart for chart in some if chart.series] for heading, some in charts.items()}
    return {heading: some for heading, some in drawn.items() if some}


def mean_series(name: str, values: Values, kind: Kind = "points", style: int | None = None) -> Series:
    """The mean and sd over seeds at each x; an sd of 0 for a single seed."""
    sds = [stdev(some) if len(some) > 1 else 0.0 for some in values.values()]
    return Series(name, list(values), [mean(some) for some in values.values()], kind, sds, style=style)


def over_training(
    report: PaperReport, title: str, name: str, y: str, sd: str = "", to_one: bool = False, share_of: str = ""
) -> Chart:
    """A logged scalar, plotted against tokens: the mean over seeds, with a band of 1 sd over seeds.

    If `sd` is given, it names another logged scalar, whose mean over seeds is half the width of the band. If `to_one`
    is true, 1 - scalar is drawn on a logarithmic axis. If `share_of` is given, the scalar is divided by the logged
    scalar with that name.
    """
    series = []
    for style, (label, runs) in enumerate(runs_by_system(report).items()):
        if values := curve(runs, name, share_of):
            values = {tokens: [1 - one for one in some] for tokens, some in values.items()} if to_one else values
            line = mean_series(label, values, "line", style)
            if sd:
                widths = curve(runs, sd)
                line = replace(line, spread=[mean(widths.get(tokens, [0.0])) for tokens in values])
            series.append(line)
    banded = sd and any(any(line.spread) for line in series)
    note = "The band is ± 1 sd over pairs of latents, averaged over seeds." if banded else ""
    return Chart(title, "tokens", y, series, y_log=to_one, note=note)


def curve(runs: Sequence[SystemRun], name: str, share_of: str = "") -> Values:
    """Number of tokens -> the values of a logged scalar after that many tokens, one for each run that logged it there.
    If `share_of` is given, each value is divided by that other scalar; log lines where it is 0 are left out."""
    values: Values = {}
    for run in runs:
        lines = [line for line in run.log if name in line and "tokens" in line]
        if share_of:
            lines = [line for line in lines if line.get(share_of)]
        logged = {line["tokens"]: line[name] / (line[share_of] if share_of else 1) for line in lines}
        for tokens, value in logged.items():
            if math.isfinite(value):
                values.setdefault(tokens, []).append(value)
    return dict(sorted(values.items()))


def by_system(report: PaperReport, title: str, metric: str, y: str) -> Chart:
    """One metric, with a category for each system."""
    series: list[Series] = []
    for style, (label, runs) in enumerate(runs_by_system(report).items()):
        if values := metric_values(metric, runs, report.on_paper_model):
            series.append(mean_series(label, {len(series): values}, style=style))
    return Chart(title, "", y, series, categories=[one.name for one in series], note=stand_in_note(metric, report))


def by_system_and_k(report: PaperReport, title: str, ks: Sequence[int]) -> Chart:
    """Sparse probing, with a category for each system and a series for each number of latents."""
    measured = {label: probing(runs, ks, report.on_paper_model) for label, runs in runs_by_system(report).items()}
    systems = [label for label, values in measured.items() if values]
    series = []
    for k in ks:
        values: Values = {place: measured[one][k] for place, one in enumerate(systems) if k in measured[one]}
        if values:
            series.append(mean_series(f"top-{k}", values))
    return Chart(title, "", "test accuracy", series, categories=systems, note=stand_in_note(top(1), report))


def over_k(report: PaperReport, title: str) -> Chart:
    """Sparse probing, plotted against the number of latents."""
    measured = [(label, probing(runs, KS, report.on_paper_model)) for label, runs in runs_by_system(report).items()]
    series = [mean_series(label, values, "both", style) for style, (label, values) in enumerate(measured) if values]
    return Chart(title, "latents", "test accuracy", series, x_log=True, note=stand_in_note(top(1), report))


def probing(runs: Sequence[SystemRun], ks: Sequence[int], on_paper_model: bool) -> Values:
    """The accuracies of probes on the top k latents."""
    return {k: values for k in ks if (values := metric_values(top(k), runs, on_paper_model))}


def over_another(report: PaperReport, title: str, x: str, y: str, x_title: str, y_title: str) -> Chart:
    """One number plotted against another, with a point for each run."""
    series = []
    for style, (label, runs) in enumerate(runs_by_system(report).items()):
        both = [
            (metric_values(x, [run], report.on_paper_model), metric_values(y, [run], report.on_paper_model))
            for run in runs
        ]
        points = [(one[0], other[0]) for one, other in both if one and other]
        if points:
            series.append(Series(label, [one for one, _ in points], [other for _, other in points], style=style))
    return Chart(title, x_title, y_title, series, note="A point for each run.")


def by_letter(report: PaperReport, title: str) -> Chart:
    """Absorption: a category for each first letter."""
    rates = rates_by_letter(report)
    series = []
    for style, label in enumerate(runs_by_system(report)):
        if values := {float(place): of[label] for place, of in enumerate(rates.values()) if label in of}:
            series.append(mean_series(label, values, style=style))
    return Chart(title, "first letter", "absorption rate", series, categories=list(rates))


def letters(report: PaperReport) -> tuple[list[str], list[list[str]]]:
    """The headings and lines of a table: absorption by first letter and system, as the mean over seeds in %."""
    rates = rates_by_letter(report)
    shown = [label for label in runs_by_system(report) if any(label in of for of in rates.values())]
    lines = [
        [letter, *(f"{100 * mean(of[one]):.1f}" if one in of else "" for one in shown)] for letter, of in rates.items()
    ]
    return ["letter", *shown], lines


def rates_by_letter(report: PaperReport) -> dict[str, dict[str, list[float]]]:
    """Letter -> system -> the absorption in each run."""
    rates: dict[str, dict[str, list[float]]] = {}
    for label, runs in runs_by_system(report).items():
        for run in runs:
            for letter, rate in () if run.failed_gates() else rates_of(run.run.results.get("absorption")):
                rates.setdefault(letter, {}).setdefault(label, []).append(rate)
    return dict(sorted(rates.items()))


def rates_of(result: MetricResult | None) -> Iterator[tuple[str, float]]:
    for entry in result.details if result else ():
        rate: Any = entry.get("absorption_rate", entry.get("full_absorption_rate"))
        if isinstance(rate, (int, float)):
            yield entry_label(entry), rate


def top(k: int) -> str:
    return f"sparse_probing.sae.sae_top_{k}_test_accuracy"


def stand_in_note(metric: str, report: PaperReport) -> str:
    return STAND_IN_NOTE if uses_stand_in(metric, report.runs, report.on_paper_model) else ""


def logged_scalars(**scalars: str) -> dict[str, Draw]:
    """A chart for each scalar of metrics.jsonl, by its title."""
    return {
        f"{title[0].upper()}{title[1:]}": partial(over_training, name=name, y=title) for name, title in scalars.items()
    }


PAPER_FIGURES: Mapping[str, dict[str, Draw]] = {
    "000": {
        "Figure 1: mean absorption by configuration": partial(by_system, metric=ABSORPTION, y="absorption rate"),
        "Figure 2: split features by configuration": partial(by_system, metric=SPLIT, y="latents per letter"),
        "Figure 3: absorption by first letter": by_letter,
    },
    "001": {
        "Figure 1 (a): sparsity against reconstruction": partial(
            over_another, x=L0, y=VARIANCE, x_title="L0", y_title="explained variance"
        ),
        "Figure 1 (b): temperature": partial(over_training, name="T", y="temperature T"),
    },
    "002": {
        "Table 1: KL score": partial(by_system, metric=KL_SCORE, y="KL score"),
        "Table 1: MSE": partial(by_system, metric=MSE, y="MSE"),
        "Table 1: SCR at threshold 2": partial(by_system, metric=SCR, y="SCR"),
    },
    "003": {
        "Figure 1 (a): threshold tau": partial(over_training, name="tau", y="tau"),
        "Figure 1 (b): correlation of latents": partial(
            over_training, name="mean_correlation", y="correlation", sd="sd_correlation"
        ),
        "Figure 1 (c): cumulative successful steps": partial(over_training, name="step", y="steps"),
        "Figure 1 (d): training loss": partial(over_training, name="loss", y="loss"),
    },
    "004": {
        "Figure 1: explained variance by configuration": partial(by_system, metric=VARIANCE, y="explained variance"),
        "Figure 1: KL divergence by configuration": partial(by_system, metric=KL, y="KL divergence"),
        "Figure 1: mean absorption by configuration": partial(by_system, metric=ABSORPTION, y="absorption rate"),
        "Figure 2: sparse probing at top-1, 5 and 20": partial(by_system_and_k, ks=(1, 5, 20)),
    },
}
MECHANISM_FIGURES: Mapping[str, dict[str, Draw]] = {
    "000": logged_scalars(utilisation="mean utilization", contrast="contrast term", tau="contrast threshold tau")
    | {"Bounded penalty lambda": partial(over_training, name="lambda", y="lambda")},
    "001": logged_scalars(rho="utilization rho", enabled="latents enabled"),
    "002": logged_scalars(
        competition_strength="competition strength", pairs_above="pairs above the threshold",
        mean_coefficient="mean coefficient of those pairs", penalized="pairs penalized so far",
        correlation_cosine="correlation of coefficient and cosine",
    )
    | {"Competition's share of the loss": partial(over_training, name="competition", y="share", share_of="loss")},
    "004": logged_scalars(
        alpha="adaptive factor alpha", stability="stability in the window", resampled="latents resampled",
        merged="latents merged", silent="latents silent in the window", alpha_moves="steps in which alpha moved",
    ),
}  # fmt: skip
COMMON_FIGURES: dict[str, Draw] = {
    "Variance unexplained": partial(over_training, name="explained_variance", y="1 - explained variance", to_one=True),
    "L0": partial(over_training, name="l0", y="L0"),
    "Sparse probing over the number of latents": over_k,
}
