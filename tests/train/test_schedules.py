"""Schedules at their start, middle and end."""

import pytest
import torch

from sae.train.schedules import constant, cosine, linear, product, warmup
from sae.train.step import Step


def step_with(x_BD=((0.0,),), f_BF=((0.0,),), recon_BD=((0.0,),), i: int = 0) -> Step:
    """A step with the given tensors."""
    latents = torch.tensor(f_BF)
    return Step(torch.tensor(i), None, None, torch.tensor(x_BD), latents, latents, torch.tensor(recon_BD))


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
