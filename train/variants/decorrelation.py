"""Selective feature decorrelation (paper 003).

    L = |x - x_hat|^2 + l1 |f|_1 + strength R(tau)                          (1)
    R = mean over the most correlated 0.1 % of pairs of ReLU(|C_ij| - tau)  (3)

The paper's nine runs ended after zero steps, so they measured nothing. By default, a step chooses S_t from random pairs
(`pair_choice`); in `sae reproduce 003`, it chooses from all pairs, as the paper states.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ...common.errors import UsageError
from ..kernels.gram_operator import gram
from ..recipe import recipe
from ..step import LossTerm, Mechanism, Step
from ..variant import RunConfig, Variant
from .baselines import relu

SPARSE_FROM = 64  # if at most 1 in 64 of the n^2 pairs is chosen, gathering columns costs less than a full product


class Decorrelation(LossTerm):
    """R(tau): penalizes the correlation of only the pairs that fire together most (3).

    `pair_choice` determines among which pairs a step searches for the pairs to penalize:
        exact    all n (n - 1)/2 pairs. Paper: claims O(n), but the dense C takes O(B n^2), and a fixed share of all
                 pairs is O(n^2) pairs.
        blocks   the pairs in the same block. The latents are shuffled and cut into blocks of about `block` latents: O(B
                 n block). Each step uses another order, so every pair has the same chance. (2) to (4) are computed from
                 these pairs only, so tau and R are estimates from a random sample of all pairs. R has a small bias,
                 because the pairs that are most correlated within a sample are not a random sample of the pairs that
                 are most correlated overall.

    C is computed without a gradient. The gradient of R is S f_hat, with S_ij = 1/|S_t| for chosen pairs above tau. On a
    GPU, latents in bfloat16 are multiplied as they are: products of two of them are exact in float32, and so C has the
    rounding errors of a sum in float32.

    Args:
        fraction: |S_t| divided by the number of pairs from which it is chosen.
        tau_over: The pairs from whose correlations tau is computed; see `decorrelation`.
        pair_choice: The pairs among which a step searches for the most correlated ones.
        block: Approximate number of latents in a block. A dictionary with fewer than 1.5 times as many latents is not
            divided.
    """

    undivided = "the correlations of latents are those of the whole batch"
    seed: Tensor  # () int64, determines the random orders

    def __init__(
        self,
        fraction: float = 0.001,
        tau_over: Literal["alive", "all"] = "alive",
        pair_choice: Literal["blocks", "exact"] = "blocks",
        block: int = 256,
    ) -> None:
        super().__init__()
        self.fraction, self.tau_over, self.pair_choice, self.block = fraction, tau_over, pair_choice, block
        if pair_choice == "blocks":
            self.register_buffer("seed", torch.tensor(torch.initial_seed() % 2**62))

    def forward(self, step: Step) -> Tensor:
        with torch.autocast(step.f_BF.device.type, enabled=False):  # correlations in float32
            if self.pair_choice == "exact":
                return self.penalty(step, step.f_BF.float())
            return self.penalty_in_blocks(step, step.f_BF if step.f_BF.device.type == "cuda" else step.f_BF.float())

    def choose(self, corr_GMM: Tensor, step: Step) -> "ChosenPairs":
        """The most correlated pairs in all blocks. Overwrites the correlations `corr_GMM` with their upper triangle."""
        blocks, size, _ = corr_GMM.shape
        alive_G = (corr_GMM.diagonal(dim1=1, dim2=2) > 0.5).sum(1)  # the column of a silent latent is zero
        counted_G = alive_G if self.tau_over == "alive" else torch.full_like(alive_G, size)
        pairs = (counted_G * (counted_G - 1) / 2).sum().clamp_min(1)
        upper_GMM = corr_GMM.triu_(1)  # latents are never negative, so |C| = C
        mean = upper_GMM.sum() / pairs
        sd = (upper_GMM.square().sum() / pairs - mean.square()).clamp_min(0).sqrt()
        tau = mean + sd  # (4). Paper: tau is a statistic. Its gradient would correlate all other pairs
        count = max(1, round(self.fraction * blocks * size * (size - 1) / 2))
        top = upper_GMM.flatten().topk(count, sorted=False)
        # If fewer pairs fire together than `fraction` requires, the remaining chosen entries are zeros in the lower
        # triangle, which are not pairs. These zeros do not exceed tau, since tau is not negative.
        passes_P = top.values > tau
        step.metrics |= {"tau": tau, "mean_correlation": mean, "sd_correlation": sd, "pairs_over_tau": passes_P.sum()}
        return ChosenPairs(upper_GMM, top.values, top.indices, passes_P, tau)

    def penalty(self, step: Step, f_BF: Tensor) -> Tensor:
        """R over all pairs."""
        n = f_BF.shape[1]
        unit_BF = f_BF / f_BF.norm(dim=0).clamp_min(1e-8)
        with torch.no_grad():
            chosen = self.choose((unit_BF.T @ unit_BF)[None], step)  # (2)
        if SPARSE_FROM * len(chosen.index_P) < n * n:
            unit_FB = unit_BF.T.contiguous()
            cosine_P = (unit_FB[chosen.index_P // n] * unit_FB[chosen.index_P % n]).sum(1)
            return ((cosine_P - chosen.tau) * chosen.passes_P).mean()
        weight_FF = chosen.weight_GMM[0]
        unit = unit_BF.detach()
        product = ((unit @ (weight_FF + weight_FF.T)) * unit_BF).sum()
        return chosen.value + (product - product.detach())

    def penalty_in_blocks(self, step: Step, f_BF: Tensor) -> Tensor:
        """R over the pairs of this step's blocks."""
        n = f_BF.shape[1]
        blocks = max(1, round(n / self.block))
        size = n // blocks
        order_F = random_order(step.i, self.seed, n)
        order_N = order_F[: blocks * size]  # this step leaves out a few latents if the blocks do not cover n
        with torch.no_grad():
            f_GBM = f_BF.detach().index_select(1, order_N).unflatten(1, (blocks, size)).transpose(0, 1)
            gram_GMM = gram(f_GBM)
            scale_GM = 1 / gram_GMM.diagonal(dim1=1, dim2=2).sqrt().clamp_min(1e-8)
            scale_GMM = scale_GM[:, :, None] * scale_GM[:, None]
            chosen = self.choose(gram_GMM * scale_GMM, step)
            # R's gradient to a latent of length l is (sum_j S_ij f_hat_j - (sum_j S_ij C_ij) f_hat_i) / l.
            weight_GMM = chosen.weight_GMM
            share_GMM = weight_GMM * chosen.upper_GMM
            weight_GMM = weight_GMM + weight_GMM.mT - torch.diag_embed(share_GMM.sum(1) + share_GMM.sum(2))
        value: Tensor = BlockGradient.apply(f_BF, chosen.value, f_GBM, weight_GMM * scale_GMM, order_F)
        return value


