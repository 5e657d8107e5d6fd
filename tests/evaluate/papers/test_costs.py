"""Claims about the time of a training step."""

import json
from dataclasses import replace

import pytest

import sae.train.variants  # noqa: F401  (registers the recipes)
from sae.evaluate.papers.claims import STEP_TIME, Claim
from sae.evaluate.papers.costs import STEP_TIMES, Cost, judge_cost, measured_cost, nearest_table, step_time_tables
from sae.evaluate.papers.parse import load_paper
from sae.train.recipe import RECIPES

PAPER = load_paper("002")  # 8x
TIME = Claim("time", "6", "20% more time", 20.0, STEP_TIME, "%", "full", "baseline")
MACHINE = {"machine": "an abacus", "date": "2026-01-02", "batch_size": 16}


def table(width, d_in=100, **ms):
    return {**MACHINE, "d_in": d_in, "d_sae": width * d_in, "ms": {name.replace("_", "-"): t for name, t in ms.items()}}


NARROW = table(1, competition=[1, 1, 1, 0], competition_baseline=[1, 1, 1, 0])
WIDE = table(4, competition=[11, 12, 14, 1], competition_baseline=[8, 9, 10, 1])


def test_the_ratio_is_that_of_the_medians_with_what_is_done_now_and_then():
    cost = measured_cost(TIME, PAPER, [NARROW, WIDE])
    assert cost[:3] == pytest.approx((13 / 10, 12 / 11, 15 / 9))
    assert cost.source == (
        "13.0 ms against 10.0 ms a step on an abacus, 2026-01-02, d_in 100, 400 latents, 16 tokens, default options"
    )


def test_the_table_is_of_the_nearest_width():
    sizes = [(1, 100), (4, 100), (4, 200), (32, 100)]
    tables = [table(*one) for one in sizes]
    assert nearest_table(PAPER, tables) is tables[2]  # 4 is closer to 8 than 32 is: factors of 2 and 4
    assert nearest_table(load_paper("004"), tables) is tables[0]
    tables = [table(4), table(14)]
    assert nearest_table(PAPER, tables) is tables[1]  # 14 is 1.75 times 8, and 8 is 2 times 4


def test_a_recipe_that_was_not_measured_has_no_cost():
    assert measured_cost(TIME, PAPER, [table(8, competition=[1, 1, 1, 0])]) is None
    assert measured_cost(replace(TIME, against=""), PAPER, [WIDE]) is None
    model = replace(PAPER, systems={**PAPER.systems, "full": replace(PAPER.systems["full"], recipes=())})
    assert measured_cost(TIME, model, [WIDE]) is None  # the language model alone has no training step
    assert judge_cost(TIME, None) == ("not measured", "step_times.json lacks a recipe")
    assert judge_cost(replace(TIME, against=""), None) == ("not measured", "")


def test_of_several_recipes_the_slowest_counts():
    several = replace(PAPER.systems["full"], recipes=("competition", "topk"))
    paper = replace(PAPER, systems={**PAPER.systems, "full": several})
    slow = table(4, competition=[11, 12, 14, 1], competition_baseline=[8, 9, 10, 1], topk=[11, 12, 13, 8])
    assert measured_cost(TIME, paper, [slow]).ratio == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("changed", "low", "high", "expected"),
    [
        ({}, 1.1, 1.6, "direction only"),  # 20 % is claimed; the size of the increase is not judged
        ({}, 2.7, 3.1, "direction only"),
        ({}, 0.9, 1.6, "not comparable"),
        ({}, 0.7, 0.9, "contradicted"),
        ({"value": -20.0}, 0.7, 0.9, "direction only"),
        ({"value": 1.2, "unit": "x"}, 1.1, 1.6, "direction only"),
        ({"value": None, "unit": "", "says": "more"}, 1.1, 1.6, "direction only"),
        ({"value": None, "says": "equal", "margin": 20.0}, 0.9, 1.19, "equivalent within the margin"),
        ({"value": None, "says": "equal", "margin": 20.0}, 1.1, 1.3, "not comparable"),
        ({"value": None, "says": "equal", "margin": 20.0}, 1.21, 1.3, "not equivalent"),
        ({"copy_of": "overhead"}, 1.1, 1.6, "copy"),
    ],
)
def test_a_size_says_nothing_on_another_machine(changed, low, high, expected):
    assert judge_cost(replace(TIME, **changed), Cost(1.2, low, high, "")).verdict == expected


def test_quartiles_are_no_confidence_interval():
    assert judge_cost(TIME, Cost(1.2, 0.9, 1.6, "")) == ("not comparable", "the quartiles overlap")


def test_the_measured_tables_are_whole():
    for one in step_time_tables():
        assert one.keys() == {"machine", "date", "commit", "source", "d_in", "d_sae", "batch_size", "ms"}
        assert set(one["ms"]) <= set(RECIPES)
        for low, middle, high, periodic in one["ms"].values():
            assert 0 < low <= middle <= high and periodic >= 0
    assert json.loads(STEP_TIMES.read_text())["tables"] == step_time_tables()
