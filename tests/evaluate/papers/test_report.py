"""A paper's claims beside what was measured."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from sae.common.errors import LeftOutWarning
from sae.evaluate.compare import ComparedRun
from sae.evaluate.compare_charts import read_metrics_log
from sae.evaluate.metrics.base import MetricResult
from sae.evaluate.pages.reproduction import reproduction_page
from sae.evaluate.papers.claims import PAPERS, Claim
from sae.evaluate.papers.parse import load_paper
from sae.evaluate.papers.report import SystemRun, build_report, format_measured

EV = "core.reconstruction_quality.explained_variance"
PAPER = load_paper("004")


def run(
    system,
    recipe,
    seed=0,
    layer=19,
    ev=0.8,
    kl=0.5,
    metrics=None,
    steps=100,
    done=100,
    fve=0.7,
    alive=1.0,
    warmup=None,
    dead=0.0,
):
    core = MetricResult(
        {
            "reconstruction_quality": {"explained_variance": ev, "fve": fve},
            "model_behavior_preservation": {"kl_div_with_sae": kl},
            "misc_metrics": {"frac_alive": alive},
            "sparsity": {"l0": 30.0},
        }
    )
    record = {"layer": layer, "seed": seed, "steps": steps, "d_sae": 8, "batch_size": 4, "resolved": {"warmup": warmup}}
    log = [
        {"step": n, "tokens": 4 * n, "explained_variance": 0.7, "alpha": n / 100, "dead": dead}
        for n in (done // 2, done)
    ]
    found = ComparedRun(f"{recipe}-{seed}", Path("x"), {}, record, {"core": core, **(metrics or {})}, {})
    return SystemRun(system, recipe, found, log)


def of(*claims, **more):
    return replace(PAPER, claims=claims, contradictions=(), **more)


def claim(**more):
    return Claim(
        **{
            "id": "one",
            "where": "",
            "quote": "0.8 and 0.5",
            "value": 0.8,
            "metric": EV,
            "system": "full",
            "layers": (19,),
            **more,
        }
    )


def test_a_number_by_itself_is_compared_on_the_papers_model_only():
    runs = [run("full", "hierarchical", seed, ev=ev) for seed, ev in enumerate((0.799, 0.8, 0.801))]
    assert [row.verdict for row in build_report(of(claim()), runs, True).rows] == ["reproduced"]
    (row,) = build_report(of(claim()), runs, False).rows
    assert (row.verdict, row.seeds, row.measured) == ("not comparable", 3, "0.8 ± 0.001")


def test_two_systems_tell_a_direction_on_any_model():
    better = claim(against="baseline", against_value=0.5)
    own = [run("full", "hierarchical", seed, ev=0.7 + seed / 1000) for seed in range(3)]
    other = [run("baseline", "hierarchical-topk320", seed, ev=0.6) for seed in range(3)]
    (row,) = build_report(of(better), own + other, False).rows
    assert row.verdict == "direction only"
    assert row.measured == "0.701 ± 0.001 and 0.6 ± 0"
    (row,) = build_report(of(replace(better, system="baseline", against="full")), own + other, False).rows
    assert row.verdict == "contradicted"


def test_a_claim_about_several_recipes_has_to_hold_of_each():
    paper = of(claim(against="baseline", against_value=0.5), systems={
        **PAPER.systems, "full": replace(PAPER.systems["full"], recipes=("a", "b")),
    })  # fmt: skip
    runs = [run("full", "a", seed, ev=0.9) for seed in (0, 1)] + [run("full", "b", seed, ev=0.1) for seed in (0, 1)]
    runs += [run("baseline", "hierarchical-topk320", seed, ev=0.5) for seed in (0, 1)]
    (row,) = build_report(paper, runs, False).rows
    assert row.verdict == "contradicted" and row.measured == "0.1 to 0.9 over 2"
    (row,) = build_report(paper, [one for one in runs if one.recipe != "b"], False).rows
    assert row.verdict == "not measured"  # of b nothing is known


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"done": 60}, "60 of 100 steps"),
        ({"steps": 0, "done": 0}, "0 of 0 steps"),
        ({"alive": 0.05}, "95% of its latents are dead"),
        ({"alive": None, "dead": 0.95}, "95% of its latents are dead"),  # as training counts them
        ({"fve": 0.2}, "0.200 of the variance of held-out text, but 0.700"),
        ({"warmup": 1000}, "1,000 warm-up steps"),
    ],
)
def test_a_run_that_does_not_pass_a_gate_is_not_measured(broken, said):
    found = build_report(of(claim()), [run("full", "hierarchical", **broken)], True)
    assert found.rows[0].verdict == "not measured" and found.rows[0].seeds == 0
    assert found.rows[0].notes == ["all of its runs fail a gate"]
    ((name, why),) = found.excluded
    assert name == "hierarchical-0" and said in why


def test_claims_are_compared_with_saebench_s_number_and_gates_with_the_one_without_outlier_rows():
    """The papers count outlier rows, and training does not."""
    masked = run("full", "hierarchical", ev=0.81, fve=0.7).run.results["core"]
    runs = []
    for seed, ev in enumerate((0.799, 0.8, 0.801)):
        one = run("full", "hierarchical", seed, ev=ev, fve=0.1, alive=0.01)
        core = replace(one.run.results["core"], n={"outlier_rows": 7}, masked=masked)
        runs.append(replace(one, run=replace(one.run, results={"core": core})))
    assert [one.failed_gates() for one in runs] == [[], [], []]
    report = build_report(of(claim()), runs, True)
    assert [(row.verdict, row.measured) for row in report.rows] == [("reproduced", "0.8 ± 0.001")]
    page = reproduction_page(report, "google/gemma-2-2b", "field")
    assert "SAEBench's numbers over all rows" in page and "up to 7 outlier rows" in page
    assert "over all rows" not in reproduction_page(build_report(of(claim()), [run("full", "x")], True), "m", "field")


def test_another_layer_and_a_stand_in_are_named():
    probing = MetricResult({"sae": {"sae_top_1_test_accuracy": 0.7}})
    asked = claim(metric="sparse_probing.sae.sae_top_1_test_accuracy", value=85.3, unit="%", quote="85.3%")
    runs = [run("full", "hierarchical", layer=12, metrics={"sparse_probing_stdlib": probing})]
    (row,) = build_report(of(asked), runs, False).rows
    assert row.measured == "70 %"
    assert [note.split(",")[0] for note in row.notes] == [
        "layer 12 instead of 19",
        "measured on the standard-library substitute of the dataset",
    ]
    (row,) = build_report(of(asked), runs, True).rows  # never beside the paper's own
    assert row.verdict == "not measured" and row.measured == "" and not row.notes
    real = [run("full", "hierarchical", layer=12, metrics={"sparse_probing": probing})]
    assert "substitute" not in " ".join(build_report(of(asked), real, False).rows[0].notes)


def test_a_part_of_the_claimed_layers_is_named():
    (row,) = build_report(of(claim(layers=(5, 19))), [run("full", "hierarchical")], True).rows
    assert row.notes == ["layer 19 of 5, 19"]
    (row,) = build_report(of(claim()), [run("full", "hierarchical")], True).rows
    assert row.notes == []


def test_what_was_measured_as_text():
    percent = claim(unit="%", value=80.0, quote="80%")
    assert format_measured(percent, [([0.5, 0.7], [])]) == "60 ± 14 %"
    change = claim(unit="%", value=80.0, quote="80%", against="baseline")
    assert format_measured(change, [([30.0], [60.0])]) == "30 and 60"
    assert format_measured(percent, []) == ""


@pytest.mark.parametrize("number", PAPERS)
def test_the_page_has_every_claim_and_contradiction(number):
    paper = load_paper(number)
    html = reproduction_page(build_report(paper, [], False), "gemma-2-mini", "field")
    assert re.findall(r'<tr id="([^"]*)"', html) == [claim.id for claim in paper.claims]
    assert html.count("<h3>") == len(paper.contradictions)
    assert "There is nothing to draw yet" in html and "<figure" not in html
    assert "Not the paper" in html
    assert "Not the paper" not in reproduction_page(build_report(paper, [], True), paper.setup.reads_as, "field")


@pytest.mark.parametrize(
    "line",
    [
        "5",
        '"x"',
        "null",
        "[1]",
        "[" * 50_000,
        "9" * 8000,
        '{"step": null}',
        '{"step": Infinity}',
        '{"step": 1' + "0" * 400 + "}",
        '{"ste',
    ],
)
def test_a_line_of_the_log_that_is_none_is_left_out(tmp_path, line):
    kept = {"step": 1, "tokens": 4, "loss": 2.0}
    changed = '{"step": 2, "tokens": 8, "loss": "low", "dead": null}'
    (tmp_path / "metrics.jsonl").write_bytes("\n".join([line, json.dumps(kept), changed, line]).encode() + b"\xff")
    with pytest.warns(LeftOutWarning, match="Left out: 1 line of .*metrics.jsonl"):  # the last was cut off by a kill
        assert read_metrics_log(tmp_path) == [kept, {"step": 2, "tokens": 8}]
