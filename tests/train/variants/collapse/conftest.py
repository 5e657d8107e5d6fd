"""Fixtures of the tests of paper 000: steps, variants and short training runs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sae.train.loop import Trainer
from sae.train.recipe import find_recipe
from sae.train.sae import SAE
from sae.train.step import Step
from sae.train.variant import RunConfig, Variant


def step_on(sae: SAE, x_BD: Tensor, i: int = 0) -> Step:
    optimizer = torch.optim.AdamW(sae.parameters(), lr=0.01)
    return Step(torch.tensor(i), sae, optimizer, x_BD, *sae(x_BD))


def build_small(name: str, d_in: int = 32, d_sae: int = 64, steps: int = 20, **options: object) -> Variant:
    torch.manual_seed(0)
    return find_recipe(name).make(RunConfig(d_in, d_sae, steps, 64), options)


def train_on_noise(variant: Variant, steps: int) -> Trainer:
    trainer = Trainer(variant, steps, "cpu")
    generator = torch.Generator().manual_seed(1)
    for number in range(steps):
        trainer.run_periodic(number, trainer.step(torch.randn(64, variant.sae.d_in, generator=generator)))
    return trainer


@pytest.fixture
def step_of() -> Callable[..., Step]:
    """A function that runs an SAE on a batch and returns the `Step`."""
    return step_on


@pytest.fixture
def build() -> Callable[..., Variant]:
    """A function that builds a recipe with options as keywords, by default with 64 latents on 32 dimensions."""
    return build_small


@pytest.fixture
def trained() -> Callable[..., Trainer]:
    """A function that trains a variant for some steps on random rows and returns the `Trainer`."""
    return train_on_noise
