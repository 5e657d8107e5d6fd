"""The value of a claim's metric in a run, and the verdict on the claim over all seeds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, Literal, NamedTuple

from ..metrics.base import MetricResult
from ..statistics import CONFIDENCE, Interval, mean_interval
from .claims import SAME_NUMBER, STEP_TIME, TRAINING_LOG, Claim

Verdict = Literal[
    "reproduced", "direction only", "equivalent within the margin", "contradicted", "not equivalent",
    "not of the paper's equation", "mechanism inactive", "not comparable", "not measured", "paper inconsistent", "copy",
]  # fmt: skip
# Worst first. A claim about several recipes or layers gets the worst of the verdicts on them.
WORST_FIRST: tuple[Verdict, ...] = (
    "copy", "paper inconsistent", "contradicted", "not equivalent", "not of the paper's equation", "not measured",
    "mechanism inactive", "not comparable", "direction only", "equivalent within the margin", "reproduced",
)  # fmt: skip
MEANINGS: dict[Verdict, str] = {  # the meaning of each verdict, in one line
    "reproduced": "on the paper's model and with three seeds or more, the mean is within 5 % of the claimed number or "
    "equal to it after rounding, and the whole 95 % interval is within 10 % of the claimed number or within twice the "
    "rounding; if the paper also prints a number for the other system, the mean of that system is also within 5 % of "
    "its printed number or equal to it after rounding",
    "direction only": "the two systems differ in the claimed direction: the whole 95 % interval of their difference "
    "over seeds is on the claimed side of zero",
    "equivalent within the margin": "the two systems are claimed to be equal, and the 90 % interval of their "
    "difference lies within a margin that was fixed before anything was measured (two one-sided tests at 5 %)",
    "contradicted": "the two systems have similar L0, and the whole 95 % interval of their difference is on the side "
    "of zero opposite to the claimed difference; on the paper's model, a claim is also contradicted if the interval "
    "excludes the claimed number, or if all values in the interval are smaller than a tenth of the claimed difference",
    "not equivalent": "the two systems are claimed to be equal, but on a model other than the paper's, the whole 90 % "
    "interval of their difference lies outside the margin",
    "not of the paper's equation": "this reading replaces an equation that the claim is about, so the numbers can "
    "neither reproduce nor contradict the claim",
    "mechanism inactive": "the mechanism that the claim is about had no effect in these runs: the counter of its "
    "actions stayed at 0, or the weights equal those of the run without it, bit for bit",
    "not comparable": "the claim is a single number and our runs use another model; or the L0 values of the two "
    "systems differ too much; or there are too few seeds for a decision, or the seeds differ too much",
    "not measured": "there is no metric for the claim, or none of the runs that pass the checks of training has the "
    "number",
    "paper inconsistent": "the paper itself contradicts the claim",
    "copy": "for this system, the paper repeats the number that it prints in the row of another system; only the claim "
    "about that row is judged",
}
ValueBySeed = Mapping[int, float]  # seed -> the metric in its own unit

MIN_SEEDS = 3  # for `reproduced`
MEAN_TOLERANCE = SAME_NUMBER  # largest deviation of the mean over seeds, as a share of the claimed number
INTERVAL_TOLERANCE = 0.10  # largest deviation of the ends of its 95 % interval, as a share of the claimed number
NO_EFFECT = 0.10  # on the paper's model, a difference below this share of the claimed effect counts as no effect
EQUIVALENCE = 0.90  # level of the interval that must lie within the margin: two one-sided tests at 5 %
LIKE_L0 = 1.10  # largest ratio of two L0 values that count as alike
# Metrics that do not depend on L0, or are L0 itself. Every other metric changes even if only L0 changes.
FREE_OF_L0 = ("core.sparsity.l0", "core.sparsity.l1", "absorption.n.", "sparse_probing.llm.", "training.l0", STEP_TIME)


@dataclass(frozen=True)
class Conditions:
    """The conditions that affect a verdict, in addition to the measured numbers.

    Attributes:
        l0: the measured L0 of the claim's two systems, or None if it is unknown or there is no other system.
        printed_l0: the ratio of the first system's L0 to the other system's L0 in the paper; None if the paper does not
            print both.
        substituted: whether the reading of the paper (`Reading`) replaces an equation that the claim is about.
        inactive: whether the mechanism that the claim is about had no effect.
    """

    on_paper_model: bool
    inconsistent: bool = False
    substituted: bool = False
    inactive: bool = False
    l0: tuple[float, float] | None = None
    printed_l0: float | None = None


class Judgement(NamedTuple):
    """A verdict, and the reason for it if the numbers alone do not show it."""

    verdict: Verdict
    reason: str = ""


def measured_value(
    claim: Claim, results: Mapping[str, MetricResult], log: Sequence[Mapping[str, float]]
) -> float | None:
    """The claim's metric in the results of one run or in its metrics.jsonl; None if it was not measured.

    This is SAEBench's number over all rows, because the papers do not leave out outlier rows.
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


