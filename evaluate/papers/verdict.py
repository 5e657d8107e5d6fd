"""What a claim's metric was in a run, and the verdict on the claim over the seeds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any, Literal

from scipy.stats import t

from ..metrics.base import MetricResult
from .claims import TRAINING_LOG, Claim

Verdict = Literal[
    "reproduced", "direction only", "contradicted", "not comparable", "paper inconsistent", "not measured"
]
WORST_FIRST: tuple[Verdict, ...] = (
    "paper inconsistent", "contradicted", "not measured", "not comparable", "direction only", "reproduced",
)  # fmt: skip
ValueBySeed = Mapping[int, float]  # seed -> the metric, in its own unit

MIN_SEEDS = 3  # at least, for `reproduced`
MEAN_TOLERANCE = 0.05  # share of the claimed number by which the mean of the seeds may differ
INTERVAL_TOLERANCE = 0.10  # and within which the 95 % interval of that mean has to lie
NO_EFFECT = 0.10  # share of a claimed effect below which there is none


def measured_value(
    claim: Claim, results: Mapping[str, MetricResult], logged: Sequence[Mapping[str, float]]
) -> float | None:
    """The claim's metric in the results of one run, or in the lines of its metrics.jsonl; None where there is none."""
    metric, _, rest = claim.metric.partition(".")
    if metric == TRAINING_LOG:
        lines = [line[rest] for line in logged if rest in line]
        return lines[0 if claim.at == "first" else -1] if lines else None
    if metric not in results:
        return None
    result, (category, name) = results[metric], rest.split(".", 1)
    if category == "n":
        return result.n.get(name)
    if category != "details":
        return result.metrics.get(category, {}).get(name)
    asked = set(claim.entries) or {entry_label(entry) for entry in result.details}
    by_label = {entry_label(entry): entry.get(name) for entry in result.details}
    values = [value for label in asked if (value := by_label.get(label)) is not None]
    if len(values) < len(claim.entries) or not values:
        return None
    return max(values) if claim.over == "max" else mean(values)


def entry_label(entry: Mapping[str, Any]) -> str:
    """The letter or the dataset of an entry of a result's details."""
    return str(entry.get("first_letter", entry.get("dataset_name", ""))).removesuffix("_results")


def verdict(claim: Claim, values: Mapping[str, ValueBySeed], *, on_paper_model: bool, inconsistent: bool) -> Verdict:
    """What is to be said of a claim, from the metric of each system by seed.

    The first of these that is so, where T is the claim's target, and an interval is the 95 % one of Student's t for the
    mean over seeds:

    - paper inconsistent: the paper contradicts the claim itself.
    - not measured: there is no metric, or no number of a system that is needed.
    - reproduced, on the paper's model only: at least 3 seeds, their mean within d = max(5 % of |T|, half of the last
      printed digit) of T, and its interval within 2 d of T.
    - contradicted: of two systems that the claim sets against each other, the difference lies on the other side of
      zero than the paper says, or is less than a tenth of what it says, both with its whole interval.
    - direction only: it lies on the side that the paper says, with its whole interval.
    - contradicted, on the paper's model only: the interval has nothing in common with T +- d.
    - not comparable: everything else. A number by itself off the paper's model; anywhere, seeds that are too few or too
      far apart to tell.

    Differences are of runs of the same seed, two at least; their size is taken as a share of the other system's number,
    as models differ in scale. Of a claimed change it is the change.
    """
    if inconsistent:
        return "paper inconsistent"
    own, other = values.get(claim.system, {}), values.get(claim.against, {})
    pairs = [(own[seed], other[seed]) for seed in sorted(own.keys() & other.keys())]
    needs_other = claim.is_change or (claim.against and not on_paper_model)
    if claim.metric == "none" or not own or (needs_other and not pairs):
        return "not measured"
    printed = paired_changes(claim.unit, pairs) if claim.is_change else list(own.values())
    band = confidence_interval(printed)
    near = max(MEAN_TOLERANCE * abs(claim.target), claim.rounding)
    far = near * INTERVAL_TOLERANCE / MEAN_TOLERANCE
    if on_paper_model and band and len(printed) >= MIN_SEEDS:
        if abs(mean(printed) - claim.target) <= near and is_within(band, claim.target - far, claim.target + far):
            return "reproduced"
    if claim.is_change:
        differences = shares = [change - (claim.unit == "x") for change in printed]
    else:
        differences, shares = [one - two for one, two in pairs], paired_changes("share", pairs)
    side, size = confidence_interval(differences), confidence_interval(shares)
    if claim.effect and side:
        low, high = side if claim.effect > 0 else (-side[1], -side[0])  # now the paper says: above zero
        nothing = NO_EFFECT * abs(claim.effect)
        if high < 0 or (size and is_within(size, -nothing, nothing)):
            return "contradicted"
        if low > 0:
            return "direction only"
    if on_paper_model and band and (band[1] < claim.target - near or band[0] > claim.target + near):
        return "contradicted"
    return "not comparable"


def combine_verdicts(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict on a claim about several recipes or layers, from that on each: it holds as far as it holds of all."""
    return min(verdicts, key=WORST_FIRST.index, default="not measured")


def paired_changes(unit: str, pairs: Sequence[tuple[float, float]]) -> list[float]:
    """What each system has over the other, in % of it, in pp, as x times it, or as a share; none where that is of zero."""
    if unit == "pp":
        return [100 * (one - two) for one, two in pairs]
    if any(two == 0 for _, two in pairs):
        return []
    if unit == "x":
        return [one / two for one, two in pairs]
    return [(100 if unit == "%" else 1) * (one - two) / abs(two) for one, two in pairs]


def confidence_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % of the mean, by Student's t; None of fewer than two, and where a number is infinite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return mean(values) - half, mean(values) + half


def is_within(band: tuple[float, float], low: float, high: float) -> bool:
    return low <= band[0] and band[1] <= high
