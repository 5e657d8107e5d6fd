"""The verdict on a claim: cases worked by hand, and what holds whatever is measured.

Of three seeds the 95 % interval is mean +- 4.303 sd/sqrt(3), of two mean +- 12.706 |difference|/2.
"""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.evaluate.metrics.base import MetricResult
from sae.evaluate.papers.claims import Claim
from sae.evaluate.papers.verdict import (
    WORST_FIRST,
    combine_verdicts,
    confidence_interval,
    measured_value,
    paired_changes,
    verdict,
)

TEN = Claim("ten", "6", "an L0 of 10.0", 10.0, "core.sparsity.l0", system="own")
PAIR = dataclasses.replace(TEN, quote="10.0 against 20.0", against="other", against_value=20.0)  # half of the other
FALL = Claim("fall", "6", "a fall of 50%", -50.0, "core.sparsity.l0", "%", "own", "other")
TIMES = Claim("times", "6", "2.0x as many", 2.0, "core.sparsity.l0", "x", "own", "other")
POINTS = Claim("points", "6", "a gain of 7.8 points", 7.8, "core.reconstruction_quality.fve", "pp", "own", "other")
ZERO = dataclasses.replace(TEN, quote="a score of 0.0", value=0.0)
SHARE = Claim("share", "6", "an accuracy of 80.0%", 80.0, "sparse_probing.sae.sae_test_accuracy", "%", "own")


def judge(claim, own=(), other=(), at_home=True, inconsistent=False):
    values = {"own": dict(enumerate(own)), "other": dict(enumerate(other))}
    return verdict(claim, values, on_paper_model=at_home, inconsistent=inconsistent)


@pytest.mark.parametrize(
    ("claim", "own", "other", "expected"),
    [
        # 10.3, 3 % off; the interval 10.05 to 10.55 is within 9 to 11
        (TEN, [10.2, 10.3, 10.4], [], "reproduced"),
        (TEN, [10.0, 10.0, 10.0], [], "reproduced"),
        # the mean is exact, the interval 8.5 to 11.5 is too wide
        (TEN, [9.4, 10.0, 10.6], [], "not comparable"),
        # two seeds are too few, and their interval, 9.4 to 10.7, excludes nothing
        (TEN, [10.0, 10.1], [], "not comparable"),
        (TEN, [10.0], [], "not comparable"),
        # 7 % off; the interval 10.45 to 10.95 has something of 9.5 to 10.5
        (TEN, [10.6, 10.7, 10.8], [], "not comparable"),
        # 11.85 to 12.35 has nothing of it
        (TEN, [12.0, 12.1, 12.2], [], "contradicted"),
        (TEN, [8.0, 8.1, 8.2], [], "contradicted"),
        # of 0.0 five percent are nothing; whatever rounds to it is it: 0.02, and -0.005 to 0.045 within +-0.1
        (ZERO, [0.01, 0.02, 0.03], [], "reproduced"),
        (ZERO, [0.19, 0.2, 0.21], [], "contradicted"),
        # printed in %, measured as a share
        (SHARE, [0.79, 0.80, 0.81], [], "reproduced"),
        (SHARE, [80.0, 80.0, 80.0], [], "contradicted"),
        # the number itself, whatever the other has
        (PAIR, [10.2, 10.3, 10.4], [], "reproduced"),
        # not the number; every seed is below its other: differences -3, -3.1, -2.9
        (PAIR, [12.0, 12.1, 12.2], [15.0, 15.2, 15.1], "direction only"),
        (PAIR, [15.0, 15.2, 15.1], [12.0, 12.1, 12.2], "contradicted"),
        # 1 % below, all of them: less than a tenth of the half that is claimed
        (PAIR, [14.85, 15.048, 14.949], [15.0, 15.2, 15.1], "contradicted"),
        # differences -4, 0, +1: anything is possible, and the number is 13 +- 5
        (PAIR, [11.0, 13.0, 15.0], [15.0, 13.0, 14.0], "not comparable"),
        # without the other, a number like any
        (PAIR, [12.0, 12.1, 12.2], [], "contradicted"),
        # changes -49, -50, -51 %: +- 2.5 around -50, within -55 to -45
        (FALL, [5.1, 5.0, 4.9], [10.0, 10.0, 10.0], "reproduced"),
        (FALL, [8.1, 8.0, 7.9], [10.0, 10.0, 10.0], "direction only"),
        (FALL, [12.1, 12.0, 11.9], [10.0, 10.0, 10.0], "contradicted"),
        # -1 % is less than a tenth of -50
        (FALL, [9.9, 9.91, 9.89], [10.0, 10.0, 10.0], "contradicted"),
        (FALL, [5.0], [10.0], "not comparable"),
        # a share of zero is none
        (FALL, [5.0, 5.0, 5.0], [0.0, 10.0, 10.0], "not comparable"),
        # only seed 0 has both
        (FALL, [5.0, 5.0, 5.0], [10.0], "not comparable"),
        (TIMES, [20.0, 20.2, 19.8], [10.0, 10.0, 10.0], "reproduced"),
        (TIMES, [15.0, 15.2, 14.8], [10.0, 10.0, 10.0], "direction only"),
        (TIMES, [8.0, 8.2, 7.8], [10.0, 10.0, 10.0], "contradicted"),
        (POINTS, [0.878, 0.878, 0.878], [0.8, 0.8, 0.8], "reproduced"),
        (POINTS, [0.828, 0.829, 0.827], [0.8, 0.8, 0.8], "direction only"),
    ],
)
def test_on_the_paper_s_model(claim, own, other, expected):
    assert judge(claim, own, other) == expected


