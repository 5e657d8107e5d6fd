"""Which runs are measured, what is refused, and what the files hold."""

import json
import os
import shutil
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from sae.cache.errors import DamagedError, OutsideError, UsageError
from sae.cache.reader import Cache
from sae.evaluate.core import Core
from sae.evaluate.metric import Result
from sae.evaluate.run import METRICS, Request, evaluate, flat, make_bench, metrics_of, unfinished
from sae.evaluate.table import tables
from sae.harvest.plan import Request as Harvest
from sae.harvest.plan import plan
from sae.harvest.run import harvest
from sae.train.sae import SAE, ReLU, save_sae

ENVELOPE = {
    "eval_type_id", "eval_config", "eval_id", "datetime_epoch_millis", "eval_result_metrics", "eval_result_details",
    "sae_bench_commit_hash", "sae_lens_id", "sae_lens_release_id", "sae_lens_version", "sae_cfg_dict",
    "eval_result_unstructured",
}  # fmt: skip


def make_run(folder: Path, cache: Cache, layer: int = 0, seed: int = 0, /, **changes) -> Path:
    """A run folder with an untrained SAE in it."""
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


def ask(*runs: Path, **changes) -> Request:
    return replace(Request(runs=runs, suite="core", tokens=60, device="cpu", references=False), **changes)


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
    assert found["sae_cfg_dict"] == json.loads((run / "sae.json").read_text())
    assert {"mode": "0.6.0", "batch_contexts": 16, "llm_dtype": "float32"}.items() <= found["eval_config"].items()
    assert found["eval_result_metrics"] == row.results["core"].metrics
    dead = found["eval_result_details"][0]
    assert (dead["feature_density"], dead["consistent_activation_heuristic"]) == (0, -1)  # 0/0 is -1 in a file
    assert "NaN" not in (run / "evaluations" / "core.json").read_text()
    assert flat(row)["core.sparsity.l0"] == found["eval_result_metrics"]["sparsity"]["l0"]


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
    for change in ({"layer": 1}, {"activation": [{"name": "topk", "k": 2}]}):  # the same weights, used otherwise
        spec, before = json.loads((run / "sae.json").read_text()), written_at(run)
        spec["origin"]["layer"] = change.get("layer", spec["origin"]["layer"])
        spec["activation"] = change.get("activation", spec["activation"])
        (run / "sae.json").write_text(json.dumps(spec))
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
    (again,) = evaluate(ask(run, tokens=None))
    assert again.results == whole.results and (run / "evaluations" / "core.json").read_bytes() == written


def test_a_new_run_beside_a_measured_one_leaves_it_alone(tiny_cache, home):
    old, new = make_run(home / "old", tiny_cache), make_run(home / "new", tiny_cache, 1)
    evaluate(ask(old))
    before = written_at(old)
    rows = evaluate(ask(old, new, references=True))
    assert written_at(old) == before
    names = [(row.name.split("-")[0], row.subject.layer) for row in rows]
    beside = ("identity", "zero", "pca", "random")
    assert names == [("old", 0), ("new", 1), *((name, layer) for layer in (0, 1) for name in beside)]
    ((title, heads, lines),) = tables(rows)
    assert "contexts" in title and all(len(line) == len(heads) for line in lines)
    column = {head.split("\n")[0]: number for number, head in enumerate(heads)}
    assert lines[0][column["alive ↑"]] and "±" in lines[0][column["KL score ↑"]]
    assert "0..1" in heads[column["KL score ↑"]]
    assert lines[3][column["cosine ↑"]] == ""  # zero has no direction
    assert [row.results for row in evaluate(ask(old, new, references=True))] == [row.results for row in rows]