def judge(claim: Claim, values: Mapping[str, ValueBySeed], conditions: Conditions) -> Judgement:
    """The verdict on a claim; `values` has the metric of each system by seed.

    The first rule that applies decides. T is the claim's target, and an interval is the 95 % interval of Student's t
    for the mean over seeds. Differences are taken between runs with the same seed; at least two such pairs are needed.

    - copy: the paper prints the number of another row.
    - paper inconsistent: the paper itself contradicts the claim.
    - not measured: no metric measures the claim, or a number that is needed is missing for a system.
    - mechanism inactive: the mechanism that the claim is about had no effect (see mechanisms.py).

    Then the numbers decide (`judge_numbers`):

    - reproduced (on the paper's model only): at least 3 seeds, their mean within d = max(5 % of |T|, half of the last
      printed digit) of T, and its interval within 2 d of T. If the paper also prints a number P for the other system
      and that system was run, its mean must also lie within d of P, where d is computed from P instead of T.
    - contradicted: the whole interval of the difference between the two systems lies on the opposite side of zero from
      the paper's difference. On the paper's model, a claim is also contradicted if every difference in the interval is
      smaller than a tenth of the claimed difference, or if the interval of the claimed number does not overlap T +- d.
      On other models, these two rules do not apply, because sizes do not carry over to other models.
    - direction only: the whole interval of the difference lies on the same side of zero as in the paper. Two printed
      numbers that differ by one unit of their last digit have no direction, because they can be the same number before
      rounding. Two seeds with equal differences have no interval.
    - equivalent within the margin (for a claim that two systems are equal): the 90 % interval of the difference lies
      within +- the margin; this amounts to two one-sided tests at 5 %. If the whole interval lies outside the margin,
      the claim is contradicted on the paper's model. On other models, the verdict is only `not equivalent`, because the
      margin is the size of an effect, and sizes do not carry over to other models.
    - not comparable: everything else, such as a single number on another model, or seeds that are too few or differ too
      much.

    Two conditions can replace this verdict:

    - not comparable, because of L0: the L0 values of the two systems differ by more than 10 %. If they differ in the
      same direction in the paper's own comparison, the verdict can still be `direction only`. If they differ in the
      paper, but are alike in our runs, the claim cannot be contradicted. These three rules apply only if the model is
      not the paper's and the metric changes with L0.
    - not of the paper's equation: the claim is about an equation in whose place the chosen reading of the paper uses a
      different one, so the claim can be neither reproduced nor contradicted.
    """
    if claim.copy_of:
        return Judgement("copy", f"of {claim.copy_of}")
    if conditions.inconsistent:
        return Judgement("paper inconsistent")
    system, other = values.get(claim.system, {}), values.get(claim.against, {})
    pairs = [(system[seed], other[seed]) for seed in sorted(system.keys() & other.keys())]
    needs_other = claim.is_change or claim.says or (claim.against and not conditions.on_paper_model)
    if claim.metric == "none" or not system or (needs_other and not pairs):
        return Judgement("not measured")
    if conditions.inactive:
        return Judgement("mechanism inactive")
    found = judge_numbers(claim, list(system.values()), pairs, conditions.on_paper_model)
    return withhold(claim, found, conditions)


