"""The penalty on similar pairs of latents that fire together (5), its rising strength (4), and its monitor."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ...sae import SAE
from ...schedules import Coefficient, warmup
from ...step import LossTerm, Mechanism, Step
from ...variant import Variant
from .pairs import MIN_RATE, Coactivation


class CompetitionLoss(LossTerm):
    """sum over pairs of max(c_ij, c_ji) <v_i, v_j>^2, for pairs above tau (5); c has no gradient.

    `tau_on`    the value that has to reach tau: "conditional" (P of one latent given the other) or "lift" (c itself)
    `weight`    the weight of a pair: "lift" (c) or "conditional"
    `pair_vec`  v_i: "decoder" (row i of W_dec) or "activation" (f_i over the batch, divided by sqrt(B))
                Paper: writes f_i for both, and calls <f_i, f_j> "feature similarity"; the division by sqrt(B) makes
                the product a mean over tokens, which does not grow with the batch
    `direction` latents with a gradient: "symmetric" (both), "child_only" (the rarer) or "parent_only" (the other)
    `reduction` "active_pairs" (the mean over pairs that pass), "sum" (over ordered pairs, as in (5)) or "n" (sum / n)
    `target`    "cofire", as in the paper; or "absorption": pairs with a decoder cosine over 0.2 that fire together less
                than tau, weighted by how far they are below it. Paper: an absorbed parent is silent when its child
                fires, so (5) does not act on absorbed pairs.
    `diagonal`  whether the pairs (i, i) of all latents that fire are included; for them, P is 1 and c is n/k (5)
    """

    def __init__(
        self,
        pairs: Coactivation,
        chance: float,
        tau: float = 0.6,
        tau_on: str = "conditional",
        weight: str = "lift",
        pair_vec: str = "decoder",
        direction: str = "symmetric",
        reduction: str = "active_pairs",
        target: str = "cofire",
        diagonal: bool = False,
    ) -> None:
        super().__init__()
        self.pairs = pairs
        self.tau = tau if tau_on == "conditional" else tau * chance
        self.unit = chance if weight == "lift" else 1.0
        self.pair_vec, self.direction, self.reduction, self.target = pair_vec, direction, reduction, target
        self.diagonal = diagonal
        if pair_vec == "decoder":
            self.undivided = ""

    def forward(self, step: Step) -> Tensor:
        vector_FX = step.sae.W_dec if self.pair_vec == "decoder" else step.f_BF.float().T / step.tokens**0.5
        with torch.no_grad():
            weight_S, count = self.weights(step.sae, step.i)
        step.metrics |= {"pairs_above": count, "mean_coefficient": weight_S.sum() / count.clamp_min(1)}
        times = 2 * self.pairs.turns  # 2, as (i, j) is also (j, i); `turns`, as other steps compare the other pairs
        total = times * (weight_S * self.similarity(vector_FX, step.i).square()).sum()
        ordered = times * count
        if self.diagonal:
            with torch.no_grad():
                weight_F = self.diagonal_weights()
            total = total + (weight_F * self.squared_length(vector_FX).square()).sum()
            ordered = ordered + (weight_F > 0).sum()
        if self.reduction == "active_pairs":
            return total / ordered.clamp_min(1)
        return total / (step.sae.d_sae if self.reduction == "n" else 1)

    def diagonal_weights(self) -> Tensor:
        """(F): the weight of each pair (i, i), where P is 1.

        The weight is 0 for silent latents, and for all latents if tau > 1.
        """
        passes_F = (self.pairs.rates() >= MIN_RATE) & (self.tau <= 1)
        return passes_F.to(self.pairs.rate_F.dtype) / self.unit

    def weights(self, sae: SAE, i: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The weight of each pair (S), which is zero unless the pair passes tau, and the number () of pairs that pass.

        Covers the pairs that step i compares, or all pairs if i is None.
        """
        conditional_S = self.pairs.conditional(i)
        if self.target == "cofire":
            active_S, amount_S = conditional_S >= self.tau, conditional_S
        else:
            unit_FD = F.normalize(sae.W_dec, dim=1)
            alike_S = self.pairs.inner(unit_FD, unit_FD, i) > 0.2
            active_S = alike_S & (conditional_S >= 0) & (conditional_S < self.tau)
            amount_S = self.tau - conditional_S
        active_S &= conditional_S >= 0
        return torch.where(active_S, amount_S / self.unit, 0.0), active_S.sum()

    def similarity(self, vector_FX: Tensor, i: Tensor | None = None) -> Tensor:
        """<v_i, v_j> (S), with a gradient to the latents that `direction` selects."""
        if self.direction == "symmetric":
            return self.pairs.inner(vector_FX, vector_FX, i)
        first_S, second_S = self.pairs.ends(self.pairs.rate_F, i)
        first_moves_S = (first_S <= second_S) == (self.direction == "child_only")
        fixed_FX = vector_FX.detach()
        moving = self.pairs.inner(vector_FX, fixed_FX, i), self.pairs.inner(fixed_FX, vector_FX, i)
        return torch.where(first_moves_S, *moving)

    def squared_length(self, vector_FX: Tensor) -> Tensor:
        """<v_i, v_i> (F). Unless `direction` is symmetric, the gradient is halved: it reaches only one factor."""
        other_FX = vector_FX if self.direction == "symmetric" else vector_FX.detach()
        return (vector_FX * other_FX).sum(1)

    @torch.no_grad()
    def correlation(self, sae: SAE) -> tuple[Tensor, Tensor]:
        """Pearson's r () between the weight of a pair, max(c_ij, c_ji), and the cosine of its decoder rows, over the
        pairs that pass tau; also the number () of these pairs.

        The paper reports this as "correlation r = 0.82 between semantic similarity and competition strength" (3.1). If
        the pairs are too many for one block of `BLOCK` elements, r is computed on an evenly spaced subset of them. r is
        0 if fewer than three pairs pass tau, or if all pairs have the same weight or cosine. Paper: does not say which
        pairs it uses. Here the pairs below tau are left out, since for them the strength of competition is zero.
        """
        weight_M, cosine_M = self.pairs.sample(self.weights(sae)[0], F.normalize(sae.W_dec, dim=1))
        passes_M = weight_M > 0
        count = passes_M.sum()
        one_M, two_M = (centred(value_M.double(), passes_M) for value_M in (weight_M, cosine_M))
        spread = (one_M.square().sum() * two_M.square().sum()).sqrt()
        r = (one_M * two_M).sum() / spread
        return torch.where((count >= 3) & (spread > 1e-12 * count), r, 0.0).float(), count


