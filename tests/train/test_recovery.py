"""TopK and ReLU recover the atoms that their data is made of. benchmarks/synthetic_recovery.py tries every recipe."""

import pytest
import torch
from torch.nn.functional import normalize

from sae.train.loop import Trainer
from sae.train.recipe import find_recipe
from sae.train.variant import RunConfig

STEPS = 600


@pytest.mark.parametrize(
    "name, options", [("topk", {"k": 3}), pytest.param("relu", {"l1": 0.2}, marks=pytest.mark.slow)]
)
def test_the_atoms_are_found(name: str, options: dict) -> None:
    """Each row combines about three of 32 atoms in 32 dimensions.

    The measure is the mean over atoms of the cosine with the nearest decoder row.
    """
    random = torch.Generator().manual_seed(1000)  # with the seed of the weights, the weights would start as the atoms
    atoms_AD = normalize(torch.randn(32, 32, generator=random), dim=1)

    def rows(count: int) -> torch.Tensor:
        active_BA = torch.rand(count, 32, generator=random) < 3 / 32
        return (active_BA * (0.5 + torch.rand(count, 32, generator=random))) @ atoms_AD

    def cosine() -> float:
        return float((atoms_AD @ variant.sae.W_dec.detach().T).max(1).values.mean())

    torch.manual_seed(0)
    variant = find_recipe(name).make(RunConfig(32, 64, STEPS, 256), {"lr": 5e-3, **options})
    sample = rows(10_000)
    variant.set_normalization(sample.mean(0), float(sample.square().sum(1).mean()))
    training, before = Trainer(variant, STEPS, "cpu"), cosine()
    for number in range(STEPS):
        training.run_periodic(number, training.step(rows(256)))
    assert before < 0.6
    assert cosine() > 0.95