def judge_numbers(
    claim: Claim, system: Sequence[float], pairs: Sequence[tuple[float, float]], on_paper_model: bool
) -> Judgement:
    """The verdict based on the numbers alone, regardless of L0 and substitutions; see `judge`."""
    changes = differences(claim, pairs)
    if claim.says == "equal":
        return judge_equality(claim, confidence_interval(changes, EQUIVALENCE), on_paper_model)
    numbers = paired_changes(claim.unit, pairs) if claim.is_change else system
    if on_paper_model and agrees(claim, numbers) and other_agrees(claim, [other for _, other in pairs]):
        return Judgement("reproduced")
    shares = changes if claim.is_change else paired_changes("share", pairs)
    if on_paper_model and has_no_effect(claim, confidence_interval(shares)):
        return Judgement("contradicted", f"the difference is below {NO_EFFECT:.0%} of the claimed difference")
    found = judge_direction(claim, confidence_interval(changes))
    if found.verdict == "not comparable" and on_paper_model and excludes(claim, numbers):
        return Judgement("contradicted", "the interval excludes the claimed number")
    return found


def differences(claim: Claim, pairs: Sequence[tuple[float, float]]) -> list[float]:
    """For each pair, the change from the other system's number to the system's: in the unit of the claimed change or
    margin if the claim has one, else in the metric's own unit. A multiple (x) is returned minus 1, so that 0 always
    means no difference."""
    in_unit = claim.is_change or claim.says
    return [change - (claim.unit == "x") for change in paired_changes(claim.unit if in_unit else "", pairs)]


def judge_direction(claim: Claim, interval: Interval | None) -> Judgement:
    """The verdict according to whether the whole interval of the difference lies on the claimed side of zero."""
    if claim.is_within_rounding:
        return Judgement("not comparable", "the two printed numbers may be the same number, rounded differently")
    if not claim.direction:
        return Judgement("not comparable")
    if interval is None:
        return Judgement(
            "not comparable", "fewer than two seeds of both systems, or two seeds with the same difference"
        )
    low, high = interval if claim.direction > 0 else (-interval[1], -interval[0])  # positive: the claimed direction
    if high < 0:
        return Judgement("contradicted")
    return Judgement("direction only") if low > 0 else Judgement("not comparable", "the interval includes 0")


def judge_equality(claim: Claim, interval: Interval | None, on_paper_model: bool) -> Judgement:
    """The verdict according to whether the whole interval of the difference lies within the margin or outside it."""
    if interval is None or claim.margin is None:
        return Judgement("not comparable", "fewer than two seeds of both systems")
    if is_within(interval, -claim.margin, claim.margin):
        return Judgement("equivalent within the margin")
    if interval[0] > claim.margin or interval[1] < -claim.margin:
        return Judgement("contradicted" if on_paper_model else "not equivalent")
    return Judgement("not comparable", "the interval includes an end of the margin")


def agrees(claim: Claim, numbers: Sequence[float]) -> bool:
    """Whether the numbers reproduce the claim's target."""
    interval = confidence_interval(numbers)
    if claim.target is None or interval is None or len(numbers) < MIN_SEEDS:
        return False
    near = nearness(claim, claim.target)
    far = near * INTERVAL_TOLERANCE / MEAN_TOLERANCE
    return abs(mean(numbers) - claim.target) <= near and is_within(interval, claim.target - far, claim.target + far)


def other_agrees(claim: Claim, numbers: Sequence[float]) -> bool:
    """Whether the other system's number also agrees with its printed number, as required for `reproduced`. True if the
    paper does not print the other system's number, or if the other system was not run."""
    if claim.against_value is None or not numbers:
        return True
    scale = 100 if claim.unit == "%" else 1
    near = max(MEAN_TOLERANCE * abs(claim.against_value / scale), claim.rounding)
    return abs(mean(numbers) - claim.against_value / scale) <= near


def excludes(claim: Claim, numbers: Sequence[float]) -> bool:
    """Whether every value that agrees with the claim's target lies outside the interval for the mean of the numbers."""
    interval = confidence_interval(numbers)
    if claim.target is None or interval is None:
        return False
    near = nearness(claim, claim.target)
    return interval[1] < claim.target - near or interval[0] > claim.target + near


def nearness(claim: Claim, target: float) -> float:
    """How far a mean may lie from the target and still agree with it."""
    return max(MEAN_TOLERANCE * abs(target), claim.rounding)