class ChosenPairs(NamedTuple):
    """The pairs of S_t. `index_P` gives the positions of these pairs in the upper triangles of the blocks."""

    upper_GMM: Tensor
    value_P: Tensor
    index_P: Tensor
    passes_P: Tensor
    tau: Tensor

    @property
    def value(self) -> Tensor:
        """R (3)."""
        return ((self.value_P - self.tau) * self.passes_P).mean()

    @property
    def weight_GMM(self) -> Tensor:
        """S: 1/|S_t| for the pairs above tau and 0 otherwise, in the upper triangles."""
        weight = torch.zeros_like(self.upper_GMM).flatten()
        return weight.scatter(0, self.index_P, self.passes_P / len(self.index_P)).view_as(self.upper_GMM)


def random_order(i: Tensor, seed: Tensor, n: int) -> Tensor:
    """A random order of n latents for step i, from a hash of step and latent, so that no state has to be kept.

    The hash is splitmix64, except that torch's shifts keep the sign. So two latents may have the same hash, which is
    harmless.

    A random generator would have a state that the host has to read and checkpoints have to contain.
    """
    z_F = (torch.arange(n, device=i.device) + i * n + seed) * -0x61C8864680B583EB
    z_F = (z_F ^ (z_F >> 30)) * -0x40A7B892E31B1A47
    z_F = (z_F ^ (z_F >> 27)) * -0x6B2FB644ECCEEE15
    return (z_F ^ (z_F >> 31)).argsort(stable=True)


