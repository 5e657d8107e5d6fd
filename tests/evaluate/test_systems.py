"""Metrics that compare seeds: which runs are seeds of one system, and what the results depend on."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import sae
from sae.common.errors import UnavailableError, UsageError
from sae.evaluate.metrics.base import Metric, MetricResult
from sae.evaluate.metrics.registry import METRICS
from sae.evaluate.plan import EvaluateConfig, plan_evaluation
from sae.evaluate.run import evaluate
from sae.train.activation_functions import ReLU
from sae.train.sae import SAE, save_sae

from ..run_records import write_run_record

ASKED = {"suite": "beside", "tokens": 60, "device": "cpu", "references": False}
measured: list[list[str]] = []


@dataclass(frozen=True)
class Beside(Metric):
    """A metric that counts the other seeds of each SAE."""

    name, type_id, title, columns = "beside", "beside", "", ()
    independent_seeds = False

    def settings_of(self, target, targets):
        seeds = [one.weights for one in targets if one is not target and target.system and one.system == target.system]
        if not seeds:
            raise UnavailableError("beside needs another seed")
        return {"seeds": sorted(seeds)}

    def measure(self, ctx, targets, progress):
        measured.append([target.name for target in targets])
        counts = [sum(one.system == target.system for one in targets) - 1 for target in targets]
        return [MetricResult({"seeds": {"beside": float(count)}}) for count in counts]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(METRICS, "beside", Beside)
    measured.clear()


def make_run(folder: Path, cache, seed: int, variant: str = "topk", weights: int | None = None) -> Path:
    torch.manual_seed(seed if weights is None else weights)
    origin = {
        "model": cache.identity["model"],
        "layer": 0,
        "cache": str(cache.folder),
        "fingerprint": cache.fingerprint,
    }
    save_sae(SAE(32, 16, [ReLU()]), folder, origin)
    write_run_record(folder, d_in=32, d_sae=16, layer=0, variant=variant, seed=seed)
    return folder


def counted(rows) -> dict[str, float]:
    return {row.name: row.results["beside"].metrics["seeds"]["beside"] for row in rows if "beside" in row.results}


def test_a_result_is_of_the_seeds_that_it_was_measured_with(tiny_cache, home):
    a, b, c = (make_run(home / name, tiny_cache, seed) for seed, name in enumerate("abc"))
    assert counted(evaluate(EvaluateConfig([a, b], **ASKED))) == {"a": 1, "b": 1}
    assert counted(evaluate(EvaluateConfig([b, a], **{**ASKED, "references": True}))) == {"a": 1, "b": 1}
    assert measured == [["a", "b"]]  # the second call found both results, and references were not measured
    settings = json.loads((a / "evaluations" / "beside.json").read_text())["eval_config"]
    assert len(settings["seeds"]) == 1 and settings["weights"] not in settings["seeds"]
    assert counted(evaluate(EvaluateConfig([a, b, c], **ASKED))) == {"a": 2, "b": 2, "c": 2}  # one more seed
    assert counted(evaluate(EvaluateConfig([a, b], **ASKED))) == {"a": 1, "b": 1}  # archived and restored
    assert measured == [["a", "b"], ["a", "b", "c"]]
    make_run(b, tiny_cache, 1, weights=7)  # b has other weights
    assert counted(evaluate(EvaluateConfig([a, b], **ASKED))) == {"a": 1, "b": 1}
    assert measured[2:] == [["a", "b"]]


def test_a_seed_without_a_result_is_measured_with_those_that_have_one(tiny_cache, home):
    runs = [make_run(home / name, tiny_cache, seed) for seed, name in enumerate("abc")]
    other = [make_run(home / name, tiny_cache, seed, "relu") for seed, name in enumerate("xy")]
    evaluate(EvaluateConfig([*runs, *other], **ASKED))
    (runs[1] / "evaluations" / "beside.json").unlink()
    kept = (runs[0] / "evaluations" / "beside.json").stat().st_mtime_ns
    rows = evaluate(EvaluateConfig([*runs, *other], **ASKED))
    assert counted(rows) == {"a": 2, "b": 2, "c": 2, "x": 1, "y": 1}
    assert measured == [["a", "b", "c", "x", "y"], ["b", "a", "c"]]
    assert (runs[0] / "evaluations" / "beside.json").stat().st_mtime_ns == kept


def test_a_run_alone_has_a_reason_and_an_error_only_where_nothing_else_was_asked(tiny_cache, home, monkeypatch):
    a, b, alone = (make_run(home / n, tiny_cache, s, v) for n, s, v in (("a", 0, "t"), ("b", 1, "t"), ("c", 0, "r")))
    with pytest.raises(UnavailableError, match="beside needs another seed"):
        plan_evaluation(EvaluateConfig([a, alone], **ASKED))
    plan = plan_evaluation(EvaluateConfig([a, b, alone], **ASKED))
    assert [row.name for row in plan.rows if "beside" in row.errors] == ["c"]
    rows = evaluate(EvaluateConfig([a, b, alone], force=True, **ASKED))
    assert counted(rows) == {"a": 1, "b": 1} and measured == [["a", "b"]]
    monkeypatch.setitem(sae.evaluate.metrics.registry.SUITES, "quick", ("core", "beside"))
    quick = plan_evaluation(EvaluateConfig([alone], **{**ASKED, "suite": "quick"}))
    assert quick.exit_code(quick.rows) == 0 and quick.has_work
    assert quick.expected_failures == {("beside", "beside needs another seed")}


def test_imported_saes_and_references_are_of_no_system(tiny_cache, home):
    runs = [make_run(home / name, tiny_cache, seed) for seed, name in enumerate("ab")]
    source = {"format": "saelens", "path": "", "sha256": {}}
    for run in runs:
        write_run_record(run, d_in=32, d_sae=16, layer=0, variant="imported", seed=None, imported_from=source)
    with pytest.raises(UnavailableError, match="needs another seed"):
        evaluate(EvaluateConfig(runs, **ASKED))


def test_objects_name_their_system(tiny_cache):
    saes = {name: SAE(32, 16, [ReLU()]).eval().requires_grad_(False) for name in ("one", "two", "other")}
    asked = {**ASKED, "cache": tiny_cache, "layer": 0}
    rows = sae.evaluate_saes(saes, systems={"one": "mine", "two": "mine"}, **asked)
    assert counted(rows) == {"one": 1, "two": 1}
    assert str(rows[2].errors["beside"]) == "beside needs another seed"
    with pytest.raises(UsageError, match="systems= has the key tow, which is not among the SAEs; did you mean two?"):
        sae.evaluate_saes(saes, systems={"tow": "mine"}, **asked)
    with pytest.raises(UsageError, match="omit systems="):
        sae.evaluate_saes(["runs/one"], systems={"one": "mine"})
