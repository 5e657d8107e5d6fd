"""Clamp latents of an SAE on the residual stream. This is the intervention of the unlearning metric.

Shape suffixes: N prompts, S positions, D d_in, F latents, K clamped latents, M multipliers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...cache.outliers import outlier_mask
from .base import EvalTarget
from .packing import TOKENS_PER_ENCODE, encode_float32


@dataclass(frozen=True)
class ClampPlan:
    """The clamped latents of one SAE, for each retain threshold and number of latents."""

    target: EvalTarget
    selected: dict[tuple[float, int], tuple[int, ...]]
    unit_FD: Tensor  # decoder rows of unit length
    scale_F: Tensor  # norms folded into the latents
    folded: bool  # whether any norm was not 1

    @property
    def selections(self) -> list[tuple[int, ...]]:
        """The distinct non-empty selections. An empty selection does not change the model."""
        return [selection for selection in dict.fromkeys(self.selected.values()) if selection]

    @property
    def union(self) -> list[int]:
        """All latents that occur in any selection, in ascending order."""
        return sorted({latent for selection in self.selections for latent in selection})

    def latents(self, x_NSD: Tensor) -> Tensor:
        """Activations of the latents of `union` (N, S, K), with decoder norms folded in; 0 at outlier rows."""
        union = torch.tensor(self.union, dtype=torch.int64, device=x_NSD.device)
        parts = [encode_float32(self.target.sae, x)[:, union] for x in x_NSD.flatten(0, 1).split(TOKENS_PER_ENCODE)]
        f_NSK = torch.cat(parts).view(*x_NSD.shape[:2], -1) * self.scale_F[union]
        return torch.where(outlier_mask(x_NSD, self.target.norm_limit)[..., None], 0, f_NSK)

    def clamp(self, x_NSD: Tensor, f_NSK: Tensor, selection: Sequence[int], multipliers_M: Tensor) -> Tensor:
        """The residual stream with one selection clamped, for every multiplier (M, N, S, D). `f_NSK` is the result of
        `latents`."""
        column = {latent: i for i, latent in enumerate(self.union)}
        f_NSK = f_NSK[..., [column[latent] for latent in selection]]
        return clamp_latents(x_NSD, f_NSK, self.unit_FD[list(selection)], multipliers_M)


def clamp_latents(x_NSD: Tensor, f_NSK: Tensor, W_dec_KD: Tensor, multipliers_M: Tensor) -> Tensor:
    """Set each firing latent to -multiplier, for every multiplier (M, N, S, D): x + sum (-m - f_k) d_k.

    The SAE's reconstruction error remains part of x. The first position, BOS, is left unchanged.
    """
    fires_NSK = f_NSK > 0
    fires_NSK[:, 0] = False
    without_NSD = x_NSD.float() - (f_NSK * fires_NSK) @ W_dec_KD
    push_NSD = fires_NSK.float() @ W_dec_KD
    return (without_NSD - multipliers_M[:, None, None, None] * push_NSD).to(x_NSD.dtype)
