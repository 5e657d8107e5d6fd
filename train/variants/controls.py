"""Controls: SAEs with parameters that stay random (Korznikov et al. 2026, arXiv 2602.14111, section 4.1).

    frozen-decoder        W_dec is drawn at random and never trained
    soft-frozen-decoder   each row of W_dec keeps a minimum cosine to its random start
    frozen-encoder        W_enc is drawn at random and never trained

Everything else is as in `batchtopk` (or `topk`). So a score that a control also reaches is not evidence of learned
features. `sae evaluate --controls` trains controls for the runs that it evaluates, and shows them as reference rows.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ...common.errors import UsageError
from ..mechanisms import UnitNormDecoder
from ..recipe import recipe
from ..sae import SAE
from ..step import Mechanism, Step
from ..variant import RunConfig, Variant
from .baselines import AUX_OPTIONS, batchtopk, topk

PAPER = "Korznikov et al. 2026"
Base = Literal["batchtopk", "topk"]


class CovarianceStart(Mechanism):
    """Draws rows of W_dec from a normal distribution with the activations' covariance and normalizes them (appendix E).

        W_i <- C^1/2 g_i / |C^1/2 g_i|,     W_enc <- W_dec^T

    C is the covariance of the first rows that the run reads. The g_i are the SAE's initial rows, so runs with the same
    seed use the same g_i. The g_i are isotropic, and their lengths do not matter.
    """

    reads_rows = True

    def start_from_rows(self, sae: SAE, sample_ND: Tensor) -> None:
        variance_D, axis_DD = torch.linalg.eigh(torch.cov(sample_ND.T.double()))
        root_DD = axis_DD * variance_D.clamp_min(0).sqrt() @ axis_DD.T  # symmetric: the signs of the axes cancel
        row_FD = F.normalize(sae.W_dec.data.double() @ root_DD, dim=1)
        sae.W_dec.data.copy_(row_FD)
        sae.W_enc.data.copy_(row_FD.T)


class DecoderCone(UnitNormDecoder):
    """Keeps each row of W_dec at unit norm, and the row's cosine with its initial value at or above `cosine`.

    It is the last mechanism of its variant.

        W_i <- the nearest unit vector with W_i . s_i = cosine,     if W_i . s_i < cosine

    s_i is the initial value of row i. The nearest vector lies in the plane of W_i and s_i.
    """

    start_FD: Tensor
    mean_cosine: Tensor  # (), mean cosine between the rows and their initial values
    at_edge: Tensor  # (), share of the rows that the last step moved out of their cones

    def __init__(self, sae: SAE, cosine: float) -> None:
        super().__init__()
        self.cosine, self.sine = cosine, (1 - cosine**2) ** 0.5
        self.register_buffer("start_FD", sae.W_dec.detach().clone())
        self.register_buffer("mean_cosine", torch.ones(()))
        self.register_buffer("at_edge", torch.zeros(()))

    def after_step(self, step: Step) -> None:
        super().after_step(step)
        row_FD = step.sae.W_dec.data
        cosine_F = torch.linalg.vecdot(row_FD, self.start_FD)
        outside_F = cosine_F < self.cosine
        # The edge is cosine s + sine v/|v| with v = W - (W . s) s, so |v|^2 = 1 - (W . s)^2.
        keep_F = self.sine / (1 - cosine_F.square()).clamp_min(1e-12).sqrt()
        keep_F = torch.where(outside_F, keep_F, 1.0)
        pull_F = torch.where(outside_F, self.cosine - keep_F * cosine_F, 0.0)
        row_FD.mul_(keep_F[:, None]).add_(pull_F[:, None] * self.start_FD)
        self.mean_cosine.copy_(cosine_F.clamp_min(self.cosine).mean())
        self.at_edge.copy_(outside_F.float().mean())

    def scalars(self) -> dict[str, Tensor]:
        return {"decoder_cosine": self.mean_cosine, "rows_at_edge": self.at_edge}


def base_variant(config: RunConfig, base: Base, k: float, aux: float, aux_k: int | None) -> Variant:
    """The variant that a control changes in one respect."""
    # Paper: uses BatchTopK, JumpReLU and ReLU, and TopK in appendix C. BatchTopK is the default here, because its k
    # sets L0. Paper: AdamW with a learning rate of 2e-4 and batches of 4,098 at width 73,728. Here the optimizer
    # settings and the batch size are those of a run of `batchtopk`.
    if base == "batchtopk":
        return batchtopk(config, k=k, aux=aux, aux_k=aux_k)
    if k != int(k):
        raise UsageError(f"With base=topk, k has to be a whole number, but it is {k:g}.")
    return topk(config, k=int(k), aux=aux, aux_k=aux_k)


@recipe("frozen-decoder", paper=PAPER, equations="4.1, App. E", switched_off=AUX_OPTIONS)
def frozen_decoder(
    config: RunConfig,
    k: float = 32,
    base: Base = "batchtopk",
    init: Literal["cov", "iso"] = "cov",
    aux: float = 1 / 32,
    aux_k: int | None = None,
) -> Variant:
    """A control: `batchtopk` with a random decoder that is never trained.

    The scores of this control show what an encoder can achieve with random directions.

    Args:
        k: Active latents per token, on average over the batch.
        base: Recipe that the control changes: batchtopk or topk.
        init: How the rows are drawn. cov: with the covariance of the activations, which is the stronger control in the
            paper. iso: uniformly from the unit sphere.
        aux: Weight of AuxK, which trains dead latents to model the residual.
        aux_k: Dead latents that AuxK uses per token. None: d_in / 2.
    """
    variant = base_variant(config, base, k, aux, aux_k)
    variant.sae.W_dec.requires_grad_(False)
    variant.mechanisms.pop(-1)  # UnitNormDecoder, which could change the last bits of the rows
    # Paper: does not say how the encoder is initialized. Here the encoder starts as the transpose of the decoder,
    # as in every SAE.
    if init == "cov":
        variant.mechanisms.append(CovarianceStart())
    return variant


@recipe("soft-frozen-decoder", paper=PAPER, equations="4.1, App. D", switched_off=AUX_OPTIONS)
def soft_frozen_decoder(
    config: RunConfig,
    k: float = 32,
    cosine: float = 0.8,
    base: Base = "batchtopk",
    aux: float = 1 / 32,
    aux_k: int | None = None,
) -> Variant:
    """A control: `batchtopk` with decoder rows near their random start.

    Rows are initialized uniformly on the unit sphere. After each step, rows that have turned too far are projected
    back.

    Args:
        k: Active latents per token, on average over the batch.
        cosine: Minimum cosine between a decoder row and its initial value.
        base: Recipe that the control changes: batchtopk or topk.
        aux: Weight of AuxK, which trains dead latents to model the residual.
        aux_k: Dead latents that AuxK uses per token. None: d_in / 2.
    """
    if not 0 <= cosine < 1:
        raise UsageError(
            f"cosine={cosine:g} is out of range: give at least 0 and below 1. For a decoder that is not trained at "
            "all, use frozen-decoder."
        )
    variant = base_variant(config, base, k, aux, aux_k)
    variant.mechanisms[-1] = DecoderCone(variant.sae, cosine)
    return variant


@recipe("frozen-encoder", paper=PAPER, equations="4.1", switched_off=AUX_OPTIONS)
def frozen_encoder(
    config: RunConfig, k: float = 32, base: Base = "batchtopk", aux: float = 1 / 32, aux_k: int | None = None
) -> Variant:
    """A control: `batchtopk` with a random encoder that is never trained.

    b_enc, which sets how readily each latent fires, and the decoder are trained.

    Args:
        k: Active latents per token, on average over the batch.
        base: Recipe that the control changes: batchtopk or topk.
        aux: Weight of AuxK, which trains the biases and decoder rows of dead latents to model the residual.
        aux_k: Dead latents that AuxK uses per token. None: d_in / 2.
    """
    variant = base_variant(config, base, k, aux, aux_k)
    variant.sae.W_enc.requires_grad_(False)
    return variant
