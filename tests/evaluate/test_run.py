"""`sae evaluate`: which runs are measured, which are refused, and what the result files contain."""

import errno
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sae.cache.reader import Cache
from sae.cache.store_errors import TransientError
from sae.common.errors import DamagedError, SaeError, UnavailableError, UsageError
from sae.common.schemas import SAE_RECORD
from sae.evaluate.artifacts import ArtifactCache
from sae.evaluate.context import EvalContext
from sae.evaluate.inputs import find_eval_cache, make_context
from sae.evaluate.metrics.base import MetricResult
from sae.evaluate.metrics.core import Core
from sae.evaluate.metrics.registry import METRICS, metrics_of_suite
from sae.evaluate.plan import (
    RESULT_BYTES,
    RESULT_BYTES_PER_LATENT,
    EvaluateConfig,
    EvaluatePlan,
    plan_evaluation,
    unfinished_runs,
)
from sae.evaluate.results import read_result, write_result
from sae.evaluate.run import evaluate, run_evaluation
from sae.evaluate.statistics import detectable_difference
from sae.evaluate.tables import tables
from sae.harvest.plan import HarvestConfig as Harvest
from sae.harvest.plan import plan_harvest
from sae.harvest.run import run_harvest
from sae.train.activation_functions import ReLU
from sae.train.sae import SAE, save_sae

from ..run_records import change_record, write_run_record

ENVELOPE = {
    "eval_type_id", "eval_config", "eval_id", "datetime_epoch_millis", "eval_result_metrics", "eval_result_details",
    "sae_bench_commit_hash", "sae_lens_id", "sae_lens_release_id", "sae_lens_version", "sae_cfg_dict",
    "eval_result_unstructured",
}  # fmt: skip


def make_run(folder: Path, cache: Cache, layer: int = 0, seed: int = 0, /, **changes) -> Path:
    """A run folder with an untrained SAE."""
    torch.manual_seed(seed)
    origin = {
        "model": cache.identity["model"],
        "layer": layer,
        "cache": str(cache.folder),
        "fingerprint": cache.attributes["fingerprint"],
        **changes,
    }
    sae = SAE(32, 16, [ReLU()])
    sae.b_enc.data[0] = -1e3  # a latent that never fires
    save_sae(sae, folder, origin)
    return folder


def ask(*runs: Path, **changes) -> EvaluateConfig:
    return replace(EvaluateConfig(runs=runs, suite="core", tokens=60, device="cpu", references=False), **changes)


def bench_of(cache: Cache, *runs: Path) -> EvalContext:
    return make_context(cache)


def result_of(run: Path) -> dict:
    return json.loads((run / "evaluations" / "core.json").read_text())


def written_at(run: Path) -> int:
    return (run / "evaluations" / "core.json").stat().st_mtime_ns


def test_the_file_is_saebench_s(tiny_cache, home):
    run = make_run(home / "runs" / "one", tiny_cache)
    (row,) = evaluate(ask(run))
    found = result_of(run)
    assert found.keys() == ENVELOPE
    assert (found["eval_type_id"], found["sae_lens_id"], found["sae_lens_release_id"]) == ("core", "custom_sae", "one")
    assert found["sae_cfg_dict"] == SAE_RECORD.read(run / "sae.json")
    assert {"mode": "0.6.0", "batch_contexts": 16, "llm_dtype": "float32"}.items() <= found["eval_config"].items()
    assert found["eval_result_metrics"] == row.results["core"].metrics
    dead = found["eval_result_details"][0]
    assert (dead["feature_density"], dead["consistent_activation_heuristic"]) == (0, -1)  # files store 0/0 as -1
    assert "NaN" not in (run / "evaluations" / "core.json").read_text()
    assert row.flat()["core.sparsity.l0"] == found["eval_result_metrics"]["sparsity"]["l0"]


