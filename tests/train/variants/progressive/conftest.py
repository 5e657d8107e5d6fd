"""Fixtures of the tests of paper 001: steps and growing dictionaries."""

from collections.abc import Callable

import pytest
import torch

from sae.train.mechanisms import DeadLatents
from sae.train.sae import SAE
from sae.train.step import Step
from sae.train.variants.progressive.growth import EnabledLatents, EnabledUtilization, GrowCapacity


def step_of(f_BF: torch.Tensor, i: int = 0, pre_BF: torch.Tensor | None = None) -> Step:
    """A step with these latents. Pre-activations are NaN by default, so a result that depends on them would be NaN."""
    sae = SAE(1, f_BF.shape[1])
    x_BD = torch.zeros(len(f_BF), 1)
    if pre_BF is None:
        pre_BF = torch.full_like(f_BF, torch.nan)
    return Step(torch.tensor(i), sae, torch.optim.AdamW(sae.parameters()), x_BD, pre_BF, f_BF, x_BD)


def growing(d_sae: int, start: float = 0.25, reading: str = "alive_fraction", beta: float = 0.9, **options: object):
    enabled, dead = EnabledLatents(d_sae), DeadLatents(d_sae, 100)
    use = EnabledUtilization(enabled, beta, 0.01, reading)
    return enabled, use, dead, GrowCapacity(enabled, use, dead, start, **options)


@pytest.fixture(scope="session", name="step_of")
def step_of_fixture() -> Callable[..., Step]:
    return step_of


@pytest.fixture(scope="session", name="growing")
def growing_fixture() -> Callable[..., tuple[EnabledLatents, EnabledUtilization, DeadLatents, GrowCapacity]]:
    """A function that builds the parts of a growing dictionary: enabled latents, utilization, dead latents, growth."""
    return growing
