"""Comparing runs from their files."""

import csv
import io
import json
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sae.cli.main import app
from sae.common.errors import DamagedError, LeftOutWarning, UsageError
from sae.common.evaluation_schemas import RESULT_RECORD
from sae.common.files import digest_of
from sae.common.schemas import RUN_RECORD
from sae.evaluate.against import compare_against
from sae.evaluate.compare import ComparedSystem, compare_runs, comparison_table, to_csv, to_records
from sae.evaluate.compare_charts import frontiers, training_curves
from sae.evaluate.compared_runs import ComparedRun
from sae.evaluate.metrics.base import MetricResult
from sae.evaluate.metrics.registry import METRICS
from sae.evaluate.pages.comparison import comparison_page
from sae.evaluate.paired import Pairing
from sae.evaluate.tables import notes

from ..run_records import change_record, write_result_record, write_run_record, write_sae_record

MODEL = {"name": "gemma-2-mini", "revision": "0" * 64}


def make_run(
    home, variant="topk", seed=0, layer=12, l0=32.0, kl=0.9, model=MODEL, contexts=100, evaluated=True, documents=None,
    **options,
):  # fmt: skip
    """A run with a core result. `documents` are the KL scores of its documents, of which `kl` should be the mean."""
    name = f"{variant}-L{layer}-{len(list(home.glob('*')))}"
    folder = home / name
    (folder / "evaluations").mkdir(parents=True)
    write_sae_record(folder, origin={"model": model, "layer": layer, "site": "resid_post"})
    made = {"asked": {"seeds": [seed]}, "environment": {"cores": seed}, "threads": seed, "cache_folders": [str(seed)]}
    write_run_record(folder, **made, variant=variant, seed=seed, layer=layer, options=options)
    log = [
        {"step": n, "tokens": 100 * n, "loss": 1 / n, "explained_variance": 1 - 1 / n, "l0": l0, "dead": 0}
        for n in (1, 2)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, log)) + '\n{"step": 3, "tok')
    extra = documents and {"text": "a text", "unit": "document", "values": {"kl_div_score": documents}}
    kl = statistics.mean(documents) if documents else kl
    if evaluated:
        result = {
            "eval_config": {"model": model["name"], "contexts": contexts, "weights": name},
            "eval_result_metrics": {"sparsity": {"l0": l0}, "model_behavior_preservation": {"kl_div_score": kl}},
            "eval_result_details": [],
            "eval_result_unstructured": {
                "intervals": {"model_behavior_preservation": {"kl_div_score": [kl - 0.01, kl + 0.01]}},
                "n": {"tokens": 5}, "flags": ["a <b>flag</b>"], "extra": extra,
            },
        }  # fmt: skip
        write_result_record(folder, "core", **result)
    return folder


def test_a_line_has_the_numbers_of_its_run(tmp_path):
    heads, lines = comparison_table(compare_runs([make_run(tmp_path)]))
    assert [head.split("\n")[0] for head in heads] == ["system", "L0", "KL score ↑"]
    assert lines == [["topk", "32.0", "0.9000 ±.0100"]]


def test_seeds_become_mean_and_sd(tmp_path):
    scores = [0.90, 0.93, 0.95]
    found = compare_runs([make_run(tmp_path, seed=seed, kl=kl) for seed, kl in enumerate(scores)])
    assert len(found.systems) == 1
    mean, spread = statistics.mean(scores), f"{statistics.stdev(scores):.4f}".removeprefix("0")
    assert comparison_table(found)[1] == [["topk (3 seeds)", "32.0", f"{mean:.4f} ±{spread}"]]


def test_systems_are_told_apart_by_what_differs(tmp_path):
    runs = [make_run(tmp_path, k=16), make_run(tmp_path, k=64), make_run(tmp_path, "relu")]
    assert [system.label for system in compare_runs(runs).systems] == ["topk k=16", "topk k=64", "relu"]


