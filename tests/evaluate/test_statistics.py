"""The rules of docs/reference/statistics.md, checked by hand-worked numbers and simulations with a fixed seed."""

import math

import numpy as np
import pytest
from scipy.stats import t, ttest_1samp

from sae.evaluate.papers.verdict import confidence_interval
from sae.evaluate.statistics import (
    LEVEL,
    Finding,
    PairedComparison,
    PairedDifferences,
    bootstrap_interval,
    default_margin,
    detectable_difference,
    fieller_interval,
    holm,
    judge,
    mean_interval,
    proportion_interval,
)

row = PairedComparison  # a row of a table
ONE_TWO_THREE = PairedDifferences((1.0, 2.0, 3.0), "seed")  # mean 2, sd 1


def two_degrees(value: float) -> float:
    """P(T > value) of Student's t with two degrees of freedom, which has a closed form."""
    return (1 - value / math.sqrt(2 + value**2)) / 2


def test_a_paired_t_test_by_hand():
    statistic = 2 / (1 / math.sqrt(3))
    assert ONE_TWO_THREE.p_value == pytest.approx(2 * two_degrees(statistic))
    half = 4.302653 / math.sqrt(3)
    assert ONE_TWO_THREE.interval == pytest.approx((2 - half, 2 + half), abs=1e-6)
    assert mean_interval((1, 2, 3), 0.9) == pytest.approx((2 - 2.919986 / math.sqrt(3), 2 + 2.919986 / math.sqrt(3)))
    assert mean_interval((5.0, 5.0)) == (5.0, 5.0)


def test_two_one_sided_tests_by_hand():
    assert ONE_TWO_THREE.equivalence_p_value(4) == pytest.approx(
        two_degrees(2 * math.sqrt(3))
    )  # the nearer end of the margin decides
    assert ONE_TWO_THREE.equivalence_p_value(2) == pytest.approx(0.5)
    mirrored = PairedDifferences((-1.0, -2.0, -3.0), "seed")
    assert mirrored.equivalence_p_value(4) == pytest.approx(ONE_TWO_THREE.equivalence_p_value(4))


@pytest.mark.parametrize("margin", [0.5, 2.0, 4.0, 4.8, 5.2])
def test_two_one_sided_tests_are_a_90_percent_interval_within_the_margin(margin):
    """The verdicts on the claims of papers use this interval."""
    low, high = confidence_interval(ONE_TWO_THREE.values, 0.9)
    assert (ONE_TWO_THREE.equivalence_p_value(margin) < LEVEL) == (-margin < low and high < margin)