def test_what_was_measured_is_kept_until_something_changes(tiny_cache, home):
    run = make_run(home / "run", tiny_cache)
    (first,) = evaluate(ask(run))
    before = written_at(run)
    (again,) = evaluate(ask(run))
    assert written_at(run) == before
    assert again.results == first.results
    for change in ({"force": True}, {"tokens": 30}, {"mode": "2024-12"}, {"dtype": "bfloat16"}):
        before = written_at(run)
        evaluate(ask(run, **change))
        assert written_at(run) > before, change
    evaluate(ask(run))
    before = written_at(run)
    make_run(run, tiny_cache, 0, 1)  # other weights in the same folder
    evaluate(ask(run))
    assert written_at(run) > before
    for change in ({"layer": 1}, {"activation": [{"name": "topk", "k": 2}]}):  # same weights, used differently
        spec, before = SAE_RECORD.read(run / "sae.json"), written_at(run)
        spec["origin"]["layer"] = change.get("layer", spec["origin"]["layer"])
        spec["activation"] = change.get("activation", spec["activation"])
        SAE_RECORD.write(run / "sae.json", spec)
        evaluate(ask(run))
        assert written_at(run) > before, change


def test_a_result_of_other_settings_is_set_aside_and_comes_back(tiny_cache, home):
    run = make_run(home / "run", tiny_cache)
    (whole,) = evaluate(ask(run, tokens=None))
    written = (run / "evaluations" / "core.json").read_bytes()
    evaluate(ask(run, tokens=30))
    assert result_of(run)["eval_config"]["contexts"] < 90
    (aside,) = (run / "evaluations" / "earlier").iterdir()
    assert aside.read_bytes() == written
    other = (run / "evaluations" / "core.json").read_bytes()
    (again,) = evaluate(ask(run, tokens=None))
    assert again.results == whole.results and (run / "evaluations" / "core.json").read_bytes() == written
    assert other in [path.read_bytes() for path in (run / "evaluations" / "earlier").iterdir()]


def test_a_new_run_beside_a_measured_one_leaves_it_alone(tiny_cache, home):
    old, new = make_run(home / "old", tiny_cache), make_run(home / "new", tiny_cache, 1)
    evaluate(ask(old))
    before = written_at(old)
    rows = evaluate(ask(old, new, references=True))
    assert written_at(old) == before
    names = [(row.name.split("-")[0], row.target.layer) for row in rows]
    beside = ("identity", "zero", "pca", "random")
    assert names == [("old", 0), ("new", 1), *((name, layer) for layer in (0, 1) for name in beside)]
    ((title, heads, lines),) = tables(rows)
    assert "contexts" in title and all(len(line) == len(heads) for line in lines)
    column = {head.split("\n")[0]: number for number, head in enumerate(heads)}
    assert lines[0][column["alive ↑"]] and "±" in lines[0][column["KL score ↑"]]
    assert "0..1" in heads[column["KL score ↑"]]
    assert lines[3][column["cosine ↑"]] == ""  # a zero vector has no cosine
    assert [row.results for row in evaluate(ask(old, new, references=True))] == [row.results for row in rows]


def test_what_was_measured_stays_when_its_metric_cannot_run_any_more(tiny_cache, home, monkeypatch):
    old, new = make_run(home / "old", tiny_cache), make_run(home / "new", tiny_cache, 0, 1)
    evaluate(ask(old))

    def refuse(metric: Core) -> None:
        raise UnavailableError("a package is missing")

    monkeypatch.setattr(Core, "check", refuse)
    measured, pending = plan_evaluation(ask(old, new)).rows
    assert measured.results.keys() == {"core"} and not measured.errors
    assert not pending.results and str(pending.errors["core"]) == "a package is missing"


def test_force_measures_reference_rows_again(tiny_cache, home):
    run = make_run(home / "run", tiny_cache)
    evaluate(ask(run, references=True))
    results = list(home.glob("activations/evaluation/references/*/evaluations/core.json"))
    before = {path: path.stat().st_mtime_ns for path in results}
    evaluate(ask(run, references=True, force=True))
    assert len(before) == 4 and all(path.stat().st_mtime_ns > written for path, written in before.items())


