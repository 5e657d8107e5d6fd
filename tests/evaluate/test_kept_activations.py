"""An evaluation announces how many activations it will keep on disk, and limits them."""

import contextlib
import math
import os
import re
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from sae.common.errors import UsageError
from sae.common.formatting import format_bytes
from sae.common.process_group import ProcessGroup
from sae.evaluate import artifacts as artifacts_module
from sae.evaluate import run
from sae.evaluate.artifacts import ArtifactCache
from sae.evaluate.plan import EvaluateConfig, EvaluatePlan, plan_evaluation
from sae.evaluate.run import run_evaluation
from sae.train.sae import save_sae

from ..run_records import write_run_record
from .metrics.test_stability import make_sae

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config(tiny_cache, home) -> EvaluateConfig:
    """Evaluate core and stability for two seeds; core computes the losses in the first batch only."""
    for seed in range(2):
        origin = {"model": tiny_cache.identity["model"], "layer": 0, "cache": str(tiny_cache.folder)}
        save_sae(make_sae(seed), home / f"run{seed}", {**origin, "fingerprint": tiny_cache.fingerprint})
        write_run_record(home / f"run{seed}", d_in=32, d_sae=48, layer=0, variant="topk", seed=seed)
    options = ["core.batch_contexts=4", "core.reconstruction_batches=1", "stability.tokens=50", "stability.draws=1"]
    return EvaluateConfig(
        [home / "run0", home / "run1"], "core,stability", tokens=150, device="cpu", references=False, options=options
    )


def written(home: Path, kind: str) -> int:
    return sum(path.stat().st_size for path in (home / "activations/evaluation").glob(f"{kind}-[0-9a-f]*.safetensors"))


def test_the_plan_says_how_much_is_kept_that_is_not_there_yet(config, home, monkeypatch):
    monkeypatch.setattr("sae.evaluate.inputs.load_model", partial(pytest.fail, "a plan needs no model"))
    plan = plan_evaluation(config)
    announced = {one.name: sum(group.kept_bytes(one) for group in plan.groups) for one in plan.metrics}
    (line,) = [line for line in plan.describe() if line.startswith("writes")]
    for name, size in announced.items():
        assert f"; {name} adds up to {format_bytes(size)} there" in line
    assert "above 100.00 GB, the least recently read activations are removed" in line
    monkeypatch.undo()
    monkeypatch.setenv("SAE_HOME", str(home))
    run_evaluation(plan)
    files = len(list((home / "activations/evaluation").glob("text_pass-*.safetensors")))
    assert announced["core"] < written(home, "text_pass") < announced["core"] + 200 * files  # the files have headers
    assert 50 * 32 * 4 == announced["stability"] < written(home, "held_out") < announced["stability"] + 300
    again = plan_evaluation(replace(config, force=True))
    assert again.has_work and " adds up to " not in "".join(again.describe())


@pytest.mark.parametrize(
    ("metric", "kind", "options"),
    [
        ("absorption", "letters", ["words=300", "k_sparse_probe_num_epochs=1", "min_GT_probe_f1=-1"]),
        ("sparse_probing_stdlib", "rows", ["datasets=stdlib/kind", "train_set_size=40", "test_set_size=20"]),
        ("scr_stdlib", "rows", ["train_set_size=40", "test_set_size=24", "thresholds=2"]),
        ("tpp_stdlib", "rows", ["datasets=stdlib/kind", "train_set_size=40", "test_set_size=20", "thresholds=2"]),
    ],
)
def test_metrics_with_texts_of_their_own_say_how_much_at_most(config, home, metric, kind, options):
    """A text has one row per token, and the plan knows only the largest number of tokens."""
    options = [f"{metric}.{option}" for option in options]
    plan = plan_evaluation(replace(config, suite=metric, options=options))
    announced = sum(group.kept_bytes(plan.metrics[0]) for group in plan.groups)
    assert f"; {metric} keeps up to {format_bytes(announced)} there" in "".join(plan.describe())
    run_evaluation(plan)
    files = len(list((home / "activations/evaluation").glob(f"{kind}-[0-9a-f]*.safetensors")))
    assert announced / 3 < written(home, kind) < announced + 400 * files


def test_every_kind_of_activations_is_one_that_can_be_removed():
    """The names are those that the source of the metrics uses."""
    folder = Path(artifacts_module.__file__).parent
    used = {
        name
        for path in folder.rglob("*.py")
        for name in re.findall(r'(?:get_or_compute\(|^KIND = )"([a-z_-]+)"', path.read_text(), re.M)
    }
    small = {"probes", "llm_probes", "letters-probe", "sae_probes", "questions", "ravel-answers"}
    assert used - small == set(artifacts_module.ACTIVATIONS)


# --- the limit --------------------------------------------------------------------------------------------------------


def kept(cache: ArtifactCache, number: int, seconds: float | None = None) -> Path:
    """Store an artifact of at least 400 bytes that was last read `seconds` ago."""
    cache.get_or_compute("rows", {"number": number}, lambda: {"x": torch.zeros(100)})
    record = cache.path("rows", {"number": number}).with_suffix(".json")
    if seconds is not None:
        os.utime(record, (time.time() - seconds,) * 2)
    return record


