"""Growth of paper 001, by hand-worked numbers."""

import pytest
import torch

from sae.train.loop import Trainer
from sae.train.recipe import RECIPES, find_recipe
from sae.train.variant import RunConfig
from sae.train.variants.progressive.growth import EnabledUtilization, GrowCapacity


@pytest.fixture
def trained() -> Trainer:
    """A trainer of `progressive` for rows of width 32. 16 latents are enabled at first, one more every second step."""
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
    assert growing(4, n_ref=10)[3].increment(torch.tensor([0.5, 0.7])).tolist() == [2, 4]  # the minimum


def test_the_share_at_the_start_is_rounded_up(growing) -> None:
    assert growing(10, start=0.25)[0].on_F.tolist() == [1] * 3 + [0] * 7
    assert growing(10, start=0.01)[0].on_F.sum() == 1


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
    """An increment of 5 of 2304 is 5/36 of 64: from 16 latents, 17 after eight increments and 18 after fifteen."""
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
    """Of four tokens, latent 0 fires on two and latent 1 on one. Latent 2 stays below tau, and 3 is not enabled."""
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
    assert int((~off_F).sum()) == 19  # 16 and three increments of 1
    trained.variant.dead.every_n_steps(step)
    assert torch.equal(sae.W_enc[:, off_F], before["W_enc"][:, off_F])
    assert torch.equal(sae.b_enc[off_F], before["b_enc"][off_F])
    torch.testing.assert_close(sae.W_dec[off_F], before["W_dec"][off_F], rtol=0, atol=3e-7)
    assert not trained.optimizer.state[sae.W_enc]["exp_avg"][:, off_F].any()
    assert not trained.variant.dead.since_F[off_F].any()
    moved_F = (sae.W_enc != before["W_enc"]).any(0)
    assert moved_F[:16].all()


def test_a_latent_is_in_use_if_it_fires_for_more_than_a_thousandth_of_the_tokens(step_of, growing) -> None:
    """Of 2,000 tokens, latent 0 fires on ten (0.005), latent 1 on one (0.0005), latent 2 on all, latent 3 on none."""
    f_BF = torch.zeros(2000, 4)
    f_BF[:10, 0], f_BF[0, 1], f_BF[:, 2] = 1.0, 1.0, 1.0
    _, use, _, _ = growing(4, start=1.0, beta=0.0)
    use.after_step(step_of(f_BF))
    assert use.rho.item() == pytest.approx(2 / 4)
    _, slow, _, _ = growing(4, start=1.0, beta=0.9)  # averages 0.0005 and 0.00005: neither is in use
    slow.after_step(step_of(f_BF))
    assert slow.rho.item() == pytest.approx(1 / 4)


@pytest.mark.parametrize("reading", ["mean", "any", "alive_fraction"])
def test_smoothing_is_counted_by_how_far_it_moves_rho(step_of, growing, reading: str) -> None:
    busy_BF, idle_BF = torch.ones(3, 4), torch.zeros(3, 4)
    _, use, _, _ = growing(4, start=0.75, reading=reading, beta=0.9)
    for f_BF in (busy_BF, idle_BF):
        use.after_step(step_of(f_BF))
    # The two batches alone have rho = 1 and 0. Smoothed, rho is 0.1 and 0.09, or with `alive_fraction` 1 and 1.
    expected = 1.0 if reading == "alive_fraction" else 0.9 + 0.09
    assert use.scalars()["smoothed"].item() == pytest.approx(expected)
    _, bare, _, _ = growing(4, start=0.75, reading=reading, beta=0.0)
    for f_BF in (busy_BF, idle_BF):
        bare.after_step(step_of(f_BF))
    assert bare.scalars()["smoothed"].item() == 0.0 and bare.rho.item() == 0.0