def centred(value_M: Tensor, where_M: Tensor) -> Tensor:
    """The values minus their mean where the mask is set, and 0 elsewhere. The mean covers only values in the mask."""
    mean = torch.where(where_M, value_M, 0).sum() / where_M.sum().clamp_min(1)
    return torch.where(where_M, value_M - mean, 0)


class CompetitionMonitor(Mechanism):
    """Counts the pairs on which the penalty acted, and computes `correlation` when metrics are logged."""

    acted_penalized: Tensor  # () int64, pairs i < j over all steps
    leaves_weights = True

    def __init__(self, strength: Coefficient, correlation: Callable[[], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.strength, self.correlation = strength, correlation
        self.register_buffer("acted_penalized", torch.zeros((), dtype=torch.int64))

    def after_step(self, step: Step) -> None:
        self.acted_penalized += step.metrics["pairs_above"] * (self.strength(step) > 0)

    def scalars(self) -> dict[str, Tensor]:
        r, count = self.correlation()
        return {"penalized": self.acted_penalized, "correlation_cosine": r, "correlation_pairs": count}


def competition_strength(strength: float, steps: int) -> Coefficient:
    """strength min(1, t/steps), where t counts from 1 (4). Logged as `competition_strength`."""
    ramp = warmup(strength, steps)

    def coefficient(step: Step) -> Tensor | float:
        value = ramp(step)
        step.metrics["competition_strength"] = torch.as_tensor(value)
        return value

    return coefficient


def add_competition(variant: Variant, strength: Coefficient, loss: CompetitionLoss) -> Variant:
    """Add the loss to a variant, and insert the loss's statistics and monitor before the variant's last mechanism.

    The last mechanism normalizes the decoder rows.
    """
    variant.add_term("competition", strength, loss)
    for mechanism in (loss.pairs, CompetitionMonitor(strength, lambda: loss.correlation(variant.sae))):
        variant.mechanisms.insert(len(variant.mechanisms) - 1, mechanism)
    return variant
