"""What a linear probe reads from texts, and what it reads after latents of an SAE are ablated."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ...common.errors import UsageError
from .base import SAELike
from .batched_probes import LinearProbes
from .pooled_activations import PooledLatents
from .probes import ProbeTask


def mean_latent_differences(pooled: PooledLatents, tasks: Sequence[ProbeTask]) -> Tensor:
    """Mean latents of each task's positive texts minus those of its negative ones (P, F), over the counted tokens."""
    share_PN = torch.zeros(len(tasks), len(pooled.count_N))
    for share_N, task in zip(share_PN, tasks, strict=True):
        positive, negative = task.rows[task.label > 0.5], task.rows[task.label <= 0.5]
        share_N.index_add_(0, positive, torch.full((len(positive),), 1 / len(positive)))
        share_N.index_add_(0, negative, torch.full((len(negative),), -1 / len(negative)))
    return (share_PN / pooled.count_N) @ pooled.sum_NF


def strongest_latents(effect_F: Tensor, count: int) -> Tensor:
    """The latents of largest effect, `count` or as many as have an effect that is not 0.

    Where effects are negative, a latent without any ranks before them and may be picked; which one of several is
    left to `topk`, as in SAEBench.
    """
    return effect_F.topk(min(count, int(effect_F.count_nonzero()))).indices


@dataclass(frozen=True)
class ProbeReadout:
    """What probes read from each text, and what each latent adds to that."""

    logit_NP: Tensor
    latent_NF: Tensor  # over all positions, per counted token
    align_FP: Tensor  # w . d: what a probe reads of one unit of a latent

    @classmethod
    def of(cls, probes: LinearProbes, mean_ND: Tensor, pooled: PooledLatents, W_dec: Tensor, context: int) -> Self:
        """`context` is what SAEBench pads texts to. A latent that fires on a zero row fires in all of the padding."""
        padded_N = context - pooled.count_N
        latent_NF = (pooled.sum_NF + padded_N[:, None] * pooled.zero_F) / pooled.count_N[:, None]
        return cls(probes.logits(mean_ND), latent_NF, W_dec @ probes.weight_PD.T)

    def ablated(self, latents: Tensor) -> Tensor:
        """The logits (N, P) without these latents."""
        return self.logit_NP - self.latent_NF[:, latents] @ self.align_FP[latents]


@torch.no_grad()
def affine_decoder(sae: SAELike, d_in: int, device: torch.device) -> Tensor:
    """The decoder's matrix (F, D) on the CPU; that of an object without W_dec is what it makes of unit latents.

    Raises UsageError where decode is no affine function of the latents, which the read-out relies on.
    """
    d_sae = sae.encode(torch.zeros(1, d_in, device=device)).shape[-1]
    offset_D = sae.decode(torch.zeros(1, d_sae, device=device))[0]
    W_dec = getattr(sae, "W_dec", None)
    if W_dec is None:
        W_dec = sae.decode(torch.eye(d_sae, device=device)) - offset_D
    W_dec = W_dec.float()
    f_BF = torch.rand(4, d_sae, generator=torch.Generator().manual_seed(0)).to(device)
    decoded_BD = sae.decode(f_BF).float()
    error = (decoded_BD - (f_BF @ W_dec + offset_D)).abs().max()
    if not error <= 1e-2 * decoded_BD.abs().max():
        raise UsageError(
            "This SAE decodes by more than f W_dec + b, so what ablating a latent does to a probe cannot be read off "
            "W_dec. SCR and TPP measure SAEs with an affine decoder only."
        )
    return W_dec.cpu()
