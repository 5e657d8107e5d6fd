"""Loss terms that more than one recipe uses."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .activations import TopK
from .mechanisms import DeadLatents
from .step import LossTerm, Step


class MSE(LossTerm):
    """mean_B sum_D (x - x_hat)^2."""

    def forward(self, step: Step) -> Tensor:
        return step.error_BD.square().sum(-1).mean()


class L1(LossTerm):
    """mean_B sum_F |f|."""

    sparsity = True

    def forward(self, step: Step) -> Tensor:
        return step.f_BF.abs().sum(-1).mean()


class MultiTopK(LossTerm):
    """mean_B sum_D (x - x_hat)^2 with the 4 k largest latents of each token (Multi-TopK, Gao et al. 2024, 5.3).

    So the SAE also codes with another number of latents than it was trained for; beside k it weighs 1/8 there.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.activation = TopK(k)

    def forward(self, step: Step) -> Tensor:
        recon_BD = step.sae.decode(self.activation(step.pre_BF))
        return (step.x_BD - recon_BD.float()).square().sum(-1).mean()


class AuxK(LossTerm):
    """Dead latents model what is left over (Gao et al. 2024, A.2).

    z = top-k_aux of ReLU(pre) among the dead, e_hat = z W_dec without b_dec, and the loss is its error on the detached
    residual as a share of the residual's variance, times min(1, dead/k_aux). The dead are gathered into a small dense
    problem, so the gradient reaches their rows of the encoder.
    """

    def __init__(self, dead: DeadLatents, k_aux: int) -> None:
        super().__init__()
        self.dead, self.k_aux = dead, k_aux

    def forward(self, step: Step) -> Tensor:
        index_A, real_A = self.dead.index_A, self.dead.real_A
        if not len(index_A):
            return step.recon_BD.new_zeros(())
        sae = step.sae
        enc_DA, dec_AD = sae.W_enc.index_select(1, index_A), sae.W_dec.index_select(0, index_A)
        bias_A = sae.b_enc.index_select(0, index_A)
        if sae.pre_bias:
            bias_A = bias_A - sae.b_dec @ enc_DA
        z_BA = F.relu(step.x_BD @ enc_DA + bias_A) * real_A
        top = z_BA.topk(min(self.k_aux, len(index_A)), dim=-1, sorted=False)
        residual_BD = step.error_BD.detach()
        model_BD = (torch.zeros_like(z_BA).scatter(-1, top.indices, top.values) @ dec_AD).float()
        error = (residual_BD - model_BD).square().sum()
        variance = (residual_BD - residual_BD.mean(0)).square().sum()
        share = (real_A.sum() / self.k_aux).clamp(max=1.0)
        # A residual without variance (a batch of one) has no share to explain: 0, and so is the gradient.
        return share * error / torch.where(variance > 0, variance, torch.inf)


Reconstruction = Literal["sum", "mean"]


def reconstruction_weight(reconstruction: Reconstruction, d_in: int) -> float:
    """The squared error is summed over d_in, or its mean over d_in, which makes a penalty d_in times as strong."""
    return 1.0 if reconstruction == "sum" else 1 / d_in
