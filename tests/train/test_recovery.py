"""Learning, once: TopK finds the atoms that its data is made of. benchmarks/synthetic_recovery.py does it for all."""

import torch
from torch.nn.functional import normalize

from sae.train.loop import Training
from sae.train.recipe import Setting, find_recipe


def test_topk_finds_the_atoms() -> None:
    random = torch.Generator().manual_seed(1000)  # not the weights' seed: they would start as the atoms
    atoms_AD = normalize(torch.randn(64, 32, generator=random), dim=1)

    def rows(count: int) -> torch.Tensor:
        active_BA = torch.rand(count, 64, generator=random) < 3 / 64
        return (active_BA * (0.5 + torch.rand(count, 64, generator=random))) @ atoms_AD

    def cosine() -> float:
        return float((atoms_AD @ variant.sae.W_dec.detach().T).max(1).values.mean())

    torch.manual_seed(0)
    variant = find_recipe("topk").make(Setting(32, 64, 600, 256), {"k": 3})
    sample = rows(10_000)
    variant.adapt(sample.mean(0), float(sample.square().sum(1).mean()))
    training, before = Training(variant, 600, "cpu"), cosine()
    for number in range(600):
        training.between(number, training.step(rows(256)))
    assert before < 0.6
    assert cosine() > 0.95