@pytest.fixture
def artifacts(tmp_path, monkeypatch) -> ArtifactCache:
    """Five artifacts, of which the second was read again; the limit leaves room for three."""
    cache = ArtifactCache(tmp_path)
    for number in range(5):
        kept(cache, number, seconds=100 - number)
    kept(cache, 1)
    size = cache.path("rows", {"number": 0}).stat().st_size
    monkeypatch.setenv("SAE_EVALUATION_GB", f"{3.5 * size / 1e9:.9f}")
    (tmp_path / "judge-0123.jsonl").write_text("paid for")
    cache.get_or_compute("sae_probes", {"hours": 9}, lambda: {"scores": torch.zeros(1000)})
    os.utime(cache.path("sae_probes", {"hours": 9}).with_suffix(".json"), (0, 0))
    return ArtifactCache(tmp_path)


def numbers_there(cache: ArtifactCache) -> list[int]:
    found = [number for number in range(6) if cache.contains("rows", {"number": number})]
    assert found == [number for number in range(6) if cache.path("rows", {"number": number}).exists()]
    return found


def test_what_was_not_read_for_longest_is_removed_above_the_limit(artifacts):
    with artifacts.in_use():
        assert numbers_there(artifacts) == [1, 3, 4]
        kept(artifacts, 5)
    assert (artifacts.folder / "judge-0123.jsonl").exists() and artifacts.contains("sae_probes", {"hours": 9})
    with artifacts.in_use():
        assert numbers_there(artifacts) == [1, 4, 5]


def test_no_more_is_removed_than_the_limit_asks_for(artifacts):
    artifacts.limit = 3 * artifacts.path("rows", {"number": 0}).stat().st_size
    with artifacts.in_use():
        assert numbers_there(artifacts) == [1, 3, 4]


def test_nothing_is_removed_that_another_evaluation_may_read(artifacts):
    running = ArtifactCache(artifacts.folder)
    running.limit = math.inf
    with running.in_use():
        with artifacts.in_use():
            assert numbers_there(artifacts) == [0, 1, 2, 3, 4]
    with artifacts.in_use():
        assert numbers_there(artifacts) == [1, 3, 4]


@pytest.mark.parametrize("ranks", [1, 2])
def test_nothing_is_removed_from_the_first_pass_to_the_last(artifacts, monkeypatch, ranks):
    """Every process of a launcher protects what it reads from removal, starting before it measures."""
    running = ArtifactCache(artifacts.folder)
    running.limit = math.inf
    measured = []

    def measure(*_):
        with artifacts.in_use():  # by another command, which has a limit
            measured.append(numbers_there(artifacts))
        return [[]]

    monkeypatch.setattr(run, "current_process_group", lambda: ProcessGroup(1, ranks))
    monkeypatch.setattr(run, "measure_over_ranks", measure)
    monkeypatch.setattr(run, "measure_here", measure)
    assert run_evaluation(EvaluatePlan(EvaluateConfig([]), [], [], running), all_rows=False) == []
    assert measured == [[0, 1, 2, 3, 4]]


def test_an_evaluation_keeps_the_limit_and_removes_nothing_of_its_own(config, home, monkeypatch):
    old = kept(ArtifactCache(home / "activations/evaluation"), 0, seconds=1000)
    monkeypatch.setenv("SAE_EVALUATION_GB", "0")
    run_evaluation(plan_evaluation(config))
    assert not old.exists() and written(home, "text_pass") > 0
    run_evaluation(plan_evaluation(replace(config, suite="stability", options=config.options[2:], force=True)))
    assert written(home, "text_pass") == 0 and written(home, "held_out") > 0


@pytest.mark.parametrize("limit", ["much", "-1", "nan"])
def test_a_limit_that_is_no_size_is_refused(config, monkeypatch, limit):
    monkeypatch.setenv("SAE_EVALUATION_GB", limit)
    with pytest.raises(UsageError, match=f"SAE_EVALUATION_GB={limit} is not a number of gigabytes"):
        plan_evaluation(config)


@pytest.mark.parametrize("option", ["core.paired_latents=-1", "core.batch_contexts=0"])
def test_options_without_a_meaning_are_refused_by_the_plan(config, option):
    with pytest.raises(UsageError, match=f"{option}: give"):
        plan_evaluation(replace(config, suite="core", options=[option]))


def test_the_second_of_two_evaluations_is_protected_when_the_first_has_ended(artifacts):
    running = ArtifactCache(artifacts.folder)
    running.limit = math.inf
    second = ArtifactCache(artifacts.folder)
    second.limit = math.inf
    with contextlib.ExitStack() as of_second:
        with running.in_use():
            of_second.enter_context(second.in_use())
        with artifacts.in_use():
            assert numbers_there(artifacts) == [0, 1, 2, 3, 4]


def test_what_was_changed_on_the_disk_is_computed_again(tmp_path, monkeypatch):
    """The file has a flipped bit but can still be read. An empty limit means the default one."""
    monkeypatch.setenv("SAE_EVALUATION_GB", "")
    cache = ArtifactCache(tmp_path)
    assert cache.limit == 1e11
    cache.get_or_compute("rows", {"number": 0}, lambda: {"x": torch.zeros(100)})
    path = cache.path("rows", {"number": 0})
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert cache.get_or_compute("rows", {"number": 0}, lambda: {"x": torch.ones(100)})["x"].tolist() == [1.0] * 100
