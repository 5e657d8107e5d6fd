"""Growth of paper 001, by hand-worked numbers."""

import pytest
import torch

from sae.train.loop import Trainer
from sae.train.recipe import RECIPES, find_recipe
from sae.train.variant import RunConfig
from sae.train.variants.progressive.growth import EnabledUtilization


@pytest.fixture
def trained() -> Trainer:
    """`progressive`, ready to take steps on 64 rows of width 32; a latent more every second step, from 16 on."""
    torch.manual_seed(0)
    find_recipe("progressive")
    options = {"interval": 2, "pace": 0.2, "hybrid": False, "lr": 1e-2, "warmup": 0}
    return Trainer(RECIPES["progressive"].make(RunConfig(32, 64, 100, 64), options), 100, "cpu")


def rows(seed: int, count: int = 64) -> torch.Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed)) / 32**0.5


def test_increments_are_5_7_and_10_at_the_papers_width(growing) -> None:
    grow = growing(2304, n_ref=None)[3]
    rho = torch.tensor([0.0, 0.29, 0.3, 0.59, 0.6, 1.0])
    assert grow.increment(rho).tolist() == [5, 5, 7, 7, 10, 10]
    assert growing(2304, n_ref=None, hybrid=False)[3].increment(rho).tolist() == [5] * 6


def test_increments_adapt_around_a_hundred(growing) -> None:
    """floor(0.1 * 40 * 0.5) = 2, floor(0.1 * 100 * 0.4) = 4, floor(0.15 * 40 * 0.7) = 4."""
    assert growing(4, n_ref=40)[3].increment(torch.tensor([0.5, 0.7])).tolist() == [2, 4]
    assert growing(4, n_ref=100)[3].increment(torch.tensor([0.4, 0.62])).tolist() == [4, 9]


@pytest.mark.parametrize(("rho", "steps"), [(0.1, 346), (0.4, 247), (0.9, 173)])
def test_all_2304_are_enabled_after(rho: float, steps: int, step_of, growing) -> None:
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


def test_growth_waits_for_its_interval_and_keeps_fractions(step_of, growing) -> None:
    """Five at 2304 is 5/36 at 64: 16 at first, 17 after eight increments, 18 after fifteen."""
    enabled, _, _, grow = growing(64, hybrid=False, interval=3, pace=64 / 2304)
    counts = []
    for i in range(45):
        step = step_of(torch.zeros(1, 64), i)
        grow.after_backward(step)
        grow.after_step(step)
        counts.append(int(enabled.on_F.sum()))
    assert counts[22] == 16 and counts[23] == 17 and counts[43] == 17 and counts[44] == 18


def test_the_latent_that_would_fire_most_is_enabled_first(step_of, growing) -> None:
    enabled, _, _, grow = growing(8, hybrid=False, pace=0.2, interval=1, order="importance")
    pre_BF = torch.tensor([[1.0, 1, -1, -1, -1, 2, -1, -1], [1.0, 1, -1, 3, -1, 2, -1, -1]])
    for expected in ([0, 1, 5], [0, 1, 3, 5]):
        step = step_of(pre_BF.relu() * enabled.on_F, 0, pre_BF)
        grow.after_backward(step)
        grow.after_step(step)
        assert enabled.on_F.nonzero().flatten().tolist() == expected


def test_utilization_by_its_three_readings(step_of, growing) -> None:
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