def test_runs_that_differ_in_their_seed_get_a_line_together(tiny_cache, home):
    runs = [make_run(home / f"x-L0-s{seed}-ab", tiny_cache, 0, seed) for seed in range(3)]
    runs += [make_run(home / f"y-L0-s{seed}-cd", tiny_cache, 0, 10 + seed) for seed in range(3)]
    for number, run in enumerate(runs):
        if number != 2:  # two seeds of x, three of y
            write_run_record(run, d_in=32, d_sae=16, layer=0, variant=run.name[0], seed=number % 3)
    runs.append(make_run(home / "imported", tiny_cache))
    source = {"format": "saelens", "path": "", "sha256": {}}
    write_run_record(runs[-1], d_in=32, d_sae=16, layer=0, variant="imported-relu", seed=None, imported_from=source)
    rows = evaluate(ask(*runs))
    ((_, heads, lines),) = tables(rows)
    l0 = [row.results["core"].metrics["sparsity"]["l0"] for row in rows]

    def shown(mean: float, spread: float) -> str:
        return f"{mean:.1f} ±{spread:.1f}".replace("±0.", "±.")

    more = [l0[3] - l0[0], l0[4] - l0[1]]
    means = ["x-L0, 2 seeds ± sd", "y-L0, 3 seeds ± sd"]
    assert [line[0] for line in lines[7:]] == [*means, "y-L0 - x-L0, paired", "smallest detectable", "verdict"]
    assert lines[7][1] == shown(statistics.mean(l0[:2]), statistics.stdev(l0[:2]))
    assert lines[8][1] == shown(statistics.mean(l0[3:6]), statistics.stdev(l0[3:6]))
    # 12.706 is Student's t for one degree of freedom
    assert lines[9][1] == shown(statistics.mean(more), 12.706 * statistics.stdev(more) / 2**0.5)
    assert lines[10][1] == lines[11][1] == ""  # L0 is a setting and is not tested
    place = next(n for n, head in enumerate(heads) if head.startswith("KL score"))
    scores = [row.results["core"].metrics["model_behavior_preservation"]["kl_div_score"] for row in rows]
    sd = statistics.stdev([scores[3] - scores[0], scores[4] - scores[1]])
    tests = sum(line != "" for line in lines[11][1:])  # Holm's correction is over the tests of the table
    assert tests > 3 and detectable_difference(sd, 2, 0.05 / tests) > 1
    assert lines[10][place] == ">1"  # two seeds, and a number from 0 to 1
    assert set(lines[11][1:]) <= {"", "not distinguishable", "equivalent", "better", "worse", "same in every pair"}


def test_tokens_limits_the_text(tiny_cache, home):
    run = make_run(home / "run", tiny_cache)
    held = tiny_cache.contexts(held_out=True)
    evaluate(ask(run, tokens=int(held.length[0]) + 1))
    assert result_of(run)["eval_config"]["contexts"] == 2
    read = result_of(run)["eval_result_metrics"]["token_stats"]["total_tokens_eval_sparsity_variance"]
    assert read == int(held.length[:2].sum())
    assert len(bench_of(tiny_cache, run).contexts) == len(held)


def test_only_held_out_text_is_read(tiny_cache):
    contexts = bench_of(tiny_cache).contexts
    assert contexts.held_out.all()
    assert not set(contexts.document) & set(tiny_cache.contexts(held_out=False).document)


def test_a_cache_that_moved_is_found_by_its_fingerprint(tiny_cache, home):
    run = make_run(home / "run", tiny_cache, cache="/nowhere/at/all")
    with pytest.raises(UsageError, match=r"was trained on \(/nowhere/at/all\) was not found"):
        evaluate(ask(run))
    shutil.copytree(tiny_cache.folder, home / "activations" / "moved")
    assert len(evaluate(ask(run))) == 1