def test_a_seed_trained_twice_is_one_draw(tmp_path):
    """Otherwise its spread over two seeds would be 0, and paired tests would have too many degrees of freedom."""
    base = [make_run(tmp_path, seed=seed, kl=kl) for seed, kl in enumerate([0.90, 0.80])]
    again = [make_run(tmp_path, "relu", seed=0, kl=0.93) for _ in range(2)]
    found = compare_runs([*base, *again])
    assert [line[0] for line in comparison_table(found)[1]] == ["topk (2 seeds)", "relu"]
    assert comparison_table(found)[1][1][2] == "0.9300 ±.0100"  # the interval is over the text, as for one run
    (line,) = (line for line in compare_against(found, "topk").lines if line.column.name == "kl_div_score")
    assert line.pairing == Pairing(
        None, "one seed, and a result without values by document: measure it again with --force"
    )


def test_that_a_step_compared_some_pairs_only_is_said_once_of_a_system(tmp_path):
    runs = [make_run(tmp_path, "decorrelation", seed=seed) for seed in (0, 1)]
    for run in runs:
        change_record(RUN_RECORD, run / "run.json", {"resolved": {"pair_choice": "blocks", "block": 64}})
    found = compare_runs([*runs, make_run(tmp_path)]).runs
    sentence = (
        "decorrelation: a training step compared only some pairs of latents: those in random blocks of 64 latents."
    )
    assert [sentence in run.notes for run in found] == [True, True, False]
    assert notes(found).count(sentence) == 1


def test_one_folder_twice_is_one_run(tmp_path):
    run = make_run(tmp_path)
    assert len(compare_runs([run, run]).runs) == 1


def write_absorption(run, **changes):
    """Write a result of absorption with the settings of the run's core result."""
    core = RESULT_RECORD.read(run / "evaluations" / "core.json")
    shared = {"eval_config": core["eval_config"], "eval_result_unstructured": core["eval_result_unstructured"]}
    metrics = {"mean": {"mean_full_absorption_score": 0.1}}
    write_result_record(run, "absorption", **shared | {"eval_result_metrics": metrics} | changes)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"layer": 5}, "layer: 12 .*, 5 "),
        ({"model": {"name": "gpt2", "revision": "1"}}, "model: gemma-2-mini .*, gpt2 "),
        ({"contexts": 7}, "core, contexts: 100 .*, 7 "),
    ],
)
def test_what_cannot_be_read_beside_each_other(tmp_path, other, said):
    runs = [make_run(tmp_path), make_run(tmp_path, "relu", **other)]
    with pytest.raises(UsageError, match=said) as refused:
        compare_runs(runs)
    assert "--mix" in str(refused.value)
    mixed = compare_runs(runs, mix=True)
    assert len(mixed.systems) == 2
    assert any(re.search(said, sentence) for sentence in mixed.differences)


def test_limits_that_mask_as_many_rows_are_no_difference(tmp_path):
    """Two caches of a text have slightly different median norms; only the number of rows left out has to agree."""
    runs = [make_run(tmp_path, name) for name in ("topk", "relu")]
    for number, run in enumerate(runs):
        path = run / "evaluations" / "core.json"
        core = RESULT_RECORD.read(path)
        core["eval_config"]["norm_limit"] = 100.0 + number
        RESULT_RECORD.write(path, core)
    assert compare_runs(runs).differences == []
    core["eval_result_unstructured"]["n"]["outlier_rows"] = 3
    RESULT_RECORD.write(path, core)
    with pytest.raises(UsageError, match=r"core, masked rows: 0 \(.*\), 3 "):
        compare_runs(runs)


def test_runs_that_were_not_evaluated(tmp_path):
    with pytest.raises(UsageError, match="sae evaluate"):
        compare_runs([make_run(tmp_path, evaluated=False)])
    with pytest.raises(UsageError, match="sae.json"):
        compare_runs([tmp_path / "nowhere"])
    with pytest.raises(UsageError, match="Name the runs"):
        compare_runs([])


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"eval_config": 1, "eval_result_metrics": {}, "eval_result_details": [], "eval_result_unstructured": []}',
    ],
)
def test_a_damaged_result_is_named(tmp_path, content):
    run = make_run(tmp_path)
    (run / "evaluations" / "core.json").write_text(content)
    with pytest.raises(DamagedError, match="core.json"):
        compare_runs([run])


