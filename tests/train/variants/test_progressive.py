"""Paper 001: growth, competition and temperature, by hand-worked numbers."""

import math

import pytest
import torch

from sae.common.errors import UsageError
from sae.train.activation_functions import Activation, ReLU
from sae.train.loop import Trainer
from sae.train.mechanisms import DeadLatents
from sae.train.recipe import RECIPES, find_recipe
from sae.train.sae import SAE
from sae.train.step import Step
from sae.train.variant import RunConfig
from sae.train.variants.progressive import (
    ChainL1,
    CompetitionTemperature,
    EnabledLatents,
    EnabledUtilization,
    GrowCapacity,
    SoftCompetition,
)


def step_of(f_BF: torch.Tensor, i: int = 0, pre_BF: torch.Tensor | None = None) -> Step:
    """A step with these latents. Pre-activations that are not given are NaN, so that nothing can read them instead."""
    sae = SAE(1, f_BF.shape[1])
    x_BD = torch.zeros(len(f_BF), 1)
    if pre_BF is None:
        pre_BF = torch.full_like(f_BF, torch.nan)
    return Step(torch.tensor(i), sae, torch.optim.AdamW(sae.parameters()), x_BD, pre_BF, f_BF, x_BD)


def growing(d_sae: int, start: float = 0.25, reading: str = "alive_fraction", beta: float = 0.9, **options: object):
    enabled, dead = EnabledLatents(d_sae), DeadLatents(d_sae, 100)
    use = EnabledUtilization(enabled, beta, 0.01, reading)
    return enabled, use, dead, GrowCapacity(enabled, use, dead, start, **options)


@pytest.fixture
def trained() -> Trainer:
    """`progressive`, ready to take steps on 64 rows of width 32; a latent more every second step, from 16 on."""
    torch.manual_seed(0)
    find_recipe("progressive")
    options = {"interval": 2, "pace": 0.2, "hybrid": False, "lr": 1e-2, "warmup": 0}
    return Trainer(RECIPES["progressive"].make(RunConfig(32, 64, 100, 64), options), 100, "cpu")


def rows(seed: int, count: int = 64) -> torch.Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed)) / 32**0.5


def test_temperature_by_density() -> None:
    """(6): T = 0.1 (1 + 0.3 (exp(exp(rho) - 1) - 1))."""
    temper = CompetitionTemperature(SoftCompetition(0.1), growing(4)[1], lambda step: 0.1)
    for rho, expected in ((0.0, 0.1), (0.3, 0.1126), (0.6, 0.1383), (1.0, 0.2372)):
        assert temper.target(torch.tensor(rho), 0.1).item() == pytest.approx(expected, abs=5e-5)


def test_temperature_stays_in_its_bounds_and_its_sign_turns() -> None:
    use = growing(4)[1]
    assert CompetitionTemperature(SoftCompetition(0.1), use, lambda step: 0.1, s=3.0).target(
        torch.tensor(1.0), 0.1
    ).item() == pytest.approx(0.3)
    turned = CompetitionTemperature(SoftCompetition(0.1), use, lambda step: 0.1, sign=-1)
    assert turned.target(torch.tensor(0.3), 0.1).item() == pytest.approx(0.2 - 0.1126, abs=5e-5)
    assert turned.target(torch.tensor(1.0), 0.1).item() == pytest.approx(0.05)


def test_temperature_moves_a_hundredth_of_the_way() -> None:
    use, competition = growing(4)[1], SoftCompetition(0.1)
    use.rho.fill_(1.0)
    CompetitionTemperature(competition, use, lambda step: 0.1).after_step(step_of(torch.zeros(1, 4)))
    assert competition.T.item() == pytest.approx(0.99 * 0.1 + 0.01 * 0.23718, abs=1e-6)


def test_annealing_ends_at_the_base_after_its_steps() -> None:
    variant = find_recipe("progressive").make(
        RunConfig(32, 64, 5000, 64), {"anneal_steps": 2000, "competition": "softmax"}
    )
    (temper,) = (m for m in variant.mechanisms if isinstance(m, CompetitionTemperature))
    f_BF = torch.zeros(1, 64)
    bases = [float(temper.base(step_of(f_BF, i))) for i in (0, 1000, 2000, 4000)]
    assert bases == pytest.approx([0.3, 0.2, 0.1, 0.1])
    assert temper.competition.T.item() == pytest.approx(0.3)