def test_another_harvest_at_the_recorded_place_is_refused(tiny_cache, home):
    """The SAE may have been trained on the held-out text of that harvest."""
    run = make_run(home / "run", tiny_cache, fingerprint="0" * 64)
    with pytest.raises(UsageError, match="was not found"):
        evaluate(ask(run))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": "gemma-2-mini"}, r"was trained on tiny-gemma-.* \(sha256 .*\), not on gemma-2-mini"),
        (
            {"suite": "core,full"},
            "full is a suite and cannot be combined with metrics. List the metrics instead, such as core,absorption",
        ),
        ({"suite": "core,absorbtion"}, "there is no metric absorbtion; did you mean absorption?"),
        ({"mode": "0.5"}, "--mode 0.5 is unknown. Expected 0.6.0"),
        ({"runs": ()}, "Name the runs to evaluate"),
        ({"tokens": 0}, "--tokens 0: expected a positive number"),
        ({"options": ["core.batch_contexts=0"]}, "core.batch_contexts=0: give 1 or more"),
        ({"options": ["core.sparsity_batches=-1"]}, "core.sparsity_batches=-1: give 1 or more"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(tiny_cache, home, change, sentence):
    run = make_run(home / "run", tiny_cache)
    with pytest.raises(UsageError, match=sentence):
        evaluate(ask(run, **change) if "runs" not in change else replace(ask(run), **change))
    assert not (run / "evaluations").exists()


def test_runs_that_cannot_be_evaluated_are_named_together_and_leave_the_others(tiny_cache, home):
    good, empty, torn, far = make_run(home / "good", tiny_cache), home / "empty", home / "torn", home / "far"
    empty.mkdir()
    weights = make_run(torn, tiny_cache) / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    make_run(far, tiny_cache, 7)
    found = plan_evaluation(ask(empty, good, torn, far))
    assert [type(found.refused[folder]) for folder in (empty, torn, far)] == [UsageError, DamagedError, DamagedError]
    assert [row.name for row in run_evaluation(found)] == ["good"] and result_of(good)
    for run in (empty, torn, far):  # alone, each run fails with its own error
        with pytest.raises(type(found.refused[run])) as alone:
            plan_evaluation(ask(run))
        assert str(alone.value) == str(found.refused[run])
    with pytest.raises(SaeError) as together:
        plan_evaluation(ask(empty, torn))
    assert together.value.exit_code == 1 and len(str(together.value).splitlines()) == 2


def test_a_plan_measures_nothing_and_loads_no_model(tiny_cache, home, monkeypatch):
    run, other = make_run(home / "run", tiny_cache), make_run(home / "other", tiny_cache, 1, 1)
    evaluate(ask(run, references=True))

    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("sae.evaluate.inputs.load_model", load)
    found = plan_evaluation(ask(run, other))
    ((todo,),) = [group.pending("core") for group in found.groups]
    assert todo.name == "other" and [row.name for row in found.rows if row.results] == ["run"]
    assert not (other / "evaluations").exists()
    assert [row.name.split("-")[0] for row in evaluate(ask(run, references=True))] == [
        "run", "identity", "zero", "pca", "random",
    ]  # fmt: skip


@pytest.mark.slow
def test_runs_of_two_caches_are_each_measured_on_the_text_of_their_own(tiny_cache, tiny_model, sentences, home):
    other = small_harvest(home, tiny_model, sentences, 0.2)
    runs = make_run(home / "one", tiny_cache), make_run(home / "two", other)
    together = evaluate(ask(*runs, tokens=None))
    for run, row, cache in zip(runs, together, (tiny_cache, other), strict=True):
        (alone,) = evaluate(ask(run, tokens=None, force=True))
        assert alone.results == row.results
        assert result_of(run)["eval_config"]["text"] == cache.fingerprint


@pytest.mark.slow
def test_a_run_without_a_cache_takes_the_only_one_of_its_model(tiny_cache, tiny_model, sentences, home):
    """`sae import` creates such runs."""
    run = make_run(home / "run", tiny_cache, cache=None, fingerprint=None)
    absent = make_run(home / "absent", tiny_cache)
    spec = SAE_RECORD.read(absent / "sae.json")
    del spec["origin"]["cache"], spec["origin"]["fingerprint"]
    SAE_RECORD.write(absent / "sae.json", spec)
    for imported in (run, absent):
        with pytest.raises(UsageError, match="names no cache, and no cache in .*activations has held-out text"):
            evaluate(ask(imported))
    small = small_harvest(home, tiny_model, sentences, 0.2)
    for imported in (run, absent):
        evaluate(ask(imported, tokens=None))
        assert result_of(imported)["eval_config"]["text"] == small.fingerprint
    shutil.copytree(tiny_cache.folder, home / "activations" / "tiny")
    with pytest.raises(
        UsageError, match=r"2 caches have held-out text for .*Choose one:\n  --cache .*small .*\n  --cache .*tiny"
    ):
        evaluate(ask(run))
    evaluate(ask(run, cache=home / "activations" / "tiny"))
    assert result_of(run)["eval_config"]["text"] == tiny_cache.fingerprint


def test_a_cache_that_is_named_overrides_and_is_of_the_same_model(tiny_cache, tiny_model, sentences, home):
    small = small_harvest(home, tiny_model, sentences, 0.2)
    run, other = make_run(home / "run", tiny_cache), make_run(home / "other", tiny_cache, model={"name": "gpt2"})
    found = plan_evaluation(ask(run, cache=small.folder))
    assert "may have been trained on this text" in found.notes[0]
    run_evaluation(found)
    assert result_of(run)["eval_config"]["text"] == small.fingerprint
    with pytest.raises(UsageError, match="other was trained on gpt2, but .*small was harvested from .*tiny-gemma"):
        plan_evaluation(ask(other, cache=small.folder))
    with pytest.raises(UsageError, match="nowhere holds no activation cache"):
        plan_evaluation(ask(run, cache=home / "nowhere"))


def test_an_sae_of_another_width_is_refused(tiny_cache, home):
    run = home / "wide"
    origin = {"model": tiny_cache.identity["model"], "layer": 0, "cache": str(tiny_cache.folder)}
    save_sae(SAE(48, 16, [ReLU()]), run, {**origin, "fingerprint": tiny_cache.fingerprint})
    with pytest.raises(UsageError, match="takes activations of width 48, but .* has width 32"):
        plan_evaluation(ask(run))


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_measured(tiny_cache, home, monkeypatch):
    """The disk is read-only or full. A run whose results exist does not have to be written."""
    one, two = make_run(home / "one", tiny_cache), make_run(home / "two", tiny_cache, 0, 1)
    evaluate(ask(one))
    kept, real = (one / "evaluations" / "core.json").read_bytes(), Path.write_bytes

    def read_only(path, data):
        if one in path.parents or two in path.parents:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", read_only)
    found = plan_evaluation(ask(one, two))
    assert [row.name for row in found.rows] == ["one"] and list(found.refused) == [two]
    with pytest.raises(UnavailableError, match="Cannot write .*two/evaluations: Read-only file system"):
        plan_evaluation(ask(two))
    monkeypatch.undo()
    monkeypatch.setenv("SAE_HOME", str(home))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UnavailableError, match=r"The disk is full: .*two/evaluations has 0.0 MB free"):
        plan_evaluation(ask(two))
    for_16_latents = RESULT_BYTES + 16 * RESULT_BYTES_PER_LATENT
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=for_16_latents - 1))
    with pytest.raises(UnavailableError, match="The disk is full: .*two/evaluations"):
        plan_evaluation(ask(two))
    assert not (two / "evaluations").exists() and (one / "evaluations" / "core.json").read_bytes() == kept