@pytest.mark.parametrize(
    ("claim", "own", "other", "expected"),
    [
        (TEN, [10.0, 10.0, 10.0], [], "not comparable"),
        (TEN, [99.0, 99.0, 99.0], [], "not comparable"),
        (PAIR, [10.0, 10.0, 10.0], [20.0, 20.0, 20.0], "direction only"),
        (PAIR, [1.2, 1.21, 1.19], [2.0, 2.0, 2.0], "direction only"),
        (PAIR, [2.2, 2.21, 2.19], [2.0, 2.0, 2.0], "contradicted"),
        # -2.5 %: less than a tenth of -50, on any scale
        (PAIR, [1.95, 1.951, 1.949], [2.0, 2.0, 2.0], "contradicted"),
        (PAIR, [1950.0, 1951.0, 1949.0], [2000.0, 2000.0, 2000.0], "contradicted"),
        # against 0 there is no share, but a side
        (PAIR, [-1.0, -1.1, -0.9], [0.0, 0.0, 0.0], "direction only"),
        (PAIR, [10.0, 10.0, 10.0], [], "not measured"),
        (FALL, [5.0, 5.0, 5.0], [10.0, 10.0, 10.0], "direction only"),
        (FALL, [9.0, 9.0, 12.0], [10.0, 10.0, 10.0], "not comparable"),
    ],
)
def test_on_another_model(claim, own, other, expected):
    assert judge(claim, own, other, at_home=False) == expected


def test_what_the_paper_contradicts_is_not_judged():
    assert judge(TEN, [10.0] * 3, inconsistent=True) == "paper inconsistent"
    assert judge(TEN, inconsistent=True) == "paper inconsistent"


def test_what_is_missing_is_not_measured():
    unspoken = dataclasses.replace(TEN, metric="none", why="nobody measures it")
    assert judge(unspoken, [10.0] * 3) == "not measured"
    assert judge(TEN) == "not measured"
    assert judge(FALL, [5.0] * 3) == "not measured"
    assert (
        verdict(FALL, {"own": {0: 5.0}, "other": {1: 10.0}}, on_paper_model=True, inconsistent=False) == "not measured"
    )


numbers = st.lists(st.floats(-100, 100), max_size=5)
claims = st.sampled_from([TEN, PAIR, FALL, TIMES, POINTS, ZERO, SHARE])


@given(claims, numbers, numbers)
def test_another_model_reproduces_nothing(claim, own, other):
    assert judge(claim, own, other, at_home=False) in (
        "not measured",
        "not comparable",
        "direction only",
        "contradicted",
    )


