"""`sae compare --against`: the verdict on each difference, and where it is shown."""

import csv
import json
import math
import re
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from sae.cli.main import app
from sae.common.errors import UsageError
from sae.common.evaluation_schemas import RESULT_RECORD
from sae.common.schemas import RUN_RECORD
from sae.evaluate.against import AgainstLine, compare_against, l0_slope
from sae.evaluate.compare import Comparison, compare_runs, comparison_table, detectable_line, to_records
from sae.evaluate.metrics.registry import METRICS
from sae.evaluate.statistics import detectable_difference

from ..run_records import change_record, write_result_record
from .test_compare import make_run, references, write_absorption

BASE = (0.90, 0.80, 0.70)
KL = next(column for column in METRICS["core"].columns if column.name == "kl_div_score")


def seeds_of(tmp_path, variant, scores, **options):
    return [make_run(tmp_path, variant, seed=seed, kl=kl, **options) for seed, kl in enumerate(scores)]


def kl_line(comparison: Comparison, against: str, margins=(), system: str | None = None) -> AgainstLine:
    lines = compare_against(comparison, against, margins).lines
    (line,) = (one for one in lines if one.column.name == "kl_div_score" and system in (None, one.system))
    return line


def test_a_line_by_hand(tmp_path):
    """The differences 0.03, 0.02 and 0.01 have mean 0.02 and sd 0.01: t = 3.4641 with two degrees of freedom."""
    other = [make_run(tmp_path, "relu", seed=seed, kl=kl) for seed, kl in ((2, 0.71), (1, 0.82), (0, 0.93))]
    found = compare_against(compare_runs([*seeds_of(tmp_path, "topk", BASE), *other]), "topk")
    heads, (l0, kl) = found.table()
    assert heads[:4] == ["system", "number", "difference", "95 % interval"]
    assert l0 == ["relu", "L0", "+0.0", "", "3 seeds", "", "", ""]  # L0 is a setting, so it is not tested
    p = 2 * (1 - 3.4641016 / math.sqrt(2 + 12)) / 2
    assert kl[:5] == ["relu", "KL score ↑", "+0.0200", "-0.0048 to +0.0448", "3 seeds"]
    assert kl[5:] == [f"{p:.4f}".removeprefix("0"), "0.0326", "not distinguishable"]
    assert "against topk: 1 comparison, " in found.title and not found.notes


@pytest.mark.parametrize(
    ("scores", "margin", "verdict"),
    [
        ((0.921, 0.819, 0.720), "0.01", "better"),
        ((0.881, 0.780, 0.679), "0.01", "worse"),
        ((0.9051, 0.8050, 0.7049), "0.01", "better by less than 0.01"),
        ((0.9005, 0.8000, 0.6995), "0.01", "equivalent within ±0.01"),
        ((0.9005, 0.8000, 0.6995), "0.0005", "not distinguishable"),
        (BASE, "0.01", "same in every pair"),
    ],
)
def test_the_words_of_a_verdict(tmp_path, scores, margin, verdict):
    runs = [*seeds_of(tmp_path, "topk", BASE), *seeds_of(tmp_path, "relu", scores)]
    assert kl_line(compare_runs(runs), "topk", [f"kl_div_score={margin}"]).verdict == verdict


def test_lower_is_better_where_the_number_says_so(tmp_path):
    runs = [*seeds_of(tmp_path, "topk", BASE), *seeds_of(tmp_path, "relu", BASE)]
    for place, run in enumerate(runs):
        write_absorption(
            run, eval_result_metrics={"mean": {"mean_full_absorption_score": 0.1 + 0.1 * (place > 2) + place / 1e4}}
        )
    found = compare_against(compare_runs(runs), "topk").lines
    assert [one.verdict for one in found if one.metric == "absorption"] == ["not tested (every difference is the same)"]
    write_absorption(runs[3], eval_result_metrics={"mean": {"mean_full_absorption_score": 0.201}})
    (line,) = (one for one in compare_against(compare_runs(runs), "topk").lines if one.metric == "absorption")
    assert line.difference > 0 and line.verdict == "worse"


