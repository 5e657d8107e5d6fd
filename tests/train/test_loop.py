"""One training step: the optimizer's learning rate, steps that are not finite, clipping, and what is logged."""

import math

import pytest
import torch

from sae.train.loop import Trainer
from sae.train.step import LossTerm, Mechanism, Step


def test_every_group_of_the_optimizer_follows_the_rate(make_trainer, batches) -> None:
    trainer = make_trainer("relu", lr=1e-3, warmup=3, weight_decay=0.1)
    for t in range(3):
        trainer.step(batches[t])
        assert [float(g["lr"]) for g in trainer.optimizer.param_groups] == pytest.approx(2 * [1e-3 * (t + 1) / 3])
    decayed = [g for g in trainer.optimizer.param_groups if g["weight_decay"] > 0]
    assert len(decayed) == 1 and decayed[0]["params"][0] is trainer.variant.sae.W_enc and len(decayed[0]["params"]) == 1


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_batch_that_is_not_finite_moves_no_weight(make_trainer, batches, bad: float) -> None:
    """The step is latched on the device; from then on parameters and the optimizer's state do not change."""
    trainer: Trainer = make_trainer("relu")
    for t in range(3):
        trainer.step(batches[t])
    before = {n: p.detach().clone() for n, p in trainer.variant.named_parameters()}
    moments = {n: trainer.optimizer.state[p]["exp_avg"].clone() for n, p in trainer.variant.named_parameters()}
    broken_BD = batches[3].clone()
    broken_BD[5, 7] = bad
    for x_BD in (broken_BD, batches[4]):
        trainer.step(x_BD)
    assert int(trainer.failed_at) == 3
    for name, parameter in trainer.variant.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=1e-6)  # rows are renormalized
        assert torch.equal(trainer.optimizer.state[parameter]["exp_avg"], moments[name])
        assert float(trainer.optimizer.state[parameter]["step"]) == 3


def test_gradients_longer_than_the_limit_are_scaled_down_after_the_projection(make_trainer, batches) -> None:
    """The norm that is logged and limited is that of the projected gradient."""
    trainer = make_trainer("relu", clip=1e-3, lr=1e-2, warmup=0)
    trainer.step(batches[0])
    norm = sum(float(s["exp_avg"].square().sum()) for s in trainer.optimizer.state.values()) ** 0.5 / (1 - 0.9)
    assert norm == pytest.approx(1e-3, rel=1e-3)  # Adam's first moment is (1 - beta1) times the clipped gradient


def test_gradients_shorter_than_the_limit_stay_as_they_are(make_trainer, batches) -> None:
    moments = []
    for clip in (1e6, None):
        trainer = make_trainer("relu", clip=clip, warmup=0)
        trainer.step(batches[0])
        moments.append([state["exp_avg"] for state in trainer.optimizer.state.values()])
    assert all(torch.equal(*pair) for pair in zip(*moments, strict=True))


@pytest.mark.parametrize("on", ["encoder", "all"])
@pytest.mark.parametrize("form", ["decoupled", "coupled"])
def test_weight_decay_is_adamws_or_adams_on_the_encoder_or_on_everything(make_trainer, batches, on, form) -> None:
    """The first step against the rule written out: g is the clipped gradient, d the decay, w the weights before.

    decoupled: m = (1 - b1) g,        w <- w (1 - lr d) - lr g/(|g| + eps)
    coupled:   m = (1 - b1)(g + d w), w <- w - lr (g + d w)/(|g + d w| + eps)
    """
    lr, decay, eps = 1e-2, 0.3, 1e-3
    settings = {"lr": lr, "warmup": 0, "eps": eps, "clip": 0.05}
    plain: Trainer = make_trainer("relu", **settings)
    decayed: Trainer = make_trainer("relu", **settings, weight_decay=decay, weight_decay_on=on, weight_decay_form=form)
    before = {}
    for trainer in (plain, decayed):
        with torch.no_grad():
            trainer.variant.sae.b_enc.copy_(torch.linspace(-1, 1, trainer.variant.sae.d_sae))
        before = {n: p.detach().clone() for n, p in trainer.variant.named_parameters()}
        trainer.step(batches[0])
    for name, parameter in decayed.variant.named_parameters():
        w, d = before[name], decay if on == "all" or name == "sae.W_enc" else 0.0
        g = plain.optimizer.state[plain.variant.get_parameter(name)]["exp_avg"] / (1 - 0.9)
        added = d * w if form == "coupled" else torch.zeros_like(w)
        moment = decayed.optimizer.state[parameter]["exp_avg"]
        torch.testing.assert_close(moment, (1 - 0.9) * (g + added), rtol=1e-4, atol=1e-8)
        total = g + added
        expected = w * (1 - (lr * d if form == "decoupled" else 0.0)) - lr * total / (total.abs() + eps)
        if name == "sae.W_dec":  # rows are kept at unit length
            expected = expected / expected.norm(dim=1, keepdim=True)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-6)


