"""Paper 000: lambda in its moving bounds."""

import math
from collections.abc import Callable

import pytest
import torch

from sae.train.sae import SAE
from sae.train.step import Step
from sae.train.variants.collapse.l1_controller import DynamicL1


@pytest.mark.parametrize("firing, at_start, at_end", [(8, 1.0, 0.5), (0, 0.02, 0.01)])
def test_lambda_stays_in_its_moving_bounds(
    firing: int, at_start: float, at_end: float, step_of: Callable[..., Step]
) -> None:
    control = DynamicL1(0.04, steps=1000, target=2.0, kappa=1.0)
    step = step_of(SAE(4, 8), torch.zeros(3, 4))
    step.f_BF = (torch.arange(8) < firing).float().expand(3, 8)
    for i in (0, 1, 2, 3, 4, 5, 500, 1000):  # either bound is reached within the first few
        step.i = torch.tensor(i)
        value = float(control.coefficient(step))
        assert 0.02 - 0.00001 * i - 1e-7 <= value <= 1.0 - 0.0005 * i + 1e-7
        assert i != 5 or value == pytest.approx(at_start, abs=0.003)
        control.after_step(step)
    assert float(control.coefficient(step)) == pytest.approx(at_end)


def test_lambda_follows_the_controller_and_is_constant_without_one(step_of: Callable[..., Step]) -> None:
    step = step_of(SAE(4, 8), torch.zeros(3, 4))
    step.f_BF = (torch.arange(8) < 6).float().expand(3, 8)
    followed, literal = DynamicL1(0.04, 1000, 4.0), DynamicL1(0.04, 1000, 4.0, "none")
    for control in (followed, literal):
        control.after_step(step)
    assert float(followed.coefficient(step)) == pytest.approx(0.04 * math.exp(0.01 * (6 / 4 - 1)))
    assert float(literal.coefficient(step)) == pytest.approx(0.04)
    shrinking = DynamicL1(0.04, 1000, 4.0, "recon_ratio", beta=0.5)
    for i, error in enumerate((2.0, 1.0)):  # of one of four dimensions, the others are right
        moved = Step(torch.tensor(i), step.sae, step.optimizer, error**0.5 * torch.eye(4)[:1], step.pre_BF, step.f_BF,
                     torch.zeros(1, 4))  # fmt: skip
        shrinking.after_step(moved)
    assert float(shrinking.value) == pytest.approx(0.04 * 0.75)