def has_no_effect(claim: Claim, shares: Interval | None) -> bool:
    """Whether every difference in the interval given by `shares` is smaller than a tenth of the claimed effect. The
    interval and the effect have the same unit."""
    if not claim.effect or shares is None:
        return False
    return is_within(shares, -NO_EFFECT * abs(claim.effect), NO_EFFECT * abs(claim.effect))


def withhold(claim: Claim, found: Judgement, conditions: Conditions) -> Judgement:
    """The verdict that the numbers give, or a weaker one if L0 or a replaced equation rules it out; see `judge`."""
    found = allow_for_l0(claim, found, conditions)
    if conditions.substituted and found.verdict in ("reproduced", "contradicted", "not equivalent"):
        return Judgement("not of the paper's equation")
    return found


def allow_for_l0(claim: Claim, found: Judgement, conditions: Conditions) -> Judgement:
    """The verdict that the numbers give, or a weaker one if the L0 values of the two systems rule it out. On the
    paper's model, they never do."""
    if conditions.on_paper_model or conditions.l0 is None or not depends_on_l0(claim):
        return found
    own, other = conditions.l0
    at = f"L0 {own:.3g} against {other:.3g}"
    printed, here = side_of_one(conditions.printed_l0), side_of_one(own / other if other else math.inf if own else 1)
    decisive = found.verdict in ("contradicted", "not equivalent")
    if not here:
        if printed and decisive:
            return Judgement("not comparable", f"{at}, but the paper compares at different L0")
        return Judgement(found.verdict, at) if decisive and f"{own:.3g}" != f"{other:.3g}" else found
    if printed != here:
        return Judgement("not comparable", at)
    reason = f"the L0 differ as in the paper's own comparison: {own:.3g} against {other:.3g}"
    return Judgement("direction only" if found.verdict == "direction only" else "not comparable", reason)


def depends_on_l0(claim: Claim) -> bool:
    """Whether L0 by itself changes the claim's metric. At the first step of training it does not, because the SAE has
    not reached its L0 yet."""
    return not claim.metric.startswith(FREE_OF_L0) and not (
        claim.metric.startswith(TRAINING_LOG) and claim.at == "first"
    )


def side_of_one(ratio: float | None) -> int:
    """1 if the ratio of two L0 values is above the range in which they count as alike, -1 if it is below, 0 if it is
    inside or unknown."""
    return 0 if ratio is None or 1 / LIKE_L0 <= ratio <= LIKE_L0 else 1 if ratio > 1 else -1


def combine_judgements(judgements: Iterable[Judgement]) -> Judgement:
    """The verdict on a claim about several recipes or layers: the worst of their verdicts, with every reason for it."""
    judgements = list(judgements)
    verdicts: list[Verdict] = [one.verdict for one in judgements] or ["not measured"]
    worst = min(verdicts, key=WORST_FIRST.index)
    reasons = dict.fromkeys(one.reason for one in judgements if one.verdict == worst and one.reason)
    return Judgement(worst, "; ".join(reasons))


def paired_changes(unit: str, pairs: Sequence[tuple[float, float]]) -> list[float]:
    """The change in each pair (system, other). If `unit` is empty, the change is the difference; otherwise the change
    is expressed in % of the other value, in pp, as a multiple (x) of the other value, or as a share of the other value.

    Empty if the change is relative to the other system's value (%, x or a share) and one of these values is zero.
    """
    if unit in ("", "pp"):
        return [(100 if unit else 1) * (one - two) for one, two in pairs]
    if any(two == 0 for _, two in pairs):
        return []
    if unit == "x":
        return [one / two for one, two in pairs]
    return [(100 if unit == "%" else 1) * (one - two) / abs(two) for one, two in pairs]


def confidence_interval(values: Sequence[float], level: float = CONFIDENCE) -> Interval | None:
    """Student's t interval of the mean; None if there are fewer than two values or if a value is not finite.

    Also None for two equal values other than 0, such as counts, because two equal values do not show how much the
    values vary.
    """
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    if len(values) == 2 and values[0] and math.isclose(*values):
        return None
    return mean_interval(values, level)


def is_within(interval: Interval, low: float, high: float) -> bool:
    return low <= interval[0] and interval[1] <= high
