"""Competition and temperature of paper 001, by hand-worked numbers."""

import math

import pytest
import torch

from sae.train.activation_functions import ReLU
from sae.train.variants.progressive.competition import ChainL1, CompetitionTemperature, SoftCompetition
from sae.train.variants.progressive.growth import EnabledLatents


def test_temperature_by_density(growing) -> None:
    """(6): T = 0.1 (1 + 0.3 (exp(exp(rho) - 1) - 1))."""
    temper = CompetitionTemperature(SoftCompetition(0.1), growing(4)[1], lambda step: 0.1)
    for rho, expected in ((0.0, 0.1), (0.3, 0.1126), (0.6, 0.1383), (1.0, 0.2372)):
        assert temper.target(torch.tensor(rho), 0.1).item() == pytest.approx(expected, abs=5e-5)


def test_temperature_stays_in_its_bounds_and_its_sign_turns(growing) -> None:
    use = growing(4)[1]
    assert CompetitionTemperature(SoftCompetition(0.1), use, lambda step: 0.1, s=3.0).target(
        torch.tensor(1.0), 0.1
    ).item() == pytest.approx(0.3)
    turned = CompetitionTemperature(SoftCompetition(0.1), use, lambda step: 0.1, sign=-1)
    assert turned.target(torch.tensor(0.3), 0.1).item() == pytest.approx(0.2 - 0.1126, abs=5e-5)
    assert turned.target(torch.tensor(1.0), 0.1).item() == pytest.approx(0.05)


def test_temperature_moves_a_hundredth_of_the_way(step_of, growing) -> None:
    use, competition = growing(4)[1], SoftCompetition(0.1)
    use.rho.fill_(1.0)
    CompetitionTemperature(competition, use, lambda step: 0.1).after_step(step_of(torch.zeros(1, 4)))
    assert competition.T.item() == pytest.approx(0.99 * 0.1 + 0.01 * 0.23718, abs=1e-6)


def test_a_disabled_latent_takes_no_part() -> None:
    """The softmax is over the two enabled latents, so the weights are 1/(1 + e^-2) and its complement."""
    enabled = EnabledLatents(3)
    enabled.on_F[2] = 0
    alpha_F = SoftCompetition(0.5, "softmax")(enabled(torch.tensor([[2.0, 1.0, 9.0]])))[0]
    w = 1 / (1 + math.exp(-2))
    assert alpha_F.tolist() == pytest.approx([2 * w, 1 - w, 0])


def test_competition_by_its_four_weights() -> None:
    """z = (2, 1, 0), T = 1: e^(z - 2) is 1, e^-1, e^-2."""
    z_BF = torch.tensor([[2.0, 1.0, -3.0]])
    a, b = math.exp(-1), math.exp(-2)
    for weights, expected in (
        ("softmax_peak", [2, a, 0]),
        ("softmax", [2 / (1 + a + b), a / (1 + a + b), 0]),
        ("softmax_scaled", [4 / (1 + a + b), 2 * a / (1 + a + b), 0]),
        ("softmax_active_only", [2 / (1 + a), a / (1 + a), 0]),
    ):
        assert SoftCompetition(1.0, weights)(z_BF)[0].tolist() == pytest.approx(expected), weights


@pytest.mark.parametrize("unit", ["input", "rms_z"])
def test_the_winner_keeps_its_value(unit: str) -> None:
    z_BF = torch.randn(32, 50, generator=torch.Generator().manual_seed(0))
    alpha_BF = SoftCompetition(0.1, unit=unit)(z_BF)
    assert torch.equal(alpha_BF.amax(1), z_BF.amax(1))
    assert (alpha_BF <= z_BF.relu()).all()


def test_latents_up_to_the_cut_are_zero() -> None:
    """Before the cut, the second latent is 0.3 e^-1.7 = 0.0548."""
    z_BF = torch.tensor([[2.0, 0.3]])
    assert SoftCompetition(1.0, cut=0.05)(z_BF)[0].tolist() == pytest.approx([2.0, 0.3 * math.exp(-1.7)])
    assert SoftCompetition(1.0, cut=0.06)(z_BF)[0].tolist() == [2.0, 0.0]


@pytest.mark.parametrize("weights", ["softmax_peak", "softmax", "softmax_scaled", "softmax_active_only"])
@pytest.mark.parametrize("unit", ["input", "rms_z"])
def test_rescaling_is_exact_and_silence_stays_silent(weights: str, unit: str) -> None:
    z_BF = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    z_BF[0] = -1
    z_BF.requires_grad_()
    link = SoftCompetition(0.2, weights, unit, cut=0.02)
    alpha_BF = link(z_BF)
    alpha_BF.square().sum().backward()
    assert not alpha_BF[0].any() and torch.isfinite(z_BF.grad).all()
    link.rescale_(4.0)  # a power of two, so scaling is exact
    assert torch.equal(link(4 * z_BF.detach()), 4 * alpha_BF.detach())


