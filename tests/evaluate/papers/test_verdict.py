"""The verdict on a claim: cases worked by hand, and properties that hold for any numbers.

The 95 % interval over three seeds is mean +- 4.303 sd/sqrt(3), and over two seeds mean +- 12.706 |difference|/2.
"""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.evaluate.metrics.base import MetricResult
from sae.evaluate.papers.claims import Claim
from sae.evaluate.papers.verdict import (
    MEANINGS,
    WORST_FIRST,
    Conditions,
    Judgement,
    Verdict,
    combine_judgements,
    confidence_interval,
    differences,
    judge,
    measured_value,
    paired_changes,
)

TEN = Claim("ten", "6", "an L0 of 10.0", 10.0, "core.sparsity.l0", system="own")
PAIR = dataclasses.replace(TEN, quote="10.0 against 20.0", against="other", against_value=20.0)  # half of the other
FALL = Claim("fall", "6", "a fall of 50%", -50.0, "core.sparsity.l0", "%", "own", "other")
TIMES = Claim("times", "6", "2.0x as many", 2.0, "core.sparsity.l0", "x", "own", "other")
POINTS = Claim("points", "6", "a gain of 7.8 points", 7.8, "core.reconstruction_quality.fve", "pp", "own", "other")
ZERO = dataclasses.replace(TEN, quote="a score of 0.0", value=0.0)
SHARE = Claim("share", "6", "an accuracy of 80.0%", 80.0, "sparse_probing.sae.sae_test_accuracy", "%", "own")

SHARE_PAIR = dataclasses.replace(SHARE, quote="80.0% against 70.0%", against="other", against_value=70.0)


def judged(claim, own=(), other=(), at_home=True, **conditions):
    values = {"own": dict(enumerate(own)), "other": dict(enumerate(other))}
    return judge(claim, values, Conditions(at_home, **conditions))


def verdict(*about, **conditions):
    return judged(*about, **conditions).verdict


