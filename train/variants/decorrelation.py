"""Selective feature decorrelation (paper 003).

    L = |x - x_hat|^2 + l1 |f|_1 + strength R(tau)                          (1)
    R = mean over the most correlated 0.1 % of pairs of ReLU(|C_ij| - tau)  (3)

The paper's nine runs ended after zero steps, so it measured nothing.
"""

from typing import Literal

import torch
from torch import Tensor

from ...common.errors import UsageError
from ..recipe import recipe
from ..step import LossTerm, Mechanism, Step
from ..variant import RunConfig, Variant
from .baselines import relu

SPARSE_FROM = 64  # if at most one in so many of n^2 pairs is chosen, gathering columns costs less than a full product


class Decorrelation(LossTerm):
    """R(tau): penalize the correlation of only those pairs that fire together most (3).

    Paper: claims O(n); finding the pairs takes the dense C, O(B n^2), and a share of the pairs is O(n^2) of them. C is
    computed without a gradient. The gradient of R is S f_hat, S_ij = 1/|S_t| for the chosen pairs over tau: O(B pairs)
    while they are few, another product of C's size when they are many.

    Args:
        fraction: |S_t| over n (n - 1)/2, the number of pairs.
        tau_over: The pairs whose correlations give tau, see `decorrelation`.
    """

    all_pairs = True
    undivided = "the correlations of latents are those of the whole batch"

    def __init__(self, fraction: float = 0.001, tau_over: Literal["alive", "all"] = "alive") -> None:
        super().__init__()
        self.fraction, self.tau_over = fraction, tau_over

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
            counted = alive if self.tau_over == "alive" else torch.full_like(alive, n)
            pairs = (counted * (counted - 1) / 2).clamp_min(1)
            upper_FF = corr_FF.triu_(1)  # C is not negative, as latents are not: |C| = C
            mean = upper_FF.sum() / pairs
            sd = (upper_FF.square().sum() / pairs - mean.square()).clamp_min(0).sqrt()
            tau = mean + sd  # (4). Paper: tau is a statistic; with a gradient it would correlate every other pair
            top = upper_FF.flatten().topk(max(1, round(self.fraction * n * (n - 1) / 2)), sorted=False)
        step.metrics |= {"tau": tau, "mean_correlation": mean, "sd_correlation": sd}
        # If fewer pairs fire together than `fraction` asks for, the rest are zeros of the lower triangle, not pairs.
        # They do not pass, since tau is not negative.
        passes_P = top.values > tau
        step.metrics["pairs_over_tau"] = passes_P.sum()
        if SPARSE_FROM * len(top.indices) < n * n:
            unit_FB = unit_BF.T.contiguous()
            cosine_P = (unit_FB[top.indices // n] * unit_FB[top.indices % n]).sum(1)
            return ((cosine_P - tau) * passes_P).mean()
        value = ((top.values - tau) * passes_P).mean()
        weight_FF = torch.zeros_like(upper_FF).flatten().scatter(0, top.indices, passes_P / len(top.indices)).view(n, n)
        unit = unit_BF.detach()
        product = ((unit @ (weight_FF + weight_FF.T)) * unit_BF).sum()
        return value + (product - product.detach())


class PenalizedPairs(Mechanism):
    """Counts the pairs that R penalized, summed over the steps from the run's start."""

    acted_pairs: Tensor  # () int64

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("acted_pairs", torch.zeros((), dtype=torch.int64))

    def after_step(self, step: Step) -> None:
        self.acted_pairs += step.metrics["pairs_over_tau"]

    def scalars(self) -> dict[str, Tensor]:
        return {"penalized_pairs": self.acted_pairs}


@recipe("decorrelation", paper="003", equations="(1)-(5)", width=1, paper_exact={})
def decorrelation(
    config: RunConfig,
    strength: float = 0.1,
    fraction: float = 0.001,
    l1: float = 0.04,
    l1_warmup: int | None = None,
    pre_bias: bool = False,
    tau_over: Literal["alive", "all"] = "alive",
) -> Variant:
    """`relu` plus a penalty on the most correlated 0.1 % of pairs.

    Paper: gives no strength. Of the encoder it says f_enc(x), a function of x and not of x - b_dec. No warm-up of the
    L1 penalty is printed (l1_warmup=0). tau is of all off-diagonal correlations (4), but a latent that is silent in the
    batch has none, since (2) is 0/0: by default its pairs are left out (tau_over=all counts them as 0). 5.1 has tau
    follow running statistics, (4) those of step t, which are used. (5) normalizes the rows of W_dec after each update;
    the gradient along each row is removed before it, too, so that Adam's moments hold none of it.

    Args:
        strength: Strength of the penalty R (1).
        fraction: Share of the pairs that is penalized, the most correlated ones (3).
        l1: Strength of the L1 penalty (1).
        l1_warmup: Steps over which the L1 penalty rises from zero. None: a twentieth of the run.
        pre_bias: Subtract b_dec from the encoder's input.
        tau_over: Pairs whose mean and standard deviation give tau (4). alive: those of two latents that fire in the
            batch. all: every pair; the correlation of a silent latent counts as 0.
    """
    if not 0 < fraction <= 1:
        raise UsageError(f"invalid fraction={fraction:g}: expected a share of the pairs above 0 and up to 1.")
    variant = relu(config, l1=l1, l1_warmup=l1_warmup, pre_bias=pre_bias)
    variant.add_term("decorrelation", strength, Decorrelation(fraction, tau_over))
    variant.mechanisms.insert(1, PenalizedPairs())
    return variant
