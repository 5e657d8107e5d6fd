"""The figures of a paper, redrawn from runs."""

import string
from dataclasses import replace

import pytest

from sae.evaluate.metrics.base import MetricResult
from sae.evaluate.pages.reproduction import reproduction_page
from sae.evaluate.papers.claims import PAPERS
from sae.evaluate.papers.figures import EXTRA_HEADING, MECHANISM_FIGURES, PAPER_HEADING, curve, letters, paper_figures
from sae.evaluate.papers.figures import PAPER_FIGURES as FIGURES
from sae.evaluate.papers.parse import load_paper
from sae.evaluate.papers.report import build_report, runs_by_system

from .test_report import PAPER, of, run


def runs_of(paper, metrics=None, **scalars):
    """Three seeds of each recipe of each system; the measured and logged numbers grow with the seed."""
    made = [
        run(one.id, recipe, seed, layer=12, ev=0.7 + seed / 10, metrics=metrics(seed) if metrics else None)
        for one in paper.systems.values()
        for recipe in one.recipes
        for seed in range(3)
    ]
    return [
        replace(
            one, log=[{**line, **{name: value * (1 + one.seed) for name, value in scalars.items()}} for line in one.log]
        )
        for one in made
    ]


def absorbed(seed):
    letters = [{"first_letter": a, "absorption_rate": r * seed} for a, r in (("b", 0.2), ("a", 0.1))]
    means = {"mean_absorption_score": 0.1 * seed, "mean_num_split_features": 1.0 + seed}
    probing = {f"sae_top_{k}_test_accuracy": 0.5 + k / 100 + seed / 10 for k in (1, 5, 20)}
    return {
        "absorption": MetricResult({"mean": means}, letters),
        "sparse_probing_stdlib": MetricResult({"sae": probing}),
    }


def lettered(seed):
    letters = [{"first_letter": a, "absorption_rate": seed / 10} for a in string.ascii_lowercase]
    return {"absorption": MetricResult({"mean": {"mean_absorption_score": seed / 10}}, letters)}


def drawn(paper, runs, heading=PAPER_HEADING):
    return {chart.title: chart for chart in paper_figures(build_report(paper, runs, False)).get(heading, [])}


def test_a_line_is_the_mean_over_seeds_and_its_band_their_sd():
    made = runs_of(load_paper("001"), T=0.1)  # 0.1, 0.2 and 0.3
    chart = drawn(load_paper("001"), made)["Figure 1 (b): temperature"]
    assert [one.name for one in chart.series] == list(load_paper("001").systems)
    for line in chart.series:
        assert line.kind == "line" and list(line.x) == [200, 400]
        assert list(line.y) == pytest.approx([0.2, 0.2]) and list(line.spread) == pytest.approx([0.1, 0.1])


def test_one_seed_has_no_band():
    (line, *_) = drawn(load_paper("001"), runs_of(load_paper("001"), T=0.1)[::3])["Figure 1 (b): temperature"].series
    assert list(line.y) == [0.1, 0.1] and not any(line.spread)


def test_the_band_of_correlations_is_their_sd_over_pairs():
    made = runs_of(load_paper("003"), mean_correlation=0.1, sd_correlation=0.02)
    chart = drawn(load_paper("003"), made)["Figure 1 (b): correlation of latents"]
    for line in chart.series:
        assert list(line.y) == pytest.approx([0.2, 0.2]) and list(line.spread) == pytest.approx([0.04, 0.04])
    assert "pairs" in chart.note
    older = drawn(load_paper("003"), runs_of(load_paper("003"), mean_correlation=0.1))[
        "Figure 1 (b): correlation of latents"
    ]
    assert not older.note and not any(older.series[0].spread)  # older runs did not log the spread


def test_figures_are_of_the_papers_layer():
    made = [run("full", "hierarchical", seed, layer, ev=layer / 100) for layer in (5, 12, 19) for seed in range(2)]
    title = "Figure 1: explained variance by configuration"
    for layers, drawn_at in (((5, 12, 19), 19), ((5, 12), 5)):  # 19 is the layer of paper 004
        here = [one for one in made if one.layer in layers]
        (point,) = drawn(PAPER, here)[title].series
        assert list(point.y) == pytest.approx([drawn_at / 100])
        assert f"At layer {drawn_at}." in reproduction_page(build_report(PAPER, here, False), "gemma-2-mini")