@pytest.mark.parametrize(
    ("claim", "own", "other", "expected"),
    [
        # the mean 10.3 is 3 % off; the interval 10.05 to 10.55 is within 9 to 11
        (TEN, [10.2, 10.3, 10.4], [], "reproduced"),
        (TEN, [10.0, 10.0, 10.0], [], "reproduced"),
        # the mean is exact, but the interval 8.5 to 11.5 is too wide
        (TEN, [9.4, 10.0, 10.6], [], "not comparable"),
        # two seeds are too few: their interval, 9.4 to 10.7, excludes nothing
        (TEN, [10.0, 10.1], [], "not comparable"),
        (TEN, [10.0], [], "not comparable"),
        # the mean is 7 % off; the interval 10.45 to 10.95 overlaps 9.5 to 10.5
        (TEN, [10.6, 10.7, 10.8], [], "not comparable"),
        # the interval 11.85 to 12.35 does not overlap 9.5 to 10.5
        (TEN, [12.0, 12.1, 12.2], [], "contradicted"),
        (TEN, [8.0, 8.1, 8.2], [], "contradicted"),
        # 5 % of 0.0 is 0, so a mean that rounds to 0.0 agrees: here 0.02, with the interval -0.005 to 0.045 in +-0.1
        (ZERO, [0.01, 0.02, 0.03], [], "reproduced"),
        (ZERO, [0.19, 0.2, 0.21], [], "contradicted"),
        # printed in %, measured as a share
        (SHARE, [0.79, 0.80, 0.81], [], "reproduced"),
        (SHARE, [80.0, 80.0, 80.0], [], "contradicted"),
        # without runs of the other system, only the claimed number counts
        (PAIR, [10.2, 10.3, 10.4], [], "reproduced"),
        # the other system has a printed number too: a mean of 20.6 is 3 % off and agrees, a mean of 25 does not
        (PAIR, [10.2, 10.3, 10.4], [20.5, 20.6, 20.7], "reproduced"),
        (PAIR, [10.2, 10.3, 10.4], [24.9, 25.0, 25.1], "direction only"),
        (SHARE_PAIR, [0.8, 0.8, 0.81], [0.7, 0.7, 0.71], "reproduced"),
        (SHARE_PAIR, [0.8, 0.8, 0.81], [0.6, 0.6, 0.62], "direction only"),
        # the number differs, but every seed is below its pair in the other system: differences -3, -3.1, -2.9
        (PAIR, [12.0, 12.1, 12.2], [15.0, 15.2, 15.1], "direction only"),
        (PAIR, [15.0, 15.2, 15.1], [12.0, 12.1, 12.2], "contradicted"),
        # every seed is 1 % below: less than a tenth of the 50 % that is claimed
        (PAIR, [14.85, 15.048, 14.949], [15.0, 15.2, 15.1], "contradicted"),
        # the differences -4, 0 and +1 allow either direction, and the number is 13 +- 5
        (PAIR, [11.0, 13.0, 15.0], [15.0, 13.0, 14.0], "not comparable"),
        # without the other system, the claim is judged by its number alone
        (PAIR, [12.0, 12.1, 12.2], [], "contradicted"),
        # changes -49, -50, -51 %: +- 2.5 around -50, within -55 to -45
        (FALL, [5.1, 5.0, 4.9], [10.0, 10.0, 10.0], "reproduced"),
        (FALL, [8.1, 8.0, 7.9], [10.0, 10.0, 10.0], "direction only"),
        (FALL, [12.1, 12.0, 11.9], [10.0, 10.0, 10.0], "contradicted"),
        # -1 % is less than a tenth of -50 %, and -6 % is more; an increase to 1.05x is less than a tenth of that to 2x
        (FALL, [9.9, 9.91, 9.89], [10.0, 10.0, 10.0], "contradicted"),
        (FALL, [9.4, 9.41, 9.39], [10.0, 10.0, 10.0], "direction only"),
        (TIMES, [10.5, 10.51, 10.49], [10.0, 10.0, 10.0], "contradicted"),
        (TIMES, [11.5, 11.51, 11.49], [10.0, 10.0, 10.0], "direction only"),
        (FALL, [5.0], [10.0], "not comparable"),
        # a change relative to zero does not exist
        (FALL, [5.0, 5.0, 5.0], [0.0, 10.0, 10.0], "not comparable"),
        # only seed 0 exists for both systems
        (FALL, [5.0, 5.0, 5.0], [10.0], "not comparable"),
        (TIMES, [20.0, 20.2, 19.8], [10.0, 10.0, 10.0], "reproduced"),
        (TIMES, [15.0, 15.2, 14.8], [10.0, 10.0, 10.0], "direction only"),
        (TIMES, [8.0, 8.2, 7.8], [10.0, 10.0, 10.0], "contradicted"),
        (POINTS, [0.878, 0.878, 0.878], [0.8, 0.8, 0.8], "reproduced"),
        (POINTS, [0.828, 0.829, 0.827], [0.8, 0.8, 0.8], "direction only"),
    ],
)
def test_on_the_paper_s_model(claim, own, other, expected):
    assert verdict(claim, own, other) == expected


@pytest.mark.parametrize(
    ("claim", "own", "other", "expected"),
    [
        (TEN, [10.0, 10.0, 10.0], [], "not comparable"),
        (TEN, [99.0, 99.0, 99.0], [], "not comparable"),
        (PAIR, [10.0, 10.0, 10.0], [20.0, 20.0, 20.0], "direction only"),
        (PAIR, [1.2, 1.21, 1.19], [2.0, 2.0, 2.0], "direction only"),
        (PAIR, [2.2, 2.21, 2.19], [2.0, 2.0, 2.0], "contradicted"),
        # -2.5 % is less than a tenth of -50 %, but on another model only the direction counts
        (PAIR, [1.95, 1.951, 1.949], [2.0, 2.0, 2.0], "direction only"),
        (PAIR, [1950.0, 1951.0, 1949.0], [2000.0, 2000.0, 2000.0], "direction only"),
        # the interval contains zero and is within a tenth of the claimed change
        (PAIR, [1.999, 2.0, 2.001], [2.0, 2.0, 2.0], "not comparable"),
        (FALL, [9.999, 10.0, 10.001], [10.0, 10.0, 10.0], "not comparable"),
        # relative to 0 there is no change in %, but there is a direction
        (PAIR, [-1.0, -1.1, -0.9], [0.0, 0.0, 0.0], "direction only"),
        (PAIR, [10.0, 10.0, 10.0], [], "not measured"),
        (FALL, [5.0, 5.0, 5.0], [10.0, 10.0, 10.0], "direction only"),
        (FALL, [9.0, 9.0, 12.0], [10.0, 10.0, 10.0], "not comparable"),
    ],
)
def test_on_another_model(claim, own, other, expected):
    assert verdict(claim, own, other, at_home=False) == expected


