"""`--l0`, `--paper-exact`, and the papers' constants at other widths: what holds for every recipe."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sae.train.variants  # noqa: F401  (registers the recipes)
from sae.common.errors import UsageError
from sae.train import recipe as registry
from sae.train.checkpoint import restore_checkpoint, save_checkpoint, training_state
from sae.train.l0_control import L0Controller
from sae.train.loop import Trainer
from sae.train.losses import MSE
from sae.train.mechanisms import DeadLatents
from sae.train.plan import TrainConfig, plan_training
from sae.train.recipe import RECIPES, find_recipe
from sae.train.run import run_training
from sae.train.sae import SAE
from sae.train.scaling import ScaledDefault, ScaleWithNorm, ScaleWithVariance, ScaleWithWidth
from sae.train.step import Step
from sae.train.variant import RunConfig, Variant

every_recipe = pytest.mark.parametrize("name", sorted(RECIPES))
PAPERS = sorted(name for name, recipe in RECIPES.items() if recipe.paper in ("000", "001", "002", "003", "004"))
of_the_papers = pytest.mark.parametrize("name", PAPERS)
SETTING = RunConfig(32, 128, 40, 64)


def trained(cache, setting: RunConfig, name: str, batches: list[torch.Tensor], **options: object) -> Trainer:
    torch.manual_seed(0)
    variant = find_recipe(name).make(setting, options)
    mean_D = torch.from_numpy(cache.mean("layer_00")).float()
    variant.set_normalization(mean_D, cache.statistics("layer_00")["mean_square_norm"])
    training = Trainer(variant, setting.steps, "cpu")
    for number in range(setting.steps):
        training.run_periodic(number, training.step(batches[number % len(batches)]))
        if number == setting.steps * 9 // 10:
            training.pop_metrics()
    return training


# --- l0 -------------------------------------------------------------------------------------------------------------


@every_recipe
def test_l0_is_a_knob_of_every_recipe_and_turns_the_right_way(name, sparse_cache, batches) -> None:
    few, many = (
        trained(sparse_cache, SETTING._replace(l0=n), name, batches, lr=3e-3, warmup=0).pop_metrics() for n in (4, 48)
    )
    assert few["l0"] < many["l0"]


@pytest.mark.parametrize(
    "name",
    [
        "topk", "batchtopk", "switch", "competition",  # k
        "jumprelu", "collapse-04", "collapse-10",  # l0
        # with a penalty
        "relu", "april", "p-anneal", "gated", "jumprelu-step", "jumprelu-tanh", "progressive", "hierarchical",
    ],
)  # fmt: skip
def test_a_run_ends_at_the_l0_that_was_asked_for(name, sparse_cache, batches) -> None:
    setting = SETTING._replace(steps=400, l0=8)
    training = trained(sparse_cache, setting, name, batches, lr=2e-3)
    assert training.pop_metrics()["l0"] == pytest.approx(8, rel=0.1)


@every_recipe
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


def test_the_recipe_has_its_coefficient_for_a_twentieth_of_the_run_and_the_target_from_then_on() -> None:
    """Twice as many latents as wanted: log 2 is over the bound of 1/2, so c is c_w exp(1 + 0.02 a step)."""
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


def test_l0_is_refused_where_nothing_sets_it_or_something_else_does(monkeypatch) -> None:
    def bare(run: RunConfig) -> Variant:
        return Variant(SAE(run.d_in, run.d_sae), {"mse": (1.0, MSE())}, dead=DeadLatents(run.d_sae, 1))

    monkeypatch.setattr(registry, "RECIPES", {})
    registry.recipe("bare", paper="none")(bare)
    with pytest.raises(UsageError, match="--l0 has nothing to act on: no option k or l0, and no sparsity"):
        registry.RECIPES["bare"].make(SETTING._replace(l0=8), {})
    for name, knob in (("topk", "k"), ("jumprelu", "l0")):
        with pytest.raises(UsageError, match=f"--l0 8 and {knob}=4 set the same: give one"):
            RECIPES[name].make(SETTING._replace(l0=8), {knob: 4})
    for wrong in (0, -1, 129, float("nan")):
        with pytest.raises(UsageError, match="is out of range: give a number above 0 and at most 128"):
            RECIPES["relu"].make(SETTING._replace(l0=wrong), {})
    with pytest.raises(UsageError, match=r"k=8.5 has the wrong type: expected int"):
        RECIPES["topk"].make(SETTING._replace(l0=8.5), {})


def test_l0_and_literal_are_part_of_a_run_only_when_given(sparse_cache, tmp_path) -> None:
    def runs(**knobs: object) -> list:
        return plan_training(
            TrainConfig(["relu"], layers=[0], caches=[sparse_cache.folder], steps=10, batch_size=64, **knobs)
        ).runs

    (plain,) = runs()
    assert not {"l0", "literal"} & plain.identity().keys()
    few, many = runs(l0=[4, 16.5])
    assert (few.identity()["l0"], many.identity()["l0"]) == (4, 16.5)
    (literal,) = runs(paper_exact=True)
    assert literal.identity()["literal"] is True
    names = [run.default_name().rpartition("-")[0] for run in (plain, few, many, literal)]
    assert names == ["relu-L00-n32-s0", "relu-L00-n32-l0_4-s0", "relu-L00-n32-l0_16.5-s0", "relu-L00-n32-literal-s0"]


def test_a_run_with_knobs_is_resumed_with_them(sparse_cache, tmp_path) -> None:
    asked = TrainConfig(
        ["competition"], layers=[0], caches=[sparse_cache.folder], steps=4, batch_size=64, l0=[8], paper_exact=True,
        device="cpu", out=tmp_path,
    )  # fmt: skip
    plan = plan_training(asked)
    (run,) = plan.runs
    run_training(plan)
    (again,) = plan_training(TrainConfig(resume=[run.folder])).runs
    assert again.config == run.config and again.config.l0 == 8 and again.config.paper_exact
    with pytest.raises(UsageError, match="--l0, --paper-exact cannot be changed once a run has started"):
        plan_training(TrainConfig(resume=[run.folder], l0=[8], paper_exact=True))


# --- literal --------------------------------------------------------------------------------------------------------


@of_the_papers
def test_a_papers_recipe_declares_its_letter_with_reasons(name) -> None:
    letter, options = RECIPES[name].paper_exact, RECIPES[name].options
    assert letter is not None  # {}: the defaults are the letter
    assert [option for option in letter if option not in options] == []
    for option, (value, why) in letter.items():
        assert value != options[option]
        assert len(why.split()) > 5


@every_recipe
def test_literal_changes_what_is_declared_and_what_is_scaled_and_nothing_else(name) -> None:
    recipe, setting = RECIPES[name], RunConfig(32, 512, 100, 64, variance=6.0)
    ours, literal = recipe.make(setting, {}), recipe.make(setting._replace(paper_exact=True), {})
    changed = {option: value for option, value in literal.options.items() if value != ours.options[option]}
    declared = {option: value for option, (value, _) in (recipe.paper_exact or {}).items()}
    raw = {option: value for option, value in recipe.options.items() if isinstance(value, ScaledDefault)}
    assert {o: v for o, v in changed.items() if o not in raw} == {o: v for o, v in declared.items() if o not in raw}
    assert {o: literal.options[o] for o in raw} == {o: declared.get(o, v) for o, v in raw.items()}
    warned = [note for note in literal.notes if " as in the paper: " in note]
    assert len(warned) == len(declared)
    assert literal.notes


@of_the_papers
def test_a_literal_run_is_finite_or_stops_by_itself(name, sparse_cache, batches) -> None:
    training = trained(sparse_cache, RunConfig(32, 512, 12, 64, paper_exact=True), name, batches)
    weights = [w for w in training.variant.sae.state_dict().values() if not torch.isfinite(w).all()]
    assert weights == []  # a step that is not finite moves nothing


def test_what_is_set_overrides_the_letter() -> None:
    variant = RECIPES["competition"].make(SETTING._replace(paper_exact=True), {"reduction": "n", "k": 3})
    assert (variant.options["tau_on"], variant.options["reduction"], variant.options["k"]) == ("lift", "n", 3)
    assert not any("reduction" in note for note in variant.notes)


# --- scaling --------------------------------------------------------------------------------------------------------


def test_the_papers_numbers_at_other_sizes() -> None:
    narrow = RunConfig(128, 512, 100, 64, variance=6.0)
    variant = RECIPES["hierarchical-topk320"].make(narrow, {})
    assert variant.options["k"] == 18
    assert variant.notes == ["hierarchical-topk320: k 320 at d_in 2304 -> 18 at 128"]
    assert RECIPES["progressive"].make(narrow, {}).notes == ["progressive: pace 1 at d_sae 2304 -> 0.222 at 512"]
    assert RECIPES["hierarchical"].make(narrow, {}).notes == ["hierarchical: target 2.5 at variance 24 -> 0.625 at 6"]
    with torch.device("meta"):
        home = RECIPES["collapse-10"].make(RunConfig(2304, 2304, 4882, 2048, variance=24.0), {})
    assert home.notes == [] and home.options["jl_dim"] == 128


def test_a_length_is_scaled_where_the_input_is_raw() -> None:
    narrow = RunConfig(128, 512, 100, 64, variance=6.0)
    raw = RECIPES["progressive"].make(narrow, {"normalize": "none"})
    assert (raw.options["cut"], raw.options["temperature"]) == pytest.approx((0.005, 0.05))
    assert RECIPES["progressive"].make(narrow, {}).options["cut"] == 0.01


def test_numbers_that_follow_the_run_are_plain_numbers_to_everybody_else() -> None:
    run = RunConfig(128, 512, 100, 64, variance=6.0)
    assert ScaleWithWidth(1).resolve(run, False) == 1  # of anything there is one at least
    assert (ScaleWithWidth(100) + 1, ScaleWithVariance(2.5) * 2, f"{ScaleWithNorm(0.01)}") == (
        101,
        5.0,
        "0.01 at variance 24",
    )
    assert ScaleWithVariance(2.5).resolve(run._replace(variance=None), False) == 2.5