def test_a_disk_that_fills_up_costs_the_file_and_not_the_number(tiny_cache, home, monkeypatch):
    run = make_run(home / "run", tiny_cache)

    def full(*_):
        raise UnavailableError("The disk is full")

    monkeypatch.setattr("sae.evaluate.measure.write_result", full)
    (row,) = evaluate(ask(run))
    assert row.results["core"].metrics["sparsity"]["l0"] and str(row.errors["core"]) == "The disk is full"


def test_what_dead_processes_left_half_written_is_removed(tiny_cache, home):
    """Files of a live process are kept, and so are recent ones, which another machine may still be writing."""
    run = make_run(home / "run", tiny_cache)
    artifacts = home / "activations" / "evaluation"
    dead = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True).stdout.strip()
    names = [f"x.safetensors.tmp-{dead}", f"y.json.tmp-{os.getpid()}", f"z.json.tmp-{dead}", "w.tmp-kept"]
    for folder in (artifacts, run / "evaluations"):
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).write_text("half")
            age = 10 if name.startswith("z") else 7200
            os.utime(folder / name, (time.time() - age,) * 2)
    evaluate(ask(run))
    for folder in (artifacts, run / "evaluations"):
        assert {path.name for path in folder.glob("*.tmp-*")} == set(names[1:])


