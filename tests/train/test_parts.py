"""Terms, mechanisms and coefficients by numbers that can be worked out by hand."""

import math

import pytest
import torch

from sae.train.activations import BatchTopK, TopK
from sae.train.loop import Trainer
from sae.train.losses import L1, MSE, AuxK, MultiTopK
from sae.train.mechanisms import (
    ActivityEMA,
    AnnealK,
    BatchTopKThreshold,
    DeadLatents,
    UnitNormDecoder,
    reset_adam_state,
)
from sae.train.sae import SAE
from sae.train.schedules import constant, cosine, linear, product, warmup
from sae.train.step import Step
from sae.train.variant import Optimization
from sae.train.variants.decorrelation import Decorrelation


def step_of(sae: SAE, x_BD: torch.Tensor, i: int = 0, optimizer=None) -> Step:
    """The step of an SAE on a batch."""
    pre_BF, f_BF, recon_BD, _ = sae(x_BD)
    return Step(torch.tensor(i), sae, optimizer, x_BD, pre_BF, f_BF, recon_BD)


def step_with(x_BD=((0.0,),), f_BF=((0.0,),), recon_BD=((0.0,),), i: int = 0) -> Step:
    """A step with given numbers in it."""
    latents = torch.tensor(f_BF)
    return Step(torch.tensor(i), None, None, torch.tensor(x_BD), latents, latents, torch.tensor(recon_BD))


def test_mse_sums_over_dimensions_and_averages_over_tokens() -> None:
    step = step_with(x_BD=((1.0, 2.0), (3.0, 4.0)), recon_BD=((1.0, 0.0), (0.0, 0.0)))
    assert float(MSE()(step)) == (4 + 9 + 16) / 2


def test_l1_sums_over_latents_and_averages_over_tokens() -> None:
    assert float(L1()(step_with(f_BF=((1.0, 2.0, 0.0), (0.0, 0.0, 4.0))))) == 3.5


@pytest.mark.parametrize(
    ("coefficient", "values"),
    [
        (constant(0.3), {0: 0.3, 10: 0.3}),
        (linear(1.0, 0.0, 10), {0: 1.0, 5: 0.5, 10: 0.0, 99: 0.0}),
        (linear(0.2, 0.6, 4), {0: 0.2, 1: 0.3, 4: 0.6, 5: 0.6}),
        (cosine(1.0, 0.2, 8), {0: 1.0, 4: 0.6, 8: 0.2, 99: 0.2}),
        (warmup(2.0, 4), {0: 0.5, 1: 1.0, 3: 2.0, 4: 2.0, 99: 2.0}),
        (warmup(2.0, 0), {0: 2.0}),
        (product(warmup(2.0, 4), constant(3.0), linear(1.0, 0.0, 10)), {0: 1.5, 5: 3.0, 10: 0.0}),
    ],
)
def test_coefficients_at_the_start_the_middle_the_end_and_beyond(coefficient, values: dict[int, float]) -> None:
    found = {i: float(coefficient(step_with(i=i))) for i in values}
    assert found == pytest.approx(values, abs=1e-7)


def test_the_rate_rises_stays_and_falls() -> None:
    """lr (t+1)/w up to w = 10, lr until 0.8 of 100 steps, then lr (T - t)/20: the last step still moves."""
    how = Optimization(lr=2.0, warmup=10, decay_start=0.8)
    expected = {0: 0.2, 9: 2.0, 10: 2.0, 80: 2.0, 90: 1.0, 99: 0.1}
    assert {t: float(how.lr_at(torch.tensor(t), 100)) for t in expected} == pytest.approx(expected, rel=1e-5)


def test_every_group_of_the_optimizer_follows_the_rate(training_of, batches) -> None:
    training = training_of("relu", lr=1e-3, warmup=3, weight_decay=0.1)
    for t in range(3):
        training.step(batches[t])
        assert [float(g["lr"]) for g in training.optimizer.param_groups] == pytest.approx(2 * [1e-3 * (t + 1) / 3])
    decayed = [g for g in training.optimizer.param_groups if g["weight_decay"] > 0]
    assert (
        len(decayed) == 1 and decayed[0]["params"][0] is training.variant.sae.W_enc and len(decayed[0]["params"]) == 1
    )