def test_one_run_each_is_paired_by_document(tmp_path):
    """The differences in four documents are 0.02, 0.01, 0.03 and 0.02."""
    documents = [0.5, 0.9, 0.7, 0.7]
    one = make_run(
        tmp_path, "relu", documents=[a + d for a, d in zip(documents, (0.02, 0.01, 0.03, 0.02), strict=True)]
    )
    found = compare_against(compare_runs([make_run(tmp_path, documents=documents, seed=3), one]), "topk")
    (line,) = (line for line in found.lines if line.metric == "core" and line.column.better)
    assert line.cells()[4] == "4 documents" and line.pairing.differences.mean == pytest.approx(0.02)
    assert line.finding.detectable == pytest.approx(detectable_difference(line.pairing.differences.sd, 4))
    assert line.verdict == "better"
    assert any("one seed cannot show whether their recipes differ" in note for note in found.notes)


def test_one_seed_in_common_is_paired_by_document_too(tmp_path):
    runs = [make_run(tmp_path, seed=seed, documents=[0.5, 0.7, 0.9]) for seed in (0, 1)]
    other = make_run(tmp_path, "relu", seed=1, documents=[0.6, 0.7, 0.8])
    assert kl_line(compare_runs([*runs, other]), "topk").pairing.differences.values == pytest.approx([0.1, 0.0, -0.1])


@pytest.mark.parametrize(
    ("base", "other", "reason"),
    [
        ([{"seed": 0}, {"seed": 1}], [{"seed": 2}, {"seed": 3}], "no seed in common"),
        ([{"seed": 0}, {"seed": 1}], [{"seed": 2}], "no seed in common"),
        ([{"documents": [0.5, 0.6]}], [{}], "one seed, and a result without values by document: measure it again"),
        ([{"documents": [0.5]}], [{"documents": [0.6]}], "one seed, and fewer than two of the same document"),
    ],
)
def test_what_cannot_be_paired_is_not_tested_and_says_why(tmp_path, base, other, reason):
    runs = [make_run(tmp_path, **one) for one in base] + [make_run(tmp_path, "relu", **one) for one in other]
    line = kl_line(compare_runs(runs), "topk")
    assert line.verdict.startswith(f"not tested ({reason}") and line.finding.p_value is None
    assert line.difference == pytest.approx(line.values[0] - line.values[1])


def test_documents_of_another_text_are_not_paired(tmp_path):
    runs = [make_run(tmp_path, name, documents=[0.5, 0.6, 0.8]) for name in ("topk", "relu")]
    path = runs[1] / "evaluations" / "core.json"
    core = RESULT_RECORD.read(path)
    core["eval_result_unstructured"]["extra"]["text"] = "another"
    RESULT_RECORD.write(path, core)
    assert kl_line(compare_runs(runs), "topk").pairing.differences is None


def test_letters_and_data_sets_are_units_too(tmp_path):
    runs = [make_run(tmp_path), make_run(tmp_path, "relu")]
    for run, rates in zip(runs, ([0.1, 0.2, 0.6], [0.2, 0.4, 0.6]), strict=True):
        letters = [{"first_letter": letter, "full_absorption_rate": r} for letter, r in zip("abc", rates, strict=True)]
        mean = {"mean": {"mean_full_absorption_score": sum(rates) / 3}}
        write_absorption(run, eval_result_metrics=mean, eval_result_details=letters)
        sets = [
            {"dataset_name": f"{n}_results", "sae_top_1_test_accuracy": r} for n, r in zip("xyz", rates, strict=True)
        ]
        probing = {"sae": {"sae_top_1_test_accuracy": sum(rates) / 3}}
        write_result_record(run, "sparse_probing", eval_result_metrics=probing, eval_result_details=sets)
    lines = compare_against(compare_runs(runs), "topk").lines
    paired = {line.metric: (line.cells()[4], line.pairing.differences) for line in lines if line.metric != "core"}
    assert [over for over, _ in paired.values()] == ["3 letters", "3 data sets"]
    for _, differences in paired.values():
        assert differences.values == pytest.approx([0.1, 0.2, 0.0])