def test_a_damaged_reference_does_not_stop_the_comparison_of_others(tmp_path, home):
    """The references of all evaluations on a machine are in one folder."""
    run = make_run(tmp_path / "runs")
    folder = home / "activations" / "evaluation" / "references" / f"zero-L12-{'0' * 8}" / "evaluations"
    folder.mkdir(parents=True)
    (folder / "core.json").write_text("torn")
    with pytest.warns(LeftOutWarning, match="zero-L12-0+ is left out: .*core.json cannot be read"):
        assert [one.name for one in compare_runs([run]).runs] == [run.name]


def test_a_result_of_another_reference_is_left_out(tmp_path, home):
    """The folder name of a reference ends with a digest of its description."""
    run = make_run(tmp_path / "runs")
    what = {"reference": "zero", "layer": 12, "site": "resid_post"}
    right = home / "activations" / "evaluation" / "references" / f"zero-L12-{digest_of(what)[:8]}"
    (right / "evaluations").mkdir(parents=True)
    result = RESULT_RECORD.read(run / "evaluations" / "core.json")
    RESULT_RECORD.write(right / "evaluations" / "core.json", result | {"sae_cfg_dict": what})
    assert [one.label for one in compare_runs([run]).references] == ["zero"]
    right.rename(right.with_name("zero-L12-00000000"))
    with pytest.warns(LeftOutWarning, match="core.json is a result of another reference"):
        assert not compare_runs([run]).references


def test_a_line_goes_through_the_systems_of_a_recipe_in_the_order_of_l0(tmp_path):
    runs = [make_run(tmp_path, k=k, l0=float(k), kl=kl) for k, kl in ((64, 0.97), (16, 0.9), (32, 0.95))]
    (chart,) = frontiers(compare_runs([*runs, make_run(tmp_path, "relu", l0=80.0)]))
    assert [(one.name, list(one.x), list(one.y)) for one in chart.series] == [
        ("topk", [16, 32, 64], [0.9, 0.95, 0.97]),
        ("relu", [80], [0.9]),
    ]


def references(*points):
    """Reference systems of one run each, from tuples (name, L0, KL score)."""
    column = next(one for one in METRICS["core"].columns if one.name == "l0")
    score = next(one for one in METRICS["core"].columns if one.name == "kl_div_score")
    systems = []
    for name, l0, kl in points:
        metrics = {column.category: {"l0": l0}, score.category: {"kl_div_score": kl}}
        run = ComparedRun(name, Path(name), {}, {}, {"core": MetricResult(metrics)}, {}, is_reference=True)
        systems.append(ComparedSystem(name, [run]))
    return systems


def test_a_reference_far_from_the_saes_is_named_below_the_chart(tmp_path):
    runs = [make_run(tmp_path, k=k, l0=float(k), kl=kl) for k, kl in ((16, 0.9), (32, 0.95))]
    found = compare_runs(runs, references=False)
    far = references(("identity", 576.0, 1.0), ("random-32", 32.0, 0.3), ("pca-32", 32.0, 0.8))
    (chart,) = frontiers(replace(found, references=far))
    assert [one.name for one in chart.series] == ["topk", "pca"]
    assert chart.note == "Outside this chart: identity (L0 576.0, 1); random-32 (L0 32.0, 0.3)."
    near = references(("identity", 40.0, 0.96), ("random-32", 20.0, 0.91))
    (chart,) = frontiers(replace(found, references=near))
    assert [one.name for one in chart.series] == ["topk", "identity", "random"] and chart.note == ""


def test_controls_of_different_recipes_are_different_series_and_those_of_one_are_one(tmp_path):
    runs = [make_run(tmp_path, k=k, l0=float(k), kl=kl) for k, kl in ((16, 0.9), (32, 0.95))]
    controls = references(
        ("frozen-decoder-16", 16.0, 0.91), ("frozen-decoder-32-n64", 32.0, 0.93), ("frozen-encoder-32", 32.0, 0.94)
    )
    (chart,) = frontiers(replace(compare_runs(runs, references=False), references=controls))
    assert [one.name for one in chart.series] == ["topk", "frozen-decoder", "frozen-encoder"]


