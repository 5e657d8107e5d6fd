"""CompeteSAE (paper 002): pairs of latents that fire together are penalized for similar decoder directions.

    c_ij  = P(f_i | f_j) / (k/n)                                                                  (3)
    alpha = min(1, t / t_w)                                                                       (4)
    L     = |x - x_hat|^2 + l1 |f|_1 + strength alpha sum_ij max(c_ij, c_ji) <f_i, f_j>^2         (5)

P(f_i | f_j) = J_ij / p_j, so max(c_ij, c_ji) = J_ij / min(p_i, p_j) / (k/n): how often the rarer latent of a pair
brings the other, over chance. It is symmetric, and so is <f_i, f_j>: the direction of (3) has no effect on (5).

The paper's own settings are `tau_on=lift reduction=sum pair_store=dense`, and `diagonal=true` for a sum that holds
i = j. Two of them have no effect as intended (`PAPER_EXACT`). The defaults are readings that work.

Paper: (5) is a sum over all i, j. By default tau is on P instead of c, the sum is the mean over the pairs that pass,
and i = j is left out: c_ii = P(f_i | f_i) / (k/n) = n/k, so that the diagonal is (n/k) sum_i |f_i|^4, a constant of
unit rows.

The dense J has n^2 entries, 1.4 GB at n = 18432, and its products take n (2B + 6d) / 10Bd = 7 times the operations of
the rest of a step. With k latents per token few pairs ever pass, so `pair_store=table` follows a fixed number of pairs
and looks for better ones now and then.

Paper: states two numbers of steps, of k and of every result, and prints the L1 baseline's numbers as those of "no
competition"; `competition-off` is the same model without (5), `competition-baseline` the other one. It prints no
warm-up of lambda_1, which ours has unless `l1_warmup=0`. It writes E(x), so the encoder does not see x - b_dec. It does
not state the activation or the units of its loss: what its baseline's
explained variance of 0.293 points to is `reconstruction=mean normalize=none`.

Shape suffixes here: S pairs in the shape of their store, P pairs in a table, I a block of latents, X d_in or tokens.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..activation_functions import Activation, BatchTopK, ReLU, TopK
from ..losses import L1, MSE, AuxK, Reconstruction, reconstruction_weight
from ..mechanisms import BatchTopKThreshold, DeadLatents, UnitNormDecoder
from ..optimization import Optimization
from ..options import RecipeOptions
from ..recipe import recipe
from ..sae import SAE
from ..scaling import ScaleWithWidth
from ..schedules import Coefficient, warmup
from ..step import LossTerm, Mechanism, Step
from ..variant import RunConfig, Variant
from .baselines import relu

PAPER: dict[str, Any] = {"paper": "002", "equations": "(3)-(5)"}
PAPER_EXACT: dict[str, tuple[Any, str]] = {
    "tau_on": ("lift", "chance is 1 on the scale of c and tau is 0.6, so most independent pairs pass"),
    "reduction": ("sum", "over n^2 pairs of random rows it is n^2/d, thousands of times the reconstruction"),
    "pair_store": ("dense", "a sum over all pairs needs all of them: n^2 entries"),
}
MIN_RATE = 1e-5  # a latent that fires less often than this per token has no known conditional probability
BLOCK = 2**24  # elements to work on at once, so that the table's work needs little memory besides the table


# (3): the statistics of pairs.


class Coactivation(Mechanism):
    """p_i = P(f_i > 0) and J_ij = P(f_i > 0, f_j > 0), averaged over steps: a <- beta a + (1 - beta) of the batch.

    Each unordered pair occurs once. A subclass decides which pairs it follows, and thereby the shape S of all per-pair
    tensors.

    Paper: says only "exponential moving averages (decay rate 0.99)". Ours start at zero and are divided by the weight
    that they have gathered, 1 - beta^t. This leaves J / p as it is, apart from pairs that a table follows later than
    their latents. A latent that fires less often than `MIN_RATE` has no c, where (3) divides by almost nothing.
    """

    rate_F: Tensor
    seen: Tensor  # () 1 - beta^t

    def __init__(self, d_sae: int, beta: float) -> None:
        super().__init__()
        self.beta = beta
        self.register_buffer("rate_F", torch.zeros(d_sae))
        self.register_buffer("seen", torch.zeros(()))

    def after_step(self, step: Step) -> None:
        fires_BF = step.f_BF.detach() > 0
        self.rate_F.lerp_(fires_BF.to(self.rate_F.dtype).mean(0), 1 - self.beta)
        self.seen += (1 - self.beta) * (1 - self.seen)
        self.update_joint(fires_BF)

    def rates(self) -> Tensor:
        """p (F)."""
        return self.rate_F / self.seen.clamp_min(1e-12)

    def conditional(self) -> Tensor:
        """J_ij / min(p_i, p_j), the larger of P(f_i | f_j) and P(f_j | f_i) (S); -1 where it is not known."""
        joint_S, known_S = self.joint()
        rarer_S = torch.minimum(*self.ends(self.rates()))
        return torch.where(known_S & (rarer_S >= MIN_RATE), (joint_S / rarer_S.clamp_min(MIN_RATE)).clamp(max=1), -1.0)

    @abstractmethod
    def update_joint(self, fires_BF: Tensor) -> None:
        """Average a batch into J."""

    @abstractmethod
    def joint(self) -> tuple[Tensor, Tensor]:
        """J (S), and a mask (S) of its entries that are pairs with statistics."""

    @abstractmethod
    def ends(self, value_F: Tensor) -> tuple[Tensor, Tensor]:
        """The value of the first and of the second latent of each pair; both broadcast to S."""

    @abstractmethod
    def inner(self, left_FX: Tensor, right_FX: Tensor) -> Tensor:
        """<left_i, right_j> for each pair i < j (S)."""

    @abstractmethod
    def sample(self, value_S: Tensor, vector_FX: Tensor) -> tuple[Tensor, Tensor]:
        """The values of some pairs, evenly spread, and their <v_i, v_j>: all, or as many as have `BLOCK` elements."""


class DensePairs(Coactivation):
    """Every pair: S is (F, F), and the pairs are its upper triangle."""

    joint_FF: Tensor

    def __init__(self, d_sae: int, beta: float = 0.99) -> None:
        super().__init__(d_sae, beta)
        self.register_buffer("joint_FF", torch.zeros(d_sae, d_sae))

    @staticmethod
    def gigabytes(d_sae: int) -> float:
        """J and the temporaries of a step: at most eight matrices of its size."""
        return 8 * 4 * d_sae**2 / 1e9

    def update_joint(self, fires_BF: Tensor) -> None:
        fires_BF = fires_BF.to(self.joint_FF.dtype)
        self.joint_FF.lerp_(fires_BF.T @ fires_BF / len(fires_BF), 1 - self.beta)

    def joint(self) -> tuple[Tensor, Tensor]:
        upper_FF = torch.ones_like(self.joint_FF, dtype=torch.bool).triu_(1)
        return self.joint_FF / self.seen.clamp_min(1e-12), upper_FF

    def ends(self, value_F: Tensor) -> tuple[Tensor, Tensor]:
        return value_F[:, None], value_F[None]

    def inner(self, left_FX: Tensor, right_FX: Tensor) -> Tensor:
        return (left_FX @ right_FX.T).to(left_FX.dtype)

    def sample(self, value_S: Tensor, vector_FX: Tensor) -> tuple[Tensor, Tensor]:
        rows = slice(None, None, -(-value_S.numel() // BLOCK))
        return value_S[rows], vector_FX[rows] @ vector_FX.T


class PairTable(Coactivation):
    """A table of `capacity` pairs i < j: S is (P).

    Every `every` steps the table is refreshed: all pairs of the last batch are ranked together with those in the table,
    and the best stay. A new pair's J starts then, and has its own weight in `seen_P`. A table with room for all pairs
    holds them from the start, and is `DensePairs` in another shape. `by` ranks pairs: "cofire" by their conditional
    probability, "cosine" by the cosine of their decoder rows.
    """

    first_P: Tensor  # int64; entries in which first = second are empty
    second_P: Tensor
    joint_P: Tensor
    seen_P: Tensor

    def __init__(
        self, d_sae: int, capacity: int, beta: float = 0.99, every: int | None = 100, by: str = "cofire"
    ) -> None:
        super().__init__(d_sae, beta)
        self.every, self.by = every, by
        first_P = second_P = torch.zeros(capacity, dtype=torch.int64)
        if capacity >= d_sae * (d_sae - 1) // 2:
            first_P, second_P = torch.triu_indices(d_sae, d_sae, 1)
            self.every = None
        self.register_buffer("first_P", first_P.clone())
        self.register_buffer("second_P", second_P.clone())
        self.register_buffer("joint_P", torch.zeros(len(first_P)))
        self.register_buffer("seen_P", torch.zeros(len(first_P)))

    @staticmethod
    def gigabytes(capacity: int) -> float:
        """The table's columns of 24 B, four times 28 B while it is refreshed, and four blocks."""
        return ((24 + 4 * 28) * capacity + 4 * 4 * BLOCK) / 1e9

    def update_joint(self, fires_BF: Tensor) -> None:
        together_P = count_cofiring(fires_BF, self.first_P, self.second_P).to(self.joint_P.dtype)
        self.joint_P.lerp_(together_P / len(fires_BF), 1 - self.beta)
        self.seen_P += (1 - self.beta) * (1 - self.seen_P)

    def joint(self) -> tuple[Tensor, Tensor]:
        return self.joint_P / self.seen_P.clamp_min(1e-12), (self.first_P < self.second_P) & (self.seen_P > 0)

    def ends(self, value_F: Tensor) -> tuple[Tensor, Tensor]:
        return value_F[self.first_P], value_F[self.second_P]

    def inner(self, left_FX: Tensor, right_FX: Tensor) -> Tensor:
        products_P: Tensor = PairProducts.apply(left_FX, right_FX, self.first_P, self.second_P)
        return products_P

    def sample(self, value_S: Tensor, vector_FX: Tensor) -> tuple[Tensor, Tensor]:
        some = slice(None, None, -(-len(value_S) * vector_FX.shape[1] // BLOCK))
        return value_S[some], (vector_FX[self.first_P[some]] * vector_FX[self.second_P[some]]).sum(1)

    def every_n_steps(self, step: Step) -> None:
        """Refresh the table. `slot` is the place of a pair in the table so far, -1 for a new one."""
        unit_FD = F.normalize(step.sae.W_dec.detach(), dim=1)
        score_P = self.conditional() if self.by == "cofire" else self.inner(unit_FD, unit_FD)
        score_P = torch.where(self.first_P < self.second_P, score_P, -1)
        best = (score_P, self.first_P, self.second_P, torch.arange(len(score_P), device=score_P.device))
        for start, score_IF in self.candidates(step, unit_FD):
            top = score_IF.flatten().topk(min(len(score_P), score_IF.numel()))
            first, second = start + top.indices // score_IF.shape[1], top.indices % score_IF.shape[1]
            new = (top.values, first, second, -torch.ones_like(first))
            columns = [torch.cat(pair) for pair in zip(best, new, strict=True)]
            chosen = columns[0].topk(len(score_P)).indices
            score_P, first_P, second_P, slot_P = (column[chosen] for column in columns)
            best = (score_P, first_P, second_P, slot_P)
        score_P, first_P, second_P, slot_P = best
        filled_P = score_P > 0
        stays_P = filled_P & (slot_P >= 0)
        self.first_P.copy_(torch.where(filled_P, first_P, 0))
        self.second_P.copy_(torch.where(filled_P, second_P, 0))
        self.joint_P.copy_(torch.where(stays_P, self.joint_P[slot_P], 0))
        self.seen_P.copy_(torch.where(stays_P, self.seen_P[slot_P], 0))

    def candidates(self, step: Step, unit_FD: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Scores (I, F) of pairs that are not in the table, a block of first latents at a time; 0 marks no pair."""
        fires_BF = (step.f_BF.detach() > 0).float()
        n, size = fires_BF.shape[1], max(1, BLOCK // fires_BF.shape[1])
        # Paper: follows every pair. Candidates are ranked as if each latent had fired three more times, without the
        # other: in a single batch, rare latents that fired together once would look alike.
        rate_F = self.rates() + 3 / len(fires_BF)
        for start in range(0, n, size):
            rows = slice(start, start + size)
            if self.by == "cofire":
                joint_IF = fires_BF[:, rows].T @ fires_BF / len(fires_BF)
                score_IF = joint_IF / torch.minimum(rate_F[rows, None], rate_F[None])
            else:
                score_IF = unit_FD[rows] @ unit_FD.T
            score_IF = score_IF.triu_(start + 1)
            inside_P = (self.first_P >= start) & (self.first_P < start + size)
            score_IF[self.first_P[inside_P] - start, self.second_P[inside_P]] = 0
            yield start, score_IF


def pair_blocks(first_P: Tensor, second_P: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs, as many at a time as have `BLOCK` elements in rows of `width`."""
    size = max(1, BLOCK // width)
    return zip(first_P.split(size), second_P.split(size), strict=True)


def count_cofiring(fires_BF: Tensor, first_P: Tensor, second_P: Tensor) -> Tensor:
    """The number of tokens on which both latents of each pair fire (P).

    64 tokens fit a word, so a pair costs B/64 words: their AND, and its bits counted by twos, fours, bytes and words.
    """
    fires_BF = F.pad(fires_BF.to(torch.uint8), (0, 0, 0, -len(fires_BF) % 64))
    place_8 = torch.arange(8, dtype=torch.uint8, device=fires_BF.device)[:, None]
    bytes_F = (fires_BF.unflatten(0, (-1, 8)) << place_8).sum(1, dtype=torch.uint8).T.contiguous()
    words_FW = bytes_F.view(torch.int64)
    counts = []
    for first, second in pair_blocks(first_P, second_P, words_FW.shape[1]):
        bits = words_FW[first] & words_FW[second]
        bits = bits - ((bits >> 1) & 0x5555555555555555)
        bits = (bits & 0x3333333333333333) + ((bits >> 2) & 0x3333333333333333)
        bits = (bits + (bits >> 4)) & 0x0F0F0F0F0F0F0F0F
        counts.append(((bits * 0x0101010101010101) >> 56).sum(1))
    return torch.cat(counts)


class PairProducts(torch.autograd.Function):
    """<left_i, right_j> for each pair, by blocks: the rows of all pairs at once would be larger than the dense J."""

    @staticmethod
    def forward(ctx: Any, left_FX: Tensor, right_FX: Tensor, first_P: Tensor, second_P: Tensor) -> Tensor:
        ctx.save_for_backward(left_FX, right_FX, first_P, second_P)
        blocks = pair_blocks(first_P, second_P, left_FX.shape[1])
        return torch.cat([(left_FX[first] * right_FX[second]).sum(1) for first, second in blocks])

    @staticmethod
    def backward(ctx: Any, gradient_P: Tensor) -> tuple[Tensor | None, ...]:
        left_FX, right_FX, first_P, second_P = ctx.saved_tensors
        to_left = torch.zeros_like(left_FX) if ctx.needs_input_grad[0] else None
        to_right = torch.zeros_like(right_FX) if ctx.needs_input_grad[1] else None
        blocks = pair_blocks(first_P, second_P, left_FX.shape[1])
        size = max(1, BLOCK // left_FX.shape[1])
        for (first, second), gradient in zip(blocks, gradient_P.split(size), strict=True):
            if to_left is not None:
                to_left.index_add_(0, first, gradient[:, None] * right_FX[second])
            if to_right is not None:
                to_right.index_add_(0, second, gradient[:, None] * left_FX[first])
        return to_left, to_right, None, None


# (4) and (5): the penalty.


class CompetitionLoss(LossTerm):
    """sum over pairs of max(c_ij, c_ji) <v_i, v_j>^2, for pairs above tau (5); c has no gradient.

    `tau_on`    what has to reach tau: "conditional", P of one given the other, or "lift", c itself
    `weight`    the weight of a pair: "lift", c, or "conditional"
    `pair_vec`  v_i: "decoder", row i of W_dec, or "activation", f_i over the batch divided by sqrt(B)
                Paper: writes <f_i, f_j> of "feature similarity" and f_i for both; the division by sqrt(B) makes the
                product a mean over tokens, which does not grow with the batch
    `direction` which latent gets the gradient: "symmetric", both; "child_only", the rarer; "parent_only", the other
    `reduction` "active_pairs", the mean over pairs that pass; "sum", over ordered pairs as printed; "n", that over n
    `target`    "cofire", as printed; or "absorption": pairs of decoder cosine over 0.2 that fire together less than
                tau, weighted by what they lack. Paper: a parent that is absorbed is silent when its child fires, so
                absorbed pairs are those which (5) leaves alone.
    `diagonal`  whether the pairs include i = j, of every latent that fires: P is 1 and c is n/k (5)
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
        self.all_pairs = isinstance(pairs, DensePairs)
        self.tau = tau if tau_on == "conditional" else tau * chance
        self.unit = chance if weight == "lift" else 1.0
        self.pair_vec, self.direction, self.reduction, self.target = pair_vec, direction, reduction, target
        self.diagonal = diagonal

    def forward(self, step: Step) -> Tensor:
        vector_FX = step.sae.W_dec if self.pair_vec == "decoder" else step.f_BF.float().T / step.tokens**0.5
        with torch.no_grad():
            weight_S, count = self.weights(step.sae)
        step.metrics |= {"pairs_above": count, "mean_coefficient": weight_S.sum() / count.clamp_min(1)}
        total, ordered = 2 * (weight_S * self.similarity(vector_FX).square()).sum(), 2 * count  # (i, j) and (j, i)
        if self.diagonal:
            with torch.no_grad():
                weight_F = self.diagonal_weights()
            total = total + (weight_F * self.squared_length(vector_FX).square()).sum()
            ordered = ordered + (weight_F > 0).sum()
        if self.reduction == "active_pairs":
            return total / ordered.clamp_min(1)
        return total / (step.sae.d_sae if self.reduction == "n" else 1)

    def diagonal_weights(self) -> Tensor:
        """The weight of each pair (i, i) (F): that of P = 1 if it passes tau; 0 for latents that do not fire."""
        passes_F = (self.pairs.rates() >= MIN_RATE) & (self.tau <= 1)
        return passes_F.to(self.pairs.rate_F.dtype) / self.unit

    def weights(self, sae: SAE) -> tuple[Tensor, Tensor]:
        """The weight of each pair (S), zero unless the pair passes tau, and the number () of pairs that pass."""
        conditional_S = self.pairs.conditional()
        if self.target == "cofire":
            active_S, amount_S = conditional_S >= self.tau, conditional_S
        else:
            unit_FD = F.normalize(sae.W_dec, dim=1)
            alike_S = self.pairs.inner(unit_FD, unit_FD) > 0.2
            active_S = alike_S & (conditional_S >= 0) & (conditional_S < self.tau)
            amount_S = self.tau - conditional_S
        active_S &= conditional_S >= 0
        return torch.where(active_S, amount_S / self.unit, 0.0), active_S.sum()

    def similarity(self, vector_FX: Tensor) -> Tensor:
        """<v_i, v_j> (S), with a gradient to the latents that `direction` names."""
        if self.direction == "symmetric":
            return self.pairs.inner(vector_FX, vector_FX)
        first_S, second_S = self.pairs.ends(self.pairs.rate_F)
        first_moves_S = (first_S <= second_S) == (self.direction == "child_only")
        fixed_FX = vector_FX.detach()
        return torch.where(first_moves_S, self.pairs.inner(vector_FX, fixed_FX), self.pairs.inner(fixed_FX, vector_FX))

    def squared_length(self, vector_FX: Tensor) -> Tensor:
        """<v_i, v_i> (F); as one of a pair of the other directions, a latent has half of the gradient."""
        other_FX = vector_FX if self.direction == "symmetric" else vector_FX.detach()
        return (vector_FX * other_FX).sum(1)

    @torch.no_grad()
    def correlation(self, sae: SAE) -> tuple[Tensor, Tensor]:
        """Pearson's r () of the weight of a pair, max(c_ij, c_ji), and the cosine of its decoder rows, over the pairs
        that pass tau, and the number () of those pairs.

        This is "correlation r = 0.82 between semantic similarity and competition strength" (3.1). Of more pairs than
        have `BLOCK` elements it is over an evenly spread part. It is 0 where fewer than three pass, or all have the
        same weight or cosine. Paper: does not say which pairs; below tau the strength of competition is zero.
        """
        weight_M, cosine_M = self.pairs.sample(self.weights(sae)[0], F.normalize(sae.W_dec, dim=1))
        passes_M = weight_M > 0
        count = passes_M.sum()
        one_M, two_M = (centred(value_M.double(), passes_M) for value_M in (weight_M, cosine_M))
        spread = (one_M.square().sum() * two_M.square().sum()).sqrt()
        r = (one_M * two_M).sum() / spread
        return torch.where((count >= 3) & (spread > 1e-12 * count), r, 0.0).float(), count


def centred(value_M: Tensor, where_M: Tensor) -> Tensor:
    """The values minus their mean, both where the mask is set; 0 elsewhere."""
    mean = torch.where(where_M, value_M, 0).sum() / where_M.sum().clamp_min(1)
    return torch.where(where_M, value_M - mean, 0)


class CompetitionMonitor(Mechanism):
    """Counts the pairs that the penalty acted on, and correlates c with the rows' cosine when metrics are logged."""

    acted_penalized: Tensor  # () int64, pairs i < j over all steps

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
    """strength min(1, t/steps), t counted from 1 (4). Logged as `competition_strength`."""
    ramp = warmup(strength, steps)

    def coefficient(step: Step) -> Tensor | float:
        value = ramp(step)
        step.metrics["competition_strength"] = torch.as_tensor(value)
        return value

    return coefficient


def add_competition(variant: Variant, strength: Coefficient, loss: CompetitionLoss) -> Variant:
    """Add the loss to any variant, and its statistics and its monitor to the mechanisms, before the unit norm."""
    variant.add_term("competition", strength, loss)
    for mechanism in (loss.pairs, CompetitionMonitor(strength, lambda: loss.correlation(variant.sae))):
        variant.mechanisms.insert(len(variant.mechanisms) - 1, mechanism)
    return variant


# The recipes.


@dataclass(frozen=True)
class CompetitionOptions(RecipeOptions):
    k: int = ScaleWithWidth(100)
    """Latents kept per token. The paper's results also say 320 (`competition-k320`)."""
    strength: float = 0.03
    """Strength of the competition loss (5)."""
    strength_warmup: int | None = None
    """Steps t_w over which the strength rises (4). None: 2000, or 2000/4882 of a shorter run."""
    tau: float = 0.6
    """Value that a pair must reach to be penalized."""
    tau_on: Literal["conditional", "lift"] = "conditional"
    """Scale of tau: the conditional probability P of one latent given the other, or the lift c of (3) (the paper)."""
    weight: Literal["lift", "conditional"] = "lift"
    """Weight of a pair in (5): its lift c, or its conditional probability."""
    pair_vec: Literal["decoder", "activation"] = "decoder"
    """Vectors compared in (5): rows of W_dec, or latents over the batch divided by sqrt(B)."""
    direction: Literal["symmetric", "child_only", "parent_only"] = "symmetric"
    """Latent of a pair that gets the gradient: both, the rarer one (child), or the other (parent)."""
    reduction: Literal["active_pairs", "sum", "n"] = "active_pairs"
    """active_pairs: mean over pairs that pass tau. sum: over all ordered pairs (the paper). n: that sum over d_sae."""
    diagonal: bool = False
    """Also penalize each latent's similarity to itself, as the printed sum over all i and j does (5)."""
    target: Literal["cofire", "absorption"] = "cofire"
    """Pairs to penalize: those that fire together (the paper), or those of decoder cosine over 0.2 that rarely do."""
    beta: float = 0.99
    """Decay of the averages of p and J, per step."""
    pair_store: Literal["table", "dense"] = "table"
    """table: follow a fixed number of pairs. dense: all of them, n^2 entries (the paper)."""
    pairs: int = 16
    """Pairs per latent that the table follows, on average."""
    refresh: int = 100
    """Steps after which the table looks for better pairs."""
    memory_gb: float = 2.0
    """Memory that the statistics of pairs may take, in GB. More is refused before the run starts."""
    act: Literal["topk", "batchtopk", "relu"] = "topk"
    """Activation function. The paper bounds L0 by k and does not name one."""
    l1: float = 0.04
    """Strength of the L1 penalty (5)."""
    l1_warmup: int | None = None
    """Steps over which the L1 penalty rises from zero. None: a twentieth of the run."""
    aux: float = 0.0
    """Weight of AuxK, which revives dead latents. The paper has none."""
    reconstruction: Reconstruction = "sum"
    """Squared error summed or averaged over d_in. The paper's numbers point to mean, with normalize=none."""
    pre_bias: bool = False
    """Subtract b_dec from the encoder's input. The paper writes E(x)."""

    def validation_errors(self, config: RunConfig) -> Iterator[str]:
        if not 0 <= self.beta < 1:
            yield f"invalid beta={self.beta:g}: expected a decay from 0 to below 1."
        for name in ("pairs", "refresh"):
            if (count := getattr(self, name)) < 1:
                yield f"invalid {name}={count}: expected 1 or more."
        if self.tau < 0:
            yield f"invalid tau={self.tau:g}: below 0 every pair would pass."
        if self.diagonal and self.target == "absorption":
            yield "diagonal=true has no effect with target=absorption: a latent never fires without itself."
        limit = self.memory_gb
        if self.pair_store == "dense" and (needed := DensePairs.gigabytes(config.d_sae)) > limit:
            yield (
                f"pair_store=dense takes {needed:.1f} GB for {config.d_sae} latents, eight matrices of n x n in "
                f"float32, but memory_gb={limit:g}: use pair_store=table, a smaller --width, or raise memory_gb."
            )
        if self.pair_store == "table" and (needed := PairTable.gigabytes(self.pairs * config.d_sae)) > limit:
            yield (
                f"pair_store=table takes {needed:.1f} GB for {self.pairs} pairs per latent, but memory_gb={limit:g}: "
                "set fewer pairs, or raise memory_gb."
            )


@recipe("competition", paper_exact=PAPER_EXACT, **PAPER)
def competition(config: RunConfig, options: CompetitionOptions) -> Variant:
    """TopK; latents that fire together are pushed apart.

    Pairs that fire together are penalized for the similarity of their decoder rows.
    """
    variant = topk_with_l1(config, options)
    loss = CompetitionLoss(
        pair_statistics(config, options),
        options.k / config.d_sae,
        options.tau,
        options.tau_on,
        options.weight,
        options.pair_vec,
        options.direction,
        options.reduction,
        options.target,
        options.diagonal,
    )
    steps = options.strength_warmup
    if steps is None:
        steps = min(2000, round(config.steps * 2000 / 4882))
    return add_competition(variant, competition_strength(options.strength, steps), loss)


def topk_with_l1(config: RunConfig, options: CompetitionOptions) -> Variant:
    """The model of (1): the variant before (5) is added."""
    dead = DeadLatents(config.d_sae, config.dead_after_tokens)
    mechanisms: list[Mechanism] = [UnitNormDecoder()]
    activation: Activation = ReLU()
    if options.act == "topk":
        activation = TopK(options.k)
    elif options.act == "batchtopk":
        activation = BatchTopK(options.k)
        mechanisms.insert(0, BatchTopKThreshold(activation))
    variant = Variant(
        SAE(config.d_in, config.d_sae, [activation], pre_bias=options.pre_bias),
        {
            "mse": (reconstruction_weight(options.reconstruction, config.d_in), MSE()),
            "l1": (warmup(options.l1, config.penalty_warmup(options.l1_warmup)), L1()),
        },
        mechanisms,
        Optimization(),
        dead=dead,
    )
    if options.aux:
        variant.add_term("aux", options.aux, AuxK(dead, max(1, config.d_in // 2)))
    return variant


def pair_statistics(config: RunConfig, options: CompetitionOptions) -> Coactivation:
    if options.pair_store == "dense":
        return DensePairs(config.d_sae, options.beta)
    by = "cofire" if options.target == "cofire" else "cosine"
    return PairTable(config.d_sae, options.pairs * config.d_sae, options.beta, options.refresh, by)


# Paper: does not say how small the reduced dictionary is.
ABLATIONS: tuple[tuple[str, int, str, dict[str, Any]], ...] = (
    ("no-warmup", 8, "`competition` at full strength from the first step.", {"strength_warmup": 0}),
    ("off", 8, "`competition` with strength zero; its statistics are kept.", {"strength": 0.0}),
    ("small", 1, "`competition` in a dictionary of d_in latents.", {}),
    ("k320", 8, "`competition` with the 320 latents per token of the paper's results.", {"k": ScaleWithWidth(320)}),
)
for _name, _width, _summary, _fixed in ABLATIONS:
    recipe(f"competition-{_name}", width=_width, paper_exact=PAPER_EXACT, summary=_summary, fixed=_fixed, **PAPER)(
        competition
    )


@recipe("competition-baseline", paper="002", equations="(1)", paper_exact={})
def baseline(
    config: RunConfig,
    l1: float = 0.04,
    l1_warmup: int | None = None,
    reconstruction: Reconstruction = "sum",
    pre_bias: bool = False,
) -> Variant:
    """ReLU latents and an L1 penalty: the paper's baseline.

    Args:
        l1: Strength of the L1 penalty.
        l1_warmup: Steps over which the L1 penalty rises from zero. None: a twentieth of the run.
        reconstruction: Squared error summed or averaged over d_in. The paper's numbers point to mean, with
            normalize=none.
        pre_bias: Subtract b_dec from the encoder's input. The paper writes E(x).
    """
    variant = relu(config, l1=l1, l1_warmup=l1_warmup, pre_bias=pre_bias)
    variant.add_term("mse", reconstruction_weight(reconstruction, config.d_in), MSE())
    return variant
