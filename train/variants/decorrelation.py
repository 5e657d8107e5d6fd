"""Selective feature decorrelation (paper 003).

    L = |x - x_hat|^2 + l1 |f|_1 + strength R(tau)                          (1)
    R = mean over the most correlated 0.1 % of pairs of ReLU(|C_ij| - tau)  (3)

The paper's nine runs ended after zero steps, so it measured nothing.
"""

import torch
from torch import Tensor

from ...common.errors import UsageError
from ..recipe import recipe
from ..step import LossTerm, Step
from ..variant import RunConfig, Variant
from .baselines import relu

SPARSE_FROM = 64  # if at most one in so many of n^2 pairs is chosen, gathering columns costs less than a full product


class Decorrelation(LossTerm):
    """R(tau): penalize the correlation of only those pairs that fire together most (3).

    Paper: claims O(n); finding the pairs takes the dense C, O(B n^2), and a share of the pairs is O(n^2) of them. C is
    computed without a gradient. The gradient of R is S f_hat, S_ij = 1/|S_t| for the chosen pairs over tau: O(B pairs)
    while they are few, another product of C's size when they are many.
    """

    all_pairs = True

    def __init__(self, fraction: float = 0.001) -> None:
        super().__init__()
        self.fraction = fraction

    def forward(self, step: Step) -> Tensor:
        with torch.autocast(step.f_BF.device.type, enabled=False):  # correlations in float32
            return self.penalty(step)

    def penalty(self, step: Step) -> Tensor:
        f_BF = step.f_BF.float()
        n = f_BF.shape[1]
        unit_BF = f_BF / f_BF.norm(dim=0).clamp_min(1e-8)
        with torch.no_grad():
            corr_FF = unit_BF.T @ unit_BF  # (2); a latent that is silent in the batch has a column of zeros
            alive = (corr_FF.diagonal() > 0.5).sum()
            pairs = (alive * (alive - 1) / 2).clamp_min(1)
            upper_FF = corr_FF.triu_(1)  # C is not negative, as latents are not: |C| = C
            mean = upper_FF.sum() / pairs
            sd = (upper_FF.square().sum() / pairs - mean.square()).clamp_min(0).sqrt()
            tau = mean + sd  # (4). Paper: tau is a statistic; with a gradient it would correlate every other pair
            top = upper_FF.flatten().topk(max(1, round(self.fraction * n * (n - 1) / 2)), sorted=False)
        step.metrics |= {"tau": tau, "mean_correlation": mean, "sd_correlation": sd}
        # If fewer pairs fire together than `fraction` asks for, the rest are zeros of the lower triangle, not pairs.
        passes_P = (top.values > tau) & (top.values > 0)
        if SPARSE_FROM * len(top.indices) < n * n:
            unit_FB = unit_BF.T.contiguous()
            cosine_P = (unit_FB[top.indices // n] * unit_FB[top.indices % n]).sum(1)
            return ((cosine_P - tau) * passes_P).mean()
        value = ((top.values - tau) * passes_P).mean()
        weight_FF = torch.zeros_like(upper_FF).flatten().scatter(0, top.indices, passes_P / len(top.indices)).view(n, n)
        unit = unit_BF.detach()
        product = ((unit @ (weight_FF + weight_FF.T)) * unit_BF).sum()
        return value + (product - product.detach())


@recipe("decorrelation", paper="003", equations="(1)-(5)", width=1, paper_exact={})
def decorrelation(
    config: RunConfig,
    strength: float = 0.1,
    fraction: float = 0.001,
    l1: float = 0.04,
    l1_warmup: int | None = None,
    pre_bias: bool = False,
) -> Variant:
    """`relu` plus a penalty on the most correlated 0.1 % of pairs.

    Paper: gives no strength. Of the encoder it says f_enc(x), a function of x and not of x - b_dec.

    Args:
        strength: Strength of the penalty R (1).
        fraction: Share of the pairs that is penalized, the most correlated ones (3).
        l1: Strength of the L1 penalty (1).
        l1_warmup: Steps over which the L1 penalty rises from zero. None: a twentieth of the run.
        pre_bias: Subtract b_dec from the encoder's input.
    """
    if not 0 < fraction <= 1:
        raise UsageError(f"invalid fraction={fraction:g}: expected a share of the pairs above 0 and up to 1.")
    variant = relu(config, l1=l1, l1_warmup=l1_warmup, pre_bias=pre_bias)
    variant.add_term("decorrelation", strength, Decorrelation(fraction))
    return variant