def test_steps_add_up():
    line = drawn(load_paper("003"), runs_of(load_paper("003")))["Figure 1 (c): cumulative successful steps"].series[0]
    assert (list(line.x), list(line.y), list(line.spread)) == ([200, 400], [50, 100], [0, 0])


def test_what_training_logged_twice_or_without_a_number():
    one = run("full", "hierarchical")
    again = replace(
        one, log=[*one.log, {"tokens": 400, "alpha": 3.0}, {"tokens": 100, "alpha": float("nan")}, {"step": 9}]
    )
    assert curve([one, again], "alpha") == {200: [0.5, 0.5], 400: [1.0, 3.0]}


def test_a_category_is_the_mean_over_seeds_of_a_system():
    paper = load_paper("000")
    charts = drawn(paper, runs_of(paper, absorbed))
    names = [*paper.systems["runs"].recipes, "baseline"]
    for title, middle, sd in (
        ("Figure 1: mean absorption by configuration", 0.1, 0.1),
        ("Figure 2: split features by configuration", 2.0, 1.0),
    ):
        chart = charts[title]
        assert list(chart.categories) == [one.name for one in chart.series] == names
        for place, one in enumerate(chart.series):
            assert (list(one.x), list(one.y), list(one.spread)) == (
                [place],
                pytest.approx([middle]),
                pytest.approx([sd]),
            )


def test_a_run_that_is_of_two_systems_is_shown_once():
    """In paper 000, all runs form one system and each run is one too; run 9 without inhibition is a further system."""
    paper = load_paper("000")
    made = [
        run("run-09-no-inhibition", "collapse-09 without", seed, layer=12)
        if one.system == "run-09-no-inhibition"
        else one
        for seed, one in enumerate(runs_of(paper, absorbed))
    ]
    shown = runs_by_system(build_report(paper, made, False))
    assert list(shown) == [*paper.systems["runs"].recipes, "baseline", "run-09-no-inhibition"]
    assert all(len(runs) == 3 for runs in shown.values())


def test_absorption_by_letter():
    paper = load_paper("000")
    chart = drawn(paper, runs_of(paper, absorbed))["Figure 3: absorption by first letter"]
    assert list(chart.categories) == ["a", "b"]
    for one in chart.series:
        assert list(one.y) == pytest.approx([0.1, 0.2]) and list(one.spread) == pytest.approx([0.1, 0.2])
    heads, lines = letters(build_report(paper, runs_of(paper, absorbed), False))
    assert heads[:2] == ["letter", "collapse-01"] and [line[:2] for line in lines] == [["a", "10.0"], ["b", "20.0"]]


def test_probing_by_system():
    chart = drawn(PAPER, runs_of(PAPER, absorbed))["Figure 2: sparse probing at top-1, 5 and 20"]
    assert list(chart.categories) == list(PAPER.systems) and [one.name for one in chart.series] == [
        "top-1",
        "top-5",
        "top-20",
    ]
    for k, one in zip((1, 5, 20), chart.series, strict=True):
        assert list(one.x) == list(range(len(PAPER.systems)))
        assert list(one.y) == pytest.approx([0.6 + k / 100] * len(one.x)) and list(one.spread) == pytest.approx(
            [0.1] * len(one.x)
        )
    assert "standard-library substitute" in chart.note


def test_systems_of_one_recipe_are_not_mixed():
    paper = load_paper("002")
    chart = drawn(
        paper,
        [
            run(
                one,
                "competition-off",
                metrics={"scr": MetricResult({"scr_metrics": {"scr_metric_threshold_2": value}})},
            )
            for one, value in (("no-competition", 0.1), ("topk", 0.2))
        ],
    )["Table 1: SCR at threshold 2"]
    assert [(one.name, list(one.y)) for one in chart.series] == [("no-competition", [0.1]), ("topk", [0.2])]