class BlockGradient(torch.autograd.Function):
    """A value whose gradient is f M for latents in the blocks and 0 for all others."""

    @staticmethod
    def forward(ctx: Any, f_BF: Tensor, value: Tensor, f_GBM: Tensor, matrix_GMM: Tensor, order_F: Tensor) -> Tensor:
        ctx.save_for_backward(f_GBM, matrix_GMM, order_F)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        f_GBM, matrix_GMM, order_F = ctx.saved_tensors
        blocks, tokens, size = f_GBM.shape
        count = blocks * size
        if f_GBM.dtype == torch.bfloat16:  # two passes over (B, F) instead of four
            ordered_BF = f_GBM.new_empty(tokens, len(order_F))
            ordered_BF[:, count:] = 0
            g_GBM = ordered_BF[:, :count].unflatten(1, (blocks, size)).transpose(0, 1)
            torch.bmm(f_GBM, torch.mul(matrix_GMM, gradient[0], out=f_GBM.new_empty(matrix_GMM.shape)), out=g_GBM)
            place_F = torch.empty_like(order_F).scatter_(0, order_F, torch.arange(len(order_F), device=order_F.device))
            return ordered_BF.index_select(1, place_F), None, None, None, None
        g_BN = (f_GBM @ (matrix_GMM * gradient[0])).transpose(0, 1).flatten(1)
        g_BF = g_BN.new_zeros(tokens, len(order_F))
        return g_BF.index_copy_(1, order_F[:count], g_BN), None, None, None, None


class PenalizedPairs(Mechanism):
    """Counts the pairs that R penalized, summed over all steps since the start of the run."""

    acted_pairs: Tensor  # () int64
    leaves_weights = True

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("acted_pairs", torch.zeros((), dtype=torch.int64))

    def after_step(self, step: Step) -> None:
        self.acted_pairs += step.metrics["pairs_over_tau"]

    def scalars(self) -> dict[str, Tensor]:
        return {"penalized_pairs": self.acted_pairs}


PAPER_EXACT: dict[str, tuple[Any, str]] = {
    "pair_choice": ("exact", "C of all pairs has n^2 entries and takes more than the rest of a step"),
}


@recipe(
    "decorrelation", paper="003", equations="(1)-(5)", width=1, paper_exact=PAPER_EXACT,
    switched_off={"block": ("pair_choice", ("exact",))},
)  # fmt: skip
def decorrelation(
    config: RunConfig,
    strength: float = 0.1,
    fraction: float = 0.001,
    l1: float = 0.04,
    l1_warmup: int | None = None,
    pre_bias: bool = False,
    tau_over: Literal["alive", "all"] = "alive",
    pair_choice: Literal["blocks", "exact"] = "blocks",
    block: int = 256,
) -> Variant:
    """`relu` plus a penalty on the most correlated 0.1 % of pairs.

    Paper: states no strength. The paper writes the encoder as f_enc(x), a function of x and not of x - b_dec. It
    mentions no warm-up of the L1 penalty (l1_warmup=0). tau is computed from all off-diagonal correlations (4). A
    latent that is silent in the batch has no correlations, since (2) is 0/0; by default its pairs are left out
    (tau_over=all counts them as 0). According to section 5.1, tau follows running statistics, but according to (4) it
    uses the statistics of step t; we follow (4). (5) normalizes the rows of W_dec after each update. We also remove the
    gradient along each row before the update, so that it does not enter Adam's moments. The paper chooses S_t from all
    pairs (3), which costs more than the rest of a step; by default we choose it from pairs that are drawn at random in
    each step.

    Args:
        strength: Strength of the penalty R (1).
        fraction: Size of S_t, the set of the most correlated pairs, as a share of the pairs from which they are chosen.
        l1: Strength of the L1 penalty (1).
        l1_warmup: Steps over which the L1 penalty rises from zero. None: a twentieth of the run.
        pre_bias: Subtract b_dec from the encoder's input.
        tau_over: Pairs whose mean and standard deviation give tau (4). alive: pairs of latents that both fire in the
            batch. all: every pair; the correlation of a silent latent counts as 0.
        pair_choice: Pairs among which a step searches for the most correlated ones. exact: all pairs (3). blocks: pairs
            within blocks of latents, which are drawn at random in each step; far cheaper for a wide dictionary.
        block: Approximate number of latents in a block. A dictionary with fewer than 1.5 times as many latents is not
            divided.
    """
    if not 0 < fraction <= 1:
        raise UsageError(f"invalid fraction={fraction:g}: expected a share of the pairs, above 0 and at most 1.")
    if block < 2:
        raise UsageError(f"invalid block={block}: expected 2 latents or more.")
    variant = relu(config, l1=l1, l1_warmup=l1_warmup, pre_bias=pre_bias)
    variant.add_term("decorrelation", strength, Decorrelation(fraction, tau_over, pair_choice, block))
    variant.mechanisms.insert(1, PenalizedPairs())
    return variant