def test_a_number_of_minus_one_is_not_one_that_does_not_exist(tmp_path):
    """SAEBench writes -1 for both; our files also record which numbers are absent."""
    result = MetricResult.of(
        {"a": {"score": -1.0, "none": math.nan, "zero": 0.0}}, [{"x": -1.0, "y": math.inf, "z": [None, -1.0]}]
    )
    assert result.metrics["a"] == {"score": -1.0, "none": None, "zero": 0.0}
    write_result(tmp_path, Core(), {"k": 1}, result, {})
    written = json.loads((tmp_path / "evaluations" / "core.json").read_text())
    assert written["eval_result_metrics"]["a"] == {"score": -1.0, "none": -1.0, "zero": 0.0}
    assert written["eval_result_details"] == [{"x": -1.0, "y": -1.0, "z": [-1.0, -1.0]}]
    assert read_result(tmp_path, Core(), {"k": 1}) == result
    del written["eval_result_unstructured"]["absent"]  # an older file, where -1 means absent
    del written["eval_result_unstructured"]["content_digest"]
    (tmp_path / "evaluations" / "core.json").write_text(json.dumps(written))
    assert read_result(tmp_path, Core(), {"k": 1}).metrics["a"] == {"score": None, "none": None, "zero": 0.0}


def test_a_run_that_does_not_say_what_it_was_trained_on_is_refused(tiny_cache, home):
    run = home / "run"
    save_sae(SAE(32, 16), run, {})
    with pytest.raises(UsageError, match="does not record the model and layer it was trained on"):
        evaluate(ask(run))


def test_a_damaged_result_is_named_and_force_replaces_it(tiny_cache, home):
    run = make_run(home / "run", tiny_cache)
    evaluate(ask(run))
    path = run / "evaluations" / "core.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(DamagedError, match=r"core\.json cannot be read"):
        evaluate(ask(run))
    evaluate(ask(run, force=True))
    assert result_of(run).keys() == ENVELOPE


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: [],
        lambda found: {k: v for k, v in found.items() if k != "eval_result_unstructured"},
        lambda found: {**found, "eval_result_unstructured": {}},
        lambda found: {**found, "eval_result_metrics": {"sparsity": {"l0": "many"}}},
        lambda found: {**found, "eval_result_metrics": []},
    ],
)
def test_a_file_that_is_json_and_no_result_is_named(tiny_cache, home, damage):
    run = make_run(home / "run", tiny_cache)
    evaluate(ask(run))
    (run / "evaluations" / "core.json").write_text(json.dumps(damage(result_of(run))))
    with pytest.raises(DamagedError, match=r"core\.json is not as it was written \((expected|object missing)"):
        evaluate(ask(run))


def test_a_result_is_of_the_sae_json_that_it_was_measured_with(tiny_cache, home):
    """The same weights with a different activation or layer are a different SAE."""
    run = make_run(home / "run", tiny_cache)
    (before,) = evaluate(ask(run))
    change_record(SAE_RECORD, run / "sae.json", {"activation": [{"name": "topk", "k": 1}]})
    (after,) = evaluate(ask(run))
    assert after.results["core"].metrics["sparsity"]["l0"] == 1 != before.results["core"].metrics["sparsity"]["l0"]


@pytest.mark.parametrize(
    ("origin", "sentence"),
    [
        ([], r"expected `object`, got `array` - at `\$.origin`"),
        ({"model": "gemma"}, r"expected `object`, got `str` - at `\$.origin.model`"),
        ({"cache": None, "fingerprint": "0"}, "was trained on was not found. It contains the text"),
        ({"layer": "twelve"}, r"expected `int`, got `str` - at `\$.origin.layer`"),
        ({"layer": 99}, "says layer 99, but .* has layers 0 to"),
        ({"layer": -1}, r"expected `int` >= 0 - at `\$.origin.layer`"),
    ],
)
def test_a_sae_json_that_was_overwritten_is_named(tiny_cache, home, origin, sentence):
    run = make_run(home / "run", tiny_cache)
    spec = json.loads((run / "sae.json").read_text())
    changed = {**spec["origin"], **origin} if isinstance(origin, dict) else origin
    del spec["content_digest"]
    (run / "sae.json").write_text(json.dumps({**spec, "origin": changed}))
    with pytest.raises((UsageError, DamagedError), match=sentence):
        evaluate(ask(run))


def small_harvest(home: Path, model: Path, text: Path, held_out: float) -> Cache:
    request = Harvest(
        model=str(model), dataset=str(text), layers=(0,), tokens=300, context=32, window=512, held_out=held_out,
        device="cpu", out=home / "activations" / "small",
    )  # fmt: skip
    return run_harvest(plan_harvest(request))


