"""The frontier in the table of a comparison and in the charts of a run, worked by hand."""

import re

import pytest

from sae.common.evaluation_schemas import RESULT_RECORD
from sae.evaluate import compare_charts
from sae.evaluate.compare import ComparedSystem, compare_runs
from sae.evaluate.compared_runs import read_run
from sae.evaluate.frontier import (
    FRONTIER_NUMBERS,
    PUBLISHED_NOTE,
    PUBLISHED_NUMBER,
    Published,
    frontier_table,
    published_at,
)
from sae.evaluate.neighbours import find_neighbours
from sae.evaluate.pages.comparison import comparison_page
from sae.evaluate.pages.summary import THIS_SAE, frontier_charts, summary_section

from ..run_records import change_record, write_result_record
from .test_answers import MODEL, make_reference, make_run

GEMMA = {"name": "google/gemma-2-2b", "revision": "0"}
SERIES = {  # an L0 of 40 is halfway between the two points of "one" and "two" on a log scale
    "one": [[80, 0.9], [20, 0.7]], "two": [[10, 0.5], [160, 0.7]], "from 50": [[50, 0.1], [90, 0.2]],
    "to 30": [[10, 0.1], [30, 0.2]],
}  # fmt: skip


def make_runs(home, model=MODEL, **systems):
    """A run with (L0, KL score, EV) for each system, each with its own recipe."""
    return [
        make_run(home / "runs" / name, *numbers, model=model, variant=name, options={})
        for name, numbers in systems.items()
    ]


def mask_rows(run, l0: float, kl: float) -> None:
    """Give a run outlier rows, and `l0` and `kl` as its numbers without them."""

    def change(record):
        record["eval_result_metrics"] |= {
            "masked_sparsity": {"l0": l0}, "masked_model_behavior_preservation": {"kl_div_score": kl},
            "masked_model_performance_preservation": {"ce_loss_score": kl},
            "masked_reconstruction_quality": {"fve": kl},
        }  # fmt: skip
        record["eval_result_unstructured"]["masked"] = {
            "details": [],
            "intervals": {},
            "n": {},
            "flags": [],
            "extra": None,
        }

    change_record(RESULT_RECORD, run / "evaluations" / "core.json", change)


@pytest.fixture
def published(tmp_path, monkeypatch):
    where = 'model = "google/gemma-2-2b"\nlayer = 12\nmetric = "core"\nnumber = "ce_loss_score"'
    text = [f'[[series]]\nname = "{name}"\n{where}\npoints = {points}' for name, points in SERIES.items()]
    (tmp_path / "published.toml").write_text("\n".join(text))
    monkeypatch.setattr(compare_charts, "PUBLISHED", tmp_path / "published.toml")


def test_a_system_is_behind_the_best_of_no_more_l0(home):
    runs = make_runs(
        home,
        a=(32.0, 0.8, 0.7),
        b=(32.2, 0.9, 0.7),
        same=(32.2, 0.9, 0.6),
        c=(64.0, 0.85, 0.75),
        d=(64.0, 0.7, 0.8),
        e=(0.0, 1, 1),
    )
    comparison = compare_runs(runs, references=False)
    heads, lines = frontier_table(comparison)
    assert heads == ["system", "L0", "KL score ↑", "EV ↑"]
    assert lines == [
        ["a", "32.0", "0.8000, -0.1000 from b", "0.7000, on the frontier"],  # slightly more L0 is allowed
        ["b", "32.2", "0.9000, on the frontier", "0.7000, on the frontier"],  # the same EV is not better
        ["same", "32.2", "0.9000, on the frontier", "0.6000, -0.1000 from a"],  # of equal systems the first is named
        ["c", "64.0", "0.8500, -0.0500 from b", "0.7500, -0.0500 from d"],
        ["d", "64.0", "0.7000, -0.2000 from b", "0.8000, on the frontier"],
    ]
    html = comparison_page(comparison)
    assert "<td>0.7000, -0.2000 from b</td>" in html and PUBLISHED_NOTE not in html
    for some in (runs[:1], [runs[0], runs[-1]]):
        assert frontier_table(compare_runs(some, references=False))[1] == []


def test_all_numbers_of_the_frontier_are_better_if_they_are_larger():
    assert {column.better for _, column in (*FRONTIER_NUMBERS, PUBLISHED_NUMBER)} == {"up"}


def test_published_results_are_interpolated_over_the_logarithm_of_l0(home, published):
    run = read_run(make_run(home / "runs" / "one", 40.0, model=GEMMA))
    found = published_at(ComparedSystem("one", [run]), *PUBLISHED_NUMBER)
    assert found == [Published("one", pytest.approx(0.8)), Published("two", pytest.approx(0.6))]


def test_a_run_over_all_rows_stands_beside_published_results(home, published):
    """Published results include outlier rows; the other numbers in the table leave them out."""
    run = make_run(home / "runs" / "one", 40.0, 0.65, model=GEMMA)
    mask_rows(run, 55.0, 0.95)
    comparison = compare_runs([run], references=False)
    heads, lines = frontier_table(comparison)
    assert heads[4:] == ["CE score ↑", "best published\nat this L0", "lower\npublished"]
    assert lines == [
        ["topk k=32", "55.0", "0.9500, on the frontier", "0.9500, on the frontier", "0.6500", "0.8000 one", "1 of 2"]
    ]
    assert PUBLISHED_NOTE in comparison_page(comparison)


