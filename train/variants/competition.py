"""CompeteSAE (paper 002): pairs of latents that fire together pay for the similarity of their directions.

    c_ij  = P(f_i | f_j) / (k/n)                                                                  (3)
    alpha = min(1, t / t_w)                                                                       (4)
    L     = |x - x_hat|^2 + l1 |f|_1 + strength alpha sum_ij max(c_ij, c_ji) <f_i, f_j>^2         (5)

P(f_i | f_j) = J_ij / p_j, so max(c_ij, c_ji) = J_ij / min(p_i, p_j) / (k/n): how often the rarer latent of a pair
brings the other, over chance. It is symmetric, and <f_i, f_j> is: the direction of (3) has no effect on (5).

To the letter: `tau_on=lift reduction=sum pair_store=dense`. That is void in two places (`PAPER_EXACT`). The defaults are
readings that work: tau on P, and the mean over the pairs that pass.

The dense J has n^2 entries, 1.4 GB at n = 18432, and its products have n (2B + 6d) / 10Bd = 7 times the operations of the
other part of a step. With k latents a token few pairs ever pass, so `pair_store=table` follows a fixed number of pairs
and looks for better ones now and then.

Paper: states two numbers of steps, of k and of every result, and prints the L1 baseline's numbers as those of "no
competition"; `competition-off` is the same model without (5), `competition-baseline` the other one. It writes E(x), so
the encoder does not see x - b_dec. It does not state the activation or the units of its loss: what its baseline's
explained variance of 0.293 points to is `reconstruction=mean normalize=none`.
"""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ...common.errors import UsageError
from ..activations import Activation, BatchTopK, ReLU, TopK
from ..losses import L1, MSE, AuxK, Reconstruction, reconstruction_weight
from ..mechanisms import BatchTopKThreshold, DeadLatents, UnitNormDecoder
from ..recipe import recipe, register_ablation
from ..sae import SAE
from ..scaling import ScaleWithWidth
from ..schedules import Coefficient, warmup
from ..step import LossTerm, Mechanism, Step
from ..variant import Optimization, RunConfig, Variant
from .baselines import relu

PAPER = {"paper": "002", "equations": "(3)-(5)"}
PAPER_EXACT = {
    "tau_on": ("lift", "chance is 1 on the scale of c and tau is 0.6, so most independent pairs pass"),
    "reduction": ("sum", "over n^2 pairs of random rows it is n^2/d, thousands of times the reconstruction"),
    "pair_store": ("dense", "a sum over all pairs needs all of them: n^2 entries"),
}
RARE = 1e-5  # of a latent that fires less than once in so many tokens nothing is said
BLOCK = 2**24  # elements worked on at once, so that the table's work needs no memory beside it


class Coactivation(Mechanism):
    """p_i = P(f_i > 0) and J_ij = P(f_i > 0, f_j > 0), averaged over the steps: a <- beta a + (1 - beta) of the batch.

    The averages begin at zero and are divided by the weight that they have seen, 1 - beta^t. Each pair is there once;
    what is known of pairs has the shape S, which the store decides.
    """

    rate_F: Tensor
    seen: Tensor  # () 1 - beta^t

    def __init__(self, d_sae: int, beta: float) -> None:
        super().__init__()
        self.beta = beta
        self.register_buffer("rate_F", torch.zeros(d_sae))
        self.register_buffer("seen", torch.zeros(()))

    def after_step(self, step: Step) -> None:
        on_BF = step.f_BF.detach() > 0
        self.rate_F.lerp_(on_BF.to(self.rate_F.dtype).mean(0), 1 - self.beta)
        self.seen += (1 - self.beta) * (1 - self.seen)
        self.count(on_BF)

    def rates(self) -> Tensor:
        return self.rate_F / self.seen.clamp_min(1e-12)

    def conditional(self) -> Tensor:
        """J_ij / min(p_i, p_j), the larger of P(f_i | f_j) and P(f_j | f_i) (S); -1 where it is not known."""
        joint_S, known_S = self.joint()
        rarer_S = torch.minimum(*self.ends(self.rates()))
        return torch.where(known_S & (rarer_S >= RARE), (joint_S / rarer_S.clamp_min(RARE)).clamp(max=1), -1.0)

    @abstractmethod
    def count(self, on_BF: Tensor) -> None:
        """Take a batch into J."""

    @abstractmethod
    def joint(self) -> tuple[Tensor, Tensor]:
        """J (S), and which of it are pairs that were counted."""

    @abstractmethod
    def ends(self, value_F: Tensor) -> tuple[Tensor, Tensor]:
        """A number of each latent, for the first and for the second of each pair; both broadcast to S."""

    @abstractmethod
    def inner(self, left_FX: Tensor, right_FX: Tensor) -> Tensor:
        """<left_i, right_j> (S)."""


