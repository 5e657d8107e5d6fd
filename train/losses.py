"""Loss terms that more than one recipe uses."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .activation_functions import TopK
from .dense_ops import total
from .mechanisms import DeadLatents
from .step import LossTerm, Step


class MSE(LossTerm):
    """mean_B sum_D (x - x_hat)^2."""

    undivided = ""

    def forward(self, step: Step) -> Tensor:
        return step.squared_error / step.tokens


class L1(LossTerm):
    """mean_B sum_F |f|."""

    sparsity = True
    undivided = ""

    def forward(self, step: Step) -> Tensor:
        if not step.sae.activation[-1].nonnegative:
            return step.f_BF.abs().sum(-1).mean()
        return total(step.f_BF if step.kept is None else step.kept.value_N) / step.tokens


class MultiTopK(LossTerm):
    """mean_B sum_D (x - x_hat)^2 with the 4 k largest latents of each token (Multi-TopK, Gao et al. 2024, 5.3).

    An SAE trained with this loss also works with more or fewer latents than the k that it was trained with. The paper
    adds this loss, with weight 1/8, to the loss with k latents.
    """

    undivided = ""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.activation = TopK(k)

    def forward(self, step: Step) -> Tensor:
        recon_BD = step.sae.decode(self.activation(step.pre_BF))
        return (step.x_BD - recon_BD.float()).square().sum(-1).mean()


class AuxK(LossTerm):
    """Dead latents reconstruct the residual (Gao et al. 2024, A.2).

    z = top-k_aux of ReLU(pre) among the dead latents, e_hat = z W_dec without b_dec. The loss is the squared error
    between e_hat and the detached residual, divided by the residual's variance, times min(1, dead/k_aux). The weights
    of the dead latents are gathered into a small dense problem, through which the gradient reaches their encoder
    weights.
    """

    undivided = ""

    def __init__(self, dead: DeadLatents, k_aux: int) -> None:
        super().__init__()
        self.dead, self.k_aux = dead, k_aux

    @property
    def reads_batch(self) -> bool:  # type: ignore[override]
        return len(self.dead.index_A) > 0

    def forward(self, step: Step) -> Tensor:
        index_A, real_A = self.dead.index_A, self.dead.real_A
        if not len(index_A):
            return step.x_BD.new_zeros(())
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
        if step.part_of is not None:  # so that the mean over the parts is the loss of the whole batch
            residual_BD = step.whole.error_BD
            error = error * (step.whole.tokens / step.tokens)
        variance = (residual_BD - residual_BD.mean(0)).square().sum()
        share = (real_A.sum() / self.k_aux).clamp(max=1.0)
        # If the residual has no variance (a batch of one token), the loss and its gradient are 0.
        return share * error / torch.where(variance > 0, variance, torch.inf)


Reconstruction = Literal["sum", "mean"]


def reconstruction_weight(reconstruction: Reconstruction, d_in: int) -> float:
    """The coefficient that makes MSE a sum or a mean over d_in. A mean makes penalties d_in times as strong."""
    return 1.0 if reconstruction == "sum" else 1 / d_in