def dead_set(d_sae: int, dead: list[int]) -> DeadLatents:
    mechanism = DeadLatents(d_sae, after_tokens=1)
    mechanism.since_F[dead] = 1
    mechanism.every_n_steps(None)
    return mechanism


def aux_reference(step: Step, dead: list[int], k_aux: int) -> torch.Tensor:
    """AuxK over the whole width with a mask: slow, and plain to see."""
    sae, mask_F = step.sae, torch.zeros(step.sae.d_sae, dtype=torch.bool)
    mask_F[dead] = True
    z_BF = torch.where(mask_F, step.pre_BF.relu(), 0.0)
    kth_B1 = z_BF.sort(dim=1, descending=True).values[:, min(k_aux, len(dead)) - 1 :][:, :1]
    e_hat_BD = torch.where(z_BF >= kth_B1, z_BF, 0.0) @ sae.W_dec  # no b_dec
    e_BD = (step.x_BD - step.recon_BD).detach()
    variance = (e_BD - e_BD.mean(0)).square().sum(1).mean()
    return min(1.0, len(dead) / k_aux) * (e_BD - e_hat_BD).square().sum(1).mean() / variance


def aux_sae(pre_bias: bool = True) -> tuple[SAE, torch.Tensor]:
    torch.manual_seed(0)
    sae = SAE(8, 100, pre_bias=pre_bias)
    with torch.no_grad():
        sae.b_dec.normal_()
        sae.b_enc.normal_(0.5, 0.1)
    return sae, torch.randn(16, 8)


@pytest.mark.parametrize("pre_bias", [True, False])
@pytest.mark.parametrize("dead", [[7], [3, 50, 99], list(range(20, 90)), list(range(100))], ids=len)
def test_auxk_on_the_gathered_dead_is_the_masked_one(dead: list[int], pre_bias: bool) -> None:
    """The value and every gradient; padding (one dead latent is padded to 64) adds nothing."""
    sae, x_BD = aux_sae(pre_bias)
    gradients = []
    for loss in (AuxK(dead_set(100, dead), k_aux=4), lambda step: aux_reference(step, dead, k_aux=4)):
        sae.zero_grad()
        value = loss(step_of(sae, x_BD))
        value.backward()
        gradients.append([value.detach(), *[p.grad.clone() if p.grad is not None else None for p in sae.parameters()]])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    assert gradients[0][2][:, dead].abs().sum(0).gt(0).any()  # W_enc's columns of the dead are taught
    alive = [n for n in range(100) if n not in dead]
    assert not gradients[0][2][:, alive].any()


def test_auxk_is_zero_without_dead_latents_and_without_a_residual_to_explain() -> None:
    sae, x_BD = aux_sae()
    assert float(AuxK(dead_set(100, []), 4)(step_of(sae, x_BD))) == 0
    value = AuxK(dead_set(100, [1, 2]), 4)(step_of(sae, x_BD[:1]))  # one token: its residual has no variance
    value.backward()
    assert value.item() == 0 and all(p.grad is None or torch.isfinite(p.grad).all() for p in sae.parameters())


