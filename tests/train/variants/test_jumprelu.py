"""JumpReLU's surrogate gradients agree with loops over their definition, and its penalties with values by hand."""

import pytest
import torch

from sae.train.loop import Trainer
from sae.train.recipe import find_recipe
from sae.train.sae import fold_normalization, load_sae, save_sae
from sae.train.variant import RunConfig
from sae.train.variants.jumprelu import L0, JumpReLU, NonNegativeThreshold, PreActLoss, Tanh, TargetL0

EPS = 0.5


@pytest.fixture
def activation() -> JumpReLU:
    activation = JumpReLU(3, EPS)
    activation.threshold.data = torch.tensor([0.5, 1.0, 2.0])
    return activation


def built(name: str, d_in: int = 8, d_sae: int = 16, steps: int = 200, **options: object) -> Trainer:
    torch.manual_seed(0)
    return Trainer(find_recipe(name).make(RunConfig(d_in, d_sae, steps, 32), options), steps, "cpu")


def with_axes(name: str, activation_threshold: list[float], **options: object) -> Trainer:
    """d_in = d_sae = 3, and W_enc is the identity, so z = x."""
    trainer = built(name, 3, 3, **options)
    sae = trainer.variant.sae
    sae.W_enc.data, sae.W_dec.data = torch.eye(3), torch.diag(torch.tensor([1.0, 2.0, 0.5]))
    sae.activation[0].threshold.data = torch.tensor(activation_threshold)
    return trainer


def test_what_exceeds_its_threshold_passes_unchanged(activation) -> None:
    z_BF = torch.tensor([[0.4, 1.5, 2.0], [0.6, -3.0, 2.5]])
    assert activation(z_BF).tolist() == [[0.0, 1.5, 0.0], [pytest.approx(0.6), 0.0, 2.5]]
    assert activation.fires(z_BF).tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]


def test_surrogates_are_their_definition(activation) -> None:
    torch.manual_seed(0)
    z_BF, out_BF = 2 * torch.rand(64, 3), torch.randn(64, 3)
    z_BF.requires_grad_()
    theta_F = activation.threshold.detach()
    of_f, of_count, to_z = torch.zeros(3), torch.zeros(3), torch.zeros(64, 3)
    for b in range(64):
        for i in range(3):
            u = (z_BF[b, i].item() - theta_F[i].item()) / EPS
            kernel = 1.0 if abs(u) < 0.5 else 0.0
            of_f[i] -= theta_F[i] / EPS * kernel * out_BF[b, i]
            of_count[i] -= kernel / EPS * out_BF[b, i]
            to_z[b, i] = out_BF[b, i] if z_BF[b, i] > theta_F[i] else 0.0
    assert of_f.all() and of_count.all()  # some z lies near every threshold
    gradients = torch.autograd.grad(activation(z_BF), (z_BF, activation.threshold), out_BF)
    torch.testing.assert_close(gradients, (to_z, of_f))
    count, *none = torch.autograd.grad(activation.fires(z_BF), (activation.threshold, z_BF), out_BF, allow_unused=True)
    torch.testing.assert_close(count, of_count)
    assert none == [None]  # counts have no gradient with respect to z


def test_with_ste_to_input_a_pre_activation_gets_what_its_threshold_loses(activation) -> None:
    """Within eps/2 of theta = 1, dtheta is -2, and dz is 1 + theta/eps = 3 at z = 1.1 and 2 at 0.9; else 1 or 0."""
    z_BF = torch.tensor([[9.0, 1.1, 0.0], [9.0, 0.9, 9.0]], requires_grad=True)
    activation.ste_to_input = True
    to_z_BF, to_theta_F = torch.autograd.grad(activation(z_BF).sum(), (z_BF, activation.threshold))
    assert to_z_BF.tolist() == [[1.0, 3.0, 0.0], [1.0, 2.0, 1.0]]
    assert to_theta_F.tolist() == [0.0, -4.0, 0.0]


def test_any_leading_shape(activation) -> None:
    z = torch.rand(4, 5, 3, requires_grad=True)
    activation(z).sum().backward()
    there = activation.threshold.grad.clone()
    activation.threshold.grad = None
    activation(z.detach().flatten(0, 1)).sum().backward()
    torch.testing.assert_close(there, activation.threshold.grad)


def test_a_threshold_gets_its_gradient_in_float32_from_bfloat16_products(activation) -> None:
    z_BF = torch.tensor([[0.5, 1.0, 2.0]], dtype=torch.bfloat16, requires_grad=True)
    f_BF = activation(z_BF)
    f_BF.backward(torch.full_like(f_BF, 1 + 2**-7))
    assert f_BF.dtype == z_BF.grad.dtype == torch.bfloat16 and activation.threshold.grad.dtype == torch.float32
    torch.testing.assert_close(activation.threshold.grad, -activation.threshold.detach() / EPS * (1 + 2**-7))


def test_a_threshold_moves_at_a_rate_that_bfloat16_would_swallow(tmp_path) -> None:
    """One Adam step moves a threshold of 0.1 by 7e-5. Half a unit in the last place of bfloat16 is 2.4e-4 there."""
    trainer = built("jumprelu", l0=2, threshold=0.1, bandwidth=2.0, lr=7e-5, warmup=0)
    trainer.step(torch.randn(32, 8))
    threshold = trainer.variant.sae.activation[0].threshold
    moved_F = (threshold.detach() - 0.1).abs()
    assert threshold.dtype == torch.float32
    torch.testing.assert_close(moved_F, torch.full((16,), 7e-5), rtol=0.01, atol=0)
    assert torch.equal(threshold.detach().bfloat16(), torch.full((16,), 0.1).bfloat16())
    save_sae(fold_normalization(trainer.variant.sae, 1.0, torch.zeros(8)), tmp_path, {})
    assert torch.equal(load_sae(tmp_path).activation[0].threshold, threshold)


