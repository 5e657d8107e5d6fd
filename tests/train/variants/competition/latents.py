"""Latents and steps that the tests of paper 002 share."""

import torch
from torch import Tensor

from sae.train.activation_functions import TopK
from sae.train.sae import SAE
from sae.train.step import Step
from sae.train.variants.competition.pairs import DensePairs, PairTable


def step_of(f_BF: Tensor, sae: SAE | None = None, i: int = 0) -> Step:
    """A step with these latents. The pre-activations are NaN, so a result that depends on them would be NaN."""
    sae = sae or SAE(4, f_BF.shape[1])
    x_BD, pre_BF = torch.zeros(len(f_BF), sae.d_in), torch.full_like(f_BF, torch.nan)
    return Step(torch.tensor(i), sae, torch.optim.SGD(sae.parameters()), x_BD, pre_BF, f_BF, x_BD)


def codes(seed: int, tokens: int = 256, latents: int = 24, k: int = 4) -> Tensor:
    """k positive latents per token. The first latents are active far more often than the last ones."""
    generator = torch.Generator().manual_seed(seed)
    noise_BF = torch.rand(tokens, latents, generator=generator) + torch.linspace(0.5, 0, latents)
    return TopK(k)(noise_BF)


def stores(latents: int = 24) -> tuple[DensePairs, PairTable]:
    return DensePairs(latents), PairTable(latents, latents * (latents - 1) // 2)


def three_latents() -> tuple[Step, SAE]:
    """Four tokens: latent 0 fires on all but the last, latent 1 on the first two, latent 2 on the last two."""
    f_BF = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0], [1.0, 0.0, 3.0], [0.0, 0.0, 3.0]])
    sae = SAE(2, 3)
    sae.W_dec.data = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    return step_of(f_BF, sae), sae