def test_published_points_stand_beside_their_own_model_and_layer_only(tmp_path):
    gemma = {"name": "google/gemma-2-2b", "revision": "1"}

    def absorbed(**where):
        run = make_run(tmp_path, **where)
        write_absorption(run)
        chart = next(chart for chart in frontiers(compare_runs([run])) if "absorption" in chart.title)
        return [(x, y) for one in chart.series if "published" in one.name for x, y in zip(one.x, one.y, strict=True)]

    assert (85.3, 0.109) in absorbed(model=gemma)
    assert not absorbed(model=gemma, layer=5)
    assert not absorbed()


def test_published_points_stand_beside_saebench_s_numbers_and_the_note_says_so(tmp_path):
    """Their chart includes outlier rows; the table and the other charts leave them out."""
    run = make_run(tmp_path, model={"name": "google/gemma-2-2b", "revision": "1"}, l0=60.0, kl=0.5)
    core = RESULT_RECORD.read(run / "evaluations" / "core.json")
    core["eval_result_metrics"] |= {
        "masked_sparsity": {"l0": 32.0}, "masked_model_behavior_preservation": {"kl_div_score": 0.9},
    }  # fmt: skip
    rest = core["eval_result_unstructured"]
    rest["masked"] = {"details": [], "intervals": {}, "n": {"outlier_rows": 3}, "flags": ["sound"], "extra": None}
    rest["n"] = {"outlier_rows": 3}
    RESULT_RECORD.write(run / "evaluations" / "core.json", core)
    write_absorption(run, eval_result_unstructured={**rest, "n": {}, "flags": []} | {"masked": None})
    comparison = compare_runs([run])
    assert comparison_table(comparison)[1][0][1:3] == ["32.0", "0.9000"]
    (note,) = notes(comparison.runs)
    assert "sound" in note and "flag" not in note
    charts = {chart.title: chart for chart in frontiers(comparison)}
    own = {title: chart.series[0] for title, chart in charts.items()}
    assert (list(own["KL score ↑"].x), charts["KL score ↑"].note) == ([32.0], "")
    (beside_published,) = (chart for title, chart in charts.items() if "absorption" in title)
    assert list(beside_published.series[0].x) == [60.0] and "over all rows" in beside_published.note
    assert "over all rows" in comparison_page(comparison)


def test_curves_show_what_was_logged_and_skip_a_torn_line(tmp_path):
    found = {chart.title: chart.series[0] for chart in training_curves(compare_runs([make_run(tmp_path)]))}
    assert list(found["variance unexplained"].x) == [100, 200]
    assert list(found["variance unexplained"].y) == [1, 0.5]
    assert list(found["L0"].y) == [32, 32]


def test_csv_reads_back(tmp_path):
    found = compare_runs([make_run(tmp_path), make_run(tmp_path, "relu", kl=0.5)])
    lines = list(csv.DictReader(io.StringIO(to_csv(found))))
    records = [record | {"notes": " ".join(record["notes"])} for record in to_records(found)]
    assert lines == [{k: "" if v is None else str(v) for k, v in record.items()} for record in records]
    assert [line["notes"] for line in lines] == ["core: a <b>flag</b>"] * 2
    assert [line["core.model_behavior_preservation.kl_div_score"] for line in lines] == ["0.9", "0.5"]


def test_a_csv_has_no_formula_in_names_or_cells(tmp_path):
    found = compare_runs([make_run(tmp_path, "=HYPERLINK(1)", **{"@SUM(A1)": "+1"})])
    (record,) = to_records(found)
    names, cells = csv.reader(io.StringIO(to_csv(found)))
    assert "=HYPERLINK(1)" in record.values() and "'=HYPERLINK(1)" in cells
    assert not any(text.startswith(("=", "+", "-", "@")) for text in [*names, *cells])


def test_the_page_holds_the_table_and_escapes_what_is_not_ours(tmp_path):
    html = comparison_page(compare_runs([make_run(tmp_path, "</script><b>")]))
    assert "0.9000 ±.0100" in html
    assert "</script><b>" not in html and "<b>flag" not in html


