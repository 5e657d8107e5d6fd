"""Intervals, tests and smallest detectable differences, as defined in docs/reference/statistics.md.

This module does not depend on runs or metrics. The functions take numbers, one for each resampled unit: a seed, a
document, a data set, a letter. scipy does the computations, except Holm's correction, which it lacks.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import nctdtrinc
from scipy.stats import binomtest, bootstrap, t, ttest_1samp

CONFIDENCE = 0.95  # of every interval
LEVEL = 0.05  # of all tests of a table together
POWER = 0.8  # probability of detecting the smallest detectable difference
REPLICATES = 1000  # of a bootstrap
MARGIN = 0.01  # default margin of equivalence, as a share of the range of a number
NO_SPREAD = 1e-9  # differences that are equal within this relative tolerance have no spread to test with

Verdict = Literal["better", "worse", "equivalent", "not distinguishable", "same in every pair", "not tested"]
Interval = tuple[float, float]
Statistic = Callable[..., Any]  # takes samples, and the keyword `axis`


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The interval of the mean by Student's t (`scipy.stats.t.interval`). Needs at least two values."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    if not error:
        return float(np.mean(values)), float(np.mean(values))
    low, high = t.interval(confidence, len(values) - 1, loc=float(np.mean(values)), scale=error)
    return float(low), float(high)


def prediction_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The range in which another such value is expected: mean ± t sd sqrt(1 + 1/n) by Student's t. Needs at least two
    values.

    Unlike the interval of the mean, it does not shrink to a point as the number of values grows.
    """
    spread = float(np.std(values, ddof=1)) * math.sqrt(1 + 1 / len(values))
    if not spread:
        return float(np.mean(values)), float(np.mean(values))
    low, high = t.interval(confidence, len(values) - 1, loc=float(np.mean(values)), scale=spread)
    return float(low), float(high)


def fieller_interval(
    numerators: Sequence[float], denominators: Sequence[float], confidence: float = CONFIDENCE
) -> Interval | None:
    """Fieller's interval of the ratio of two paired means (J. R. Statist. Soc. B 16, 1954). Needs at least two pairs.

    The interval contains the ratios q for which a paired t test of `numerators - q * denominators` finds no difference
    from 0. None if it is unbounded, because the mean of the denominators may be 0.
    """
    top, bottom, pairs = float(np.mean(numerators)), float(np.mean(denominators)), len(numerators)
    limit = float(t.isf((1 - confidence) / 2, pairs - 1)) ** 2 / pairs
    (var_top, covariance), (_, var_bottom) = limit * np.cov(numerators, denominators)
    # (top - q bottom)^2 <= var_top - 2 q covariance + q^2 var_bottom, as a q^2 - 2 b q + c <= 0
    a, b, c = bottom**2 - var_bottom, top * bottom - covariance, top**2 - var_top
    if a <= 0:
        return None
    root = math.sqrt(max(b**2 - a * c, 0.0))
    return float((b - root) / a), float((b + root) / a)


def proportion_interval(hits: int, count: int) -> list[float]:
    """Wilson's 95 % interval of hits / count (`scipy.stats.binomtest(...).proportion_ci(method="wilson")`)."""
    low, high = binomtest(hits, count).proportion_ci(CONFIDENCE, "wilson")
    return [float(low), float(high)]


def mean_of_means(*samples: NDArray[Any], axis: int = -1) -> Any:
    """The mean of the samples' means. If each sample has the values of one letter's words, for example, the values are
    averaged over the words of each letter, and then over letters."""
    return np.mean([np.mean(sample, axis=axis) for sample in samples], axis=0)