def test_increments_are_5_7_and_10_at_the_papers_width() -> None:
    grow = growing(2304, n_ref=None)[3]
    rho = torch.tensor([0.0, 0.29, 0.3, 0.59, 0.6, 1.0])
    assert grow.increment(rho).tolist() == [5, 5, 7, 7, 10, 10]
    assert growing(2304, n_ref=None, hybrid=False)[3].increment(rho).tolist() == [5] * 6


def test_increments_adapt_around_a_hundred() -> None:
    """floor(0.1 * 40 * 0.5) = 2, floor(0.1 * 100 * 0.4) = 4, floor(0.15 * 40 * 0.7) = 4."""
    assert growing(4, n_ref=40)[3].increment(torch.tensor([0.5, 0.7])).tolist() == [2, 4]
    assert growing(4, n_ref=100)[3].increment(torch.tensor([0.4, 0.62])).tolist() == [4, 9]


@pytest.mark.parametrize(("rho", "steps"), [(0.1, 346), (0.4, 247), (0.9, 173)])
def test_all_2304_are_enabled_after(rho: float, steps: int) -> None:
    enabled, use, _, grow = growing(2304, n_ref=None, interval=1)
    assert enabled.on_F.sum() == 576
    use.rho.fill_(rho)
    step = step_of(torch.zeros(1, 2304))
    taken = 0
    while enabled.on_F.sum() < 2304:
        grow.after_backward(step)
        grow.after_step(step)
        taken += 1
    assert taken == steps


def test_growth_waits_for_its_interval_and_keeps_fractions() -> None:
    """Five at 2304 is 5/36 at 64: 16 at first, 17 after eight increments, 18 after fifteen."""
    enabled, _, _, grow = growing(64, hybrid=False, interval=3, pace=64 / 2304)
    counts = []
    for i in range(45):
        step = step_of(torch.zeros(1, 64), i)
        grow.after_backward(step)
        grow.after_step(step)
        counts.append(int(enabled.on_F.sum()))
    assert counts[22] == 16 and counts[23] == 17 and counts[43] == 17 and counts[44] == 18


def test_the_latent_that_would_fire_most_is_enabled_first() -> None:
    enabled, _, _, grow = growing(8, hybrid=False, pace=0.2, interval=1, order="importance")
    pre_BF = torch.tensor([[1.0, 1, -1, -1, -1, 2, -1, -1], [1.0, 1, -1, 3, -1, 2, -1, -1]])
    for expected in ([0, 1, 5], [0, 1, 3, 5]):
        step = step_of(pre_BF.relu() * enabled.on_F, 0, pre_BF)
        grow.after_backward(step)
        grow.after_step(step)
        assert enabled.on_F.nonzero().flatten().tolist() == expected


def test_utilization_by_its_three_readings() -> None:
    """Of four tokens, latents 0 and 1 fire on two and one; 2 fires below tau; 3 is not enabled."""
    f_BF = torch.tensor([[1.0, 1, 0.005, 0], [1.0, 0, 0, 0], [0.0, 0, 0, 0], [0.0, 0, 0, 0]])
    for reading, rho in (("mean", (0.5 + 0.25) / 3), ("any", 2 / 3), ("alive_fraction", 2 / 3)):
        enabled, use, _, _ = growing(4, start=0.75, reading=reading, beta=0.0)
        use.after_step(step_of(f_BF))
        assert use.rho.item() == pytest.approx(rho), reading
        slow = EnabledUtilization(enabled, 0.9, 0.01, reading)
        slow.after_step(step_of(f_BF))
        assert slow.rho.item() == pytest.approx(rho if reading == "alive_fraction" else 0.1 * rho), reading


def test_disabled_latents_stay_as_they_are(trained: Trainer) -> None:
    sae = trained.variant.sae
    enabled = sae.activation[0]
    before = {name: parameter.detach().clone() for name, parameter in sae.named_parameters()}
    for i in range(6):
        step = trained.step(rows(i))
    off_F = enabled.on_F == 0
    assert int((~off_F).sum()) == 19  # 16, and three increments
    trained.variant.dead.every_n_steps(step)
    assert torch.equal(sae.W_enc[:, off_F], before["W_enc"][:, off_F])
    assert torch.equal(sae.b_enc[off_F], before["b_enc"][off_F])
    torch.testing.assert_close(sae.W_dec[off_F], before["W_dec"][off_F], rtol=0, atol=3e-7)
    assert not trained.optimizer.state[sae.W_enc]["exp_avg"][:, off_F].any()
    assert not trained.variant.dead.since_F[off_F].any()
    moved_F = (sae.W_enc != before["W_enc"]).any(0)
    assert moved_F[:16].all()