def test_a_point_for_each_run_over_its_l0():
    chart = drawn(load_paper("001"), runs_of(load_paper("001")))["Figure 1 (a): sparsity against reconstruction"]
    for one in chart.series:
        assert list(one.x) == [30.0] * 3 and list(one.y) == pytest.approx([0.7, 0.8, 0.9])


def test_a_run_that_does_not_pass_the_gates_is_drawn_in_training_only():
    broken = [run("full", "hierarchical", metrics=absorbed(1), alive=0.01)]
    assert drawn(PAPER, broken) == {} and letters(build_report(PAPER, broken, False)) == (["letter"], [])
    assert "Adaptive factor alpha" in drawn(PAPER, broken, EXTRA_HEADING)
    html = reproduction_page(build_report(PAPER, broken, False), "gemma-2-mini")
    assert "appear only in the training curves" in html


def test_what_is_missing_to_one_is_drawn_of_explained_variance():
    chart = drawn(of(), [run("full", "hierarchical")], EXTRA_HEADING)["Variance unexplained"]
    assert chart.y_log and list(chart.series[0].y) == pytest.approx([0.3, 0.3])


def test_a_share_is_of_the_loss_on_the_same_line():
    """The penalty is 0.1 of a loss of 0.4 in every seed. A line without a loss, or with a loss of 0, has no share."""
    paper = load_paper("002")
    made = runs_of(paper, competition=0.1, loss=0.4)
    chart = drawn(paper, made, EXTRA_HEADING)["Competition's share of the loss"]
    assert len(chart.series) == sum(len(system.recipes) for system in paper.systems.values())
    for line in chart.series:
        assert list(line.x) == [200, 400] and list(line.y) == pytest.approx([0.25, 0.25]) and not any(line.spread)
    lines = [{"tokens": 1, "competition": 1.0}, {"tokens": 2, "competition": 1.0, "loss": 0.0}]
    lines += [{"tokens": 3, "competition": 1.0, "loss": 4.0}]
    assert curve([replace(made[0], log=lines)], "competition", "loss") == {3: [0.25]}
    assert curve([replace(made[0], log=lines)], "competition") == {1: [1.0], 2: [1.0], 3: [1.0]}


@pytest.mark.parametrize("number", PAPERS)
def test_every_chart_is_drawn_where_there_is_all_and_none_where_there_is_nothing(number):
    paper = load_paper(number)
    scalars = (
        "T",
        "rho",
        "enabled",
        "tau",
        "loss",
        "lambda",
        "utilisation",
        "contrast",
        "mean_correlation",
        "l0",
        "merged",
        "competition_strength",
        "pairs_above",
        "mean_coefficient",
        "penalized",
        "correlation_cosine",
        "competition",
        "alpha",
        "stability",
        "resampled",
        "silent",
        "alpha_moves",
    )
    scr = {"scr_stdlib": MetricResult({"scr_metrics": {"scr_metric_threshold_2": 0.1}})}
    core = {
        "reconstruction_quality": {"explained_variance": 0.8, "fve": 0.7, "mse": 1.0},
        "sparsity": {"l0": 30.0},
        "model_behavior_preservation": {"kl_div_with_sae": 0.1, "kl_div_score": 0.9},
    }
    made = runs_of(
        paper, lambda seed: {**absorbed(seed), **scr, "core": MetricResult(core)}, **dict.fromkeys(scalars, 1.0)
    )
    found = paper_figures(build_report(paper, made, False))
    assert [chart.title for chart in found[PAPER_HEADING]] == list(FIGURES[number])
    assert [chart.title for chart in found[EXTRA_HEADING]][: len(MECHANISM_FIGURES.get(number, {}))] == list(
        MECHANISM_FIGURES.get(number, {})
    )
    html = reproduction_page(build_report(paper, made, False), "gemma-2-mini")
    assert html.count("<figure") == sum(map(len, found.values())) and "nothing measured" not in html
    assert paper_figures(build_report(paper, [], False)) == {}
