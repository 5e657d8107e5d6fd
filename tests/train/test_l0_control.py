"""The L0 controller behind `--l0`: what holds for every recipe, and the formula."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from typer.testing import CliRunner

import sae.train.variants  # noqa: F401  (registers the recipes)
from sae.cli.main import app
from sae.common.errors import UsageError
from sae.train import recipe as registry
from sae.train.checkpoint import restore_checkpoint, save_checkpoint, training_state
from sae.train.l0_control import L0Controller, missed_targets
from sae.train.loop import Trainer
from sae.train.losses import MSE
from sae.train.mechanisms import DeadLatents
from sae.train.recipe import RECIPES, find_recipe
from sae.train.sae import SAE
from sae.train.step import Step
from sae.train.variant import RunConfig, Variant

from .runs import SETTING, trained_recipe

# Recipes for each way of following l0: by k, by a target of its own, and by the coefficient of a penalty.
CONTROLLED = ("topk", "batchtopk", "jumprelu", "collapse-04", "relu", "gated", "progressive")


def slow(*names: str) -> list:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", [n if n in CONTROLLED else slow(n)[0] for n in sorted(RECIPES)])
def test_every_recipe_follows_l0_in_the_right_direction(name, sparse_cache, batches) -> None:
    few, many = (
        trained_recipe(sparse_cache, SETTING._replace(l0=n, steps=20), name, batches, lr=3e-3, warmup=0).pop_metrics()
        for n in (4, 48)
    )
    assert few["l0"] < many["l0"]


@pytest.mark.parametrize(
    "name",
    [
        *slow("topk", "batchtopk", "switch", "competition"),  # k
        "jumprelu", *slow("collapse-04", "collapse-10"),  # l0
        # with a penalty
        "relu", *slow("gated", "april", "p-anneal", "jumprelu-step", "jumprelu-tanh", "progressive", "hierarchical"),
    ],
)  # fmt: skip
def test_a_run_ends_at_the_l0_that_was_asked_for(name, sparse_cache, batches) -> None:
    setting = SETTING._replace(steps=400, l0=8)
    training = trained_recipe(sparse_cache, setting, name, batches, lr=2e-3)
    assert training.pop_metrics()["l0"] == pytest.approx(8, rel=0.1)


@pytest.mark.parametrize("name", [n if n in CONTROLLED else slow(n)[0] for n in sorted(RECIPES)])
def test_a_step_with_l0_reads_nothing_back_to_the_host(name) -> None:
    with FakeTensorMode():
        training = Trainer(RECIPES[name].make(SETTING._replace(l0=8), {}), 40, "cpu")
        for _ in range(3):
            training.step(torch.randn(64, 32, dtype=torch.bfloat16))


def test_resume_is_exact_with_l0(sparse_cache, batches, tmp_path) -> None:
    def begun() -> Trainer:
        torch.manual_seed(0)
        return Trainer(find_recipe("relu").make(SETTING._replace(l0=8), {}), 40, "cpu")

    whole, first, second = begun(), begun(), begun()
    for training, numbers in ((whole, range(20)), (first, range(10))):
        for number in numbers:
            training.step(batches[number])
    save_checkpoint(first, tmp_path, 10)
    assert restore_checkpoint(second, tmp_path, pytest.fail) == 10
    for number in range(10, 20):
        second.step(batches[number])
    ours, theirs = training_state(second), training_state(whole)
    assert [n for n in theirs if not torch.equal(ours[n], theirs[n])] == []


def test_the_controller_takes_over_after_a_twentieth_of_the_run() -> None:
    """Twice as many latents as wanted: log 2 exceeds the bound of 1/2, so c is c_w exp(1 + 0.02 a step)."""
    controller = L0Controller(2.0, start_step=2)
    coefficient = controller.take_over("l1", lambda step: 0.1 * (step.i + 1))

    def step(i: int) -> Step:
        f_BF = torch.ones(3, 4)
        return Step(torch.tensor(i), SAE(2, 4), None, torch.zeros(3, 2), f_BF, f_BF, torch.zeros(3, 2))

    found = []
    for i in range(5):
        found.append(float(coefficient(step(i))))
        controller.after_step(step(i))
    moved = [0.3 * torch.tensor(1.0 + 0.02 * n).exp().item() for n in (1, 2)]
    assert found == pytest.approx([0.1, 0.2, 0.3, *moved])
    nothing = controller.take_over("aux", lambda step: torch.zeros(()))  # a penalty of zero can be raised too
    assert float(nothing(step(1))) == 0.0
    assert float(nothing(step(5))) == pytest.approx(1e-6 * torch.tensor(1.0 + 0.02 * 3).exp().item())
    controller = find_recipe("relu").make(SETTING._replace(steps=400, l0=8), {}).mechanisms[0]
    assert isinstance(controller, L0Controller) and (controller.start_step, controller.target) == (20, 8)


def test_l0_is_rejected_where_nothing_sets_it_or_another_option_does(monkeypatch) -> None:
    def bare(run: RunConfig) -> Variant:
        return Variant(SAE(run.d_in, run.d_sae), {"mse": (1.0, MSE())}, dead=DeadLatents(run.d_sae, 1))

    monkeypatch.setattr(registry, "RECIPES", {})
    registry.recipe("bare", paper="none")(bare)
    with pytest.raises(UsageError, match="--l0 has no effect on this recipe: it has no option k or l0 and no sparsity"):
        registry.RECIPES["bare"].make(SETTING._replace(l0=8), {})
    for name, knob in (("topk", "k"), ("jumprelu", "l0")):
        with pytest.raises(UsageError, match=f"--l0 8 and {knob}=4 set the same option: give one"):
            RECIPES[name].make(SETTING._replace(l0=8), {knob: 4})
    for wrong in (0, -1, 129, float("nan")):
        with pytest.raises(UsageError, match="is out of range: give a number above 0 and at most 128"):
            RECIPES["relu"].make(SETTING._replace(l0=wrong), {})
    assert RECIPES["topk"].make(SETTING._replace(l0=128.0), {}).options["k"] == 128  # all latents, as an int
    with pytest.raises(UsageError, match=r"k=8.5 has the wrong type: expected int"):
        RECIPES["topk"].make(SETTING._replace(l0=8.5), {})


def test_a_target_is_missed_by_more_than_a_tenth_on_either_side() -> None:
    last = {"low": 8.9, "near": 9.1, "far": 10.9, "high": 11.1, "free": 30.0}
    targets = {name: None if name == "free" else 10.0 for name in [*last, "failed"]}
    low, high = missed_targets(targets, {name: {"l0": l0} for name, l0 in last.items()})
    assert low.startswith("low ended at L0 8.9, -11% from its target 10.")
    assert high.startswith("high ended at L0 11.1, +11% from its target 10.")


def test_the_command_says_which_run_missed_its_l0(sparse_cache, tmp_path) -> None:
    words = ["train", "--cache", str(sparse_cache.folder), "--layer", "0", "--variant", "relu", "--variant", "topk"]
    words += ["--l0", "4", "--steps", "3", "--batch-size", "64", "--width", "128", "--device", "cpu"]
    said = CliRunner().invoke(app, [*words, "--out", str(tmp_path)])
    assert said.exit_code == 0, said.output
    (note,) = [line for line in said.output.splitlines() if "from its target" in line]
    assert note.startswith("note     relu-")