class DensePairs(Coactivation):
    """Every pair: S is (F, F), and the pairs are its upper triangle."""

    joint_FF: Tensor

    def __init__(self, d_sae: int, beta: float = 0.99) -> None:
        super().__init__(d_sae, beta)
        self.register_buffer("joint_FF", torch.zeros(d_sae, d_sae))

    @staticmethod
    def gigabytes(d_sae: int) -> float:
        """J, and what a step makes of it: eight matrices of its size at most."""
        return 8 * 4 * d_sae**2 / 1e9

    def count(self, on_BF: Tensor) -> None:
        on_BF = on_BF.to(self.joint_FF.dtype)
        self.joint_FF.lerp_(on_BF.T @ on_BF / len(on_BF), 1 - self.beta)

    def joint(self) -> tuple[Tensor, Tensor]:
        upper_FF = torch.ones_like(self.joint_FF, dtype=torch.bool).triu_(1)
        return self.joint_FF / self.seen.clamp_min(1e-12), upper_FF

    def ends(self, value_F: Tensor) -> tuple[Tensor, Tensor]:
        return value_F[:, None], value_F[None]

    def inner(self, left_FX: Tensor, right_FX: Tensor) -> Tensor:
        return (left_FX @ right_FX.T).to(left_FX.dtype)