def test_runs_that_differ_in_their_seed_get_a_line_together(tiny_cache, home):
    runs = [make_run(home / f"x-L0-s{seed}-ab", tiny_cache, 0, seed) for seed in range(3)]
    runs += [make_run(home / f"y-L0-s{seed}-cd", tiny_cache, 0, 10 + seed) for seed in range(3)]
    for number, run in enumerate(runs):
        if number != 2:  # of x two seeds, of y three
            (run / "run.json").write_text(json.dumps({"variant": run.name[0], "seed": number % 3}))
    rows = evaluate(ask(*runs))
    ((_, heads, lines),) = tables(rows)
    l0 = [row.results["core"].metrics["sparsity"]["l0"] for row in rows]

    def shown(mean: float, spread: float) -> str:
        return f"{mean:.1f} ±{spread:.1f}".replace("±0.", "±.")

    more = [l0[3] - l0[0], l0[4] - l0[1]]
    assert [line[0] for line in lines[6:]] == ["x-L0, 2 seeds ± sd", "y-L0, 3 seeds ± sd", "y-L0 - x-L0, paired"]
    assert lines[6][1] == shown(statistics.mean(l0[:2]), statistics.stdev(l0[:2]))
    assert lines[7][1] == shown(statistics.mean(l0[3:]), statistics.stdev(l0[3:]))
    assert lines[8][1] == shown(statistics.mean(more), 12.706 * statistics.stdev(more) / 2**0.5)  # t of one degree


def test_tokens_limits_the_text(tiny_cache, home):
    run = make_run(home / "run", tiny_cache)
    held = tiny_cache.contexts(held_out=True)
    evaluate(ask(run, tokens=int(held.length[0]) + 1))
    assert result_of(run)["eval_config"]["contexts"] == 2
    read = result_of(run)["eval_result_metrics"]["token_stats"]["total_tokens_eval_sparsity_variance"]
    assert read == int(held.length[:2].sum())
    assert len(make_bench(ask(run, tokens=None), tiny_cache).contexts) == len(held)


def test_only_held_out_text_is_read(tiny_cache):
    contexts = make_bench(ask(tokens=None), tiny_cache).contexts
    assert contexts.held_out.all()
    assert not set(contexts.document) & set(tiny_cache.contexts(held_out=False).document)


def test_a_cache_that_moved_is_found_by_its_fingerprint(tiny_cache, home):
    run = make_run(home / "run", tiny_cache, cache="/nowhere/at/all")
    with pytest.raises(UsageError, match=r"is gone: it was /nowhere/at/all"):
        evaluate(ask(run))
    shutil.copytree(tiny_cache.folder, home / "activations" / "moved")
    assert len(evaluate(ask(run))) == 1