def test_penalties_by_hand() -> None:
    trainer = with_axes("jumprelu", [0.5, 1.0, 2.0])
    activation = trainer.variant.sae.activation[0]
    step = trainer.variant(trainer.i, torch.tensor([[1.0, 1.5, 0.5], [0.25, 3.0, 0.0]]), trainer.optimizer)
    # latents 0 and 1 fire on token 0, latent 1 on token 1; rows have norms 1, 2 and 0.5
    assert L0(activation)(step).item() == pytest.approx(3 / 2)
    assert TargetL0(activation, 1.0)(step).item() == pytest.approx(0.25)
    tanh = torch.tensor([0.5 * 1.0, 0.5 * 3.0, 0.5 * 6.0]).tanh().sum() / 2
    assert Tanh(0.5)(step).item() == pytest.approx(tanh.item())
    # below the thresholds are latent 2 by 1.5 on token 0, and latents 0 and 2 by 0.25 and 2 on token 1
    assert PreActLoss(activation)(step).item() == pytest.approx((1.5 * 0.5 + 0.25 * 1 + 2.0 * 0.5) / 2)


def test_tanh_is_the_papers_objective_in_its_units() -> None:
    """For x that is sqrt(d) times as large, the paper's loss is d times this one."""
    trainer = built("jumprelu-tanh", d_in=16, d_sae=32, steps=1)
    sae, x_BD = trainer.variant.sae, torch.randn(64, 16) / 4
    loss = sum(trainer.variant.losses(trainer.variant(trainer.i, x_BD, trainer.optimizer)).values())
    x_BD, theta, norm_F = 4 * x_BD, 0.1, sae.W_dec.norm(dim=1)
    z_BF = x_BD @ sae.W_enc
    f_BF = z_BF * (z_BF > theta)
    error = (x_BD - f_BF @ sae.W_dec).square().sum(1).mean()
    tanh = (4 * f_BF * norm_F).tanh().sum(1).mean()
    reach = ((theta - z_BF).relu() * norm_F).sum(1).mean()
    torch.testing.assert_close(loss, (error + 20 * tanh + 3e-6 * reach) / 16)


def test_thresholds_stay_at_zero_or_above(activation) -> None:
    activation.threshold.data = torch.tensor([-1.0, 0.0, 2.0])
    trainer = built("jumprelu")
    with torch.no_grad():
        NonNegativeThreshold(activation).after_step(trainer.variant(trainer.i, torch.randn(2, 8), trainer.optimizer))
    assert activation.threshold.tolist() == [0.0, 0.0, 2.0]


@pytest.mark.parametrize("threshold", [0.03, 1.5])
def test_the_target_is_approached_from_both_sides(threshold) -> None:
    """At first, half or one in fifteen of the latents fire. Under a strong penalty, about 4 of 16 fire in the end."""
    options = {"l0": 4, "penalty": 100.0, "bandwidth": 0.5, "lr": 1e-2, "warmup": 0}
    trainer = built("jumprelu", steps=300, threshold=threshold, **options)
    torch.manual_seed(1)
    for number in range(300):
        trainer.step(torch.randn(64, 8))
        if number == 0:
            first = trainer.pop_metrics()["l0"]
        if number == 250:
            trainer.pop_metrics()
    assert (first > 6) if threshold < 1 else (first < 2)
    assert trainer.pop_metrics()["l0"] == pytest.approx(4, rel=0.1)


def test_thresholds_scale_with_the_input() -> None:
    trainer = with_axes("jumprelu", [0.5, 1.0, 2.0])
    raw, x_BD = fold_normalization(trainer.variant.sae, 5.0, torch.zeros(3)), 10 * torch.rand(64, 3)
    assert raw.activation[0].threshold.tolist() == [2.5, 5.0, 10.0]
    torch.testing.assert_close(raw.encode(x_BD), 5 * trainer.variant.sae.encode(x_BD / 5))


@pytest.mark.parametrize("name", ["jumprelu-step", "jumprelu-tanh", "jumprelu"])
def test_with_l0_a_short_run_moves_thresholds_as_far_as_a_long_one(name: str) -> None:
    """A hundred steps of 7e-4 move a threshold by at most 0.07. Updates are ten times as large to allow for 0.7."""
    moved = {}
    for l0 in (None, 3):
        torch.manual_seed(0)
        options = {"lr": 7e-4, "warmup": 0, "decay_start": 1.0, "threshold": 0.5, "bandwidth": 2.0}
        variant = find_recipe(name).make(RunConfig(8, 64, 100, 32, l0=l0), options)
        trainer = Trainer(variant, 100, "cpu")
        threshold, before_F = variant.sae.activation[0].threshold, variant.sae.activation[0].threshold.detach().clone()
        trainer.step(torch.randn(32, 8))
        moved[l0] = (threshold.detach() - before_F).abs()
    assert moved[None].max().item() == pytest.approx(7e-4, rel=1e-3)  # Adam's first step is the learning rate
    torch.testing.assert_close(moved[3][moved[None] > 6e-4], 10 * moved[None][moved[None] > 6e-4], rtol=1e-3, atol=1e-6)
