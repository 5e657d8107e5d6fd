"""The papers' constants at other widths and variances, and `--paper-exact`, for every recipe."""

import pytest
import torch

import sae.train.variants  # noqa: F401  (registers the recipes)
from sae.common.errors import UsageError
from sae.train.plan import TrainConfig, plan_training
from sae.train.recipe import RECIPES
from sae.train.run import run_training
from sae.train.scaling import ScaledDefault, ScaleWithNorm, ScaleWithVariance, ScaleWithWidth
from sae.train.variant import RunConfig

from .runs import SETTING, trained_recipe

every_recipe = pytest.mark.parametrize("name", sorted(RECIPES))


PAPERS = sorted(name for name, recipe in RECIPES.items() if recipe.paper in ("000", "001", "002", "003", "004"))


of_the_papers = pytest.mark.parametrize("name", PAPERS)


def test_l0_and_paper_exact_are_part_of_a_runs_identity_only_when_given(sparse_cache, tmp_path) -> None:
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


def test_a_run_is_resumed_with_its_l0_and_paper_exact(sparse_cache, tmp_path) -> None:
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


@of_the_papers
def test_a_papers_recipe_declares_its_exact_settings_with_their_drawbacks(name) -> None:
    letter, options = RECIPES[name].paper_exact, RECIPES[name].options
    assert letter is not None  # {}: the defaults are the paper's
    assert [option for option in letter if option not in options] == []
    for option, (value, why) in letter.items():
        assert value != options[option]
        assert len(why.split()) > 5


@every_recipe
def test_paper_exact_changes_only_what_is_declared_or_scaled(name) -> None:
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
def test_a_paper_exact_run_is_finite_or_stops_by_itself(name, sparse_cache, batches) -> None:
    training = trained_recipe(sparse_cache, RunConfig(32, 512, 12, 64, paper_exact=True), name, batches)
    weights = [w for w in training.variant.sae.state_dict().values() if not torch.isfinite(w).all()]
    assert weights == []  # a step that is not finite changes no weight


def test_set_overrides_paper_exact() -> None:
    variant = RECIPES["competition"].make(SETTING._replace(paper_exact=True), {"reduction": "n", "k": 3})
    assert (variant.options["tau_on"], variant.options["reduction"], variant.options["k"]) == ("lift", "n", 3)
    assert not any("reduction" in note for note in variant.notes)


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


def test_scaled_defaults_are_ordinary_numbers() -> None:
    run = RunConfig(128, 512, 100, 64, variance=6.0)
    assert ScaleWithWidth(1).resolve(run, False) == 1  # at least 1
    assert (ScaleWithWidth(100) + 1, ScaleWithVariance(2.5) * 2, f"{ScaleWithNorm(0.01)}") == (
        101,
        5.0,
        "0.01 at variance 24 of raw input",
    )
    assert ScaleWithVariance(2.5).resolve(run._replace(variance=None), False) == 2.5


def test_a_k_larger_than_the_dictionary_is_scaled_even_if_the_paper_is_exact() -> None:
    """k = 320 at d_in = 2,304 is scaled to k = 18 at d_in = 128.

    A dictionary that has room for the paper's k gets it.
    """
    recipe, narrow = RECIPES["hierarchical-topk320"], RunConfig(128, 128, 100, 64, paper_exact=True)
    variant = recipe.make(narrow, {})
    assert variant.options["k"] == 18 and "hierarchical-topk320: k 320 at d_in 2304 -> 18 at 128" in variant.notes
    assert recipe.make(narrow._replace(d_sae=320), {}).options["k"] == 320
    with pytest.raises(UsageError, match="k=320 is out of range"):
        recipe.make(narrow, {"k": 320})