def test_values_whose_mean_is_not_the_number_are_not_paired(tmp_path):
    runs = [make_run(tmp_path, name, documents=[0.5, 0.6, 0.8]) for name in ("topk", "relu")]
    write_absorption(runs[0], eval_result_details=[{"first_letter": "a", "full_absorption_rate": 0.3}])
    write_absorption(runs[1], eval_result_details=[{"first_letter": "a", "full_absorption_rate": 0.1}])
    (line,) = (one for one in compare_against(compare_runs(runs), "topk").lines if one.metric == "absorption")
    assert line.verdict.startswith("not tested (one seed, and a result without values by letter")


def test_a_reference_is_one_fixed_sae(tmp_path):
    found = compare_runs(seeds_of(tmp_path, "topk", BASE), references=False)
    found = replace(found, references=references(("pca-32", 32.0, 0.5)))
    line = kl_line(found, "pca-32")
    assert line.pairing.differences.values == pytest.approx([0.4, 0.3, 0.2]) and line.cells()[4] == "3 seeds"


def test_what_can_not_be_asked(tmp_path):
    found = compare_runs([*seeds_of(tmp_path, "topk", BASE), make_run(tmp_path, "relu")])
    with pytest.raises(UsageError, match="did you mean topk"):
        compare_against(found, "topq")
    with pytest.raises(UsageError, match="no number kl.*did you mean kl_div_score"):
        compare_against(found, "topk", ["kl_score=0.1"])
    for text in ("kl_div_score", "kl_div_score=x", "kl_div_score=0", "kl_div_score=-1", "kl_div_score=inf"):
        with pytest.raises(UsageError, match="a margin above 0"):
            compare_against(found, "topk", [text])
    with pytest.raises(UsageError, match="name the runs of another system"):
        compare_against(compare_runs(seeds_of(tmp_path, "gated", BASE)), "gated")


def test_neither_the_order_of_the_runs_nor_their_names_matter(tmp_path):
    runs = [*seeds_of(tmp_path, "topk", BASE), *seeds_of(tmp_path, "relu", (0.93, 0.82, 0.73))]
    runs += seeds_of(tmp_path, "gated", (0.92, 0.83, 0.71))

    def records(folders) -> list[dict]:
        found = compare_against(compare_runs(folders), "topk").records()
        return sorted(found, key=lambda record: (record["system"], record["number"]))

    before = records(runs)
    shuffled = records([runs[place] for place in (7, 2, 5, 0, 8, 4, 1, 6, 3)])
    renamed = records([run.rename(tmp_path / f"z{place}") for place, run in enumerate(runs)])
    for after in (shuffled, renamed):
        for one, other in zip(before, after, strict=True):
            assert one.keys() == other.keys() and one["verdict"] == other["verdict"]
            numbers = {name: value for name, value in one.items() if isinstance(value, float)}
            assert numbers == pytest.approx({name: other[name] for name in numbers}, abs=1e-12)


def test_the_level_is_shared_by_all_systems_and_numbers(tmp_path):
    runs = [*seeds_of(tmp_path, "topk", BASE), *seeds_of(tmp_path, "relu", (0.93, 0.82, 0.71))]
    alone = kl_line(compare_runs(runs), "topk")
    beside = [*seeds_of(tmp_path, "gated", (0.7, 0.9, 0.8)), *seeds_of(tmp_path, "april", (0.8, 0.7, 0.9))]
    together = kl_line(compare_runs([*runs, *beside]), "topk", system="relu")
    assert together.finding.p_value == pytest.approx(3 * alone.finding.p_value)
    assert together.finding.detectable > alone.finding.detectable


def test_without_a_slope_l0_matters_from_ten_percent_on(tmp_path):
    runs = [*seeds_of(tmp_path, "topk", BASE), *seeds_of(tmp_path, "relu", (0.92, 0.82, 0.719), l0=36.0)]
    found = compare_against(compare_runs(runs), "topk")
    assert [line.verdict for line in found.lines] == ["", "better, at another L0"]
    (note,) = found.notes
    assert note.startswith(
        "relu has L0 36.0, topk 32.0: they differ by more than 10 %, and no two systems here differ only"
    )
    near = [*runs[:3], *seeds_of(tmp_path, "gated", (0.92, 0.82, 0.719), l0=35.0)]
    assert not compare_against(compare_runs(near), "topk").notes
    below = [*runs[:3], *seeds_of(tmp_path, "jumprelu", (0.92, 0.82, 0.719), l0=28.0)]
    assert compare_against(compare_runs(below), "topk").lines[1].verdict == "better, at another L0"