def test_what_the_paper_contradicts_is_not_judged():
    assert verdict(TEN, [10.0] * 3, inconsistent=True) == "paper inconsistent"
    assert verdict(TEN, inconsistent=True) == "paper inconsistent"


def test_what_is_missing_is_not_measured():
    unspoken = dataclasses.replace(TEN, metric="none", why="nobody measures it")
    assert verdict(unspoken, [10.0] * 3) == "not measured"
    assert verdict(TEN) == "not measured"
    assert verdict(FALL, [5.0] * 3) == "not measured"
    assert judge(FALL, {"own": {0: 5.0}, "other": {1: 10.0}}, Conditions(True)).verdict == "not measured"


numbers = st.lists(st.floats(-100, 100), max_size=5)
claims = st.sampled_from([TEN, PAIR, FALL, TIMES, POINTS, ZERO, SHARE])


@given(claims, numbers, numbers)
def test_another_model_reproduces_nothing(claim, own, other):
    assert verdict(claim, own, other, at_home=False) in (
        "not measured",
        "not comparable",
        "direction only",
        "contradicted",
    )


@given(numbers, numbers)
def test_a_number_of_one_system_has_no_direction(own, other):
    assert verdict(TEN, own, other) != "direction only"


@given(claims, numbers, numbers, st.booleans(), st.randoms())
def test_the_order_of_seeds_says_nothing(claim, own, other, at_home, random):
    seeds = list(enumerate(zip(own, other, strict=False)))
    shuffled = random.sample(seeds, len(seeds))

    def of(pairs):
        values = {"own": {s: a for s, (a, _) in pairs}, "other": {s: b for s, (_, b) in pairs}}
        return judge(claim, values, Conditions(at_home)).verdict

    assert of(seeds) == of(shuffled)


@given(numbers, numbers)
def test_the_opposite_claim_has_the_opposite_direction(own, other):
    """Numbers that support a fall contradict the claim of a rise."""
    rise = dataclasses.replace(FALL, value=50.0)
    if verdict(FALL, own, other, at_home=False) == "direction only":
        assert verdict(rise, own, other, at_home=False) == "contradicted"


def combined(*verdicts):
    return combine_judgements(Judgement(one) for one in verdicts).verdict


def test_of_several_recipes_the_claim_has_to_hold_of_each():
    assert combined("reproduced", "reproduced") == "reproduced"
    assert combined("reproduced", "equivalent within the margin") == "equivalent within the margin"
    assert combined("equivalent within the margin", "direction only") == "direction only"
    assert combined("direction only", "not comparable") == "not comparable"
    assert combined("not comparable", "mechanism inactive") == "mechanism inactive"
    assert combined("mechanism inactive", "not measured") == "not measured"
    assert combined("not measured", "not of the paper's equation") == "not of the paper's equation"
    assert combined("not of the paper's equation", "not equivalent") == "not equivalent"
    assert combined("reproduced", "not equivalent", "contradicted", "not measured") == "contradicted"
    assert combined("contradicted", "paper inconsistent") == "paper inconsistent"
    assert combined() == "not measured"
    assert set(WORST_FIRST) == set(Verdict.__args__) == set(MEANINGS) and len(WORST_FIRST) == len(MEANINGS)