def test_dead_latents_count_tokens_since_they_fired() -> None:
    mechanism = DeadLatents(3, after_tokens=5)
    fired = ((1.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    for f_BF, since in [(fired, [0, 2, 2]), (((0.0, 0.0, -2.0),), [1, 3, 0]), (fired, [0, 5, 2])]:
        mechanism.after_step(step_with(x_BD=f_BF, f_BF=f_BF))
        assert mechanism.since_F.tolist() == since
    assert float(mechanism.scalars()["dead"]) == pytest.approx(1 / 3)
    assert len(mechanism.index_A) == 0  # the list is renewed in between
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
        removed_FD = tangent_FD - sae.W_dec.grad  # along the row and nothing else
        torch.testing.assert_close(removed_FD, (tangent_FD * sae.W_dec).sum(1, keepdim=True) * sae.W_dec)
        direction_FD = sae.W_dec.clone()
        sae.W_dec.mul_(torch.rand(20, 1) + 0.5)
        mechanism.after_step(step)
        torch.testing.assert_close(sae.W_dec.detach(), direction_FD)


def test_activity_follows_how_often_a_latent_fires() -> None:
    mechanism = ActivityEMA(2, beta=0.9, threshold=0.5)
    for _ in range(2):
        mechanism.after_step(step_with(f_BF=((1.0, 0.5), (0.2, 0.0))))  # one of two over the threshold, none
    assert mechanism.rate_F.tolist() == pytest.approx([0.1 * 0.5 + 0.9 * 0.1 * 0.5, 0.0])


def test_forget_zeroes_the_moments_of_some_latents_and_keeps_the_count_of_steps() -> None:
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
        (((0.0, 0.0), (0.0, 0.0)), 2.2),  # nothing fired: nothing is learnt
    ]:
        mechanism.after_step(step_with(f_BF=f_BF))
        assert float(activation.threshold) == pytest.approx(expected)
    for f_BF in ((4.0,),), ((1.0,),), ((7.0,),):
        mechanism.calibrate(step_with(f_BF=f_BF))
    assert float(activation.threshold) == pytest.approx(4.0)  # the mean of the minima alone


def test_the_calibrated_threshold_keeps_k_latents_a_token() -> None:
    torch.manual_seed(0)
    sae = SAE(32, 256, [BatchTopK(20)])
    mechanism = BatchTopKThreshold(sae.activation[0])
    with torch.no_grad():
        for _ in range(16):
            mechanism.calibrate(step_of(sae, torch.randn(256, 32)))
        l0 = (sae.eval().encode(torch.randn(4096, 32)) > 0).sum(1).float().mean()
    assert float(l0) == pytest.approx(20, rel=0.05)


def decorrelation_reference(f_BF: torch.Tensor, fraction: float, tau: float | None = None):
    """(2) to (4) in float64 with loops over pairs and a full sort."""
    n = f_BF.shape[1]
    alive = [i for i in range(n) if f_BF[:, i].any()]
    pairs = {
        (i, j): (f_BF[:, i] @ f_BF[:, j]) / (f_BF[:, i].norm() * f_BF[:, j].norm())
        for i in alive
        for j in alive
        if i < j
    }
    values = torch.stack(list(pairs.values())).detach()
    mean, sd = float(values.mean()), float(values.std(correction=0))
    tau = mean + sd if tau is None else tau
    chosen = max(1, round(fraction * n * (n - 1) / 2))
    largest = sorted(pairs.values(), key=lambda c: c.item(), reverse=True)[:chosen]
    return sum((c - tau).relu() for c in largest if c.item() > 0) / chosen, mean, tau


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 1.0])
def test_decorrelation_is_its_definition(fraction: float) -> None:
    """Value, mean, tau and gradient, with dead columns; at fraction 1 fewer pairs fire than the fraction allows."""
    torch.manual_seed(0)
    f_BF = (torch.randn(40, 24) * (torch.rand(40, 24) < 0.3)).relu().double()
    f_BF[:, [0, 5, 23]] = 0
    exact_BF = f_BF.clone().requires_grad_()
    value, mean, tau = decorrelation_reference(exact_BF, fraction)
    value.backward()
    latents_BF = f_BF.float().requires_grad_()
    step = Step(torch.tensor(0), None, None, latents_BF, latents_BF, latents_BF, latents_BF)
    found = Decorrelation(fraction)(step)
    found.backward()
    assert float(step.metrics["mean_correlation"]) == pytest.approx(mean, rel=1e-4)
    assert float(step.metrics["tau"]) == pytest.approx(tau, rel=1e-4)
    assert float(step.metrics["sd_correlation"]) == pytest.approx(tau - mean, rel=1e-4)  # the reference's sd
    assert found.item() == pytest.approx(value.item(), rel=1e-4)
    torch.testing.assert_close(latents_BF.grad.double(), exact_BF.grad, rtol=1e-3, atol=1e-6)
    assert not latents_BF.grad[:, [0, 5, 23]].any()