def test_a_slope_over_l0_comes_from_within_recipes(tmp_path):
    """The KL score of topk rises by 0.1 with each doubling of L0; relu is 0.3 below topk at its L0 of 16."""
    runs = [make_run(tmp_path, k=k, l0=float(k), kl=0.5 + 0.1 * math.log2(k / 16)) for k in (16, 32, 64)]
    runs += [make_run(tmp_path, "relu", l0=16.0, kl=0.2), make_run(tmp_path, "gated", l0=33.0, kl=0.8)]
    found = compare_against(compare_runs(runs), "topk k=32")
    by_system = {line.system: line for line in found.lines if line.column.better}
    assert by_system["relu"].l0_shift == pytest.approx(-0.1)
    assert not by_system["relu"].l0_matters  # the measured difference is -0.4
    assert by_system["topk k=16"].l0_shift == pytest.approx(-0.1) and by_system["topk k=16"].l0_matters
    assert not by_system["gated"].l0_matters  # an L0 of 33 explains 0.004 of a difference of 0.2
    note = next(note for note in found.notes if note.startswith("topk k=16 has L0 16.0, topk k=32 32.0."))
    assert (
        "The slope over log L0 of topk at L0 16, 32, 64 predicts KL score ↑ -0.1000 from this difference in L0" in note
    )
    assert [note.split(" has ")[0] for note in found.notes if " has L0 " in note] == ["topk k=16", "topk k=64"]


def test_a_slope_is_of_systems_that_differ_in_their_l0_alone(tmp_path):
    """Runs that also differ in options, steps, cache or order of rows give no slope, even with the same recipe."""
    for changes in ({"options": {"aux": 1}}, {"steps": 20}, {"cache": "1" * 64}, {"order_seed": 3}):
        found = [make_run(tmp_path, k=k, l0=float(k), kl=kl) for k, kl in ((16, 0.5), (32, 0.6))]
        assert l0_slope(compare_runs(found), "core", KL).per_log == pytest.approx(0.1 / math.log(2))
        change_record(RUN_RECORD, found[0] / "run.json", changes)
        assert l0_slope(compare_runs(found), "core", KL) is None, changes


def test_two_systems_are_not_called_a_slope_and_each_number_has_its_own_source(tmp_path):
    """All three systems have the KL score, but only two have absorption, so its prediction comes from two systems."""
    runs = [make_run(tmp_path, k=k, l0=float(k), kl=kl) for k, kl in ((16, 0.5), (32, 0.6), (64, 0.7))]
    for run, score in zip(runs, (0.4, 0.3), strict=False):
        write_absorption(run, eval_result_metrics={"mean": {"mean_full_absorption_score": score}})
    told = [note for note in compare_against(compare_runs(runs), "topk k=32").notes if note.startswith("topk k=16")]
    start, end = (
        "topk k=16 has L0 16.0, topk k=32 32.0. ",
        " from this difference in L0 alone: enough to be detected, or at least half of the measured difference. ",
    )
    line, pair = (note.removeprefix(start).partition(end) for note in told)
    assert line[0] == "The slope over log L0 of topk at L0 16, 32, 64 predicts KL score ↑ -0.1000"
    assert pair[0] == "The difference between two systems, topk at L0 16, 32, predicts absorption full ↓ +0.1000"
    assert line[2] == pair[2] == "Compare at equal L0 (sae train --l0)."


def test_the_line_below_the_table_says_what_could_be_detected(tmp_path):
    runs = [*seeds_of(tmp_path, "topk", BASE), *seeds_of(tmp_path, "relu", (0.93, 0.82, 0.71))]
    found = compare_runs(runs)
    assert detectable_line(found) == ["smallest detectable difference", "", "0.0326"]
    assert len(detectable_line(found)) == len(comparison_table(found)[0])
    assert detectable_line(compare_runs(runs[:3])) == []
    two = compare_runs([*seeds_of(tmp_path, "gated", (0.1, 0.9)), *seeds_of(tmp_path, "switch", (0.9, 0.3))])
    assert detectable_line(two)[-1] == ">1"  # scores from 0 to 1 cannot differ by that much