def test_the_reasons_are_those_of_the_worst_verdict_each_once():
    some = [("not comparable", "L0 1 against 2"), ("direction only", "so"), ("not comparable", "L0 1 against 2")]
    some += [("not comparable", ""), ("not comparable", "the interval includes 0")]
    found = combine_judgements(Judgement(*one) for one in some)
    assert found == ("not comparable", "L0 1 against 2; the interval includes 0")


def test_the_interval_is_student_s():
    assert confidence_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5), rel=1e-5)
    assert confidence_interval([1.0, 2.0]) == pytest.approx((1.5 - 12.7062 / 2, 1.5 + 12.7062 / 2), rel=1e-5)
    assert confidence_interval([1.0, 2.0, 3.0], 0.9) == pytest.approx(
        (2 - 2.91999 / 3**0.5, 2 + 2.91999 / 3**0.5), rel=1e-5
    )
    assert confidence_interval([1.0]) is None and confidence_interval([1.0, float("nan")]) is None


def test_changes_are_in_the_unit_of_the_claim():
    pairs = [(3.0, 2.0), (-1.0, -2.0)]
    assert paired_changes("%", pairs) == [50.0, 50.0]  # relative to |other|: -1 is above -2
    assert paired_changes("share", pairs) == [0.5, 0.5]
    assert paired_changes("pp", pairs) == [100.0, 100.0]
    assert paired_changes("", pairs) == [1.0, 1.0]
    assert paired_changes("x", pairs) == [1.5, 0.5]
    assert paired_changes("%", [(1.0, 0.0)]) == []
    assert paired_changes("pp", [(1.0, 0.0)]) == [100.0]


# --- comparisons in words ---------------------------------------------------------------------------------------------

MORE = Claim(
    "more", "6", "more of it", None, "core.reconstruction_quality.fve", system="own", against="other", says="more"
)
LESS = dataclasses.replace(MORE, says="less")
EQUAL = dataclasses.replace(MORE, says="equal", margin=0.1)
NEARLY = dataclasses.replace(EQUAL, unit="%", margin=2.0)


@pytest.mark.parametrize(
    ("claim", "own", "expected", "elsewhere"),
    [
        # against 1.0, 1.0, 1.0: differences 0.1 +- 0.02484 (95 %)
        (MORE, [1.09, 1.1, 1.11], "direction only", "direction only"),
        (LESS, [1.09, 1.1, 1.11], "contradicted", "contradicted"),
        (MORE, [0.89, 0.9, 0.91], "contradicted", "contradicted"),
        (LESS, [0.89, 0.9, 0.91], "direction only", "direction only"),
        (MORE, [0.99, 1.0, 1.02], "not comparable", "not comparable"),
        (MORE, [1.1], "not comparable", "not comparable"),
        # the 90 % interval is mean +- 2.920 sd/sqrt(3): 0.08 +- 0.01686 is within 0.1; 0.08 +- 0.02484 (95 %) is not
        (EQUAL, [1.07, 1.08, 1.09], "equivalent within the margin", "equivalent within the margin"),
        (EQUAL, [0.91, 0.92, 0.93], "equivalent within the margin", "equivalent within the margin"),
        # 0.085 +- 0.01686 extends beyond the margin
        (EQUAL, [1.075, 1.085, 1.095], "not comparable", "not comparable"),
        (EQUAL, [0.905, 0.915, 0.925], "not comparable", "not comparable"),
        # 0.12 +- 0.01686 lies outside the margin, but the 95 % interval does not
        (EQUAL, [1.11, 1.12, 1.13], "contradicted", "not equivalent"),
        (EQUAL, [0.87, 0.88, 0.89], "contradicted", "not equivalent"),
        (EQUAL, [1.0], "not comparable", "not comparable"),
        (EQUAL, [1.0, 1.0, 1.0], "equivalent within the margin", "equivalent within the margin"),
        # 1 % +- 0.16 is within 2 %, 3 % +- 0.16 is not
        (NEARLY, [1.009, 1.01, 1.011], "equivalent within the margin", "equivalent within the margin"),
        (NEARLY, [1.029, 1.03, 1.031], "contradicted", "not equivalent"),
    ],
)
def test_a_comparison_in_words(claim, own, expected, elsewhere):
    ones = [1.0] * len(own)
    assert verdict(claim, own, ones) == expected
    assert verdict(claim, own, ones, at_home=False) == elsewhere
    assert verdict(claim, own) == verdict(claim, own, at_home=False) == "not measured"