def test_another_harvest_at_the_recorded_place_is_refused(tiny_cache, home):
    """Its held-out text may have been trained on."""
    run = make_run(home / "run", tiny_cache, fingerprint="0" * 64)
    with pytest.raises(UsageError, match="is gone"):
        evaluate(ask(run))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": "gemma-2-mini"}, "was trained on .*tiny-gemma, not on gemma-2-mini"),
        ({"suite": "core,absorbtion"}, "there is no metric absorbtion; did you mean absorption?"),
        ({"mode": "0.5"}, "--mode 0.5 is unknown: 0.6.0"),
        ({"runs": ()}, "Name the runs to evaluate"),
        ({"tokens": 0}, "--tokens 0 is not positive"),
        ({"options": ["core.batch_contexts=0"]}, "core.batch_contexts=0: give 1 or more"),
        ({"options": ["core.sparsity_batches=-1"]}, "core.sparsity_batches=-1: give 1 or more"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(tiny_cache, home, change, sentence):
    run = make_run(home / "run", tiny_cache)
    with pytest.raises(UsageError, match=sentence):
        evaluate(ask(run, **change) if "runs" not in change else replace(ask(run), **change))
    assert not (run / "evaluations").exists()


def test_a_run_that_is_not_trained_is_refused_before_anything_is_measured(tiny_cache, home):
    run, unfinished = make_run(home / "run", tiny_cache), home / "unfinished"
    unfinished.mkdir()
    with pytest.raises(UsageError, match="unfinished holds no trained SAE"):
        evaluate(ask(run, unfinished))
    assert not (run / "evaluations").exists()


def test_a_run_that_does_not_say_what_it_was_trained_on_is_refused(tiny_cache, home):
    run = home / "run"
    save_sae(SAE(32, 16), run, {})
    with pytest.raises(UsageError, match="does not say what it was trained on"):
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
    with pytest.raises(DamagedError, match=r"core\.json (has no|holds no result)"):
        evaluate(ask(run))


def test_a_result_is_of_the_sae_json_that_it_was_measured_with(tiny_cache, home):
    """The same weights with another activation or at another layer are another SAE."""
    run = make_run(home / "run", tiny_cache)
    (before,) = evaluate(ask(run))
    spec = json.loads((run / "sae.json").read_text())
    (run / "sae.json").write_text(json.dumps({**spec, "activation": [{"name": "topk", "k": 1}]}))
    (after,) = evaluate(ask(run))
    assert after.results["core"].metrics["sparsity"]["l0"] == 1 != before.results["core"].metrics["sparsity"]["l0"]


@pytest.mark.parametrize(
    ("origin", "sentence"),
    [
        ([], "does not say what it was trained on"),
        ({"model": "gemma"}, "does not say what it was trained on"),
        ({"cache": None}, "does not say what it was trained on"),
        ({"layer": "twelve"}, "does not say what it was trained on"),
        ({"layer": 99}, "says layer 99, but .* has layers 0 to"),
        ({"layer": -1}, "says layer -1, but .* has layers 0 to"),
    ],
)
def test_a_sae_json_that_was_overwritten_is_named(tiny_cache, home, origin, sentence):
    run = make_run(home / "run", tiny_cache)
    spec = json.loads((run / "sae.json").read_text())
    changed = {**spec["origin"], **origin} if isinstance(origin, dict) else origin
    (run / "sae.json").write_text(json.dumps({**spec, "origin": changed}))
    with pytest.raises((UsageError, DamagedError), match=sentence):
        evaluate(ask(run))


def small_harvest(home: Path, model: Path, text: Path, held_out: float) -> Cache:
    request = Harvest(
        model=str(model), dataset=str(text), layers=(0,), tokens=300, context=32, window=512, held_out=held_out,
        device="cpu", out=home / "activations" / "small",
    )  # fmt: skip
    return harvest(plan(request))


def test_a_model_that_changed_since_the_harvest_is_refused(tiny_model, sentences, home):
    model = shutil.copytree(tiny_model, home / "model")
    run = make_run(home / "run", small_harvest(home, model, sentences, 0.2))
    evaluate(ask(run, tokens=50))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    with pytest.raises(UsageError, match="was harvested from .* but what is found under that name is"):
        evaluate(ask(run, tokens=50))


def test_a_cache_without_held_out_text_is_refused(tiny_model, sentences, home):
    run = make_run(home / "run", small_harvest(home, tiny_model, sentences, 0.0))
    with pytest.raises(UsageError, match="holds no held-out text"):
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
    assert unfinished([whole, begun]) == [begun]
    assert [row.name for row in evaluate(ask(whole, begun))] == ["whole"]
    with pytest.raises(UsageError, match="begun holds no trained SAE"):
        evaluate(ask(begun))


def test_a_suite_of_names_is_read_leniently():
    assert [metric.name for metric in metrics_of("core, absorption,,core,")] == ["core", "absorption"]
    with pytest.raises(UsageError, match="--suite ',' names no metric; there are quick, full, core"):
        metrics_of(",")


def test_options_of_metrics_are_checked_together(tiny_cache, home):
    (metric,) = metrics_of("core", ["core.batch_contexts=8"])
    assert metric.batch_contexts == 8
    with pytest.raises(UsageError) as refused:
        metrics_of("core,cor", ["core.batch_context=8", "core.batch_contexts=x", "core.batch_contexts"])
    lines = str(refused.value).splitlines()
    assert len(lines) == 4
    assert (
        "did you mean core?" in lines[0]
        and "did you mean batch_contexts?" in lines[1]
        and "'x' is no value" in lines[2]
    )


def test_a_metric_that_fails_leaves_the_others(tiny_cache, home, monkeypatch):
    @dataclass(frozen=True)
    class Broken(Core):
        name = "broken"

        def measure(self, bench, subjects, progress):
            return [OutsideError("no such text"), *([Result({})] * (len(subjects) - 1))]

    monkeypatch.setitem(METRICS, "broken", Broken)
    one, two = make_run(home / "one", tiny_cache), make_run(home / "two", tiny_cache, 0, 1)
    first, second = evaluate(ask(one, two, suite="broken,core"))
    assert str(first.failed["broken"]) == "no such text" and first.results.keys() == {"core"}
    assert second.results.keys() == {"core", "broken"} and not second.failed
    assert not (one / "evaluations" / "broken.json").exists()
    with pytest.raises(OutsideError, match="no such text"):
        evaluate(ask(one, suite="broken"))
