"""Properties of every registered recipe: a new one is covered as soon as its file exists."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sae.train.variants  # noqa: F401  (registers the recipes)
from sae.cache.reader import Cache
from sae.common.files import read_json
from sae.train.checkpoint import restore_checkpoint, save_checkpoint, training_state
from sae.train.loop import Trainer
from sae.train.mechanisms import UnitNormDecoder
from sae.train.plan import TrainConfig, TrainPlan, plan_training
from sae.train.recipe import RECIPES, matches_type
from sae.train.run import run_training
from sae.train.sae import fold_normalization, load_sae, save_sae
from sae.train.variant import RunConfig, Variant

from ..recipes import SOME

# Recipes with options that add a component, as "recipe option=value ...".
VARIED = (
    "topk k=4 k_anneal_steps=11 multi=0.125",
    "batchtopk k=2.5 k_anneal_steps=9 k_start=7.5",
    "matryoshka k=4 k_anneal_steps=12",
    "jumprelu-tanh ste_to_input=true",
    "soft-frozen-decoder base=topk k=4 cosine=0.999",
)
EVERY = [*sorted(RECIPES), *VARIED]
QUICK = (*SOME, "topk k=4 k_anneal_steps=11 multi=0.125")  # for tests that take steps; slow tests cover all recipes
every_recipe = pytest.mark.parametrize("name", EVERY)
every_recipe_in_steps = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in EVERY]
)
in_company = pytest.mark.parametrize(
    ("company", "name"),
    [
        *(pytest.param(QUICK, name, id=name) for name in QUICK),
        *(pytest.param(tuple(EVERY), name, id=f"{name} of all", marks=pytest.mark.slow) for name in EVERY),
    ],
)
D_IN, D_SAE, BATCH, STEPS = 32, 512, 64, 12


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    """The names of tensors that differ in a bit, or that only one side has."""
    return [
        n for n in left.keys() | right.keys() if n not in left or n not in right or not torch.equal(left[n], right[n])
    ]


@every_recipe_in_steps
def test_a_whole_run_is_finite_and_rows_stay_unit(name, make_trainer, take) -> None:
    """The run includes warm-ups and decays. Periodic mechanisms act every fourth step."""
    trainer = make_trainer(name, steps=16)
    unit = any(isinstance(mechanism, UnitNormDecoder) for mechanism in trainer.variant.mechanisms)
    sae = trainer.variant.sae
    trained = sae.W_enc if sae.W_enc.requires_grad else sae.W_dec
    before = trained.detach().clone()
    for number in take(trainer, range(16)):
        if unit:
            norms_F = trainer.variant.sae.W_dec.norm(dim=1)
            assert (norms_F - 1).abs().max() < 1e-6, f"after step {number}"
    assert int(trainer.failed_at) == -1
    assert [n for n, t in training_state(trainer).items() if not torch.isfinite(t).all()] == []
    assert all(value == value for value in trainer.pop_metrics().values())
    assert not torch.equal(before, trained)


@every_recipe
def test_unit_norm_comes_last(name, make_variant) -> None:
    order = [isinstance(mechanism, UnitNormDecoder) for mechanism in make_variant(name).mechanisms]
    assert True not in order[:-1]


@every_recipe_in_steps
def test_resume_is_exact(name, make_trainer, take, tmp_path: Path) -> None:
    """Ten steps, a checkpoint, and six more steps of new objects under another random state equal 16 steps.

    A test below shows that a checkpoint changes nothing in the run that writes it: a run alone writes its checkpoints
    at other steps than a run in company.
    """
    whole = make_trainer(name)
    list(take(whole, range(10)))
    save_checkpoint(whole, tmp_path, 10)
    saved = {name: tensor.clone() for name, tensor in training_state(whole).items()}
    list(take(whole, range(10, 16)))
    second = make_trainer(name)
    torch.manual_seed(2)
    assert restore_checkpoint(second, tmp_path, pytest.fail) == 10
    assert same(training_state(second), saved) == []
    list(take(second, range(10, 16)))
    assert same(training_state(whole), training_state(second)) == []


@pytest.fixture(scope="module")
def kept() -> dict[str, Trainer]:
    return {}


@pytest.fixture
def trained(name: str, kept: dict[str, Trainer], make_trainer, take) -> Variant:
    """The recipe after ten steps on centered rows, trained once for all tests that only read it."""
    if name not in kept:
        kept[name] = make_trainer(name, center=True)
        list(take(kept[name], range(10)))
    variant = kept[name].variant
    variant.sae.train()
    return variant


@every_recipe_in_steps
def test_the_saved_sae_does_to_raw_rows_what_training_did_to_normalized_ones(
    name, trained, batches, tmp_path: Path
) -> None:
    variant = trained
    save_sae(fold_normalization(variant.sae, float(variant.scale), variant.mean_D), tmp_path, {})
    loaded, own = load_sae(tmp_path), variant.sae.eval()
    x_BD = batches[20].float()
    with torch.no_grad():
        f_BF = own.encode((x_BD - variant.mean_D) / variant.scale)
        x_hat_BD = own.decode(f_BF)
        torch.testing.assert_close(loaded.encode(x_BD), variant.scale * f_BF, rtol=1e-4, atol=1e-4)
        expected = variant.scale * x_hat_BD + variant.mean_D
        torch.testing.assert_close(loaded.decode(variant.scale * f_BF), expected, rtol=1e-4, atol=1e-4)
    assert variant.scale > 3  # otherwise the test would pass without folding


@every_recipe_in_steps
def test_save_and_load_keep_every_bit(name, trained, batches, tmp_path: Path) -> None:
    raw = fold_normalization(trained.sae, float(trained.scale), trained.mean_D)
    save_sae(raw, tmp_path, {"layer": 0})
    loaded, x_BD = load_sae(tmp_path), batches[20].float()
    with torch.no_grad():
        assert torch.equal(loaded.encode(x_BD), raw.encode(x_BD))
        assert torch.equal(loaded.decode(raw.encode(x_BD)), raw.decode(raw.encode(x_BD)))
    assert same(loaded.state_dict(), raw.state_dict()) == []
    assert loaded.origin == {"layer": 0}


@every_recipe_in_steps
def test_after_training_a_token_is_encoded_by_itself(name, trained, batches) -> None:
    sae, x_BD = trained.sae.eval(), batches[20].float()
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(x_BD)[:3], sae.encode(x_BD[:3]), rtol=1e-5, atol=1e-5)


@every_recipe_in_steps
def test_a_step_reads_nothing_back_to_the_host(name, make) -> None:
    """Under FakeTensorMode tensors have no values: `.item()`, `nonzero` and shapes that depend on data raise."""
    with FakeTensorMode():
        variant = make(name, RunConfig(D_IN, D_SAE, 100, BATCH))
        variant.dead.index_A, variant.dead.real_A = torch.arange(D_SAE), torch.ones(D_SAE)  # AuxK has work to do
        trainer = Trainer(variant, 100, "cpu")
        for _ in range(2):
            trainer.step(torch.randn(BATCH, D_IN, dtype=torch.bfloat16))


@every_recipe
def test_options_are_checked_without_allocating(name, make) -> None:
    with torch.device("meta"):
        variant = make(name, RunConfig(2304, 2**14, 1000, 2048))
    assert variant.sae.W_dec.is_meta


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_defaults_are_of_the_type_they_are_annotated_with(name) -> None:
    kinds = RECIPES[name].option_types()
    assert [k for k, default in RECIPES[name].options.items() if not matches_type(default, kinds[k])] == []
    assert RECIPES[name].summary and RECIPES[name].paper


def make_config(name: str, cache: Cache, out: Path, **other: int) -> TrainConfig:
    """The config of a short run."""
    name, *options = name.split()
    sizes = {"steps": STEPS, "batch_size": BATCH, "width": "16x"}
    return TrainConfig(
        [name], layers=[0], caches=[cache.folder], device="cpu", out=out, options=options, **sizes, **other
    )


@pytest.fixture(scope="module")
def together(sparse_cache, tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, ...]], dict[str, Path]]:
    """A function that trains recipes together with run_training, once, and returns their run folders."""

    @functools.cache
    def train(names: tuple[str, ...]) -> dict[str, Path]:
        out = tmp_path_factory.mktemp("together")
        requests = [make_config(name, sparse_cache, out, checkpoint_every=6) for name in names]
        runs = [run for config in requests for run in plan_training(config).runs]
        run_training(TrainPlan(requests[0], runs))
        return {name: run.folder for name, run in zip(names, runs, strict=True)}

    return train


@in_company
def test_a_variant_trained_with_others_is_what_it_is_alone(
    company, name, together, sparse_cache, tmp_path: Path
) -> None:
    config = make_config(name, sparse_cache, tmp_path)
    plan = plan_training(config)
    (run,) = plan.runs
    run_training(plan)
    for file in ("sae.safetensors", f"checkpoints/step-{STEPS:08d}/state.safetensors"):
        assert (run.folder / file).read_bytes() == (together(company)[name] / file).read_bytes(), file


@in_company
def test_a_killed_run_resumes_from_its_checkpoint(company, name, together, sparse_cache, tmp_path: Path) -> None:
    """A run folder as left by a kill after step 6, and the same command again."""
    folder = tmp_path / together(company)[name].name
    shutil.copytree(together(company)[name], folder)
    (folder / "sae.json").unlink()
    (folder / "sae.safetensors").unlink()
    shutil.rmtree(folder / "checkpoints" / f"step-{STEPS:08d}")
    config = make_config(name, sparse_cache, tmp_path)
    plan = plan_training(config)
    assert [run.folder for run in plan.runs] == [folder]
    run_training(plan)
    assert (folder / "sae.safetensors").read_bytes() == (together(company)[name] / "sae.safetensors").read_bytes()
    assert read_json(folder / "sae.json") == read_json(together(company)[name] / "sae.json")