def bootstrap_interval(
    samples: Sequence[ArrayLike], seed: int, statistic: Statistic = mean_of_means, replicates: int = REPLICATES
) -> list[float]:
    """95 % percentile interval of a statistic (`scipy.stats.bootstrap`). Each sample is resampled separately.

    `statistic` takes the samples as arguments and the keyword `axis`. The same `seed` leads to the same draws, so
    intervals of SAEs that were measured on the same units come from the same resamples.
    """
    # scipy raises an error for a sample of one value. A sample of two copies of this value has the same resamples.
    arrays = [np.repeat(array, 2) if len(array := np.asarray(sample)) == 1 else array for sample in samples]
    found = bootstrap(
        arrays, statistic, n_resamples=replicates, vectorized=True, method="percentile",
        confidence_level=CONFIDENCE, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return [float(end) for end in found.confidence_interval]


def detectable_difference(sd: float, pairs: int, level: float = LEVEL, power: float = POWER) -> float:
    """The smallest true difference that a two-sided paired t test at `level` detects with probability `power`.

    This difference is sd / sqrt(pairs) * nc, where nc is the noncentrality at which Student's noncentral t with
    pairs - 1 degrees of freedom exceeds the critical value t(1 - level/2) with probability `power`
    (`scipy.special.nctdtrinc`). The other tail, which such a difference reaches with a probability below 1e-3, is
    ignored.

    `sd` is the standard deviation of the paired differences. The result does not depend on the measured difference.
    """
    degrees = pairs - 1
    noncentrality = nctdtrinc(degrees, 1 - power, t.isf(level / 2, degrees))
    return sd / math.sqrt(pairs) * float(noncentrality)


def holm(p_values: Sequence[float], missing: int = 0) -> list[float]:
    """The p-values corrected for multiple testing, in the same order (Holm 1979).

    Each of `missing` further tests counts as a p-value of 1.

    The smallest of m p-values is multiplied by m, the next by m - 1, and so on. No corrected value is smaller than the
    one before it, or larger than 1. With the corrected values, the probability of any false rejection at
    0.05 is at most 0.05, even if the tests depend on each other.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) + missing - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


@dataclass(frozen=True)
class PairedDifferences:
    """The differences of a number between two systems: one difference per unit on which both were measured.

    Attributes:
        values: at least two.
        unit: the paired unit, in the singular: "seed", "document", "data set".
    """

    values: Sequence[float]
    unit: str

    @property
    def pairs(self) -> int:
        return len(self.values)

    @cached_property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @cached_property
    def sd(self) -> float:
        return float(np.std(self.values, ddof=1)) if self.has_spread else 0.0

    @cached_property
    def has_spread(self) -> bool:
        """Whether any two differences are unequal. If all differences are equal, their variation is unknown, so there
        is no test."""
        return not math.isclose(min(self.values), max(self.values), rel_tol=NO_SPREAD)

    @property
    def interval(self) -> Interval:
        """95 % interval of the mean difference by Student's t, not corrected for other comparisons."""
        return mean_interval(self.values) if self.has_spread else (self.mean, self.mean)

    @cached_property
    def p_value(self) -> float:
        """The p-value of a two-sided paired t test (`scipy.stats.ttest_1samp`); 1 if every difference is 0."""
        return float(ttest_1samp(self.values, 0).pvalue) if self.has_spread else 1.0

    def equivalence_p_value(self, margin: float) -> float:
        """The p-value of two one-sided t tests (Schuirmann 1987) of the hypothesis that the mean difference is not
        within +- `margin`."""
        above = ttest_1samp(self.values, -margin, alternative="greater").pvalue
        below = ttest_1samp(self.values, margin, alternative="less").pvalue
        return float(max(above, below))

    def detectable(self, comparisons: int) -> float:
        """The smallest detectable difference of one comparison, at the level that is corrected for `comparisons`
        comparisons."""
        return detectable_difference(self.sd, self.pairs, LEVEL / comparisons)


class PairedComparison(NamedTuple):
    """One comparison of a table.

    Attributes:
        differences: None if there are no pairs.
        better: the direction in which the number is better, "up" or "down"; "" if neither direction is better, and the
            number is then not tested.
        margin: differences of at most this size count as equivalent; None if there is no margin.
    """

    differences: PairedDifferences | None
    better: str
    margin: float | None = None

    @property
    def is_test(self) -> bool:
        one = self.differences
        return one is not None and bool(self.better) and (one.has_spread or not one.mean)


class Finding(NamedTuple):
    """The result of one comparison.

    Attributes:
        p_value: corrected for the comparisons of the table; None if it was not tested.
        equivalence_p_value: corrected in the same way; None without a margin or a spread.
        detectable: the smallest detectable difference; None without a spread.
        small: the verdict is better or worse, but the difference is also shown to be within the margin.
    """

    verdict: Verdict
    p_value: float | None = None
    equivalence_p_value: float | None = None
    detectable: float | None = None
    small: bool = False


def judge(table: Sequence[PairedComparison], planned: int = 0) -> list[Finding]:
    """The verdict on each comparison of a table. The p-values are corrected for all comparisons by `holm`.

    If more comparisons are planned than the table has tests, the missing ones count as tests with a p-value of 1. A
    verdict that is computed from part of the comparisons is therefore as strict as a verdict from all of them.

    - better, worse: the corrected p-value is below 0.05.
    - equivalent: neither better nor worse, and two one-sided tests show that the difference is within the margin. The
      p-values of these tests are corrected by `holm` as well, separately from those for better or worse.
    - not distinguishable: no other verdict applies. The true difference can be 0, or as large as the smallest
      detectable one.
    - same in every pair: every difference is exactly 0.
    - not tested: there are fewer than two pairs, neither direction of the number counts as better, or the difference is
      the same in every pair but not 0.
    """
    tests = [place for place, one in enumerate(table) if one.is_test]
    with_margin = [place for place in tests if table[place].margin and has_spread(table[place])]
    missing = max(0, planned - len(tests))
    p_values = dict(zip(tests, holm([differences_of(table[place]).p_value for place in tests], missing), strict=True))
    equivalence = [differences_of(table[place]).equivalence_p_value(table[place].margin or 0) for place in with_margin]
    equivalence_p_values = dict(zip(with_margin, holm(equivalence, missing), strict=True))
    return [
        conclude(one, p_values.get(place), equivalence_p_values.get(place), max(len(tests) + missing, 1))
        for place, one in enumerate(table)
    ]


def has_spread(one: PairedComparison) -> bool:
    return one.differences is not None and one.differences.has_spread


def differences_of(one: PairedComparison) -> PairedDifferences:
    assert one.differences is not None
    return one.differences


def conclude(one: PairedComparison, p_value: float | None, equivalence: float | None, comparisons: int) -> Finding:
    """The finding for one comparison, given its corrected p-values."""
    if p_value is None:
        return Finding("not tested")
    found = differences_of(one)
    if not found.has_spread:
        return Finding("same in every pair", p_value)
    detectable, within = found.detectable(comparisons), equivalence is not None and equivalence < LEVEL
    if p_value < LEVEL:
        verdict: Verdict = "better" if (found.mean > 0) == (one.better == "up") else "worse"
        return Finding(verdict, p_value, equivalence, detectable, within)
    return Finding("equivalent" if within else "not distinguishable", p_value, equivalence, detectable)


def default_margin(floor: float | None, ceiling: float | None) -> float | None:
    """The margin of a number for which no margin was given: 1 % of its range; None if the range is not known."""
    return None if floor is None or ceiling is None else MARGIN * (ceiling - floor)
