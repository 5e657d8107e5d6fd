"""The penalty weighted by row norms (`april`) and its export, and the annealed exponent (`p-anneal`)."""

import pytest
import torch

from sae.common.errors import UsageError
from sae.train.loop import Trainer
from sae.train.mechanisms import UnitNormExport
from sae.train.plan import TrainConfig, plan_training
from sae.train.recipe import find_recipe
from sae.train.run import run_training
from sae.train.sae import fold_normalization, load_sae
from sae.train.variant import RunConfig
from sae.train.variants.april import Lp, PAnnealing, WeightedL1, power_sum


def built(name: str, steps: int = 100, **options: object) -> Trainer:
    torch.manual_seed(0)
    return Trainer(find_recipe(name).make(RunConfig(2, 3, steps, 4), options), steps, "cpu")


def forward(trainer: Trainer, x_BD: torch.Tensor):
    return trainer.variant(trainer.i, x_BD, trainer.optimizer)


def test_the_penalty_weighs_latents_by_their_rows() -> None:
    trainer = built("april")
    sae = trainer.variant.sae
    sae.W_enc.data = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
    sae.W_dec.data = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]])  # norms 5, 2, 1
    step = forward(trainer, torch.tensor([[1.0, 1.0], [0.0, 3.0]]))  # latents 1, 1, 2 and 0, 3, 0
    assert WeightedL1()(step).item() == pytest.approx(((1 * 5 + 1 * 2 + 2 * 1) + 3 * 2) / 2)


def test_the_penalty_is_the_same_when_a_latent_shrinks_and_its_row_grows() -> None:
    trainer, x_BD = built("april"), torch.randn(8, 2)
    before = WeightedL1()(forward(trainer, x_BD))
    trainer.variant.sae.W_enc.data /= 7
    trainer.variant.sae.W_dec.data *= 7
    torch.testing.assert_close(WeightedL1()(forward(trainer, x_BD)), before)


def test_the_coefficient_is_five_in_units_of_the_root_of_d() -> None:
    """For x that is sqrt(d) times as large, the paper's loss is d times this one."""
    torch.manual_seed(0)
    trainer = Trainer(find_recipe("april").make(RunConfig(16, 32, 100, 4), {"l1_warmup": 0}), 100, "cpu")
    sae, x_BD = trainer.variant.sae, torch.randn(4, 16) / 4
    step = forward(trainer, x_BD)
    loss = sum(trainer.variant.losses(step).values())
    f_BF = ((4 * x_BD) @ sae.W_enc).relu()  # biases are zero at the start
    error = (4 * x_BD - f_BF @ sae.W_dec).square().sum(1).mean()
    paper = error + 5 * (f_BF * sae.W_dec.norm(dim=1)).sum(1).mean()
    torch.testing.assert_close(loss, paper / 16)


@pytest.mark.parametrize("name", ["april", "jumprelu-tanh"])
def test_export_makes_unit_rows_and_keeps_the_function(name) -> None:
    torch.manual_seed(0)
    variant = find_recipe(name).make(RunConfig(8, 16, 50, 32), {"lr": 1e-2, "warmup": 0})
    trainer = Trainer(variant, 50, "cpu")
    for _ in range(50):
        trainer.step(torch.randn(32, 8))
    raw = fold_normalization(variant.sae, 3.0, torch.randn(8))
    x_BD = 3 * torch.randn(64, 8)
    norm_F, f_BF, recon_BD = raw.W_dec.norm(dim=1), raw.encode(x_BD), raw(x_BD).recon_BD
    assert norm_F.std() > 0.01  # otherwise the export would change nothing
    with torch.no_grad():
        UnitNormExport().export(raw)
    torch.testing.assert_close(raw.W_dec.norm(dim=1), torch.ones(16))
    torch.testing.assert_close(raw.encode(x_BD), f_BF * norm_F, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(raw(x_BD).recon_BD, recon_BD, rtol=1e-4, atol=1e-5)


def test_the_saved_sae_has_unit_rows(sparse_cache, tmp_path) -> None:
    request = TrainConfig(
        ["april"], layers=[0], caches=[sparse_cache.folder], steps=3, batch_size=64, device="cpu", out=tmp_path
    )
    plan = plan_training(request)
    (run,) = plan.runs
    run_training(plan)
    sae = load_sae(run.folder)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(sae.d_sae))


