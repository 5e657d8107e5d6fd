"""Mechanisms that several recipes use."""

import pytest
import torch

from sae.train.activation_functions import Activation, BatchTopK, TopK
from sae.train.losses import MSE
from sae.train.mechanisms import (
    ActivityEMA,
    AnnealK,
    BatchTopKThreshold,
    DeadLatents,
    UnitNormDecoder,
    reset_adam_state,
)
from sae.train.sae import SAE
from sae.train.step import Step


def step_of(sae: SAE, x_BD: torch.Tensor, i: int = 0, optimizer=None) -> Step:
    """The step of an SAE on a batch."""
    pre_BF, f_BF, recon_BD, _ = sae(x_BD)
    return Step(torch.tensor(i), sae, optimizer, x_BD, pre_BF, f_BF, recon_BD)


def step_with(x_BD=((0.0,),), f_BF=((0.0,),), recon_BD=((0.0,),), i: int = 0) -> Step:
    """A step with these numbers in it. Pre-activations differ from latents, so that nothing can confuse them."""
    latents_BF = torch.tensor(f_BF)
    return Step(torch.tensor(i), None, None, torch.tensor(x_BD), latents_BF - 0.7, latents_BF, torch.tensor(recon_BD))


def dead_set(d_sae: int, dead: list[int]) -> DeadLatents:
    mechanism = DeadLatents(d_sae, after_tokens=1)
    mechanism.since_F[dead] = 1
    mechanism.every_n_steps(None)
    return mechanism


def test_dead_latents_count_tokens_since_they_fired() -> None:
    mechanism = DeadLatents(3, after_tokens=5)
    fired = ((1.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    for f_BF, since in [(fired, [0, 2, 2]), (((0.0, 0.0, -2.0),), [1, 3, 0]), (fired, [0, 5, 2])]:
        mechanism.after_step(step_with(x_BD=f_BF, f_BF=f_BF))
        assert mechanism.since_F.tolist() == since
    assert float(mechanism.scalars()["dead"]) == pytest.approx(1 / 3)
    assert len(mechanism.index_A) == 0  # only every_n_steps updates the list
    mechanism.every_n_steps(None)
    assert mechanism.dead_F.tolist() == [False, True, False]
    assert mechanism.index_A[mechanism.real_A > 0].tolist() == [1]


@pytest.mark.parametrize(("dead", "padded"), [(0, 0), (1, 64), (64, 64), (65, 128), (129, 200), (200, 200)])
def test_the_list_of_the_dead_is_padded_to_a_power_of_two_within_the_width(dead: int, padded: int) -> None:
    mechanism = dead_set(200, list(range(dead)))
    assert (len(mechanism.index_A), int(mechanism.real_A.sum())) == (padded, dead)
    again = DeadLatents(200, after_tokens=1)
    again.load_state_dict(mechanism.state_dict())
    again.after_restore()
    assert torch.equal(again.index_A, mechanism.index_A) and torch.equal(again.real_A, mechanism.real_A)


def test_unit_norm_removes_the_radial_gradient_and_restores_the_norm() -> None:
    torch.manual_seed(0)
    sae, mechanism = SAE(8, 20), UnitNormDecoder()
    sae.W_dec.grad = torch.randn(20, 8)
    tangent_FD = sae.W_dec.grad.clone()
    step = step_of(sae, torch.randn(4, 8))
    with torch.no_grad():
        mechanism.after_backward(step)
        assert (sae.W_dec.grad * sae.W_dec).sum(1).abs().max() < 1e-6
        removed_FD = tangent_FD - sae.W_dec.grad  # only the component along the row
        torch.testing.assert_close(removed_FD, (tangent_FD * sae.W_dec).sum(1, keepdim=True) * sae.W_dec)
        direction_FD = sae.W_dec.clone()
        sae.W_dec.mul_(torch.rand(20, 1) + 0.5)
        mechanism.after_step(step)
        torch.testing.assert_close(sae.W_dec.detach(), direction_FD)


def test_activity_follows_how_often_a_latent_fires() -> None:
    mechanism = ActivityEMA(2, beta=0.9, threshold=0.5)
    for _ in range(2):
        # Latent 0 exceeds the threshold in one of two tokens, latent 1 in none.
        mechanism.after_step(step_with(f_BF=((1.0, 0.5), (0.2, 0.0))))
    assert mechanism.rate_F.tolist() == pytest.approx([0.1 * 0.5 + 0.9 * 0.1 * 0.5, 0.0])


def test_a_latent_below_zero_does_not_fire() -> None:
    class Signed(Activation):
        """An activation whose latents can be negative."""

    step = step_with(f_BF=((1.0, -0.5), (0.2, 0.0)))
    step.sae = SAE(2, 2, [Signed()])
    assert ActivityEMA(2).statistic(step).tolist() == [1.0, 0.0]


def test_resetting_adam_zeroes_the_moments_of_some_latents_and_keeps_the_step_count() -> None:
    sae = SAE(4, 6)
    optimizer = torch.optim.AdamW(sae.parameters())
    step = step_of(sae, torch.randn(8, 4), optimizer=optimizer)
    (step.f_BF.sum() + MSE()(step)).backward()
    for parameter in sae.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    reset_adam_state(step, torch.tensor([1, 4]))
    for parameter, latents_first in ((sae.W_dec, sae.W_dec), (sae.W_enc, sae.W_enc.T), (sae.b_enc, sae.b_enc)):
        state = optimizer.state[parameter]
        assert float(state["step"]) == 1
        for moment in (state["exp_avg"], state["exp_avg_sq"]):
            moment = moment.T if latents_first.shape != parameter.shape else moment
            touched = moment.reshape(6, -1).any(1)
            assert touched.tolist() == [True, False, True, True, False, True]
    assert optimizer.state[sae.b_dec]["exp_avg"].all()


def test_the_threshold_starts_at_the_first_minimum_and_follows_the_others() -> None:
    activation = BatchTopK(1)
    mechanism = BatchTopKThreshold(activation, rate=0.1)
    for f_BF, expected in [
        (((4.0, 0.0), (2.0, 3.0)), 2.0),
        (((4.0, 5.0), (0.0, 0.0)), 2.0 + 0.1 * (4 - 2)),
        (((0.0, 0.0), (0.0, 0.0)), 2.2),  # nothing fired, so nothing is learned
    ]:
        mechanism.after_step(step_with(f_BF=f_BF))
        assert float(activation.threshold) == pytest.approx(expected)
    for f_BF in ((4.0,),), ((1.0,),), ((7.0,),):
        mechanism.calibrate(step_with(f_BF=f_BF))
    assert float(activation.threshold) == pytest.approx(4.0)  # the mean of the minima alone


def test_the_calibrated_threshold_keeps_k_latents_per_token() -> None:
    torch.manual_seed(0)
    sae = SAE(32, 256, [BatchTopK(20)])
    mechanism = BatchTopKThreshold(sae.activation[0])
    with torch.no_grad():
        for _ in range(16):
            mechanism.calibrate(step_of(sae, torch.randn(256, 32)))
        l0 = (sae.eval().encode(torch.randn(4096, 32)) > 0).sum(1).float().mean()
    assert float(l0) == pytest.approx(20, rel=0.05)


Z_BF = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0, -1.0], [8.0, 0.5, 0.4, 0.3, 0.2, 0.1]])