def test_a_model_that_changed_since_the_harvest_is_refused(tiny_model, sentences, home):
    model = shutil.copytree(tiny_model, home / "model")
    run = make_run(home / "run", small_harvest(home, model, sentences, 0.2))
    evaluate(ask(run, tokens=50))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    with pytest.raises(UsageError, match=r"was harvested from model-.*: .*model now holds other files \(sha256 "):
        evaluate(ask(run, tokens=50))


def test_a_cache_without_held_out_text_is_refused(tiny_model, sentences, home):
    run = make_run(home / "run", small_harvest(home, tiny_model, sentences, 0.0))
    with pytest.raises(UsageError, match="has no held-out text"):
        evaluate(ask(run))


def test_results_do_not_depend_on_where_the_user_stands(tiny_cache, home, monkeypatch):
    run = make_run(home / "runs" / "run", tiny_cache)
    (here,) = evaluate(ask(run))
    monkeypatch.chdir(run)
    assert os.getcwd() == str(run)
    (there,) = evaluate(ask(Path("."), force=True))
    assert there.results == here.results
    assert there.name == "run"
    assert result_of(run)["sae_lens_release_id"] == "run"


def test_an_unfinished_run_among_others_is_left_out(tiny_cache, home):
    whole, begun = make_run(home / "runs" / "whole", tiny_cache), home / "runs" / "begun"
    begun.mkdir()
    (begun / "run.json").write_text("{}")
    assert unfinished_runs([whole, begun]) == [begun]
    assert [row.name for row in evaluate(ask(whole, begun))] == ["whole"]
    with pytest.raises(UsageError, match="begun contains no trained SAE .* Finish this run with .*--resume .*begun"):
        evaluate(ask(begun))
    with pytest.raises(UsageError, match="runs contains no trained SAE .* Train one with `sae train`.$"):
        evaluate(ask(home / "runs"))


def test_the_next_command_measures_more_of_the_same_runs_in_the_same_way(home):
    """The command has the next suite and all flags that affect the results, but no flags with default values."""
    runs = [home / "a run", home / "b"]

    def following(**changes) -> list[str]:
        config = replace(EvaluateConfig(runs), **changes)
        return shlex.split(EvaluatePlan(config, [], [], ArtifactCache(home)).next_command())

    command = ["sae", "evaluate", *map(str, runs), "--suite"]
    assert following() == [*command, "full"]
    assert following(suite="full") == [*command, "autointerp"] and following(suite="autointerp") == []
    assert following(suite="core,absorption") == [*command, "quick"]
    where = {"mode": "2024-12", "cache": home / "c", "data": home / "d", "device": "cpu", "dtype": "float32"}
    words = [word for name, value in where.items() for word in (f"--{name}", str(value))]
    assert following(**where) == [*command, "full", *words]
    assert following(controls=[home / "control"]) == [*command, "full", "--controls"]


def test_only_damage_alone_has_the_exit_code_of_damage(home):
    damaged, wrong = DamagedError("damaged"), UsageError("wrong")

    def code(*errors: SaeError) -> int:
        refused = {home / str(number): error for number, error in enumerate(errors)}
        return EvaluatePlan(EvaluateConfig([]), [], [], ArtifactCache(home), refused).exit_code([])

    assert (code(damaged, damaged), code(damaged, wrong), code(wrong), code()) == (3, 1, 1, 0)


def test_a_suite_of_names_is_read_leniently():
    assert [metric.name for metric in metrics_of_suite("core, absorption,,core,")] == ["core", "absorption"]
    with pytest.raises(UsageError, match="--suite ',' names no metric. Choose from quick, full, core"):
        metrics_of_suite(",")


def test_options_of_metrics_are_checked_together(tiny_cache, home):
    (metric,) = metrics_of_suite("core", ["core.batch_contexts=8"])
    assert metric.batch_contexts == 8
    with pytest.raises(UsageError) as refused:
        metrics_of_suite("core,cor", ["core.batch_context=8", "core.batch_contexts=x", "core.batch_contexts"])
    lines = str(refused.value).splitlines()
    assert len(lines) == 4
    assert (
        "did you mean core?" in lines[0]
        and "did you mean batch_contexts?" in lines[1]
        and "'x' is not a valid value" in lines[2]
    )


