"""The report that compares a paper's claims with measured numbers."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from sae.common.errors import LeftOutWarning, UsageError
from sae.evaluate.compare_charts import read_metrics_log
from sae.evaluate.compared_runs import ComparedRun
from sae.evaluate.metrics.base import MetricResult
from sae.evaluate.pages.reproduction import reproduction_page
from sae.evaluate.papers.claims import PAPERS, STEP_TIME, Claim, Contradiction, PaperSystem, Substitution, Unreported
from sae.evaluate.papers.costs import STEP_TIMES
from sae.evaluate.papers.mechanisms import are_equal
from sae.evaluate.papers.parse import load_paper
from sae.evaluate.papers.report import build_report, describe_system, format_measured, unreported_table
from sae.evaluate.papers.runs import SystemRun

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
    l0=30.0,
    weights="",
    **logged,
):
    core = MetricResult(
        {
            "reconstruction_quality": {"explained_variance": ev, "fve": fve},
            "model_behavior_preservation": {"kl_div_with_sae": kl},
            "misc_metrics": {"frac_alive": alive},
            "sparsity": {"l0": l0},
        }
    )
    record = {"layer": layer, "seed": seed, "steps": steps, "d_sae": 8, "batch_size": 4, "resolved": {"warmup": warmup}}
    log = [
        {"step": n, "tokens": 4 * n, "explained_variance": 0.7, "alpha": n / 100, "dead": dead, **logged}
        for n in (done // 2, done)
    ]
    found = ComparedRun(f"{recipe}-{seed}", Path(f"{recipe}-{seed}"), {}, record, {"core": core, **(metrics or {})}, {})
    return SystemRun(system, recipe, found, log, weights)


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
    runs = [run("full", name, seed, ev=ev) for name, ev in (("a", 0.9), ("b", 0.1)) for seed in (0, 1, 2)]
    runs += [run("baseline", "hierarchical-topk320", seed, ev=0.5) for seed in (0, 1, 2)]
    (row,) = build_report(paper, runs, False).rows
    assert row.verdict == "contradicted" and row.measured == "0.1 to 0.9 over 2"
    assert row.difference == "-0.4 to +0.4 over 2" and row.seeds == 3
    assert build_report(paper, [*runs[:5], *runs[6:]], False).rows[0].seeds == 2  # recipe b has two seeds
    (row,) = build_report(paper, [one for one in runs if one.recipe != "b"], False).rows
    assert row.verdict == "not measured"  # recipe b was not measured
    turned = replace(paper.claims[0], system="baseline", against="full")  # the same with the recipes on the other side
    assert row_of(turned, runs, replace(paper, claims=(turned,))).verdict == "contradicted"


def test_a_claim_about_several_layers_has_to_hold_in_each():
    both = replace(BETTER, layers=(5, 19))

    def runs(own, own_l0=30.0):
        at_5 = three("full", "hierarchical", own, layer=5) + three("baseline", "hierarchical-topk320", 0.5, layer=5)
        return at_5 + three("full", "hierarchical", 0.9, l0=own_l0) + LOW

    assert row_of(both, runs(0.8)).verdict == "direction only"
    assert row_of(both, runs(0.1)).verdict == "contradicted"
    assert row_of(BETTER, runs(0.1)).measured == "0.901 ± 0.001 and 0.601 ± 0.001"  # a claim about 19 alone
    row = row_of(both, runs(0.8, own_l0=40.0))
    assert row.verdict == "not comparable" and row.notes == ["L0 40 against 30"]
    idle = [*family("resample", 0.8, resampled=0), *family("linear")]
    idle = [*idle, *(replace(one, run=replace(one.run, record={**one.run.record, "layer": 5})) for one in idle)]
    asked = replace(both, system="resample", against="linear")
    assert row_of(asked, idle, of(asked, systems=FAMILY)).notes == ["`resampled` of resample stayed 0 until the end"]


def test_on_the_papers_model_another_layer_is_not_measured():
    asked, runs = claim(), [run("full", "hierarchical", layer=12)]
    assert row_of(asked, runs, at_home=True).verdict == "not measured"
    assert row_of(asked, runs).verdict == "not comparable"


def test_runs_of_another_system_with_the_same_recipe_and_second_runs_of_a_seed_do_not_count():
    runs = [run("baseline", "hierarchical", ev=0.1), run("full", "hierarchical", ev=0.7)]
    row = row_of(claim(), [*runs, run("full", "hierarchical", ev=0.9)])
    assert (row.measured, row.seeds) == ("0.7", 1)


def test_the_language_model_is_measured_in_the_runs_of_any_system():
    model = {**PAPER.systems, "lm": replace(PAPER.systems["full"], id="lm", recipes=())}
    probing = MetricResult({"llm": {"llm_top_50_test_accuracy": 0.9}})
    asked = claim(system="lm", metric="sparse_probing.llm.llm_top_50_test_accuracy", value=93.4, unit="%", quote="93.4")
    assert (
        row_of(asked, [run("full", "x", metrics={"sparse_probing": probing})], of(asked, systems=model)).measured
        == "90 %"
    )


def test_an_inconsistent_claim_is_so_with_and_without_runs():
    paper = replace(of(BETTER), contradictions=(Contradiction("Two numbers.", (), "", ("one",)),))
    for runs in ([], three("full", "hierarchical", 0.7) + LOW):
        assert row_of(BETTER, runs, paper).verdict == "paper inconsistent"


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"done": 60}, "60 of 100 steps"),
        ({"steps": 0, "done": 0}, "0 of 0 steps"),
        ({"alive": 0.05}, "95% of its latents are dead"),
        ({"alive": None, "dead": 0.95}, "95% of its latents are dead"),  # counted in training
        ({"fve": 0.2}, "0.200 of the variance on held-out text, but 0.700"),
        ({"warmup": 1000}, "1,000 warm-up steps"),
    ],
)
def test_a_run_that_does_not_pass_a_gate_is_not_measured(broken, said):
    found = build_report(of(claim()), [run("full", "hierarchical", **broken)], True)
    assert found.rows[0].verdict == "not measured" and found.rows[0].seeds == 0
    assert found.rows[0].notes == ["all of its runs fail a gate"]
    ((name, why),) = found.excluded
    assert name == "hierarchical-0" and said in why
    some = [run("full", "hierarchical", **broken), run("full", "hierarchical", 1)]
    assert build_report(of(claim()), some, True).rows[0].notes == []  # one run passes its gates


def test_claims_are_compared_with_saebench_s_number_and_gates_with_the_one_without_outlier_rows():
    """The papers include outlier rows in their numbers, and training leaves them out."""
    masked = run("full", "hierarchical", ev=0.81, fve=0.7).run.results["core"]
    runs = []
    for seed, ev in enumerate((0.799, 0.8, 0.801)):
        one = run("full", "hierarchical", seed, ev=ev, fve=0.1, alive=0.01)
        core = replace(one.run.results["core"], n={"outlier_rows": 7}, masked=masked)
        runs.append(replace(one, run=replace(one.run, results={"core": core})))
    assert [one.failed_gates() for one in runs] == [[], [], []]
    report = build_report(of(claim()), runs, True)
    assert [(row.verdict, row.measured) for row in report.rows] == [("reproduced", "0.8 ± 0.001")]
    page = reproduction_page(report, "google/gemma-2-2b")
    assert "SAEBench's numbers over all rows" in page and "up to 7 outlier rows" in page
    assert build_report(of(claim()), [*runs, run("full", "x")], True).outlier_rows == 7  # the maximum over runs
    assert "over all rows" not in reproduction_page(build_report(of(claim()), [run("full", "x")], True), "m")


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
    (row,) = build_report(of(asked), runs, True).rows  # the substitute is never compared with the paper's number
    assert row.verdict == "not measured" and row.measured == "" and not row.notes
    real = [run("full", "hierarchical", layer=12, metrics={"sparse_probing": probing})]
    assert "substitute" not in " ".join(build_report(of(asked), real, False).rows[0].notes)
    other = MetricResult({"sae": {"sae_top_1_test_accuracy": 0.1}})
    both = run("full", "hierarchical", metrics={"sparse_probing": probing, "sparse_probing_stdlib": other})
    assert (row_of(asked, [both]).measured, row_of(asked, [both]).notes) == ("70 %", [])
    mixed = [both, run("full", "hierarchical", 1, metrics={"sparse_probing_stdlib": probing})]
    assert row_of(asked, mixed).notes == ["measured on the standard-library substitute of the dataset"]
    assert (row_of(asked, mixed).seeds, row_of(asked, mixed, at_home=True).seeds) == (2, 1)
    assert row_of(asked, mixed, at_home=True).notes == []


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
    assert format_measured(replace(change, unit="pp"), [([0.3], [0.2])]) == "30 % and 20 %"
    assert format_measured(percent, [([0.5, 0.5], []), ([0.7], [])]) == "50 to 70 % over 2"
    assert format_measured(percent, []) == ""


@pytest.mark.parametrize("number", PAPERS)
def test_the_page_has_every_claim_and_contradiction(number):
    paper = load_paper(number)
    html = reproduction_page(build_report(paper, [], False), "gemma-2-mini")
    assert re.findall(r'<tr id="([^"]*)"', html) == [claim.id for claim in paper.claims]
    assert html.count("<h3>") == len(paper.contradictions)
    assert "There is nothing to draw yet" in html and "<figure" not in html
    assert "Not the paper" in html
    assert "Not the paper" not in reproduction_page(build_report(paper, [], True), paper.setup.reads_as)


def test_the_page_counts_a_run_once_that_belongs_to_two_systems():
    one = run("full", "hierarchical")
    html = reproduction_page(build_report(PAPER, [one, replace(one, system="adaptive")], False), "gemma-2-mini")
    assert "Measured in 1 run: layer 19, seed 0;" in html
    html = reproduction_page(build_report(PAPER, [one, run("full", "hierarchical", 1)], False), "gemma-2-mini")
    assert "Measured in 2 runs: layer 19, seeds 0, 1;" in html


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
    with pytest.warns(LeftOutWarning, match="Left out: 1 line of .*metrics.jsonl"):  # the last line is cut off
        assert read_metrics_log(tmp_path) == [kept, {"step": 2, "tokens": 8}]


# --- readings, mechanisms, L0 -----------------------------------------------------------------------------------------


def three(system, recipe, ev, **more):
    return [run(system, recipe, seed, ev=ev + seed / 1000, **more) for seed in range(3)]


BETTER = claim(against="baseline", against_value=0.5)  # claims that the EV of `full` is above that of `baseline`
LOW, HIGH = three("baseline", "hierarchical-topk320", 0.6), three("baseline", "hierarchical-topk320", 0.9)


def row_of(one, runs, paper=None, **more):
    assert paper is None or one in paper.claims
    report = build_report(paper or of(one), runs, more.pop("at_home", False), more.pop("reading", None))
    return next(row for row in report.rows if row.claim.id == one.id)


def test_a_verdict_is_of_a_reading():
    report = build_report(PAPER, [], False)
    assert report.reading.name == "field" and build_report(PAPER, [], True).reading == PAPER.readings[0]
    literal = build_report(PAPER, [], False, "literal")
    assert "Reading <strong>literal</strong> (the paper&#39;s)" in reproduction_page(literal, "m")
    assert "Reading <strong>field</strong> (ours)" in reproduction_page(report, "m")
    with pytest.raises(UsageError, match="Paper 004 has no reading letter. Choose from evidence, field, literal"):
        build_report(PAPER, [], False, "letter")


def test_what_a_reading_substitutes_stands_beside_the_verdict_in_that_reading_alone():
    field, literal = (next(one for one in PAPER.readings if one.name == name) for name in ("field", "literal"))
    some = Substitution(("one",), "(4)", "Its window has one term too many.")
    paper = of(BETTER, readings=(replace(field, substitutes=(some,)), literal))
    runs = three("full", "hierarchical", 0.7) + HIGH
    row = row_of(BETTER, runs, paper, reading="field")
    assert row.verdict == "not of the paper's equation"
    assert row.notes == ["not as printed: (4). Its window has one term too many."]
    row = row_of(BETTER, runs, paper, reading="literal")
    assert row.verdict == "contradicted" and row.notes == []
    page = reproduction_page(build_report(paper, runs, False, "field"), "m")
    assert (
        "Not as printed: (4). Its window has one term too many." in page
        and 'class="verdict not-of-the-papers-equation"' in page
    )
    assert row_of(BETTER, [], paper, reading="field").notes == []  # without runs nothing was replaced


def test_the_l0_of_the_runs_decides_what_is_comparable():
    own = three("full", "hierarchical", 0.7, l0=40.0)
    row = row_of(BETTER, own + LOW)
    assert row.verdict == "not comparable" and row.notes == ["L0 40 against 30"]
    printed = claim(
        id="l0", metric="core.sparsity.l0", quote="60, 30, 0", value=60, against="baseline", against_value=30
    )
    row = row_of(BETTER, own + LOW, of(BETTER, printed))
    assert row.verdict == "direction only" and row.notes == [
        "the L0 differ as in the paper's own comparison: 40 against 30"
    ]
    assert row_of(BETTER, own + HIGH, of(BETTER, printed)).verdict == "not comparable"
    for ratio, unit in ((100, "%"), (2.0, "x")):
        change = claim(id="l0", metric="core.sparsity.l0", value=ratio, unit=unit, against="baseline")
        assert row_of(BETTER, own + LOW, of(BETTER, change)).verdict == "direction only"
        assert row_of(BETTER, own + LOW, of(BETTER, replace(change, value=-ratio / 2))).verdict == "not comparable"
        beside = replace(change, against="l1"), replace(printed, id="b", system="baseline", against="", value=30)
        assert row_of(BETTER, own + LOW, of(BETTER, *beside)).verdict == "not comparable"  # change from a third
        assert row_of(BETTER, own + LOW, of(BETTER, replace(change, unit="pp"))).verdict == "not comparable"
    none = replace(printed, value=0.0)  # the paper's L0 of 0 is below 30, as our 20 is
    assert (
        row_of(BETTER, three("full", "hierarchical", 0.7, l0=20.0) + LOW, of(BETTER, none)).verdict == "direction only"
    )
    none = replace(printed, against_value=0.0)  # has a direction, but no relative change
    assert (none.direction, none.effect) == (1, None) and row_of(none, own + LOW, of(none)).verdict == "direction only"
    assert row_of(BETTER, own + LOW, of(BETTER, none)).verdict == "not comparable"
    spread = [run("full", "hierarchical", seed, ev=0.7, l0=l0) for seed, l0 in enumerate((30.0, 40.0, 50.0))]
    assert row_of(BETTER, spread + LOW).notes == ["L0 40 against 30"]  # the mean of the seeds
    void = Contradiction("Two L0.", (), "", ("l0",))  # an L0 that the paper itself contradicts is ignored
    assert row_of(BETTER, own + LOW, replace(of(BETTER, printed), contradictions=(void,))).verdict == "not comparable"
    assert row_of(BETTER, own + LOW, at_home=True).verdict == "direction only"


def test_without_a_result_the_l0_is_that_of_training():
    def logged(runs, l0):
        for one in runs:
            core = one.run.results["core"]
            less = replace(core, metrics={key: group for key, group in core.metrics.items() if key != "sparsity"})
            found = replace(one.run, results={"core": less})
            yield replace(one, run=found, log=[line | {"l0": l0} for line in one.log])

    own, other = three("full", "hierarchical", 0.7, l0=90.0), LOW
    row = row_of(BETTER, [*logged(own, 40.0), *logged(other, 30.0)])
    assert row.notes == ["L0 40 against 30"]
    both = [replace(one, log=[line | {"l0": 40.0} for line in one.log]) for one in own]
    assert row_of(BETTER, [*both, *logged(other, 30.0)]).notes == ["L0 40 against 30"]  # both L0 from training
    assert row_of(BETTER, [*both, *other]).notes == ["L0 90 against 30"]


FAMILY = {
    **PAPER.systems,
    "linear": replace(PAPER.systems["linear"], adds_to="", counter=""),
    "resample": replace(PAPER.systems["resample"], adds_to="linear", counter="resampled"),
    "adaptive": replace(PAPER.systems["adaptive"], adds_to="resample", counter="moved"),
    "full": replace(PAPER.systems["full"], adds_to="adaptive", counter="merged"),
}
RECIPES = {"linear": "hierarchical-linear", "resample": "hierarchical-resample", "adaptive": "hierarchical-adaptive"}


def family(system, ev=0.7, **more):
    return three(system, RECIPES.get(system, "hierarchical"), ev, **more)


def test_a_counter_that_stays_zero_makes_an_ablation_inactive():
    asked = claim(system="resample", against="linear", against_value=0.5)
    paper = of(asked, systems=FAMILY)
    idle = family("resample", 0.8, resampled=0) + family("linear")
    row = row_of(asked, idle, paper)
    assert row.verdict == "mechanism inactive" and row.notes == ["`resampled` of resample stayed 0 until the end"]
    acted = family("resample", 0.8, resampled=1) + family("linear")
    assert row_of(asked, acted, paper).verdict == "direction only" and row_of(asked, acted, paper).notes == []
    some = [*family("resample", 0.8, resampled=0)[:2], family("resample", 0.8, resampled=1)[2], *family("linear")]
    assert row_of(asked, some, paper).verdict == "direction only"  # the mechanism acted in one run
    unknown = family("resample", 0.8) + family("linear")  # old logs do not have the counter
    assert row_of(asked, unknown, paper).verdict == "direction only"
    back = replace(asked, system="linear", against="resample")
    assert row_of(back, idle, of(back, systems=FAMILY)).verdict == "mechanism inactive"


def test_a_counter_is_read_where_the_log_ends():
    asked = claim(system="resample", against="linear", against_value=0.5)
    runs = family("resample", 0.8, resampled=0) + family("linear")
    early = [replace(one, log=[one.log[0] | {"resampled": 0}, one.log[1] | {"resampled": 2}]) for one in runs[:3]]
    assert row_of(asked, early + runs[3:], of(asked, systems=FAMILY)).verdict == "direction only"


def test_equal_weights_make_an_ablation_inactive():
    asked = claim(system="resample", against="linear", against_value=0.5)
    paper = of(asked, systems=FAMILY)

    def weighted(system, names):
        return [replace(one, weights=name) for one, name in zip(family(system), names, strict=True)]

    same = weighted("resample", "abc") + weighted("linear", "abc")
    row = row_of(asked, same, paper)
    assert row.verdict == "mechanism inactive"
    assert row.notes == ["the weights of resample equal those of linear, bit for bit"]
    for own, other in (("abc", "abd"), ("abc", "acb"), (["", "", ""], ["", "", ""])):
        assert row_of(asked, weighted("resample", own) + weighted("linear", other), paper).verdict == "not comparable"
    own, other = same[:3], same[3:]
    second = [replace(one, recipe="another") for one in other]
    assert are_equal(own, other)
    assert not any(are_equal(*pair) for pair in (([], other), (own, []), (own, other + second), (own + second, other)))


def test_between_two_systems_of_a_family_every_mechanism_has_to_be_idle():
    asked = claim(system="full", against="linear", against_value=0.5)
    paper = of(asked, systems=FAMILY)

    def runs(resampled, moved, merged):
        return [
            *family("full", 0.8, merged=merged),
            *family("adaptive", moved=moved),
            *family("resample", resampled=resampled),
            *family("linear"),
        ]

    assert row_of(asked, runs(0, 0, 0), paper).verdict == "mechanism inactive"
    for acted in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert row_of(asked, runs(*acted), paper).verdict == "direction only"
    assert row_of(asked, runs(0, 0, 0), paper).notes == [
        "`merged` of full stayed 0 until the end; `moved` of adaptive stayed 0 until the end; "
        "`resampled` of resample stayed 0 until the end"
    ]
    row = row_of(asked, runs(1, 1, 0), paper)
    assert row.verdict == "direction only" and row.notes == [
        "`merged` of full stayed 0 until the end"
    ]  # the note appears anyway
    known = [one for one in runs(0, 0, 0) if one.system != "adaptive"]  # `adaptive` was not run
    assert row_of(asked, known, paper).verdict == "direction only"
    back = replace(asked, system="linear", against="full")
    assert row_of(back, runs(0, 0, 0), of(back, systems=FAMILY)).verdict == "mechanism inactive"
    assert row_of(back, runs(0, 1, 0), of(back, systems=FAMILY)).verdict == "contradicted"


def test_beside_another_model_an_idle_mechanism_is_not_counted_again():
    """If resampling never acts, `resample` against the TopK baseline repeats `linear` against the baseline."""
    linear = claim(id="linear", system="linear", against="baseline", against_value=0.5)
    resample = claim(id="resample", system="resample", against="baseline", against_value=0.5)
    runs = family("resample", 0.8, resampled=0) + family("linear", 0.8) + LOW
    row = row_of(resample, runs, of(linear, resample, systems=FAMILY))
    assert row.verdict == "mechanism inactive" and row.notes == [
        "`resampled` of resample stayed 0 until the end; see linear"
    ]
    assert row_of(linear, runs, of(linear, resample, systems=FAMILY)).verdict == "direction only"
    row = row_of(resample, runs, of(resample, systems=FAMILY))  # the paper has this claim for `resample` only
    assert row.verdict == "direction only" and row.notes == ["`resampled` of resample stayed 0 until the end"]
    for other in ({"against": "l1"}, {"metric": "core.sparsity.l0"}, {"entries": ("a",)}):  # another comparison
        unlike = of(replace(linear, **other), resample, systems=FAMILY)
        assert row_of(resample, runs, unlike).verdict == "direction only"
    acted = family("resample", 0.8, resampled=3) + runs[3:]
    assert row_of(resample, acted, of(linear, resample, systems=FAMILY)).verdict == "direction only"
    adaptive = replace(resample, id="adaptive", system="adaptive")  # adds two idle mechanisms to `linear`
    both = family("adaptive", 0.8, moved=0) + runs
    row = row_of(adaptive, both, of(linear, adaptive, systems=FAMILY))
    assert row.verdict == "mechanism inactive"
    assert (
        row.notes[0]
        == "`moved` of adaptive stayed 0 until the end; `resampled` of resample stayed 0 until the end; see linear"
    )
    for some in (family("adaptive", 0.8, moved=0) + acted, family("adaptive", 0.8, moved=1) + runs):
        assert row_of(adaptive, some, of(linear, adaptive, systems=FAMILY)).verdict == "direction only"


# --- counts, words, differences ---------------------------------------------------------------------------------------


def test_a_claim_its_restatement_and_a_copy_count_once():
    change = claim(id="change", value=60.0, unit="%", against="baseline", restates="one")
    copy = claim(id="copy", copy_of="one")
    report = build_report(of(BETTER, change, copy), three("full", "hierarchical", 0.7) + LOW, False)
    assert [row.verdict for row in report.rows] == ["direction only", "direction only", "copy"]
    assert [row.counted for row in report.rows] == [True, False, False]
    assert report.counts == {"direction only": 1}
    assert report.rows[1].notes == ["the same comparison as one"] and report.rows[2].notes == ["of one"]
    assert "1 claims; 3 rows" in reproduction_page(report, "m")


def test_counts_begin_with_the_best_verdict():
    others = [claim(id=name, metric="none", why="So.") for name in ("a", "b")]
    report = build_report(of(*others, BETTER, claim(id="lone")), three("full", "hierarchical", 0.7) + LOW, False)
    assert list(report.counts.items()) == [("direction only", 1), ("not comparable", 1), ("not measured", 2)]


def test_a_comparison_in_words_shows_its_quote_and_its_measured_difference():
    more = Claim("one", "5", "more variance is explained", metric=EV, system="full", against="baseline", says="more")
    more = replace(more, layers=(19,))
    row = row_of(more, three("full", "hierarchical", 0.7) + LOW)
    assert (row.verdict, row.measured) == ("direction only", "0.701 ± 0.001 and 0.601 ± 0.001")
    assert row.difference == "+0.1 (+0.1 to +0.1, 95%)"
    page = reproduction_page(build_report(of(more), three("full", "hierarchical", 0.7) + LOW, False), "m")
    assert "<q>more variance is explained</q>" in page and "+0.1 (+0.1 to +0.1, 95%)" in page and "<td>more" in page
    equal = replace(more, says="equal", margin=3.0, unit="%")
    row = row_of(equal, [run("full", "hierarchical", seed, ev=ev) for seed, ev in enumerate((0.9, 0.91, 0.92))] + HIGH)
    assert row.claim.claimed == "equal, within 3 %" and row.verdict == "equivalent within the margin"
    # differences of 0, 0.999 and 1.996 % of 0.9, 0.901 and 0.902: mean 0.998, sd 0.998, so +- 2.920 x 0.576
    assert row.difference == "+0.998 % (-0.684 to +2.68, 90%)"


def test_a_difference_is_in_the_unit_of_the_claim():
    runs = three("full", "hierarchical", 0.66) + LOW
    for unit, shown in (("%", "+9.98 % ("), ("pp", "+6 pp ("), ("x", "1.1 x (")):
        assert row_of(claim(value=1.5, unit=unit, against="baseline"), runs).difference.startswith(shown)
    two = claim(unit="%", value=80, quote="80%", against="baseline", against_value=50)
    assert row_of(two, runs).difference.startswith("+0.06 (")  # between two values in %: in the unit of the metric
    equal = claim(unit="%", says="equal", margin=3, value=None, against="baseline")
    assert row_of(equal, runs).measured.startswith("0.661")
    assert row_of(claim(), runs).difference == ""
    assert row_of(BETTER, runs[:1] + runs[3:4]).difference == "+0.06 (one seed)"


# --- warm-up, first steps, costs --------------------------------------------------------------------------------------


def test_a_warm_up_that_the_paper_prints_is_a_note_and_no_gate():
    paper = of(claim(), setup=replace(PAPER.setup, warmup=1000))
    runs = three("full", "hierarchical", 0.8, steps=800, done=800, warmup=1000)
    report = build_report(paper, runs, True, "literal")
    assert report.excluded == [] and report.rows[0].seeds == 3
    assert report.below_peak == (
        "The paper prints a warm-up of 1,000 steps, longer than 3 of these runs: their learning rate reached 80% of "
        "its peak."
    )
    assert report.below_peak in reproduction_page(report, "m")
    twice = [*runs, *(replace(run, system="baseline") for run in runs)]  # the runs belong to two systems
    assert build_report(paper, twice, True, "literal").below_peak == report.below_peak
    assert len(build_report(paper, twice, True, "field").excluded) == 3
    longer = three("full", "hierarchical", 0.8, steps=800, done=800, warmup=1001)  # the paper prints 1,000
    assert len(build_report(paper, longer, True, "literal").excluded) == 3
    assert len(build_report(paper, runs, True, "field").excluded) == 3  # "field" is our reading
    assert build_report(paper, three("full", "hierarchical", 0.8), True, "literal").below_peak == ""
    dead = run("full", "hierarchical", 3, steps=800, done=800, warmup=1000, alive=0.0)
    assert build_report(paper, [*runs, dead], True, "literal").below_peak == report.below_peak
    unlike = [run("full", "x", steps=steps, done=steps, warmup=1000) for steps in (120, 80)]
    unlike[1] = replace(unlike[1], run=replace(unlike[1].run, folder=Path("another")))
    assert "reached 8% to 12% of" in build_report(paper, unlike, True, "literal").below_peak


def test_the_loss_of_the_first_step_is_of_the_first_line_and_a_mean_is_named():
    asked = claim(metric="training.loss", at="first", value=5.0, quote="5.0")
    runs = [replace(one, log=[{"step": 1, "loss": 5.0}, *one.log]) for one in three("full", "hierarchical", 0.8)]
    row = row_of(asked, runs, at_home=True)
    assert (row.verdict, row.measured, row.notes) == ("reproduced", "5 ± 0", [])
    runs = [replace(one, log=[{"step": 10, "loss": 5.0}, *one.log]) for one in runs]
    assert row_of(asked, runs).notes == ["the mean of the first 10 steps, because these runs did not log single steps"]
    assert row_of(replace(asked, at="last"), runs).notes == []


def test_a_row_about_time_has_the_measured_ratio_and_where_it_was_measured():
    time = claim(metric=STEP_TIME, value=20.0, unit="%", against="baseline", quote="20%")
    row = row_of(time, [])
    (note,) = [note for note in row.notes if "a step on 2 cores" in note]
    ours, theirs = map(float, re.findall(r"([\d.]+) ms", note))
    assert float(row.measured.removesuffix(" x")) == pytest.approx(ours / theirs, rel=0.04)
    assert row.verdict == "direction only" and row.seeds == 0
    assert json.loads(STEP_TIMES.read_text())["tables"][0]["date"] in note
    low, high = map(float, re.findall(r"[\d.]+", row.difference))
    assert low < ours / theirs < high and row.difference.endswith(" x between quartiles") and row.counted
    again = row_of(replace(time, restates="first"), [])
    assert "the same comparison as first" in again.notes and not again.counted
    void = Contradiction("Two times.", (), "", ("one",))
    row = row_of(time, [], replace(of(time), contradictions=(void,)))
    assert row.verdict == "paper inconsistent" and row.measured == "1.6 x"
    unknown = {**PAPER.systems, "full": replace(PAPER.systems["full"], recipes=("brand-new",))}
    assert row_of(time, [], of(time, systems=unknown)).verdict == "not measured"
    field = next(one for one in PAPER.readings if one.name == "field")
    some = Substitution(("one",), "(7).", "So.")
    unmeasured = of(time, systems=unknown, readings=(replace(field, substitutes=(some,)),))
    assert not any("not as printed" in note for note in row_of(time, [], unmeasured).notes)
    less = replace(time, value=-20.0, quote="-20%")
    row = row_of(less, [], of(less, readings=(replace(field, substitutes=(some,)),)))
    assert row.verdict == "not of the paper's equation" and "not as printed: (7). So." in row.notes


# --- what has no number in the paper ----------------------------------------------------------------------------------


def test_what_the_paper_does_not_report_has_the_mean_of_each_system_that_has_it():
    probing = "sparse_probing.sae.sae_top_1_test_accuracy"
    paper = of(unreported=(Unreported("fidelity", "", EV), Unreported("probing", "", probing)))
    stand_in = {"sparse_probing_stdlib": MetricResult({"sae": {"sae_top_1_test_accuracy": 0.7}})}
    runs = [run("full", "hierarchical", seed, ev=ev, metrics=stand_in) for seed, ev in enumerate((0.5, 0.7))]
    runs += [run("baseline", "x", seed, ev=ev) for seed, ev in enumerate((0.4, float("nan"), float("inf")))]
    nothing = run("l1", "hierarchical-l1")
    runs.append(replace(nothing, run=replace(nothing.run, results={})))
    heads, lines = unreported_table(build_report(paper, runs, False))
    assert heads == ["what", "metric", "full", "baseline"]  # nothing was measured for `l1`
    assert lines == [["fidelity", EV, "0.6 ± 0.14", "0.4"], ["probing", probing, "0.7 ± 0", ""]]
    assert unreported_table(build_report(paper, runs, True))[1][1] == ["probing", probing, "", ""]


def test_a_system_is_its_recipes_with_its_options():
    assert describe_system(PaperSystem("a", ("b", "c"), options={"k": 3, "l1": 0.0})) == "b, c k=3 l1=0.0"
    assert describe_system(PaperSystem("a", ())) == "the language model"