@pytest.mark.parametrize(
    ("activation", "kept"),
    [
        # k_t = 6 (1 - t/4) + 2 t/4 = 6, 5, 4, 3, 2, 2; a negative latent is never kept
        (TopK(2), [5 + 6, 5 + 5, 4 + 4, 3 + 3, 2 + 2, 2 + 2]),
        # k_t = 6, 4.875, 3.75, 2.625, 1.5, 1.5, and of the batch of two floor(2 k_t) = 12, 9, 7, 5, 3, 3
        (BatchTopK(1.5), [11, 9, 7, 5, 3, 3]),
    ],
    ids=["topk", "batchtopk"],
)
@pytest.mark.parametrize("every", [1, 3, 100])
def test_annealed_k_falls_to_k_whatever_the_interval(activation, kept: list[int], every: int) -> None:
    activation = type(activation)(activation.k)
    anneal = AnnealK(activation, start=6, steps=4, every=every)
    for t, count in enumerate(kept):
        f_BF = activation(Z_BF)
        assert int((f_BF > 0).sum()) == count, f"step {t}"
        assert bool(((f_BF == Z_BF) | (f_BF == 0)).all())
        if isinstance(activation, BatchTopK):
            assert f_BF.sum() == Z_BF.flatten().sort().values[-count:].sum()
        anneal.after_step(step_with(i=t))
        if (t + 1) % every == 0:
            anneal.every_n_steps(step_with(i=t + 1))
    if every <= 3:  # once k is reached there is no room for more
        assert activation.max_k == activation.k
    assert int((activation.eval()(Z_BF) > 0).sum()) == (4 if isinstance(activation, TopK) else 11)  # threshold 0


def test_the_annealed_k_is_not_saved_with_the_sae() -> None:
    sae = SAE(4, 6, [TopK(2)])
    plain = sae.state_dict().keys()
    AnnealK(sae.activation[0], start=6, steps=4)
    assert sae.state_dict().keys() == plain
    assert "activation.0.now" in dict(sae.named_buffers())  # but with a checkpoint