def test_a_metric_that_fails_leaves_the_others(tiny_cache, home, monkeypatch):
    @dataclass(frozen=True)
    class Broken(Core):
        name = "broken"

        def measure(self, ctx, targets, progress):
            return [UnavailableError("no such text"), *([MetricResult({})] * (len(targets) - 1))]

    monkeypatch.setitem(METRICS, "broken", Broken)
    one, two = make_run(home / "one", tiny_cache), make_run(home / "two", tiny_cache, 0, 1)
    first, second = evaluate(ask(one, two, suite="broken,core"))
    assert str(first.errors["broken"]) == "no such text" and first.results.keys() == {"core"}
    assert second.results.keys() == {"core", "broken"} and not second.errors
    assert not (one / "evaluations" / "broken.json").exists()
    with pytest.raises(UnavailableError, match="no such text"):
        evaluate(ask(one, suite="broken"))


@pytest.mark.slow
def test_a_metric_that_runs_out_of_memory_leaves_the_others(tiny_cache, home, monkeypatch):
    """The other metric is measured as usual; the failed one is measured when it is requested again."""
    error, hungry = RuntimeError("DefaultCPUAllocator: can't allocate memory"), True

    @dataclass(frozen=True)
    class Hungry(Core):
        name = "hungry"

        def measure(self, ctx, targets, progress):
            if hungry:
                raise error
            return super().measure(ctx, targets, progress)

    monkeypatch.setitem(METRICS, "hungry", Hungry)
    run = make_run(home / "run", tiny_cache)
    plan = plan_evaluation(ask(run, suite="hungry,core"))
    (row,) = run_evaluation(plan)
    assert row.results.keys() == {"core"} and plan.exit_code([row]) == 1
    said = str(row.errors["hungry"])
    assert said.startswith(f"cpu is out of memory ({error}). Results of other metrics are kept; measure hungry again")
    assert "a smaller --set hungry.batch_contexts, fewer runs in one command, --no-references or" in said
    assert [line for line in plan.summary([row], 0.0) if line.startswith("not run")] == [f"not run  hungry: {said}"]
    with pytest.raises(UnavailableError, match="out of memory"):
        evaluate(ask(make_run(home / "other", tiny_cache), suite="hungry"))
    hungry = False
    (again,) = evaluate(ask(run, suite="hungry,core"))
    assert again.results["hungry"].metrics == again.results["core"].metrics == row.results["core"].metrics


def test_a_cache_that_does_not_answer_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(fingerprint: object, folder: object) -> None:
        raise UnavailableError(f"{folder}: the store cannot be reached.")

    monkeypatch.setattr("sae.evaluate.inputs.find_by_fingerprint", unreachable)
    origin = {"model": {"name": "gemma", "revision": None}, "layer": 0, "cache": "s3://b/pile", "fingerprint": "f"}
    advice = "Alternatively, use --cache to give another cache of gemma."
    with pytest.raises(UnavailableError, match=f"^s3://b/pile: .* {advice}$"):
        find_eval_cache(Path("run"), SimpleNamespace(origin=origin))


def test_a_store_that_cannot_be_reached_is_tried_once_for_all_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure takes minutes. A store is tried again after another minute; other stores are not affected."""
    clock, tried = [0.0], []

    def unreachable(fingerprint: object, folder: str) -> None:
        tried.append(folder)
        clock[0] += 200
        raise TransientError.of(folder, "the store cannot be reached")

    def refused(cache: str, name: str) -> None:
        origin = {"model": {"name": "gemma", "revision": None}, "layer": 0, "cache": cache, "fingerprint": "f"}
        with pytest.raises(UnavailableError, match=f"^{cache}: the store cannot be reached"):
            find_eval_cache(Path(name), SimpleNamespace(origin=origin))

    monkeypatch.setattr("sae.evaluate.inputs.UNREACHABLE", {})
    monkeypatch.setattr("sae.evaluate.inputs.find_by_fingerprint", unreachable)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    refused("s3://b/pile", "one"), refused("s3://b/pile", "two"), refused("s3://c/pile", "three")
    assert tried == ["s3://b/pile", "s3://c/pile"]
    clock[0] += 60
    refused("s3://b/pile", "one")
    assert tried == ["s3://b/pile", "s3://c/pile", "s3://b/pile"]