def test_decorrelation_of_silence_is_zero() -> None:
    latents_BF = torch.zeros(8, 6, requires_grad=True)
    value = Decorrelation(0.5)(Step(torch.tensor(0), None, None, latents_BF, latents_BF, latents_BF, latents_BF))
    value.backward()
    assert value.item() == 0 and not latents_BF.grad.any()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_batch_that_is_not_finite_moves_no_weight(training_of, batches, bad: float) -> None:
    """The step is latched on the device; from then on parameters and the optimizer's state do not change."""
    training: Trainer = training_of("relu")
    for t in range(3):
        training.step(batches[t])
    before = {n: p.detach().clone() for n, p in training.variant.named_parameters()}
    moments = {n: training.optimizer.state[p]["exp_avg"].clone() for n, p in training.variant.named_parameters()}
    broken_BD = batches[3].clone()
    broken_BD[5, 7] = bad
    for x_BD in (broken_BD, batches[4]):
        training.step(x_BD)
    assert int(training.failed_at) == 3
    for name, parameter in training.variant.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=1e-6)  # rows are renormalised
        assert torch.equal(training.optimizer.state[parameter]["exp_avg"], moments[name])
        assert float(training.optimizer.state[parameter]["step"]) == 3


def test_gradients_longer_than_the_limit_are_scaled_down_after_the_projection(training_of, batches) -> None:
    """The norm that is logged and limited is that of the projected gradient."""
    training = training_of("relu", clip=1e-3, lr=1e-2, warmup=0)
    training.step(batches[0])
    norm = sum(float(s["exp_avg"].square().sum()) for s in training.optimizer.state.values()) ** 0.5 / (1 - 0.9)
    assert norm == pytest.approx(1e-3, rel=1e-3)  # Adam's first moment is (1 - beta1) times the clipped gradient


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
def test_annealed_k_falls_to_k_whatever_room_there_is(activation, kept: list[int], every: int) -> None:
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
    assert int((activation.eval()(Z_BF) > 0).sum()) == (4 if isinstance(activation, TopK) else 11)  # threshold 0


def test_what_is_annealed_is_not_saved_with_the_sae() -> None:
    sae = SAE(4, 6, [TopK(2)])
    plain = sae.state_dict().keys()
    AnnealK(sae.activation[0], start=6, steps=4)
    assert sae.state_dict().keys() == plain
    assert "activation.0.now" in dict(sae.named_buffers())  # but with a checkpoint


def test_multi_topk_is_the_error_with_more_latents_and_teaches_encoder_and_decoder() -> None:
    """x = (3, 2, 1) in unit latents: with three kept the error is 0, with two 1^2, with one (the SAE's) 2^2 + 1^2."""
    sae = SAE(3, 3, [TopK(1)], pre_bias=False)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(3))
        sae.W_dec.copy_(torch.eye(3))
    step = step_of(sae, torch.tensor([[3.0, 2.0, 1.0]]))
    assert [float(term(step).detach()) for term in (MSE(), MultiTopK(2), MultiTopK(3))] == [5.0, 1.0, 0.0]
    MultiTopK(2)(step).backward()
    # error e = (0, 0, 1): row i of W_dec gets -2 f_i e, no other row does; latents with rows orthogonal to e get 0
    assert sae.W_dec.grad.tolist() == [[0, 0, -6], [0, 0, -4], [0, 0, 0]]
    with torch.no_grad():
        sae.W_dec[1] = torch.tensor([0.0, 1.0, 1.0])
    sae.zero_grad()
    MultiTopK(2)(step_of(sae, torch.tensor([[3.0, 2.0, 1.0]]))).backward()
    # x_hat = (3, 2, 2), e = (0, 0, -1): d f_2 = 2 (x_hat - x) . W_dec,2 = 2, though TopK(1) itself keeps f_1 alone
    assert sae.W_enc.grad.tolist() == [[0, 6, 0], [0, 4, 0], [0, 2, 0]]


def test_the_options_of_topk_are_its_terms(variant_of) -> None:
    variant = variant_of("topk", k=4, multi=0.125, k_anneal_steps=10)
    assert variant.coefficients["multi"](None) == 0.125 and variant.terms["multi"].activation.k == 16
    assert float(variant.sae.activation[0].now) == 32  # d_in
    assert variant_of("topk", k=200, multi=0.125).terms["multi"].activation.k == 512  # d_sae
    assert "multi" not in variant_of("topk").terms and variant_of("topk").sae.activation[0].now is None