def test_holm_by_hand():
    """0.005 x 4, 0.01 x 3, 0.03 x 2 and 0.04 x 1; the last is raised to the one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02] and holm([]) == []


def test_holm_does_not_depend_on_the_order():
    p_values = [0.011, 0.3, 0.0004, 0.02, 0.9, 0.013]
    order = [3, 1, 5, 0, 4, 2]
    assert holm([p_values[i] for i in order]) == [holm(p_values)[i] for i in order]


@pytest.mark.parametrize(("pairs", "level"), [(2, 0.05), (3, 0.05), (3, 0.05 / 12), (8, 0.05 / 4), (200, 0.05)])
def test_a_detectable_difference_is_found_in_four_of_five_simulated_designs(pairs, level):
    sd = 0.3
    drawn = np.random.default_rng(0).normal(detectable_difference(sd, pairs, level), sd, (20_000, pairs))
    statistic = np.abs(drawn.mean(1)) / (drawn.std(1, ddof=1) / math.sqrt(pairs))
    assert (statistic > t.isf(level / 2, pairs - 1)).mean() == pytest.approx(0.8, abs=0.01)


def test_the_detectable_difference_of_many_pairs_is_that_of_the_normal_distribution():
    assert detectable_difference(2.0, 10**6) == pytest.approx(2 * (1.959964 + 0.841621) / 1000, rel=1e-4)
    few = [detectable_difference(1.0, pairs) for pairs in (2, 3, 5)]
    assert few == pytest.approx([11.550, 3.264, 1.682], abs=1e-3)


def test_intervals_cover_what_they_say():
    generator = np.random.default_rng(1)
    means = [mean_interval(generator.normal(3, 2, 4)) for _ in range(2000)]
    assert np.mean([low < 3 < high for low, high in means]) == pytest.approx(0.95, abs=0.015)
    shares = [proportion_interval(int(hits), 40) for hits in generator.binomial(40, 0.1, 1000)]
    assert np.mean([low < 0.1 < high for low, high in shares]) == pytest.approx(0.95, abs=0.025)
    letters = [[generator.exponential(mean, 40) for mean in (1.0, 3.0)] for _ in range(300)]
    found = [bootstrap_interval(samples, seed, replicates=300) for seed, samples in enumerate(letters)]
    assert np.mean([low < 2 < high for low, high in found]) == pytest.approx(0.94, abs=0.03)


def test_the_interval_of_a_ratio_ends_where_a_paired_test_begins_to_find_a_difference():
    """Fieller 1954: at an end q, a paired test of numerators - q * denominators has p = 0.05; inside, p is larger."""
    rng = np.random.default_rng(0)
    bottom = rng.normal(1, 0.2, 9)
    top = 0.6 * bottom + rng.normal(0, 0.05, 9)
    low, high = fieller_interval(top, bottom)
    for end in (low, high):
        assert ttest_1samp(top - end * bottom, 0).pvalue == pytest.approx(0.05)
    ratio = top.mean() / bottom.mean()
    assert low < ratio < high and ttest_1samp(top - (low + ratio) / 2 * bottom, 0).pvalue > 0.05
    assert fieller_interval(3 * top, bottom) == pytest.approx((3 * low, 3 * high))
    wide = fieller_interval(top, bottom, 0.99)
    assert wide[0] < low and high < wide[1]
    assert fieller_interval(bottom, bottom) == pytest.approx((1, 1))


def test_a_ratio_to_what_may_be_0_has_no_interval():
    """The 95 % interval of the mean of 0.1, 0.2 and 0.4 contains 0."""
    assert mean_interval((0.1, 0.2, 0.4))[0] < 0 < mean_interval((0.2, 0.3, 0.4))[0]
    assert fieller_interval((1.0, 2.0, 1.5), (0.1, 0.2, 0.4)) is None
    assert fieller_interval((1.0, 2.0, 1.5), (0.2, 0.3, 0.4)) is not None


def test_a_bootstrap_resamples_each_sample_by_itself():
    assert bootstrap_interval([np.ones(5), np.zeros(9)], 0) == [0.5, 0.5]
    assert bootstrap_interval([np.array([3.0]), np.array([1.0])], 0) == [2.0, 2.0]  # samples of one value
    values = [np.arange(70.0), np.arange(40.0) ** 2 / 10]
    low, high = bootstrap_interval(values, 0, replicates=4000)
    middle = (values[0].mean() + values[1].mean()) / 2
    error = math.sqrt(values[0].var() / 70 + values[1].var() / 40) / 2
    assert [low, high] == pytest.approx([middle - 1.96 * error, middle + 1.96 * error], abs=0.1 * error)
    assert bootstrap_interval(values, 0) == bootstrap_interval(values, 0) != bootstrap_interval(values, 1)


@pytest.mark.slow
def test_a_table_without_true_differences_has_a_false_one_in_at_most_one_of_twenty():
    drawn = np.random.default_rng(2).normal(0, 1, (400, 4, 4))
    tables = [[row(PairedDifferences(one, "seed"), "up") for one in table] for table in drawn.tolist()]
    false = [any(one.verdict in ("better", "worse") for one in judge(table)) for table in tables]
    assert 0.02 < np.mean(false) < 0.075  # 0.19 without Holm's correction


@pytest.mark.slow
def test_differences_at_the_margin_are_called_equivalent_in_at_most_one_of_twenty():
    drawn = np.random.default_rng(3).normal(1, 0.5, (1000, 10))
    called = [PairedDifferences(values, "seed").equivalence_p_value(1.0) < LEVEL for values in drawn.tolist()]
    assert np.mean(called) == pytest.approx(0.05, abs=0.02)


def far(mean: float) -> PairedDifferences:
    return PairedDifferences([mean - 0.01, mean, mean + 0.01, mean + 0.002], "seed")


def test_verdicts():
    found = judge(
        [
            row(far(1), "up", 0.1),
            row(far(1), "down", 2.0),
            row(far(0.0), "up", 0.1),
            row(far(0.0), "up", 0.001),
            row(far(0.0), "up"),
            row(PairedDifferences((0.0, 0.0), "seed"), "up", 0.1),
            row(PairedDifferences((0.2, 0.2), "seed"), "up", 0.1),
            row(None, "up", 0.1),
            row(far(1), ""),
        ]
    )
    assert [one.verdict for one in found] == [
        "better", "worse", "equivalent", "not distinguishable", "not distinguishable", "same in every pair",
        "not tested", "not tested", "not tested",
    ]  # fmt: skip
    assert [one.small for one in found[:2]] == [False, True]  # the second is worse, but by less than its margin of 2
    assert found[5] == Finding("same in every pair", 1.0)
    assert found[7] == found[8] == Finding("not tested")


def test_a_level_is_shared_by_the_comparisons_of_the_table():
    """A difference with p = 0.016 is significant alone but not among five comparisons, and nor is an equivalence."""
    one = PairedDifferences((1.0, 2.0, 3.0, 2.0), "seed")
    assert one.p_value == pytest.approx(0.0163, abs=1e-3)
    other = PairedDifferences((1.0, -1.0, 1.0, -1.1), "seed")
    alone, (first, *_) = (
        judge([row(one, "up")])[0],
        judge([row(one, "up"), *[row(other, "up")] * 4]),
    )
    assert (alone.verdict, first.verdict) == ("better", "not distinguishable")
    assert first.p_value == pytest.approx(5 * alone.p_value)
    assert first.detectable == pytest.approx(detectable_difference(one.sd, 4, 0.05 / 5))
    assert first.detectable > alone.detectable == pytest.approx(detectable_difference(one.sd, 4))
    near = PairedDifferences((0.1, -0.1, 0.12, -0.1), "seed")
    margin = next(m for m in np.arange(0.1, 1, 0.01) if near.equivalence_p_value(m) < 0.05)
    assert judge([row(near, "up", margin)])[0].verdict == "equivalent"
    many = judge([row(near, "up", margin), *[row(other, "up", 0.01)] * 4])
    assert many[0].verdict == "not distinguishable"


def test_a_part_of_a_planned_table_is_judged_as_strictly_as_the_whole():
    """`planned` gives the same findings as adding comparisons whose p-value is 1 to the table."""
    one, nothing = PairedDifferences((1.0, 2.0, 3.0, 2.0), "seed"), PairedDifferences((1.0, -1.0, 1.0, -1.0), "seed")
    whole = judge([row(one, "up", 9.0), *[row(nothing, "up", 0.001)] * 4])[0]
    part = judge([row(one, "up", 9.0)], planned=5)[0]
    assert part == whole and part.p_value > judge([row(one, "up", 9.0)])[0].p_value
    assert judge([row(one, "up")] * 3, planned=2) == judge([row(one, "up")] * 3)


def test_what_is_not_tested_takes_no_level():
    one = PairedDifferences((1.0, 2.0, 3.0, 2.0), "seed")
    beside = [
        row(None, "up"),
        row(one, ""),
        row(PairedDifferences((0.2, 0.2), "seed"), "up"),
    ]
    assert judge([row(one, "up"), *beside])[0] == judge([row(one, "up")])[0]


def test_a_margin_is_a_hundredth_of_the_range():
    assert default_margin(0.5, 1) == pytest.approx(0.005)
    assert default_margin(0, None) is None and default_margin(None, None) is None