def test_a_run_outside_of_all_published_results_has_empty_cells(home, published):
    runs = make_runs(home, GEMMA, near=(40.0, 0.9, 0.8), far=(9.0, 0.9, 0.8))
    near, far = frontier_table(compare_runs(runs, references=False))[1]
    assert (near[0], far[0]) == ("near", "far") and near[-1] == "2 of 2" and far[-3:] == ["0.9000", "", ""]


def points_of(chart):
    return {one.name: list(zip(one.x, one.y, strict=True)) for one in chart.series}


def test_the_charts_of_a_run_hold_its_seeds_the_runs_beside_it_and_references(home):
    run = make_run(home / "runs" / "s0", 32.0, 0.9, 0.8)
    assert summary_section(read_run(run))["frontiers"] == []  # a single run is not a frontier
    make_run(home / "runs" / "s1", 34.0, 0.7, 0.6, seed=1)
    make_run(home / "runs" / "relu", 50.0, 0.95, 0.85, variant="relu")
    make_reference(home, "pca-32", 32.0, 0.5, 0.4)
    summary = summary_section(read_run(run))
    kl, ev, ce = (chart for chart, _ in summary["frontiers"])
    assert [chart.title for chart in (kl, ev, ce)] == ["KL score ↑", "EV ↑", "CE score ↑"]
    assert points_of(kl) == {
        "topk": [(33.0, pytest.approx(0.8))], "relu": [(50.0, 0.95)], "pca": [(32.0, 0.5)], THIS_SAE: [(32.0, 0.9)],
    }  # fmt: skip
    assert list(points_of(ev)) == ["topk", "relu", "pca", THIS_SAE] and points_of(ev)[THIS_SAE] == [(32.0, 0.8)]
    this = kl.series[-1]
    assert this.labels == ["s0: L0 32.0, 0.9"] and this.style not in [one.style for one in kl.series[:-1]]
    assert not summary["published"]
    assert [re.sub("<[^>]*>", "", name) for name in re.findall(r"</svg>([^<]*)<", summary["frontier_key"])]


def test_a_run_stands_over_all_rows_where_published_results_do(home, published):
    run = make_run(home / "runs" / "one", 40.0, 0.65, model=GEMMA)
    mask_rows(run, 55.0, 0.95)
    make_run(home / "runs" / "relu", 50.0, 0.7, model=GEMMA, variant="relu")
    summary = summary_section(read_run(run))
    kl, _, ce = (points_of(chart) for chart, _ in summary["frontiers"])
    assert kl[THIS_SAE] == [(55.0, 0.95)] and ce[THIS_SAE] == [(40.0, 0.65)] and summary["published"]
    assert ce["one (published)"] == [(80, 0.9), (20, 0.7)]
    assert "CE score 0.6500 is above 1 of 2 published SAEs at this L0" in summary["report"].answers[-1].numbers[-1]


def test_two_runs_of_one_recipe_are_a_frontier_and_a_number_that_is_missing_is_not_drawn(home):
    runs = [make_run(home / "runs" / str(l0), float(l0), options={"k": l0}, resolved={"k": l0}) for l0 in (16, 32, 64)]

    def without_ev(record):
        record["eval_result_metrics"].pop("reconstruction_quality")

    change_record(RESULT_RECORD, runs[0] / "evaluations" / "core.json", without_ev)
    charts = {chart.title: points_of(chart) for chart, _ in summary_section(read_run(runs[0]))["frontiers"]}
    assert charts["KL score ↑"] == {"topk": [(16, 0.9), (32, 0.9), (64, 0.9)], THIS_SAE: [(16, 0.9)]}
    assert charts["EV ↑"] == {"topk": [(32, 0.8), (64, 0.8)]}


def test_a_run_that_core_did_not_measure_is_in_no_chart(home):
    run = make_run(home / "runs" / "one")
    make_run(home / "runs" / "relu", variant="relu")
    (run / "evaluations" / "core.json").unlink()
    write_result_record(run, "stability", eval_config={"weights": "one"}, eval_result_metrics={"stability": {}})
    assert frontier_charts(find_neighbours(read_run(run))) == []
    assert summary_section(read_run(run))["stable"] is None


def test_the_summary_has_what_sae_probes_and_stability_measured(home):
    run = make_run(home / "runs" / "one")
    found = [
        ("sae_probes", {"dataset_name": "pets", "llm_test_auc": 0.9, "sae_top_1_test_auc": 0.8}),
        ("stability", {"index": 3, "density": 0.5, "recurs": True, "decoder_match": [4], "decoder_cosine": [0.9]}),
    ]
    for metric, entry in found:
        write_result_record(run, metric, eval_config={"weights": "one"}, eval_result_details=[entry])
    summary = summary_section(read_run(run))
    assert summary["probed"].lines == [["pets", "0.9000", "0.8000"]]
    assert [line.latent for line in summary["stable"].least] == [3]