def test_a_gradient_that_is_not_finite_moves_no_weight_though_the_loss_is(make_trainer, batches) -> None:
    trainer: Trainer = make_trainer("relu")
    trainer.variant.sae.b_enc.register_hook(lambda gradient: gradient + math.inf)
    before = {n: p.detach().clone() for n, p in trainer.variant.named_parameters()}
    trainer.step(batches[0])
    assert int(trainer.failed_at) == 0 and math.isfinite(trainer.pop_metrics()["loss"])
    for name, parameter in trainer.variant.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=1e-6)  # rows are renormalized


def test_a_loss_that_is_not_finite_moves_no_weight_though_its_gradient_is(make_trainer, batches) -> None:
    """The first of two such steps is latched. A later step moves nothing either, although its loss is finite."""

    class Broken(LossTerm):
        def forward(self, step: Step) -> torch.Tensor:
            return torch.where(step.i < 2, torch.inf, 0.0) + step.f_BF.sum()

    trainer: Trainer = make_trainer("relu")
    trainer.variant.add_term("broken", 1.0, Broken())
    before = trainer.variant.sae.W_enc.detach().clone()
    for x_BD in batches[:2]:
        trainer.step(x_BD)
    assert math.isfinite(trainer.pop_metrics()["gradient_norm"])
    trainer.step(batches[2])
    assert int(trainer.failed_at) == 0 and math.isfinite(trainer.pop_metrics()["loss"])
    assert torch.equal(trainer.variant.sae.W_enc, before)


def test_the_optimizer_has_the_decays_of_its_moments(make_trainer, batches) -> None:
    """Of two steps, without clipping: m = b1 (1 - b1) g_0 + (1 - b1) g_1, and v likewise; no gradient is left over."""
    trainer: Trainer = make_trainer("relu", beta1=0.5, beta2=0.75, clip=None, warmup=0)
    parameter, gradients = trainer.variant.sae.b_enc, []
    parameter.register_hook(lambda gradient: gradients.append(gradient.clone()))
    for x_BD in batches[:2]:
        trainer.step(x_BD)
        assert all(one.grad is None for one in trainer.variant.parameters())
    first, second = gradients
    state = trainer.optimizer.state[parameter]
    torch.testing.assert_close(state["exp_avg"], 0.25 * first + 0.5 * second)
    torch.testing.assert_close(state["exp_avg_sq"], 0.75 * 0.25 * first**2 + 0.25 * second**2)


def test_periodic_mechanisms_act_after_every_nth_step(make_trainer, batches) -> None:
    """`every` = 3: after the third and the sixth step, numbers 2 and 5."""

    class Third(Mechanism):
        every = 3

        def __init__(self) -> None:
            super().__init__()
            self.acted: list[int] = []

        def every_n_steps(self, step: Step) -> None:
            self.acted.append(int(step.i))

    trainer: Trainer = make_trainer("relu")
    trainer.variant.mechanisms.append(third := Third())
    for number in range(8):
        trainer.run_periodic(number, trainer.step(batches[number]))
    assert third.acted == [3, 6]  # the numbers of steps taken so far


def test_logged_losses_are_means_since_the_last_log(make_trainer, batches) -> None:
    """The first line is the mean of two steps, and the second line is the one step after them."""
    trainer: Trainer = make_trainer("relu", l1_warmup=0)
    expected = []
    for t in range(3):
        expected.append(float(trainer.forward_losses(batches[t])[1]["mse"].detach()))
        trainer.step(batches[t])
        if t == 1:
            assert trainer.pop_metrics()["mse"] == pytest.approx(sum(expected) / 2)
    assert trainer.pop_metrics()["mse"] == pytest.approx(expected[2])


def test_the_logged_variance_is_around_the_mean_of_the_batch_and_the_norm_is_that_before_clipping(
    make_trainer, batches
) -> None:
    """EV = 1 - (sum of squared errors) / (sum of squared deviations from the batch's mean row)."""
    logged = []
    for clip in (None, 1e-3):
        trainer: Trainer = make_trainer("relu", clip=clip, normalize="none", b_dec_init="zero")
        step = trainer.step(batches[0])
        logged.append(trainer.pop_metrics(reset=False))
        assert trainer.pop_metrics() == logged[-1]  # reset=False keeps the metrics
    x_BD, error_BD = batches[0].double(), (step.x_BD - step.recon_BD).detach().double()
    assert x_BD.mean(0).norm() > 1
    expected = 1 - error_BD.square().sum() / (x_BD - x_BD.mean(0)).square().sum()
    assert logged[0]["explained_variance"] == pytest.approx(float(expected), rel=1e-4)
    assert logged[1]["gradient_norm"] == pytest.approx(logged[0]["gradient_norm"]) and logged[0]["gradient_norm"] > 0.01


def test_l0_counts_latents_that_are_not_zero() -> None:
    """Two tokens have three active latents.

    A negative latent is active; one that is positive only before the activation is not.
    """
    f_BF = torch.tensor([[0.0, -2.0, 0.5], [3.0, 0.0, 0.0]])
    x_BD = torch.zeros(2, 1)
    assert float(Step(torch.tensor(0), None, None, x_BD, f_BF.abs() + 1, f_BF, x_BD).l0) == 1.5