def test_a_margin_of_a_share_is_one_of_the_other_s_number():
    tens = [10.0, 10.0, 10.0]
    assert verdict(NEARLY, [10.09, 10.1, 10.11], tens) == "equivalent within the margin"
    assert verdict(dataclasses.replace(NEARLY, unit=""), [11.9, 12.0, 12.1], tens) == "not comparable"  # 2 +- 0.17


# --- L0, substitutions, mechanisms ------------------------------------------------------------------------------------

EV = dataclasses.replace(PAIR, metric="core.reconstruction_quality.explained_variance")
BELOW, ABOVE = ([1.2, 1.21, 1.19], [2.0] * 3), ([2.2, 2.21, 2.19], [2.0] * 3)  # the claimed direction, and the opposite
WIDE = ([1.0, 2.0, 3.0], [2.0] * 3)


@pytest.mark.parametrize(
    ("l0", "printed", "expected", "opposite", "reason"),
    [
        (None, None, "direction only", "contradicted", ""),
        ((30.0, 30.0), None, "direction only", "contradicted", ""),
        # 33 is 10 % above 30, and 33.1 is above that
        ((33.0, 30.0), None, "direction only", "contradicted", "L0 33 against 30"),
        ((30.0, 33.0), None, "direction only", "contradicted", "L0 30 against 33"),
        ((33.1, 30.0), None, "not comparable", "not comparable", "L0 33.1 against 30"),
        ((30.0, 33.1), None, "not comparable", "not comparable", "L0 30 against 33.1"),
        ((6.0, 74.0), None, "not comparable", "not comparable", "L0 6 against 74"),
        ((6.0, 0.0), None, "not comparable", "not comparable", "L0 6 against 0"),
        ((0.0, 0.0), None, "direction only", "contradicted", ""),
        # the paper compares an L0 of 42 with 90.6, and ours differ in the same direction
        ((60.0, 74.0), 42.05 / 90.6, "direction only", "not comparable", "own comparison: 60 against 74"),
        ((74.0, 60.0), 5.4, "direction only", "not comparable", "own comparison: 74 against 60"),
        # ours differ in the other direction, or the paper compares at similar L0
        ((74.0, 60.0), 42.05 / 90.6, "not comparable", "not comparable", "L0 74 against 60"),
        ((60.0, 74.0), 5.4, "not comparable", "not comparable", "L0 60 against 74"),
        ((60.0, 74.0), 1.05, "not comparable", "not comparable", "L0 60 against 74"),
        # our L0 are similar and the paper's are not: that is a different comparison, so it contradicts nothing
        (
            (30.0, 31.0),
            0.5,
            "direction only",
            "not comparable",
            "L0 30 against 31, but the paper compares at different",
        ),
        ((30.0, 31.0), 1.05, "direction only", "contradicted", "L0 30 against 31"),
    ],
)
def test_at_unlike_l0_nothing_is_contradicted_on_another_model(l0, printed, expected, opposite, reason):
    where = {"at_home": False, "l0": l0, "printed_l0": printed}
    below = judged(EV, *BELOW, **where)
    assert below.verdict == expected and (below.reason == "" or expected == "not comparable" or "own" in below.reason)
    found = judged(EV, *ABOVE, **where)
    assert found.verdict == opposite and reason in found.reason and (reason or not found.reason)
    # on the paper's own model, different L0 do not matter
    where["at_home"] = True
    assert (verdict(EV, *BELOW, **where), verdict(EV, *ABOVE, **where)) == ("direction only", "contradicted")
    # an undecided comparison stays undecided
    assert verdict(EV, *WIDE, **where | {"at_home": False}) == "not comparable"


