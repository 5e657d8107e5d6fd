"""Logits of linear probes on texts, before and after latents are ablated, without decoding (SCR and TPP).

SAEBench ablates latents by replacing x by x' = x - x_hat + decode(f with some latents set to 0), at every position of
the padded text. The decoder is affine, so a probe on the mean of x' over a text reads

    w x_mean + b - sum over ablated i of F_i (w . d_i),    F_i = (sum of f_i over all positions) / (counted tokens)

Each text is therefore encoded only once for all sets of ablated latents. As in SAEBench, BOS and padding contribute
the latents of a zero row.

Shape suffixes: N texts, B rows of latents, D d_in, F latents, P probes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ...common.errors import UsageError
from .base import SAELike, reconstruct
from .batched_probes import LinearProbes
from .pooled_activations import PooledLatents
from .probes import ProbeTask


def mean_latent_differences(pooled: PooledLatents, tasks: Sequence[ProbeTask]) -> Tensor:
    """For each task, the mean of every latent over the positive texts minus its mean over the negative texts (P, F), at
    counted tokens."""
    share_PN = torch.zeros(len(tasks), len(pooled.count_N))
    for share_N, task in zip(share_PN, tasks, strict=True):
        positive, negative = task.rows[task.label > 0.5], task.rows[task.label <= 0.5]
        share_N.index_add_(0, positive, torch.full((len(positive),), 1 / len(positive)))
        share_N.index_add_(0, negative, torch.full((len(negative),), -1 / len(negative)))
    return (share_PN / pooled.count_N) @ pooled.sum_NF


def strongest_latents(effect_F: Tensor, count: int) -> Tensor:
    """The `count` latents with the largest effects, or fewer if fewer latents have a nonzero effect.

    Latents without an effect rank above latents with a negative effect and may be selected. As in SAEBench, `topk`
    decides between equal effects.
    """
    return effect_F.topk(min(count, int(effect_F.count_nonzero()))).indices


@dataclass(frozen=True)
class ProbeReadout:
    """The logits of probes on each text, and how much each latent contributes to them."""

    logit_NP: Tensor
    latent_NF: Tensor  # F_i in the module's docstring: sum over all positions / counted tokens
    align_FP: Tensor  # w . d: change in a probe's logit per unit of a latent

    @classmethod
    def of(cls, probes: LinearProbes, mean_ND: Tensor, pooled: PooledLatents, W_dec: Tensor, context: int) -> Self:
        """`context` is the padded length in SAEBench. A latent that fires on a zero row fires on all padding."""
        padded_N = context - pooled.count_N
        latent_NF = (pooled.sum_NF + padded_N[:, None] * pooled.zero_F) / pooled.count_N[:, None]
        return cls(probes.logits(mean_ND), latent_NF, W_dec @ probes.weight_PD.T)

    def ablate(self, latents: Tensor) -> Tensor:
        """The logits (N, P) after ablating these latents."""
        return self.logit_NP - self.latent_NF[:, latents] @ self.align_FP[latents]


@torch.no_grad()
def affine_decoder(sae: SAELike, d_in: int, device: torch.device) -> Tensor:
    """The decoder matrix (F, D) on the CPU, computed by decoding unit latents if the SAE has no W_dec.

    Raises UsageError if `decode` is not an affine function of the latents, as the readout requires.
    """
    zero_1D = torch.zeros(1, d_in, device=device)  # with a layer norm, `decode` adds the mean of this row, which is 0
    d_sae = sae.encode(zero_1D).shape[-1]
    offset_D = reconstruct(sae, torch.zeros(1, d_sae, device=device), zero_1D)[0]
    W_dec = getattr(sae, "W_dec", None)
    if W_dec is None:
        W_dec = reconstruct(sae, torch.eye(d_sae, device=device), zero_1D) - offset_D
    W_dec = W_dec.float()
    f_BF = torch.rand(4, d_sae, generator=torch.Generator().manual_seed(0)).to(device)
    decoded_BD = reconstruct(sae, f_BF, zero_1D).float()
    error = (decoded_BD - (f_BF @ W_dec + offset_D)).abs().max()
    if not error <= 1e-2 * decoded_BD.abs().max():
        raise UsageError(
            "This SAE's decoder does not have the affine form f W_dec + b, so the effect that ablating a latent has on "
            "a probe cannot be read from W_dec. SCR and TPP need an affine decoder."
        )
    return W_dec.cpu()
