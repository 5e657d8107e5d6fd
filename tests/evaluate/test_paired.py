"""Runs of a tiny model, paired by document: the values that core stores, and the tables made from them."""

import json
import math

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from sae.cli.main import app
from sae.evaluate.metrics.core import Core
from sae.evaluate.metrics.document_values import group_documents, values_by_group
from sae.evaluate.metrics.registry import METRICS
from sae.evaluate.metrics.sae_statistics import ratio_interval
from sae.evaluate.paired import describe_pairs, pair_runs, run_values
from sae.evaluate.run import evaluate
from sae.evaluate.statistics import PairedDifferences, detectable_difference
from sae.evaluate.tables import tables

from ..run_records import write_run_record
from .test_run import ask, make_run

BY_DOCUMENT = ("l0", "kl_div_score", "kl_div_with_sae", "ce_loss_score", "fve", "cossim")


@pytest.fixture(scope="module")
def rows(tiny_cache, tmp_path_factory):
    """Two SAEs evaluated on the same few documents."""
    folder = tmp_path_factory.mktemp("paired")
    runs = [make_run(folder / name, tiny_cache, 0, seed) for seed, name in enumerate(("one", "other"))]
    for run in runs:
        write_run_record(run, d_in=32, d_sae=16, layer=0, variant=run.name, seed=0)
    return evaluate(ask(*runs, tokens=None))


def column_of(name: str):
    return next(column for column in Core.columns if column.name == name)


@pytest.mark.parametrize("name", BY_DOCUMENT)
def test_the_values_by_document_have_the_number_as_their_mean_and_give_its_interval(rows, name):
    for row in rows:
        column, result = column_of(name), row.results["core"]
        unit, values = run_values(row, "core", column)
        assert unit == "document" and len(values) == result.n["documents"] > 2
        found, number = np.array([*values.values()]), result.metrics[column.category][name]
        assert found.mean() == pytest.approx(number, rel=1e-5)
        low, high = result.intervals[column.category][name]
        half = 1.96 * found.std(ddof=1) / math.sqrt(len(found))
        assert (high - low) / 2 == pytest.approx(half, rel=1e-3)


@pytest.mark.parametrize("name", BY_DOCUMENT)
def test_the_mean_of_the_paired_differences_is_the_difference_of_the_numbers(rows, name):
    column = column_of(name)
    differences = pair_runs(*rows, "core", column).differences
    numbers = [row.results["core"].metrics[column.category][name] for row in rows]
    assert differences.mean == pytest.approx(numbers[0] - numbers[1], abs=1e-5 * max(map(abs, numbers)))
    itself = pair_runs(rows[0], rows[0], "core", column).differences
    assert not itself.has_spread and itself.mean == 0


def test_what_core_keeps_is_in_the_file_and_reads_back(rows, tiny_cache, tmp_path):
    for row in rows:
        record = json.loads((row.folder / "evaluations" / "core.json").read_text())["eval_result_unstructured"]["extra"]
        assert record == row.results["core"].extra and record["unit"] == "document"
        assert set(BY_DOCUMENT) <= record["values"].keys()
    texts = {row.results["core"].extra["text"] for row in rows}
    (shorter,) = evaluate(ask(make_run(tmp_path / "third", tiny_cache), tokens=60))
    assert len(texts) == 1 and shorter.results["core"].extra["text"] not in texts


def test_the_table_of_single_runs_ends_with_what_the_text_could_show(rows):
    ((_, heads, lines),) = tables(rows)
    assert [line[0] for line in lines] == ["one", "other", "smallest detectable, by document"]
    cells = dict(zip([head.split(" ")[0] + head.split("\n")[0][-1] for head in heads], lines[-1], strict=True))
    paired = {column: pair_runs(*rows, "core", column).differences for column in Core.columns if column.better}
    tested = [one for one in paired.values() if one is not None]
    column = column_of("kl_div_score")
    expected = detectable_difference(paired[column].sd, paired[column].pairs, 0.05 / len(tested))
    assert lines[-1][1 + [one.name for one in Core.columns].index("kl_div_score")] == format(expected, ".4f")
    assert cells["L00"] == "" and lines[-1][1 + [one.name for one in Core.columns].index("frac_alive")] == ""


def test_compare_says_of_finished_runs_what_a_test_by_document_says(rows):
    words = ["compare", *(str(row.folder) for row in rows), "--against", "other"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    differences = pair_runs(*rows, "core", column_of("kl_div_score")).differences
    (line,) = (line for line in done.output.splitlines() if "KL score" in line and " documents " in line)
    low, high = differences.interval
    assert f"{differences.mean:+.4f}" in line and f"{low:+.4f} to {high:+.4f}" in line
    assert f"{differences.pairs} documents" in line
    assert "smallest detectable difference" in done.output
    assert "note     The differences are paired by document, with one run of each system." in done.output
    itself = CliRunner().invoke(app, ["compare", str(rows[0].folder), "--against", "one"])
    assert itself.exit_code == 2 and "name the runs of another system" in itself.output


def test_documents_are_grouped_where_there_are_many():
    document_N = torch.tensor([7, 7, 3, 900, 901, 3])
    assert group_documents(document_N).tolist() == [1, 1, 0, 2, 3, 0]
    many_N = torch.arange(5000).repeat_interleave(2)
    group_N = group_documents(many_N)
    assert int(group_N.max()) == 1023 and (group_N.diff() >= 0).all()
    assert (group_N[::2] == group_N[1::2]).all()  # no document is split over two groups
    assert 8 <= int(group_N.bincount().min()) <= int(group_N.bincount().max()) <= 10
    assert describe_pairs(PairedDifferences([0.0] * 1024, "group of documents")) == "1,024 groups of documents"


def test_intervals_of_ratios_by_document_cover_the_ratio():
    """Sums over documents of very different lengths; the true ratio is 0.3."""
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(400):
        whole = torch.empty(40, dtype=torch.float64).exponential_(generator=generator)
        part = 0.3 * whole + 0.1 * whole.sqrt() * torch.randn(40, generator=generator, dtype=torch.float64)
        values = values_by_group((part, whole), torch.arange(40)).tolist()
        low, high = PairedDifferences(values, "document").interval
        inside += low < 0.3 < high
        normal = ratio_interval((part, whole))
        # 2.0227 is Student's t for 39 degrees of freedom
        assert (high - low) / (normal[1] - normal[0]) == pytest.approx(2.0227 / 1.96, rel=1e-4)
    assert inside / 400 == pytest.approx(0.95, abs=0.025)


def test_every_metric_of_a_table_says_how_it_is_paired():
    """`values_by_unit` reads the entries of `details`. Metrics without a unit are tested over seeds only."""
    paired = {name for name, metric in METRICS.items() if metric.unit}
    assert {"core", "absorption", "sparse_probing", "sparse_probing_stdlib", "scr", "tpp"} <= paired
    assert not {"unlearning", "autointerp"} & paired