@pytest.mark.parametrize(
    ("metric", "moved"),
    [
        ("core.sparsity.l0", False),
        ("core.sparsity.l1", False),
        ("core.sparsity.activation_variance", True),
        ("core.reconstruction_quality.mse", True),
        ("core.model_behavior_preservation.kl_div_score", True),
        ("core.model_performance_preservation.ce_loss_score", True),
        ("absorption.mean.mean_absorption_score", True),
        ("absorption.n.letters", False),
        ("sparse_probing.sae.sae_top_1_test_accuracy", True),
        ("sparse_probing.llm.llm_top_1_test_accuracy", False),
        ("scr.scr_metrics.scr_metric_threshold_2", True),
        ("unlearning.unlearning.unlearning_score", True),
        ("training.loss", True),
        ("training.l0", False),
        ("cost.step_time", False),
    ],
)
def test_l0_itself_and_costs_are_comparable_at_any_l0(metric, moved):
    claim = dataclasses.replace(PAIR, metric=metric)
    where = {"at_home": False, "l0": (6.0, 74.0)}
    assert verdict(claim, *BELOW, **where) == ("not comparable" if moved else "direction only")
    assert verdict(claim, *ABOVE, **where) == ("not comparable" if moved else "contradicted")


def test_the_first_step_comes_before_any_l0():
    loss = dataclasses.replace(PAIR, metric="training.loss", at="first")
    assert verdict(loss, *ABOVE, at_home=False, l0=(6.0, 74.0)) == "contradicted"
    assert verdict(dataclasses.replace(loss, at="last"), *ABOVE, at_home=False, l0=(6.0, 74.0)) == "not comparable"


def test_two_systems_are_not_equal_by_their_l0_alone():
    unequal = [1.11, 1.12, 1.13], [1.0] * 3
    for l0, printed in (((6.0, 74.0), None), ((6.0, 74.0), 0.5), ((74.0, 74.0), 0.5)):
        assert verdict(EQUAL, *unequal, at_home=False, l0=l0, printed_l0=printed) == "not comparable"
    assert verdict(EQUAL, [1.0] * 3, [1.0] * 3, at_home=False, l0=(6.0, 74.0), printed_l0=0.5) == "not comparable"
    assert verdict(EQUAL, [1.0] * 3, [1.0] * 3, at_home=False, l0=(70.0, 74.0)) == "equivalent within the margin"


def test_of_a_replaced_equation_nothing_is_reproduced_or_contradicted():
    replaced = "not of the paper's equation"
    assert verdict(TEN, [10.2, 10.3, 10.4], substituted=True) == replaced
    assert verdict(TEN, [12.0, 12.1, 12.2], substituted=True) == replaced
    for at_home in (True, False):
        assert verdict(PAIR, *ABOVE, at_home=at_home, substituted=True) == replaced
        assert verdict(PAIR, *BELOW, at_home=at_home, substituted=True) == "direction only"
        assert verdict(EQUAL, [1.2] * 3, [1.0] * 3, at_home=at_home, substituted=True) == replaced
    assert verdict(EV, *ABOVE, at_home=False, substituted=True, l0=(6.0, 74.0)) == "not comparable"
    assert verdict(PAIR, substituted=True, at_home=False) == "not measured"


def test_an_idle_mechanism_is_neither_supported_nor_contradicted():
    for at_home in (True, False):
        for numbers in (ABOVE, BELOW, WIDE):
            assert verdict(PAIR, *numbers, at_home=at_home, inactive=True) == "mechanism inactive"
        assert verdict(PAIR, at_home=at_home, inactive=True) == "not measured"
    assert verdict(PAIR, *ABOVE, inactive=True, inconsistent=True) == "paper inconsistent"


def test_a_copy_of_another_row_has_no_verdict_of_its_own():
    copy = dataclasses.replace(PAIR, copy_of="ten")
    for more in ({}, {"inconsistent": True}, {"inactive": True}, {"substituted": True}):
        assert judged(copy, *ABOVE, **more) == ("copy", "of ten")


def test_a_restatement_is_judged_like_any_claim():
    assert verdict(dataclasses.replace(PAIR, restates="ten"), *ABOVE) == "contradicted"