def test_a_disabled_latent_takes_no_part() -> None:
    """Over the enabled two of three, softmax weights are 1/(1 + e^-2) and its complement."""
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
    """0.3 e^-1.7 = 0.0548."""
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
    link.rescale_(4.0)  # a power of two, so that nothing rounds
    assert torch.equal(link(4 * z_BF.detach()), 4 * alpha_BF.detach())


@pytest.mark.parametrize("weights", ["softmax_peak", "softmax"])
def test_its_gradient_is_that_of_the_equation(weights: str) -> None:
    """d softmax-weighted z: w_i (1 + (z_i - sum_j w_j z_j)/T) on the diagonal, -w_i w_j z_i / T beside it."""
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


def loss_terms(**options: object) -> dict[str, float]:
    torch.manual_seed(0)
    variant = find_recipe("progressive").make(RunConfig(32, 64, 100, 64), options)
    sae = variant.sae
    optimizer = torch.optim.AdamW(sae.parameters())
    return {name: value.item() for name, value in variant.losses(variant(torch.tensor(0), rows(0), optimizer)).items()}


def test_readings_of_the_penalty() -> None:
    alpha, z, both = (loss_terms(l1_on=on) for on in ("alpha", "z", "both"))
    assert both == {**alpha, **z} and set(alpha) == {"mse", "l1"} and set(z) == {"mse", "l1_z"}
    assert z["l1_z"] > alpha["l1"] > 0


def test_competition_outside_the_reconstruction_is_only_penalised() -> None:
    beside, off, inside = loss_terms(competition_in_recon=False), loss_terms(competition="off"), loss_terms()
    assert beside["mse"] == off["mse"] != inside["mse"]
    assert beside["l1"] == inside["l1"] < off["l1"]


def test_a_mean_over_d_in_weighs_the_error_less() -> None:
    assert loss_terms(reconstruction="mean")["mse"] == pytest.approx(loss_terms()["mse"] / 32)


def test_chain_l1_leaves_out_what_is_not_enabled() -> None:
    enabled = EnabledLatents(3)
    enabled.on_F[0] = 0
    pre_BF = torch.tensor([[5.0, 1, -2], [5.0, 2, 4]])
    step = step_of(torch.full_like(pre_BF, torch.nan), pre_BF=pre_BF)  # it reads pre-activations, not latents
    assert ChainL1(enabled, ReLU())(step).item() == pytest.approx(3.5)


def test_ablations_remove_what_they_name() -> None:
    def parts(name: str, *kinds: type) -> list[torch.nn.Module]:
        return [m for m in find_recipe(name).make(RunConfig(32, 64, 100, 64), {}).modules() if isinstance(m, kinds)]

    assert parts("progressive-all-at-once", EnabledLatents)[0].on_F.all() and parts(
        "progressive-all-at-once", SoftCompetition
    )
    assert not parts("progressive", EnabledLatents)[0].on_F.all()
    assert [g.hybrid for g in parts("progressive-fixed-increment", GrowCapacity)] == [False]
    assert [u.beta for u in parts("progressive-no-ema", EnabledUtilization)] == [0.0]
    assert not parts("progressive-no-competition", SoftCompetition, CompetitionTemperature) and parts(
        "progressive-no-competition", GrowCapacity
    )
    assert [type(m) for m in parts("progressive-baseline", Activation)] == [ReLU]


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("progressive", {"competition": "max"}, "competition=max is unknown: expected one of softmax_peak, softmax"),
        ("progressive", {"start": 0.0}, "invalid start=0: expected a share of the latents"),
        ("progressive", {"interval": 0}, "invalid interval=0: expected 1 step or more"),
        ("progressive", {"utilization": "median"}, "utilization=median is unknown"),
        ("progressive-no-competition", {"temperature": 0.2}, "progressive-no-competition has no option temperature"),
        ("progressive-no-ema", {"beta": 0.5}, "progressive-no-ema has no option beta"),
    ],
)
def test_invalid_options_raise_a_usage_error(name: str, given: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        find_recipe(name).make(RunConfig(32, 64, 100, 64), given)