@pytest.mark.parametrize("weights", ["softmax_peak", "softmax"])
def test_its_gradient_is_that_of_the_equation(weights: str) -> None:
    """For the softmax, d(w_i z_i)/dz_j is w_i (1 + z_i (1 - w_i)/T) if i = j, and -w_i w_j z_i / T otherwise."""
    z_F = torch.tensor([0.9, 0.4, 0.2], requires_grad=True)
    T = 0.5
    jacobian_FF = torch.autograd.functional.jacobian(lambda z: SoftCompetition(T, weights)(z[None])[0], z_F)
    with torch.no_grad():
        if weights == "softmax":
            w_F = (z_F / T).softmax(0)
            expected = torch.diag(w_F) + torch.diag(w_F * z_F / T) - torch.outer(w_F * z_F / T, w_F)
        else:
            w_F = ((z_F - z_F[0]) / T).exp()
            expected = torch.diag(w_F) + torch.diag(w_F * z_F / T)
            expected[:, 0] -= w_F * z_F / T
    torch.testing.assert_close(jacobian_FF, expected)


def test_chain_l1_leaves_out_what_is_not_enabled(step_of) -> None:
    enabled = EnabledLatents(3)
    enabled.on_F[0] = 0
    pre_BF = torch.tensor([[5.0, 1, -2], [5.0, 2, 4]])
    step = step_of(torch.full_like(pre_BF, torch.nan), pre_BF=pre_BF)  # the loss reads pre-activations
    assert ChainL1(enabled, ReLU())(step).item() == pytest.approx(3.5)


def test_the_temperature_counts_its_moves_and_what_the_competition_moves(step_of, growing) -> None:
    """z = (2, 1), T = 1: the weaker latent keeps e^-1, so 1 - e^-1 of 3 is moved. Disabled latents do not count."""
    enabled, use, _, _ = growing(3)
    enabled.on_F.copy_(torch.tensor([1.0, 1.0, 0.0]))
    temper = CompetitionTemperature(SoftCompetition(1.0), use, lambda step: 0.1, high=9.0)
    pre_BF = torch.tensor([[2.0, 1.0, 50.0]])
    for count in (1, 2):
        temper.competition.T.fill_(1.0)
        temper.after_step(step_of(torch.zeros(1, 3), pre_BF=pre_BF))
        scalars = {name: value.item() for name, value in temper.scalars().items()}
        assert scalars["competed"] == pytest.approx(count * (1 - math.exp(-1)) / 3)
        assert scalars["tempered"] == pytest.approx(count * 0.01 * 0.9, rel=1e-4)
        assert scalars["T"] == pytest.approx(0.991)


def test_a_competition_that_scales_up_is_counted_as_well_and_silence_is_not(step_of, growing) -> None:
    """At a high T, softmax_scaled keeps three equal latents, but divides a single active latent of three by three."""
    _, use, _, _ = growing(3, start=1.0)
    temper = CompetitionTemperature(SoftCompetition(1e6, "softmax_scaled"), use, lambda step: 1e6, high=1e6)
    for pre_F, moved in (([1.0, 1.0, 1.0], 0.0), ([1.0, 0.0, 0.0], 2 / 3), ([-1.0, -1.0, -1.0], 2 / 3)):
        temper.after_step(step_of(torch.zeros(1, 3), pre_BF=torch.tensor([pre_F])))
        assert temper.acted_competed.item() == pytest.approx(moved, abs=1e-5)


def test_what_is_moved_up_does_not_cancel_what_is_moved_down(step_of, growing) -> None:
    """At a low T, softmax_scaled maps (1, 0.5) to (2, 0): 1 up and 0.5 down are 1.5 of a total of 1.5."""
    _, use, _, _ = growing(2, start=1.0)
    temper = CompetitionTemperature(SoftCompetition(0.01, "softmax_scaled"), use, lambda step: 0.1)
    temper.after_step(step_of(torch.zeros(1, 2), pre_BF=torch.tensor([[1.0, 0.5]])))
    assert temper.acted_competed.item() == pytest.approx(1.0)


def test_only_the_first_tokens_are_counted(step_of, growing) -> None:
    _, use, _, _ = growing(2, start=1.0)
    temper = CompetitionTemperature(SoftCompetition(1.0, "softmax"), use, lambda step: 0.1)
    pre_BF = torch.zeros(65, 2)
    pre_BF[64] = 1.0
    temper.after_step(step_of(torch.zeros(65, 2), pre_BF=pre_BF))
    assert temper.acted_competed.item() == 0.0
    pre_BF[63] = 1.0
    temper.after_step(step_of(torch.zeros(65, 2), pre_BF=pre_BF))
    assert temper.acted_competed.item() == pytest.approx(0.5)
