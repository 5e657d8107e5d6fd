"""Decoder norms folded into the latents: f_i <- f_i * |d_i|, d_i <- d_i / |d_i|.

Folding matters for metrics that are sensitive to the scale of latents (absorption, sparse probing, unlearning). Once
the norms are folded, it makes no difference to them how an SAE divides the scale between its latents and its decoder.

Shape suffixes: N rows, D d_in, F latents.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ...common.device import copy_to_device
from ...common.errors import SaeError
from .base import SAELike, encode_finite
from .letter_probes import SparseLatents

MAX_DENSE_LATENTS = 2**25  # largest number of rows x latents in dense form at a time
NORM_TOLERANCE = 1e-5  # allowed deviation from 1 of the norms of W_dec's rows


def decoder_norms_to_fold(sae: SAELike) -> Tensor | None:
    """The norms of the decoder rows (F,). Latents must be multiplied by these norms if the rows are scaled to unit
    length.

    None if the rows already have unit length, or if the SAE has no W_dec.
    """
    W_dec = getattr(sae, "W_dec", None)
    if W_dec is None:
        return None
    norm_F = W_dec.detach().float().norm(dim=1)
    tolerance = 1e-5 if W_dec.dtype == torch.float32 else 1e-2
    return None if bool(((norm_F - 1).abs() <= tolerance).all()) else norm_F


@dataclass(frozen=True)
class UnitDecoderSAE:
    """An SAE with its decoder norms folded into the latents, so that the rows of W_dec have unit length."""

    sae: SAELike
    W_dec: Tensor  # (F, D) float32, with unit rows
    norm_F: Tensor  # multiplies the latents, after the activation
    folded: int  # number of rows whose norm was not 1

    @classmethod
    def of(cls, sae: SAELike, device: torch.device) -> Self:
        W_dec = getattr(sae, "W_dec", None)
        if W_dec is None:
            raise SaeError(
                f"Absorption needs the decoder directions of latents, but {type(sae).__name__} has no W_dec."
            )
        W_dec = W_dec.detach().to(device).float()
        norm_F = W_dec.norm(dim=1)
        folded = int(((norm_F - 1).abs() > NORM_TOLERANCE).sum())
        unit = W_dec / torch.where(norm_F > 0, norm_F, 1)[:, None]
        return cls(sae, unit, norm_F if folded else torch.ones_like(norm_F), folded)

    def encode_batches(self, x_ND: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows and their latents in float32, at most MAX_DENSE_LATENTS latents at a time."""
        for part_ND in x_ND.split(max(1, MAX_DENSE_LATENTS // len(self.W_dec))):
            yield part_ND, encode_finite(self.sae, copy_to_device(part_ND, self.W_dec.device)) * self.norm_F

    def sparse_latents(self, x_ND: Tensor) -> SparseLatents:
        return SparseLatents.from_dense((f_NF for _, f_NF in self.encode_batches(x_ND)), len(self.W_dec))