def test_tests_against_a_system_are_a_table_that_scrolls_in_itself_and_curves_are_folded(tmp_path):
    found = compare_runs([make_run(tmp_path), make_run(tmp_path, "relu", kl=0.5)])
    html = comparison_page(found, compare_against(found, "topk"))
    table = html.partition('<div class="scroll tall" role="region" tabindex="0" aria-label="Differences from topk">')[2]
    assert '<th scope="row">relu</th><td class="text">L0</td>' in table
    assert '<th scope="col" class="text verdict-words">verdict</th>' in table
    assert "<details><summary>4 training curves</summary>" in html


def test_a_model_of_a_folder_is_named_without_its_path(tmp_path):
    local = {"name": "/home/someone/models/tiny-llama", "revision": "ab12cd34" + "0" * 56}
    html = comparison_page(compare_runs([make_run(tmp_path, model=local)]))
    assert "<h1>1 SAE of tiny-llama-ab12cd34, layer 12</h1>" in html and "/home/someone" not in html


def test_the_command(tmp_path):
    runs = [str(make_run(tmp_path)), str(make_run(tmp_path, "relu"))]
    outs = [str(tmp_path / "out" / f"all.{ending}") for ending in ("html", "csv", "json")]
    done = CliRunner().invoke(app, ["compare", *runs, *(part for out in outs for part in ("--out", out))])
    assert done.exit_code == 0, done.output
    assert "relu" in done.output
    assert len(json.loads((tmp_path / "out" / "all.json").read_text())) == 2
    assert (tmp_path / "out" / "all.html").read_text().startswith("<!doctype html>")
    refused = CliRunner().invoke(app, ["compare", *runs, "--out", "all.xlsx"])
    assert refused.exit_code == 2 and ".html, .csv, .json" in refused.output


def test_the_next_command_compares_the_same(tmp_path):
    runs = [str(make_run(tmp_path)), str(make_run(tmp_path, "relu", contexts=7))]
    asked = ["--against", "relu", "--margin", "kl_div_score=0.1", "--mix", "--no-references"]
    done = CliRunner().invoke(app, ["compare", *runs, *asked])
    last = done.stderr.splitlines()[-1].split()
    assert done.exit_code == 0 and last[0] == "next" and last[-2:] == ["--out", "compare.html"]
    assert last[3:-2] == [*runs, *asked]


def test_the_command_says_what_is_compared_with_what(tmp_path, monkeypatch):
    asked, runs = [], [str(make_run(tmp_path)), str(make_run(tmp_path, "relu"))]

    def compare(folders, mix, references):
        asked.append((mix, references))
        return compare_runs(folders, mix, references)

    monkeypatch.setattr("sae.evaluate.compare.compare_runs", compare)
    for flags in ([], ["--mix", "--no-references"]):
        assert CliRunner().invoke(app, ["compare", *runs, *flags]).exit_code == 0
    assert asked == [(False, True), (True, False)]


def test_stability_among_other_seeds_is_named(tmp_path):
    """A result depends on the seeds given to its command, so results of different commands are not averaged."""
    runs = [make_run(tmp_path, seed=seed) for seed in range(3)]
    core = RESULT_RECORD.read(runs[0] / "evaluations" / "core.json")

    def write(*beside: str) -> list[str]:
        for number, (run, seeds) in enumerate(zip(runs, beside, strict=True)):
            write_result_record(
                run, "stability", eval_result_metrics={"stability": {"decoder_pw_mcc": 0.5}},
                eval_config=core["eval_config"] | {"weights": str(number), "seeds": list(seeds)},
                eval_result_unstructured=core["eval_result_unstructured"],
            )  # fmt: skip
        return [
            note for row in compare_runs(runs).rows for note in row.notes if "measured with different seeds" in note
        ]

    assert write("12", "02", "01") == []
    found = write("1", "0", "01")
    assert len(found) == 3 and "sae evaluate RUN... --suite stability" in found[0]
    assert f"stability of {runs[2].name} was measured with different seeds from stability of {runs[0].name}" in found[2]