def test_scr_and_tpp_are_in_files_with_what_is_known_against_them_and_in_no_default_column(tmp_path):
    run = make_run(tmp_path)
    for name, number in (("scr_stdlib", "scr_metric_threshold_20"), ("tpp_stdlib", "tpp_threshold_20_total_metric")):
        write_result_record(run, name, eval_result_metrics={METRICS[name].columns[0].category: {number: 0.25}})
    found = compare_runs([run])
    assert [head.split("\n")[0] for head in comparison_table(found)[0]] == ["system", "L0", "KL score ↑"]
    (record,) = to_records(found)
    assert record["scr_stdlib.scr_metrics.scr_metric_threshold_20"] == 0.25
    known = [note for note in record["notes"] if "arXiv 2605.18229" in note]
    assert [note.split(":")[0] for note in known] == ["scr_stdlib", "tpp_stdlib"]
    printed = CliRunner().invoke(app, ["compare", str(run)]).output
    assert "2605.18229" not in printed  # their numbers are not shown


def test_the_words_are_the_same_on_the_terminal_in_html_csv_and_json(tmp_path):
    runs = [*seeds_of(tmp_path, "topk", BASE), *seeds_of(tmp_path, "relu", (0.92, 0.819, 0.72), l0=64.0)]
    outs = [tmp_path / f"all.{ending}" for ending in ("html", "csv", "json")]
    words = ["compare", *map(str, runs), "--against", "topk", "--margin", "kl_div_score=0.05"]
    done = CliRunner().invoke(app, [*words, *(part for out in outs for part in ("--out", str(out)))])
    assert done.exit_code == 0, done.output
    verdict = "better by less than 0.05, at another L0"
    assert verdict in done.output and re.search(r"^note +relu has L0 64.0, topk 32.0", done.output, re.MULTILINE)
    assert "written  " + str(outs[1]) + " and all-against.csv" in done.output
    html = outs[0].read_text()
    assert verdict in html and "Against topk" in html and "relu has L0 64.0" in html and "<tfoot>" in html
    (_, from_csv) = csv.DictReader((tmp_path / "all-against.csv").read_text().splitlines())
    (_, from_json) = json.loads((tmp_path / "all-against.json").read_text())
    assert from_csv == {name: "" if value is None else str(value) for name, value in from_json.items()}
    assert (from_json["verdict"], from_json["number"]) == (verdict, "core.model_behavior_preservation.kl_div_score")
    assert from_json["smallest_detectable"] == pytest.approx(detectable_difference(0.01 / math.sqrt(300), 3), rel=1e-3)
    assert len(json.loads(outs[2].read_text())) == 6  # one record per run, as without --against
    refused = CliRunner().invoke(app, ["compare", *map(str, runs), "--margin", "kl_div_score=0.05"])
    assert refused.exit_code == 2 and "--against" in refused.output


def test_what_belongs_to_all_seeds_together_is_not_tested_over_them(tmp_path):
    runs = [*seeds_of(tmp_path, "topk", BASE), *seeds_of(tmp_path, "relu", (0.93, 0.82, 0.71))]
    for place, run in enumerate(runs):
        write_result_record(run, "stability", eval_result_metrics={"stability": {"decoder_pw_mcc": 0.1 * place}})
    (line,) = (one for one in compare_against(compare_runs(runs), "topk").lines if one.metric == "stability")
    assert line.verdict == "not tested (the number belongs to all seeds together)"


def test_a_control_is_not_called_better_without_saying_that_it_is_one(tmp_path):
    found = compare_runs([*seeds_of(tmp_path, "topk", BASE), *seeds_of(tmp_path, "frozen", (0.921, 0.819, 0.720))])
    control = next(system for system in found.systems if system.label == "frozen")
    frozen = replace(control, runs=[replace(run, is_control=True) for run in control.runs])
    systems = [frozen if system is control else system for system in found.systems]
    against = compare_against(replace(found, systems=systems), "topk")
    assert (
        next(line for line in against.lines if line.column is KL).verdict == "better (a control)" and not against.notes
    )
    turned = compare_against(replace(found, systems=systems), "frozen")
    assert turned.notes == [
        "frozen is a control: a part of it kept its random initial weights. A number in which a system is "
        "not better than this control does not show learned features."
    ]
