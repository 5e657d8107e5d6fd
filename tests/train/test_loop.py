"""One training step: the optimizer's learning rate, steps that are not finite, and gradient clipping."""

import math

import pytest
import torch

from sae.train.loop import Trainer


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