class PairTable(Coactivation):
    """`capacity` pairs i < j: S is (P).

    Every `every` steps the table is renewed: all pairs of the last batch are ranked beside those that it holds, and the
    best stay. A newcomer's J begins then, and has its own weight in `seen_P`. Where the table has room for all pairs it
    holds them from the start, and is `DensePairs` in another shape. `by` is what makes a pair good: "cofire", its
    conditional probability, or "cosine", that of its decoder rows.
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
        """The table's columns of 24 B, the four times 28 B of its renewal, and four blocks."""
        return ((24 + 4 * 28) * capacity + 4 * 4 * BLOCK) / 1e9

    def count(self, on_BF: Tensor) -> None:
        together_P = pairs_together(on_BF, self.first_P, self.second_P).to(self.joint_P.dtype)
        self.joint_P.lerp_(together_P / len(on_BF), 1 - self.beta)
        self.seen_P += (1 - self.beta) * (1 - self.seen_P)

    def joint(self) -> tuple[Tensor, Tensor]:
        return self.joint_P / self.seen_P.clamp_min(1e-12), (self.first_P < self.second_P) & (self.seen_P > 0)

    def ends(self, value_F: Tensor) -> tuple[Tensor, Tensor]:
        return value_F[self.first_P], value_F[self.second_P]

    def inner(self, left_FX: Tensor, right_FX: Tensor) -> Tensor:
        return PairProducts.apply(left_FX, right_FX, self.first_P, self.second_P)  # type: ignore[no-any-return]

    def every_n_steps(self, step: Step) -> None:
        unit_FD = F.normalize(step.sae.W_dec.detach(), dim=1)
        rank_P = self.conditional() if self.by == "cofire" else self.inner(unit_FD, unit_FD)
        rank_P = torch.where(self.first_P < self.second_P, rank_P, -1)
        held_P = torch.arange(len(rank_P), device=rank_P.device)
        best = (rank_P, self.first_P, self.second_P, held_P)
        for begin, score_IF in self.candidates(step, unit_FD):
            found = score_IF.flatten().topk(min(len(rank_P), score_IF.numel()))
            first, second = begin + found.indices // score_IF.shape[1], found.indices % score_IF.shape[1]
            both = [
                torch.cat(p) for p in zip(best, (found.values, first, second, -torch.ones_like(first)), strict=True)
            ]
            chosen = both[0].topk(len(rank_P)).indices
            best = tuple(column[chosen] for column in both)
        rank_P, first_P, second_P, held_P = best
        full_P = rank_P > 0
        stays_P = full_P & (held_P >= 0)
        self.first_P.copy_(torch.where(full_P, first_P, 0))
        self.second_P.copy_(torch.where(full_P, second_P, 0))
        self.joint_P.copy_(torch.where(stays_P, self.joint_P[held_P], 0))
        self.seen_P.copy_(torch.where(stays_P, self.seen_P[held_P], 0))

    def candidates(self, step: Step, unit_FD: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Scores of the pairs that the table does not hold, a block of first latents at a time; no pair has zero."""
        on_BF = (step.f_BF.detach() > 0).float()
        n, size = on_BF.shape[1], max(1, BLOCK // on_BF.shape[1])
        # As if each had fired three times more, without the other: one batch makes rare latents that met once look alike.
        rate_F = self.rates() + 3 / len(on_BF)
        for begin in range(0, n, size):
            rows = slice(begin, begin + size)
            if self.by == "cofire":
                joint_IF = on_BF[:, rows].T @ on_BF / len(on_BF)
                score_IF = joint_IF / torch.minimum(rate_F[rows, None], rate_F[None])
            else:
                score_IF = unit_FD[rows] @ unit_FD.T
            score_IF = score_IF.triu_(begin + 1)
            inside_P = (self.first_P >= begin) & (self.first_P < begin + size)
            score_IF[self.first_P[inside_P] - begin, self.second_P[inside_P]] = 0
            yield begin, score_IF


def blocks(first_P: Tensor, second_P: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs, so many at a time that their rows of `width` elements make a block."""
    size = max(1, BLOCK // width)
    return zip(first_P.split(size), second_P.split(size), strict=True)


def pairs_together(on_BF: Tensor, first_P: Tensor, second_P: Tensor) -> Tensor:
    """In how many tokens both latents of each pair are on.

    64 tokens make a word, so a pair costs B/64 words: their AND, and its bits counted by twos, fours, bytes and words.
    """
    on_BF = F.pad(on_BF.to(torch.uint8), (0, 0, 0, -len(on_BF) % 64))
    place_8 = torch.arange(8, dtype=torch.uint8, device=on_BF.device)[:, None]
    bytes_F = (on_BF.unflatten(0, (-1, 8)) << place_8).sum(1, dtype=torch.uint8).T.contiguous()
    words_FW = bytes_F.view(torch.int64)
    counts = []
    for first, second in blocks(first_P, second_P, words_FW.shape[1]):
        bits = words_FW[first] & words_FW[second]
        bits = bits - ((bits >> 1) & 0x5555555555555555)
        bits = (bits & 0x3333333333333333) + ((bits >> 2) & 0x3333333333333333)
        bits = (bits + (bits >> 4)) & 0x0F0F0F0F0F0F0F0F
        counts.append(((bits * 0x0101010101010101) >> 56).sum(1))
    return torch.cat(counts)


class PairProducts(torch.autograd.Function):
    """<left_i, right_j> for each pair, a block at a time: rows of all pairs at once would be larger than the dense J."""

    @staticmethod
    def forward(ctx: Any, left_FX: Tensor, right_FX: Tensor, first_P: Tensor, second_P: Tensor) -> Tensor:
        ctx.save_for_backward(left_FX, right_FX, first_P, second_P)
        parts = blocks(first_P, second_P, left_FX.shape[1])
        return torch.cat([(left_FX[first] * right_FX[second]).sum(1) for first, second in parts])

    @staticmethod
    def backward(ctx: Any, gradient_P: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        left_FX, right_FX, first_P, second_P = ctx.saved_tensors
        to_left = torch.zeros_like(left_FX) if ctx.needs_input_grad[0] else None
        to_right = torch.zeros_like(right_FX) if ctx.needs_input_grad[1] else None
        parts = blocks(first_P, second_P, left_FX.shape[1])
        width = max(1, BLOCK // left_FX.shape[1])
        for (first, second), gradient in zip(parts, gradient_P.split(width), strict=True):
            if to_left is not None:
                to_left.index_add_(0, first, gradient[:, None] * right_FX[second])
            if to_right is not None:
                to_right.index_add_(0, second, gradient[:, None] * left_FX[first])
        return to_left, to_right, None, None


class CompetitionLoss(LossTerm):
    """sum over pairs of max(c_ij, c_ji) <v_i, v_j>^2, for pairs that are bound strongly (5); c has no gradient.

    `tau_on`    what has to reach tau: "conditional", P of one given the other, or "lift", c itself
    `weight`    what a pair weighs: "lift", c, or "conditional"
    `pair_vec`  v_i: "decoder", row i of W_dec, or "activation", f_i over the batch divided by sqrt(B)
    `direction` who moves: "symmetric", both; "child_only", the rarer latent; "parent_only", the other
    `reduction` "active_pairs", the mean over pairs that pass; "sum", over ordered pairs as printed; "n", that over n
    `target`    "cofire", as printed; or "absorption": pairs of decoder cosine over 0.2 that fire together less than
                tau, weighing what they lack. Paper: a parent that is absorbed is silent when its child fires, so
                that absorbed pairs are those which (5) leaves alone.
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
    ) -> None:
        super().__init__()
        self.pairs = pairs
        self.all_pairs = isinstance(pairs, DensePairs)
        self.tau = tau if tau_on == "conditional" else tau * chance
        self.unit = chance if weight == "lift" else 1.0
        self.pair_vec, self.direction, self.reduction, self.target = pair_vec, direction, reduction, target

    def forward(self, step: Step) -> Tensor:
        vector_FX = step.sae.W_dec if self.pair_vec == "decoder" else step.f_BF.float().T / step.tokens**0.5
        with torch.no_grad():
            conditional_S = self.pairs.conditional()
            if self.target == "cofire":
                active_S, amount_S = conditional_S >= self.tau, conditional_S
            else:
                unit_FD = F.normalize(step.sae.W_dec, dim=1)
                alike_S = self.pairs.inner(unit_FD, unit_FD) > 0.2
                active_S = alike_S & (conditional_S >= 0) & (conditional_S < self.tau)
                amount_S = self.tau - conditional_S
            active_S &= conditional_S >= 0
            weight_S = torch.where(active_S, amount_S / self.unit, 0.0)
            count = active_S.sum()
        step.metrics |= {"pairs_above": count, "mean_coefficient": weight_S.sum() / count.clamp_min(1)}
        total = (weight_S * self.similarity(vector_FX).square()).sum()
        if self.reduction == "active_pairs":
            return total / count.clamp_min(1)
        return 2 * total / (step.sae.d_sae if self.reduction == "n" else 1)  # (i, j) and (j, i)

    def similarity(self, vector_FX: Tensor) -> Tensor:
        """<v_i, v_j> (S), with a gradient to those that `direction` lets move."""
        if self.direction == "symmetric":
            return self.pairs.inner(vector_FX, vector_FX)
        first_S, second_S = self.pairs.ends(self.pairs.rate_F)
        first_moves_S = (first_S <= second_S) == (self.direction == "child_only")
        still_FX = vector_FX.detach()
        return torch.where(first_moves_S, self.pairs.inner(vector_FX, still_FX), self.pairs.inner(still_FX, vector_FX))


def rising(strength: float, steps: int) -> Coefficient:
    """strength min(1, t/steps), t counted from 1 (4); the step's notes have it."""
    ramp = warmup(strength, steps)

    def coefficient(step: Step) -> Tensor | float:
        step.metrics["competition_strength"] = value = ramp(step)  # type: ignore[assignment]
        return value

    return coefficient


def compete(variant: Variant, strength: Coefficient, term: CompetitionLoss) -> Variant:
    """Add the term to any variant, and its statistics to the mechanisms, of which unit norm stays the last."""
    variant.add_term("competition", strength, term)
    variant.mechanisms.insert(len(variant.mechanisms) - 1, term.pairs)
    return variant


def problems(config: RunConfig, given: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the options of `competition`."""
    if not 0 <= given["beta"] < 1:
        yield f"beta={given['beta']} is no decay rate: give 0 to below 1."
    for name in ("pairs", "refresh"):
        if given[name] < 1:
            yield f"{name}={given[name]} is not positive."
    if given["tau"] < 0:
        yield f"tau={given['tau']} is negative: every pair would pass."
    room = given["memory_gb"]
    if given["pair_store"] == "dense" and (needed := DensePairs.gigabytes(config.d_sae)) > room:
        yield (
            f"pair_store=dense takes {needed:.1f} GB for {config.d_sae} latents, eight matrices of n x n in float32, and "
            f"memory_gb={room:g}: take pair_store=table, a narrower dictionary, or allow more."
        )
    if given["pair_store"] == "table" and (needed := PairTable.gigabytes(given["pairs"] * config.d_sae)) > room:
        yield (
            f"pair_store=table takes {needed:.1f} GB for {given['pairs']} pairs a latent, and memory_gb={room:g}: "
            f"follow fewer pairs, or allow more."
        )


@recipe("competition", paper_exact=PAPER_EXACT, **PAPER)  # type: ignore[arg-type]
def competition(
    config: RunConfig,
    k: int = ScaleWithWidth(100),
    strength: float = 0.03,
    strength_warmup: int | None = None,
    tau: float = 0.6,
    tau_on: Literal["conditional", "lift"] = "conditional",
    weight: Literal["lift", "conditional"] = "lift",
    pair_vec: Literal["decoder", "activation"] = "decoder",
    direction: Literal["symmetric", "child_only", "parent_only"] = "symmetric",
    reduction: Literal["active_pairs", "sum", "n"] = "active_pairs",
    target: Literal["cofire", "absorption"] = "cofire",
    beta: float = 0.99,
    pair_store: Literal["table", "dense"] = "table",
    pairs: int = 16,
    refresh: int = 100,
    memory_gb: float = 2.0,
    act: Literal["topk", "batchtopk", "relu"] = "topk",
    l1: float = 0.04,
    l1_warmup: int | None = None,
    aux: float = 0.0,
    reconstruction: Reconstruction = "sum",
    pre_bias: bool = False,
) -> Variant:
    """The k largest latents of each token; pairs that fire together pay for the similarity of their decoder rows.

    `strength_warmup`: None is 2000 steps, or 2000/4882 of a shorter run.
    `pairs`: how many a latent the table follows on average, and `refresh` the steps between its renewals; `memory_gb`:
    what pair statistics may take. `l1_warmup`: None is a twentieth of the run. `aux`: AuxK, which the paper has not.
    """
    wrong = list(problems(config, locals()))
    if wrong:
        raise UsageError("\n".join(wrong))
    if strength_warmup is None:
        strength_warmup = min(2000, round(config.steps * 2000 / 4882))
    dead = DeadLatents(config.d_sae, config.dead_after_tokens)
    mechanisms: list[Mechanism] = [UnitNormDecoder()]
    activation: Activation = ReLU()
    if act == "topk":
        activation = TopK(k)
    elif act == "batchtopk":
        activation = BatchTopK(k)
        mechanisms.insert(0, BatchTopKThreshold(activation))
    variant = Variant(
        SAE(config.d_in, config.d_sae, [activation], pre_bias=pre_bias),
        {
            "mse": (reconstruction_weight(reconstruction, config.d_in), MSE()),
            "l1": (warmup(l1, config.penalty_warmup(l1_warmup)), L1()),
        },
        mechanisms,
        Optimization(),
        dead=dead,
    )
    if aux:
        variant.add_term("aux", aux, AuxK(dead, max(1, config.d_in // 2)))
    store: Coactivation = (
        DensePairs(config.d_sae, beta)
        if pair_store == "dense"
        else PairTable(config.d_sae, pairs * config.d_sae, beta, refresh, "cofire" if target == "cofire" else "cosine")
    )
    term = CompetitionLoss(store, k / config.d_sae, tau, tau_on, weight, pair_vec, direction, reduction, target)
    return compete(variant, rising(strength, strength_warmup), term)


for _name, _width, _summary, _fixed in (
    ("no-warmup", 8, "`competition` at full strength from the first step.", {"strength_warmup": 0}),
    ("off", 8, "`competition` of strength zero: its statistics are followed, and act on nothing.", {"strength": 0.0}),
    ("small", 1, "`competition` in a dictionary of d_in latents. Paper: does not say how small.", {}),
    ("k320", 8, "`competition` with the 320 latents a token of the paper's results.", {"k": ScaleWithWidth(320)}),
):
    register_ablation(
        f"competition-{_name}", competition, _summary, {**PAPER, "width": _width, "paper_exact": PAPER_EXACT}, **_fixed
    )


@recipe("competition-baseline", paper="002", equations="(1)", paper_exact={})
def baseline(
    config: RunConfig,
    l1: float = 0.04,
    l1_warmup: int | None = None,
    reconstruction: Reconstruction = "sum",
    pre_bias: bool = False,
) -> Variant:
    """ReLU latents and an L1 penalty, which the paper compares with."""
    variant = relu(config, l1=l1, l1_warmup=l1_warmup, pre_bias=pre_bias)
    variant.add_term("mse", reconstruction_weight(reconstruction, config.d_in), MSE())
    return variant