def test_differences_are_in_the_unit_of_a_change_and_else_in_the_metric_s():
    pairs = [(3.0, 2.0), (1.0, 2.0)]
    assert differences(PAIR, pairs) == [1.0, -1.0]
    assert differences(SHARE, pairs) == [1.0, -1.0]  # % is the metric's unit here, not a change
    assert differences(FALL, pairs) == [50.0, -50.0]
    assert differences(TIMES, pairs) == [0.5, -0.5]
    assert differences(POINTS, pairs) == [100.0, -100.0]
    assert differences(EQUAL, pairs) == [1.0, -1.0] and differences(NEARLY, pairs) == [50.0, -50.0]


@given(claims, numbers, numbers)
def test_a_condition_takes_verdicts_away_and_never_adds_one(claim, own, other):
    """Different L0 or a replaced equation can only withhold the verdict that the numbers give."""
    plain = verdict(claim, own, other, at_home=False)
    for conditions in ({"l0": (6.0, 74.0)}, {"substituted": True}, {"l0": (6.0, 74.0), "printed_l0": 0.5}):
        found = verdict(claim, own, other, at_home=False, **conditions)
        assert found == plain or found in ("not comparable", "not of the paper's equation")
    assert verdict(claim, own, other, substituted=True) not in ("reproduced", "contradicted")


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
    assert read("training.tau") == 1.0  # from the last line that has tau
    assert read("core.details.rate", entries=("o",)) == 0.4
    assert read("core.details.rate", entries=("k", "o")) == pytest.approx(0.3)
    assert read("core.details.rate") == pytest.approx(0.3)  # z has no rate
    assert read("core.details.rate", over="max") == 0.4


def test_what_does_not_exist_is_none():
    assert read("core.sparsity.l1") is None
    assert read("core.sparsity.l2") is None
    assert read("core.density.mean") is None
    assert read("scr.scr_metrics.scr_metric_threshold_2") is None
    assert read("training.rho") is None
    assert read("core.details.rate", entries=("z",)) is None
    assert read("core.details.rate", entries=("k", "q")) is None  # no mean over only some of the entries
    assert read("none", why="so") is None


@pytest.mark.parametrize(
    ("quote", "value", "other", "unit", "direction"),
    [
        ("0.059 and 0.058", 0.058, 0.059, "", 0),  # 0.0585 rounds to either
        ("0.059 and 0.057", 0.057, 0.059, "", -1),
        ("4,675 and 4,668", 4668.0, 4675.0, "", -1),
        ("90.2% and 90.1%", 90.2, 90.1, "%", 0),
        ("90.3% and 90.1%", 90.3, 90.1, "%", 1),
    ],
)
def test_two_numbers_that_may_be_one_number_rounded_have_no_direction(quote, value, other, unit, direction):
    claim = dataclasses.replace(PAIR, quote=quote, value=value, unit=unit, against_value=other)
    assert claim.direction == direction
    found = judged(claim, [3.0, 3.1, 3.2], [1.0, 1.1, 1.2], at_home=False)
    if not direction:
        assert found == Judgement(
            "not comparable", "the two printed numbers may be the same number, rounded differently"
        )
    else:
        assert found.verdict == ("direction only" if direction > 0 else "contradicted")


def test_the_equal_differences_of_two_seeds_decide_nothing():
    """For counts, for example, 1 and 2 more splits are as likely as 1 and 1."""
    assert confidence_interval([1.0, 1.0]) is None and confidence_interval([1.0, 1.0, 1.0]) == (1.0, 1.0)
    assert confidence_interval([0.0, 0.0]) == (0.0, 0.0)
    found = judged(PAIR, [1.1, 0.3], [1.0, 0.2], at_home=False)  # both differences are 0.1, up to rounding
    assert found.verdict == "not comparable" and found.reason.endswith("or two seeds with the same difference")
    assert verdict(PAIR, [1.0, 1.04, 1.0], [1.04, 1.08, 1.04], at_home=False) == "direction only"
