"""The part of a page about sae_probes: its scores by data set, compared with the model's own probe."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from markupsafe import Markup

from ...common.formatting import format_count
from ..charts import Chart, Kind, Series
from ..metrics.base import MetricResult
from ..statistics import PairedDifferences
from .svg import CHART_SIZE, draw_svg

METRIC = "sae_probes"
LLM = "llm_test_auc"
SAE_AUC = re.compile(r"sae_top_(\d+)_test_auc")
USUAL_K = 16  # SAEs are compared at this number of latents, or at the next smaller number that was measured
MODEL = "the model's own probe"
CHART_TITLE = "Test AUC by data set, the model's best first"

Scores = Mapping[str, float]  # by data set


@dataclass(frozen=True)
class ProbePart:
    """Attributes:
    lead: sentences with the numbers over all data sets.
    heads, lines, foot: the table, a line for each data set and one for their mean.
    """

    lead: str
    heads: Sequence[str]
    lines: Sequence[Sequence[str]]
    foot: Sequence[str]
    title: str
    chart: Markup


def probes_of_run(result: MetricResult) -> ProbePart | None:
    """The part about one SAE, with a column for each number of latents. None without data sets."""
    ks, llm = measured_ks([result]), scores([result], LLM)
    if not ks or not llm:
        return None
    by_k = {k: scores([result], auc_of(k)) for k in ks}
    shown = sorted({ks[0], usual_k(ks)})
    drawn = {f"{format_count(k, 'latent')} of the SAE": by_k[k] for k in shown}
    lead = compare_with_model(by_k[usual_k(ks)], llm, usual_k(ks))
    return build_part(lead, llm, {f"k={k}": by_k[k] for k in ks}, drawn)


def probes_of_systems(systems: Mapping[str, Sequence[MetricResult]]) -> ProbePart | None:
    """The part about several systems, with a column for each system: means over seeds, at a number of latents that was
    measured for all systems."""
    systems = {label: some for label, some in systems.items() if some and measured_ks(some)}
    shared = set.intersection(*(set(measured_ks(some)) for some in systems.values())) if systems else set()
    llm = scores([one for some in systems.values() for one in some], LLM)
    if not shared or not llm:
        return None
    k = usual_k(sorted(shared))
    columns = {label: scores(some, auc_of(k)) for label, some in systems.items()}
    lead = f"Probes on {format_count(k, 'latent')}. A system's number is the mean over its seeds."
    return build_part(lead, llm, columns, columns)


def build_part(lead: str, llm: Scores, columns: Mapping[str, Scores], drawn: Mapping[str, Scores]) -> ProbePart:
    """Build the part of a page from the scores of the model's own probe, the scores in each further column of the table
    (`columns`), and the scores of each further series in the chart (`drawn`)."""
    names = sorted(llm, key=lambda name: (-llm[name], name))
    sides = [llm, *columns.values()]
    lines = [[name, *(f"{side[name]:.4f}" if name in side else "" for side in sides)] for name in names]
    foot = ["mean", *(f"{mean(side.values()):.4f}" for side in sides)]
    chart = draw_chart(names, llm, drawn)
    return ProbePart(lead, ["data set", "model's probe", *columns], lines, foot, CHART_TITLE, chart)


def draw_chart(names: Sequence[str], llm: Scores, drawn: Mapping[str, Scores]) -> Markup:
    """A chart with the data sets from left to right: the model's own probe as a line, other series as marks."""
    sides: list[tuple[str, Scores, Kind]] = [(MODEL, llm, "both")]
    sides += [(label, side, "points") for label, side in drawn.items()]
    series = []
    for label, side, kind in sides:
        places = [place for place, name in enumerate(names, 1) if name in side]
        y = [side[names[place - 1]] for place in places]
        marks = [f"{label}: {names[place - 1]}, {value:.4f}" for place, value in zip(places, y, strict=True)]
        series.append(Series(label, places, y, kind, labels=marks))
    return draw_svg(Chart(CHART_TITLE, "place in the table", "test AUC", series), True, *CHART_SIZE)


def compare_with_model(sae: Scores, llm: Scores, k: int) -> str:
    """Compare a probe on k latents with the model's own probe, on the data sets for which both have a score."""
    both = [name for name in llm if name in sae]
    if not both:
        return ""
    above = f"{sum(sae[name] > llm[name] for name in both)} of {format_count(len(both), 'data set')}"
    ours, theirs = (mean(side[name] for name in both) for side in (sae, llm))
    text = (
        f"A probe on {format_count(k, 'latent')} is better than the model's own probe on {above}: mean AUC {ours:.4f} "
        f"against {theirs:.4f}"
    )
    if len(both) < 2:
        return f"{text}."
    paired = PairedDifferences([sae[name] - llm[name] for name in both], "data set")
    low, high = paired.interval
    return f"{text}, a difference of {paired.mean:+.4f} ({low:+.4f} to {high:+.4f}, 95 %, over data sets)."


def scores(results: Sequence[MetricResult], number: str) -> dict[str, float]:
    """For each data set, the mean of one number over the results. Data sets without the number are left out."""
    found: dict[str, list[float]] = {}
    for result in results:
        for entry in result.sound.details:
            if isinstance(value := entry.get(number), (int, float)):
                found.setdefault(str(entry.get("dataset_name")), []).append(float(value))
    return {name: mean(values) for name, values in found.items()}


def measured_ks(results: Sequence[MetricResult]) -> list[int]:
    """The numbers of latents for which all results have a score, in ascending order."""
    found = [
        {int(match[1]) for entry in one.sound.details for name, value in entry.items()
         if isinstance(value, (int, float)) and (match := SAE_AUC.fullmatch(name))}
        for one in results
    ]  # fmt: skip
    return sorted(set.intersection(*found)) if found else []


def usual_k(ks: Sequence[int]) -> int:
    return max((k for k in ks if k <= USUAL_K), default=min(ks))


def auc_of(k: int) -> str:
    return f"sae_top_{k}_test_auc"
