"""What an evaluation keeps of the model's passes is announced before."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from sae.common.errors import UsageError
from sae.common.formatting import format_bytes
from sae.evaluate.plan import EvaluateConfig, plan_evaluation
from sae.evaluate.run import run_evaluation
from sae.train.sae import save_sae

from ..run_records import write_run_record
from .metrics.test_stability import make_sae

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config(tiny_cache, home) -> EvaluateConfig:
    """core and stability of two seeds, with losses in the first two batches alone."""
    for seed in range(2):
        origin = {"model": tiny_cache.identity["model"], "layer": 0, "cache": str(tiny_cache.folder)}
        save_sae(make_sae(seed), home / f"run{seed}", {**origin, "fingerprint": tiny_cache.fingerprint})
        write_run_record(home / f"run{seed}", d_in=32, d_sae=48, layer=0, variant="topk", seed=seed)
    options = ["core.batch_contexts=4", "core.reconstruction_batches=2", "stability.tokens=50", "stability.draws=1"]
    return EvaluateConfig(
        [home / "run0", home / "run1"], "core,stability", tokens=150, device="cpu", references=False, options=options
    )


def written(home: Path, kind: str) -> int:
    return sum(path.stat().st_size for path in (home / "activations/evaluation").glob(f"{kind}-*.safetensors"))


def test_the_plan_says_how_much_is_kept_that_is_not_there_yet(config, home, monkeypatch):
    monkeypatch.setattr("sae.evaluate.inputs.load_model", partial(pytest.fail, "a plan needs no model"))
    plan = plan_evaluation(config)
    announced = {one.name: sum(group.kept_bytes(one) for group in plan.groups) for one in plan.metrics}
    (line,) = [line for line in plan.describe() if line.startswith("writes")]
    for name, size in announced.items():
        assert f"; {name} adds up to {format_bytes(size)} to it" in line
    monkeypatch.undo()
    monkeypatch.setenv("SAE_HOME", str(home))
    run_evaluation(plan)
    files = len(list((home / "activations/evaluation").glob("text_pass-*.safetensors")))
    assert announced["core"] < written(home, "text_pass") < announced["core"] + 200 * files  # with headers
    assert 50 * 32 * 4 == announced["stability"] < written(home, "held_out") < announced["stability"] + 300
    again = plan_evaluation(replace(config, force=True))
    assert again.has_work and "adds" not in "".join(again.describe())


@pytest.mark.parametrize("option", ["core.paired_latents=-1", "core.batch_contexts=0"])
def test_options_without_a_meaning_are_refused_by_the_plan(config, option):
    with pytest.raises(UsageError, match=f"{option}: give"):
        plan_evaluation(replace(config, suite="core", options=[option]))