@given(numbers, numbers)
def test_a_number_of_one_system_has_no_direction(own, other):
    assert judge(TEN, own, other) != "direction only"


@given(claims, numbers, numbers, st.booleans(), st.randoms())
def test_the_order_of_seeds_says_nothing(claim, own, other, at_home, random):
    seeds = list(enumerate(zip(own, other, strict=False)))
    shuffled = random.sample(seeds, len(seeds))

    def of(pairs):
        values = {"own": {s: a for s, (a, _) in pairs}, "other": {s: b for s, (_, b) in pairs}}
        return verdict(claim, values, on_paper_model=at_home, inconsistent=False)

    assert of(seeds) == of(shuffled)


@given(numbers, numbers)
def test_the_opposite_claim_has_the_opposite_direction(own, other):
    """A rise where the paper says fall: what supports the one contradicts the other."""
    rise = dataclasses.replace(FALL, value=50.0)
    if judge(FALL, own, other, at_home=False) == "direction only":
        assert judge(rise, own, other, at_home=False) == "contradicted"


def test_of_several_recipes_the_claim_has_to_hold_of_each():
    assert combine_verdicts(["reproduced", "reproduced"]) == "reproduced"
    assert combine_verdicts(["reproduced", "direction only"]) == "direction only"
    assert combine_verdicts(["reproduced", "not measured", "contradicted"]) == "contradicted"
    assert combine_verdicts(["reproduced", "not measured"]) == "not measured"
    assert combine_verdicts([]) == "not measured"
    assert set(WORST_FIRST) == set(verdict.__annotations__["return"].__args__)


def test_the_interval_is_student_s():
    assert confidence_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5), rel=1e-5)
    assert confidence_interval([1.0, 2.0]) == pytest.approx((1.5 - 12.7062 / 2, 1.5 + 12.7062 / 2), rel=1e-5)
    assert confidence_interval([1.0]) is None


def test_changes_are_in_the_unit_of_the_claim():
    pairs = [(3.0, 2.0), (-1.0, -2.0)]
    assert paired_changes("%", pairs) == [50.0, 50.0]  # of |other|: -1 is above -2
    assert paired_changes("share", pairs) == [0.5, 0.5]
    assert paired_changes("pp", pairs) == [100.0, 100.0]
    assert paired_changes("x", pairs) == [1.5, 0.5]
    assert paired_changes("%", [(1.0, 0.0)]) == []
    assert paired_changes("pp", [(1.0, 0.0)]) == [100.0]


# --- what was measured ------------------------------------------------------------------------------------------------

LETTERS = [{"first_letter": "k", "rate": 0.2}, {"first_letter": "o", "rate": 0.4}, {"first_letter": "z", "rate": None}]
RESULT = MetricResult({"sparsity": {"l0": 7.0, "l1": None}}, LETTERS, n={"letters": 3})


def read(metric, **more):
    claim = dataclasses.replace(TEN, metric=metric, **more)
    return measured_value(claim, {"core": RESULT}, [{"loss": 3.0, "tau": 1.0}, {"loss": 2.0}])


def test_a_metric_is_read_where_it_stands():
    assert read("core.sparsity.l0") == 7.0
    assert read("core.n.letters") == 3
    assert read("training.loss") == 2.0
    assert read("training.loss", at="first") == 3.0
    assert read("training.tau") == 1.0  # the last line that has it
    assert read("core.details.rate", entries=("o",)) == 0.4
    assert read("core.details.rate", entries=("k", "o")) == pytest.approx(0.3)
    assert read("core.details.rate") == pytest.approx(0.3)  # z has none
    assert read("core.details.rate", over="max") == 0.4


def test_what_does_not_exist_is_none():
    assert read("core.sparsity.l1") is None
    assert read("core.sparsity.l2") is None
    assert read("core.density.mean") is None
    assert read("scr.scr_metrics.scr_metric_threshold_2") is None
    assert read("training.rho") is None
    assert read("core.details.rate", entries=("z",)) is None
    assert read("core.details.rate", entries=("k", "q")) is None  # a mean of fewer than were asked is another number
    assert read("none", why="so") is None