def test_growth_counts_the_latents_it_enables_and_the_increments_it_chooses(step_of, growing) -> None:
    """Of 16 latents, 4 are enabled at first, 5 more at rho = 0.1, the last 7 at rho = 0.5, and then no more."""
    enabled, use, _, grow = growing(16, n_ref=None, interval=2, pace=1.0)
    grow.n_ref = 2304
    counted = []
    for i, rho in enumerate((0.1, 0.1, 0.5, 0.5, 0.5, 0.5)):
        use.rho.fill_(rho)
        step = step_of(torch.zeros(1, 16), i)
        grow.after_backward(step)
        grow.after_step(step)
        counted.append(tuple(int(grow.scalars()[name]) for name in ("enabled", "grown", "adapted")))
    assert counted == [(4, 0, 0), (9, 5, 0), (9, 5, 0), (16, 12, 1), (16, 12, 1), (16, 12, 1)]
    assert grow.acted_grown.dtype == grow.acted_adapted.dtype == torch.int64


def test_fixed_increments_and_a_full_dictionary_are_not_counted(step_of, growing) -> None:
    for options in ({"hybrid": False}, {"start": 1.0}):
        _, use, _, grow = growing(16, interval=1, **options)
        use.rho.fill_(0.9)
        step = step_of(torch.zeros(1, 16))
        grow.after_backward(step)
        grow.after_step(step)
        assert int(grow.acted_adapted) == 0
    assert int(grow.acted_grown) == 0


@pytest.mark.parametrize("on", ["encoder", "all"])
def test_no_decay_reaches_a_latent_that_is_not_enabled(on: str) -> None:
    """Weight decay shrinks W_enc of enabled latents and, with `all`, b_enc. Disabled latents never change."""
    torch.manual_seed(0)
    options = {"interval": 50, "lr": 1e-2, "warmup": 0, "weight_decay": 5.0, "weight_decay_on": on}
    trainer = Trainer(find_recipe("progressive").make(RunConfig(32, 64, 100, 64), options), 100, "cpu")
    sae = trainer.variant.sae
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)  # nothing fires, so only decay changes weights
        sae.b_dec.fill_(1.0)
    before = {name: weight.detach().clone() for name, weight in sae.named_parameters()}
    trainer.step(rows(0))
    off_F = sae.activation[0].on_F == 0
    assert int(off_F.sum()) == 48
    assert torch.equal(sae.W_enc[:, off_F], before["W_enc"][:, off_F])
    assert torch.equal(sae.b_enc[off_F], before["b_enc"][off_F])
    torch.testing.assert_close(sae.W_dec[off_F], before["W_dec"][off_F], rtol=0, atol=3e-7)
    shrunk = 1 - 1e-2 * 5.0
    torch.testing.assert_close(sae.W_enc[:, ~off_F], shrunk * before["W_enc"][:, ~off_F])
    torch.testing.assert_close(sae.b_enc[~off_F], (shrunk if on == "all" else 1.0) * before["b_enc"][~off_F])


def test_decay_turns_no_direction_that_is_not_enabled() -> None:
    """Coupled decay passes through Adam's moments, so it would rotate a row of W_dec instead of only shrinking it."""
    torch.manual_seed(0)
    options = {"interval": 50, "lr": 1e-2, "warmup": 0, "weight_decay": 5.0, "weight_decay_on": "all"}
    options |= {"weight_decay_form": "coupled"}
    trainer = Trainer(find_recipe("progressive").make(RunConfig(32, 64, 100, 64), options), 100, "cpu")
    before_FD = trainer.variant.sae.W_dec.detach().clone()
    trainer.step(rows(0))
    off_F = trainer.variant.sae.activation[0].on_F == 0
    torch.testing.assert_close(trainer.variant.sae.W_dec[off_F], before_FD[off_F], rtol=0, atol=3e-7)


@pytest.mark.parametrize(("steps", "interval"), [(4882, 10), (2441, 5), (732, 1), (733, 2), (60, 1)])
def test_growth_takes_the_same_share_of_every_run(steps: int, interval: int) -> None:
    """The interval is ten steps in a run of 4,882. It scales with the run, rounded, and is at least one."""
    variant = find_recipe("progressive").make(RunConfig(32, 64, steps, 64), {})
    (grow,) = (m for m in variant.mechanisms if isinstance(m, GrowCapacity))
    assert grow.interval == interval
