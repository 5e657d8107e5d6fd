"""The value of a claim's metric in a run, and the verdict on the claim over all seeds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any, Literal

from scipy.stats import t

from ..metrics.base import MetricResult
from .claims import STEP_TIME, TRAINING_LOG, Claim

Verdict = Literal[
    "reproduced", "direction only", "contradicted", "not comparable", "paper inconsistent", "not measured"
]
WORST_FIRST: tuple[Verdict, ...] = (
    "paper inconsistent", "contradicted", "not measured", "not comparable", "direction only", "reproduced",
)  # fmt: skip
ValueBySeed = Mapping[int, float]  # seed -> the metric in its own unit

MIN_SEEDS = 3  # for `reproduced`
MEAN_TOLERANCE = 0.05  # share of the claimed number by which the mean over seeds may differ
INTERVAL_TOLERANCE = 0.10  # share of the claimed number within which the 95 % interval of that mean must lie
NO_EFFECT = 0.10  # a difference below this share of the claimed effect counts as no effect


def measured_value(
    claim: Claim, results: Mapping[str, MetricResult], log: Sequence[Mapping[str, float]]
) -> float | None:
    """The claim's metric in the results of one run or in its metrics.jsonl; None if it was not measured.

    It is SAEBench's number, over all rows: the papers do not leave out outlier rows.
    """
    metric, _, rest = claim.metric.partition(".")
    if metric == TRAINING_LOG:
        lines = [line[rest] for line in log if rest in line]
        return lines[0 if claim.at == "first" else -1] if lines else None
    if metric not in results:
        return None
    result, (category, name) = results[metric], rest.split(".", 1)
    if category == "n":
        return result.n.get(name)
    if category != "details":
        return result.metrics.get(category, {}).get(name)
    by_label = {entry_label(entry): entry.get(name) for entry in result.details}
    labels = set(claim.entries) or set(by_label)
    values = [value for label in labels if (value := by_label.get(label)) is not None]
    if len(values) < len(claim.entries) or not values:
        return None
    return max(values) if claim.over == "max" else mean(values)


def entry_label(entry: Mapping[str, Any]) -> str:
    """The letter or dataset of an entry in a result's details."""
    return str(entry.get("first_letter", entry.get("dataset_name", ""))).removesuffix("_results")


def verdict(claim: Claim, values: Mapping[str, ValueBySeed], *, on_paper_model: bool, inconsistent: bool) -> Verdict:
    """The verdict on a claim; `values` has the metric of each system by seed.

    The first rule that applies decides. T is the claim's target, and an interval is the 95 % interval of Student's t
    for the mean over seeds.

    - paper inconsistent: the paper itself contradicts the claim.
    - not measured: no metric measures the claim, or a system that is needed has no number.
    - reproduced (on the paper's model only): at least 3 seeds, their mean within d = max(5 % of |T|, half of the last
      printed digit) of T, and its interval within 2 d of T.
    - contradicted: the whole interval of the difference of the two systems lies on the opposite side of zero from the
      paper's, or within a tenth of the claimed difference.
    - direction only: the whole interval of the difference lies on the paper's side of zero.
    - contradicted (on the paper's model only): the interval does not overlap T +- d.
    - not comparable: everything else, such as a single number on another model, or too few or too widely spread seeds.

    Differences are taken between runs with the same seed, at least two. Their size is a share of the other system's
    number, since models differ in scale; for a claimed change it is the change.
    """
    if inconsistent:
        return "paper inconsistent"
    system, other = values.get(claim.system, {}), values.get(claim.against, {})
    pairs = [(system[seed], other[seed]) for seed in sorted(system.keys() & other.keys())]
    needs_other = claim.is_change or (claim.against and not on_paper_model)
    if claim.target is None or claim.metric in ("none", STEP_TIME) or not system or (needs_other and not pairs):
        return "not measured"
    numbers = paired_changes(claim.unit, pairs) if claim.is_change else list(system.values())
    interval = confidence_interval(numbers)
    near = max(MEAN_TOLERANCE * abs(claim.target), claim.rounding)
    far = near * INTERVAL_TOLERANCE / MEAN_TOLERANCE
    if on_paper_model and interval and len(numbers) >= MIN_SEEDS:
        if abs(mean(numbers) - claim.target) <= near and is_within(interval, claim.target - far, claim.target + far):
            return "reproduced"
    if comparison := verdict_on_difference(claim, numbers, pairs):
        return comparison
    if on_paper_model and interval and (interval[1] < claim.target - near or interval[0] > claim.target + near):
        return "contradicted"
    return "not comparable"


def verdict_on_difference(
    claim: Claim, numbers: Sequence[float], pairs: Sequence[tuple[float, float]]
) -> Verdict | None:
    """The verdict "contradicted" or "direction only" from the difference of two systems; None if it decides nothing."""
    if claim.is_change:
        differences = shares = [change - (claim.unit == "x") for change in numbers]
    else:
        differences, shares = [one - two for one, two in pairs], paired_changes("share", pairs)
    interval, share_interval = confidence_interval(differences), confidence_interval(shares)
    if not claim.effect or not interval:
        return None
    low, high = interval if claim.effect > 0 else (-interval[1], -interval[0])  # positive: the direction of the claim
    no_effect = NO_EFFECT * abs(claim.effect)
    if high < 0 or (share_interval and is_within(share_interval, -no_effect, no_effect)):
        return "contradicted"
    return "direction only" if low > 0 else None


def combine_verdicts(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict on a claim about several recipes or layers: the worst of the verdicts on each."""
    return min(verdicts, key=WORST_FIRST.index, default="not measured")


def paired_changes(unit: str, pairs: Sequence[tuple[float, float]]) -> list[float]:
    """The change of each pair (system, other) in % of the other, pp, as x times the other, or as a share of the other.

    Empty if another is zero, except in pp.
    """
    if unit == "pp":
        return [100 * (one - two) for one, two in pairs]
    if any(two == 0 for _, two in pairs):
        return []
    if unit == "x":
        return [one / two for one, two in pairs]
    return [(100 if unit == "%" else 1) * (one - two) / abs(two) for one, two in pairs]


def confidence_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean by Student's t; None for fewer than two values or values that are not finite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return mean(values) - half, mean(values) + half


def is_within(interval: tuple[float, float], low: float, high: float) -> bool:
    return low <= interval[0] and interval[1] <= high