def exponent(annealing: PAnnealing, i: int) -> float:
    return annealing.p(annealing.changes(torch.tensor(i))).item()


def test_p_is_one_until_the_start_and_ends_where_it_should() -> None:
    annealing = PAnnealing(end=0.5, start=50, stop=100, updates=5, queue=10)
    at = {0: 1.0, 49: 1.0, 50: 0.9, 59: 0.9, 60: 0.8, 75: 0.7, 89: 0.6, 90: 0.5, 99: 0.5, 500: 0.5}
    assert {i: round(exponent(annealing, i), 6) for i in at} == at


def test_p_is_that_of_the_recipe_at_both_ends() -> None:
    trainer = built("p-anneal", steps=100)
    annealing = next(m for m in trainer.variant.mechanisms if isinstance(m, PAnnealing))
    assert exponent(annealing, 0) == exponent(annealing, 29) == 1.0
    assert exponent(annealing, 99) == pytest.approx(0.2)


def test_a_power_sum_by_hand() -> None:
    f_BF = torch.tensor([[4.0, 0.0], [1.0, 9.0]])
    assert power_sum(f_BF, torch.tensor(0.5)).item() == pytest.approx((2 + 1 + 3) / 2, rel=1e-5)
    assert power_sum(f_BF, torch.tensor(1.0)).item() == pytest.approx((4 + 1 + 9) / 2, rel=1e-5)


def test_the_gradient_of_the_penalty_leaves_silent_latents_alone() -> None:
    f_BF = torch.tensor([[0.0, 0.25]], requires_grad=True)
    power_sum(f_BF, torch.tensor(0.5)).backward()
    assert f_BF.grad.tolist()[0] == pytest.approx([0.0, 0.5 * 0.25**-0.5], rel=1e-4)


def test_the_penalty_is_continuous_when_p_changes() -> None:
    """The batch and the weights are the same at every step, so only p and the factor change."""
    trainer, x_BD = built("p-anneal", steps=100, start=0.5), torch.randn(4, 2)
    annealing = next(m for m in trainer.variant.mechanisms if isinstance(m, PAnnealing))
    penalty, values, exponents = Lp(annealing), [], []
    for i in range(100):
        trainer.i.fill_(i)
        with torch.no_grad():
            step = forward(trainer, x_BD)
            values.append(penalty(step).item())
            exponents.append(step.metrics["p"].item())
            annealing.after_step(step)
    assert len(set(exponents)) == 11
    assert values == pytest.approx([values[0]] * 100, rel=1e-4)
    assert annealing.factor.item() != pytest.approx(1.0, abs=0.01)


def test_a_change_weighs_only_batches_since_the_last_one() -> None:
    annealing = PAnnealing(
        end=0.2, start=4, stop=12, updates=4, queue=10
    )  # p changes at 4, 6, 8 and 10, more often than the queue fills
    trainer = built("p-anneal")
    for i in range(6):
        trainer.i.fill_(i)
        with torch.no_grad():
            annealing.after_step(forward(trainer, torch.randn(4, 2)))
    assert not annealing.sums_Q2.any()  # step 5 is the last before a change of p


def test_silent_latents_leave_the_factor_unchanged() -> None:
    trainer = built("p-anneal", steps=10, start=0.0)
    trainer.variant.sae.b_enc.data.fill_(-100.0)
    annealing = next(m for m in trainer.variant.mechanisms if isinstance(m, PAnnealing))
    for i in range(10):
        trainer.i.fill_(i)
        annealing.after_step(forward(trainer, torch.randn(4, 2)))
    assert annealing.factor.item() == 1.0


@pytest.mark.parametrize("wrong", [{"p_end": 0.0}, {"start": 1.0}, {"updates": 0}, {"queue": 0}])
def test_an_invalid_annealing_raises_a_usage_error(wrong) -> None:
    with pytest.raises(UsageError, match=f"invalid {next(iter(wrong))}="):
        built("p-anneal", **wrong)


def test_april_starts_with_short_rows_and_no_pre_bias() -> None:
    sae = built("april").variant.sae
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((3,), 0.1))
    torch.testing.assert_close(sae.W_enc, sae.W_dec.T)
    assert not sae.pre_bias
