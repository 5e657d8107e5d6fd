"""Paper 000: the L1 coefficient lambda and its moving bounds."""

import math
from collections.abc import Callable

import pytest
import torch

from sae.train.sae import SAE
from sae.train.step import Step
from sae.train.variant import Variant
from sae.train.variants.collapse.l1_controller import DynamicL1


@pytest.mark.parametrize("firing, at_start, at_end", [(8, 1.0, 0.5), (0, 0.02, 0.01)])
def test_lambda_stays_in_its_moving_bounds(
    firing: int, at_start: float, at_end: float, step_of: Callable[..., Step]
) -> None:
    control = DynamicL1(0.04, steps=1000, target=2.0, kappa=1.0)
    step = step_of(SAE(4, 8), torch.zeros(3, 4))
    step.f_BF = (torch.arange(8) < firing).float().expand(3, 8)
    for i in (0, 1, 2, 3, 4, 5, 500, 1000):  # lambda reaches a bound within the first few steps
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
    for i, error in enumerate((2.0, 1.0)):  # squared error in one of the four dimensions
        moved = Step(torch.tensor(i), step.sae, step.optimizer, error**0.5 * torch.eye(4)[:1], step.pre_BF, step.f_BF,
                     torch.zeros(1, 4))  # fmt: skip
        shrinking.after_step(moved)
    assert float(shrinking.value) == pytest.approx(0.04 * 0.75)


def test_counts_of_a_penalty_that_moved_and_of_bounds_that_moved_it(step_of: Callable[..., Step]) -> None:
    step = step_of(SAE(4, 8), torch.zeros(3, 4))
    step.f_BF = (torch.arange(8) < 6).float().expand(3, 8)  # L0 is 6, 1.5 times the target of 4

    def counts(start: float, kappa: float, mode: str = "l0_target") -> list[tuple[int, int]]:
        control, seen = DynamicL1(start, 1000, 4.0, mode, kappa), []
        for i in range(4):
            step.i = torch.tensor(i)
            control.after_step(step)
            seen.append(tuple(int(value) for value in control.scalars().values()))
        return seen

    assert counts(0.04, 1e-3) == [(0, 0), (1, 0), (2, 0), (3, 0)]  # the first step uses the printed 0.04
    assert counts(0.04, 0.0) == counts(0.04, 1.0, "none") == [(0, 0)] * 4  # lambda stays 0.04, within its bounds
    # First, 0.9 e^0.5 is limited to 1. From then on, lambda is above the bound, which falls in every step.
    assert counts(0.9, 1.0) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert counts(1.2, 0.0, "none") == [(1, 1), (2, 2), (3, 3), (4, 4)]


@pytest.mark.parametrize("d_sae, options, target", [(64, {}, 8.0), (1024, {}, 40.0), (64, {"l0": 5.0}, 5.0)])
def test_the_target_of_a_built_run_fits_a_narrow_dictionary(
    d_sae: int, options: dict, target: float, build: Callable[..., Variant]
) -> None:
    (control,) = [m for m in build("collapse-03", 2, d_sae, **options).mechanisms if isinstance(m, DynamicL1)]
    assert (control.target, control.start, control.kappa, control.steps) == (target, 0.04, 0.01, 20)


def test_the_penalty_of_a_built_run_grows_over_its_warm_up(build: Callable[..., Variant]) -> None:
    for options, at_once in (({}, 1 / 2), ({"l1_warmup": 0}, 1.0), ({"l1_warmup": 8}, 1 / 8)):
        for name in ("collapse-02", "collapse-03"):  # 0.04 as a constant, and from the controller
            variant = build(name, steps=40, **options)
            step = variant(torch.tensor(0), torch.randn(4, 32), torch.optim.SGD(variant.parameters()))
            assert float(variant.coefficients["l1"](step)) == pytest.approx(0.04 * at_once)


def test_a_bound_counts_even_if_the_controller_then_leaves_it(step_of: Callable[..., Step]) -> None:
    step = step_of(SAE(4, 8), torch.zeros(3, 4))
    step.f_BF = (torch.arange(8) < 2).float().expand(3, 8)  # L0 is half of the target, so 1.2 becomes 0.73
    control = DynamicL1(1.2, 1000, 4.0, kappa=1.0)
    control.after_step(step)
    assert control.scalars()["penalty_bounded"] == 1 and float(control.value) == pytest.approx(1.2 * math.exp(-0.5))


def test_kappa_is_an_option(build: Callable[..., Variant]) -> None:
    (control,) = [m for m in build("collapse-03", kappa=0.5).mechanisms if isinstance(m, DynamicL1)]
    assert control.kappa == 0.5
