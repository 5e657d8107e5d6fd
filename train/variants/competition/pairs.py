"""Statistics of pairs of latents (3): how often each latent fires, and how often the two of a pair fire together.

The statistics cover all pairs (`DensePairs`) or a table of some pairs (`PairTable`). The docstring of this package
explains the shape suffixes.
"""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...dense_ops import for_products
from ...kernels.pair_operator import BLOCK, count_pairs, count_pairs_by_torch, pair_blocks
from ...sae import SAE
from ...sparse_ops import row_dtype, weighted_row_sums
from ...step import Mechanism, Step

MIN_RATE = 1e-5  # latents that fire on a smaller share of tokens have no conditional probability


class Coactivation(Mechanism):
    """p_i = P(f_i > 0) and J_ij = P(f_i > 0, f_j > 0), averaged over steps: p <- beta p + (1 - beta) p_batch.

    J is averaged in the same way. Each unordered pair occurs once. A subclass determines which pairs are tracked, and
    thereby the shape S of all per-pair tensors.

    Paper: says only "exponential moving averages (decay rate 0.99)". Our averages start at zero and are divided by
    their accumulated weight, 1 - beta^t. This does not change J / p, except for pairs that enter a table after the
    start. A latent that fires less often than `MIN_RATE` has no c, because (3) would divide by almost zero.
    """

    turns = 1  # a step compares one in `turns` pairs, so all pairs are compared within `turns` steps
    rate_F: Tensor
    seen: Tensor  # () 1 - beta^t
    leaves_weights = True
    undivided = "pairs of latents are counted in the whole batch"

    def __init__(self, d_sae: int, beta: float) -> None:
        super().__init__()
        self.beta = beta
        self.register_buffer("rate_F", torch.zeros(d_sae))
        self.register_buffer("seen", torch.zeros(()))

    def after_step(self, step: Step) -> None:
        fires_BF = step.f_BF.detach() > 0
        if step.sae.activation[-1].nonnegative:
            rate_F = step.counts_F / step.tokens
        else:
            rate_F = fires_BF.to(self.rate_F.dtype).mean(0)
        self.rate_F.lerp_(rate_F.to(self.rate_F.dtype), 1 - self.beta)
        self.seen += (1 - self.beta) * (1 - self.seen)
        self.update_joint(fires_BF)

    def rates(self) -> Tensor:
        """p (F)."""
        return self.rate_F / self.seen.clamp_min(1e-12)

    def conditional(self, i: Tensor | None = None) -> Tensor:
        """J_ij / min(p_i, p_j), the larger of P(f_i | f_j) and P(f_j | f_i) (S); -1 where this is unknown.

        Here and below, the result covers the pairs that step i compares, or all pairs if no index i () is given.
        """
        joint_S, known_S = self.joint(i)
        rarer_S = torch.minimum(*self.ends(self.rates(), i))
        return torch.where(known_S & (rarer_S >= MIN_RATE), (joint_S / rarer_S.clamp_min(MIN_RATE)).clamp(max=1), -1.0)

    @abstractmethod
    def update_joint(self, fires_BF: Tensor) -> None:
        """Average a batch into J."""

    @abstractmethod
    def joint(self, i: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """J (S), and a mask (S) that is true where the entry is a pair i < j whose J has been measured."""

    @abstractmethod
    def ends(self, value_F: Tensor, i: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The values of the first and the second latent of each pair. Both broadcast to S."""

    @abstractmethod
    def inner(self, left_FX: Tensor, right_FX: Tensor, i: Tensor | None = None) -> Tensor:
        """<left_i, right_j> for each pair i < j (S)."""

    @abstractmethod
    def sample(self, value_S: Tensor, vector_FX: Tensor) -> tuple[Tensor, Tensor]:
        """The values and <v_i, v_j> of all pairs, or of an evenly spaced subset with about `BLOCK` elements."""


class DensePairs(Coactivation):
    """Every pair: the shape S is (F, F), and only the upper triangle is used."""

    joint_FF: Tensor

    def __init__(self, d_sae: int, beta: float = 0.99) -> None:
        super().__init__(d_sae, beta)
        self.register_buffer("joint_FF", torch.zeros(d_sae, d_sae))

    @staticmethod
    def gigabytes(d_sae: int) -> float:
        """Memory for J and the temporaries of a step: at most eight matrices of the size of J."""
        return 8 * 4 * d_sae**2 / 1e9

    def update_joint(self, fires_BF: Tensor) -> None:
        fires_BF = fires_BF.to(self.joint_FF.dtype)
        self.joint_FF.lerp_(fires_BF.T @ fires_BF / len(fires_BF), 1 - self.beta)

    def joint(self, i: Tensor | None = None) -> tuple[Tensor, Tensor]:
        upper_FF = torch.ones_like(self.joint_FF, dtype=torch.bool).triu_(1)
        return self.joint_FF / self.seen.clamp_min(1e-12), upper_FF

    def ends(self, value_F: Tensor, i: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return value_F[:, None], value_F[None]

    def inner(self, left_FX: Tensor, right_FX: Tensor, i: Tensor | None = None) -> Tensor:
        return (left_FX @ right_FX.T).to(left_FX.dtype)

    def sample(self, value_S: Tensor, vector_FX: Tensor) -> tuple[Tensor, Tensor]:
        rows = slice(None, None, -(-value_S.numel() // BLOCK))
        return value_S[rows], vector_FX[rows] @ vector_FX.T


class PairTable(Coactivation):
    """A table of `capacity` pairs i < j: the shape S is (P).

    Every `every` steps the table is refreshed: all pairs of the last batch are ranked together with the pairs in the
    table, and the best are kept. For a new pair, the average J begins at the refresh, so `seen_P` holds a separate
    total weight for each pair. A table with room for all pairs contains them from the start. It has the same statistics
    as `DensePairs`, but as a list of pairs instead of a matrix. `by` selects how pairs are ranked: with "cofire", by
    conditional probability; with "cosine", by the cosine of the decoder rows.

    Step i compares the pairs i, i + `turns`, i + 2 `turns`, ... of the table. These pairs are spread over the whole
    ranking, because a refreshed table is sorted by rank. `turns` has to divide the number of pairs; it has no effect if
    the table holds all pairs.
    """

    has_kernels = True
    first_P: Tensor  # int64; entries in which first = second are empty
    second_P: Tensor
    joint_P: Tensor
    seen_P: Tensor

    def __init__(
        self,
        d_sae: int,
        capacity: int,
        beta: float = 0.99,
        every: int | None = 100,
        by: str = "cofire",
        turns: int = 1,
    ) -> None:
        super().__init__(d_sae, beta)
        self.every, self.by, self.turns = every, by, turns
        first_P = second_P = torch.zeros(capacity, dtype=torch.int64)
        if capacity >= d_sae * (d_sae - 1) // 2:
            first_P, second_P = torch.triu_indices(d_sae, d_sae, 1)
            self.every, self.turns = None, 1
        self.register_buffer("first_P", first_P.clone())
        self.register_buffer("second_P", second_P.clone())
        self.register_buffer("joint_P", torch.zeros(len(first_P)))
        self.register_buffer("seen_P", torch.zeros(len(first_P)))

    @staticmethod
    def gigabytes(capacity: int) -> float:
        """Memory for the table (24 B per pair), a refresh (four times 28 B per pair), and four blocks."""
        return ((24 + 4 * 28) * capacity + 4 * 4 * BLOCK) / 1e9

    def update_joint(self, fires_BF: Tensor) -> None:
        count = count_pairs if self.by_kernels else count_pairs_by_torch
        together_P = count(pack_tokens(fires_BF), self.first_P, self.second_P).to(self.joint_P.dtype)
        self.joint_P.lerp_(together_P / len(fires_BF), 1 - self.beta)
        self.seen_P += (1 - self.beta) * (1 - self.seen_P)

    def in_turn(self, column_P: Tensor, i: Tensor | None) -> Tensor:
        """The entries of one column of the table, for only those pairs that step i compares."""
        if i is None or self.turns == 1:
            return column_P
        return column_P.view(-1, self.turns).index_select(1, (i % self.turns).view(1)).squeeze(1)

    def joint(self, i: Tensor | None = None) -> tuple[Tensor, Tensor]:
        first_P, second_P = self.in_turn(self.first_P, i), self.in_turn(self.second_P, i)
        joint_P, seen_P = self.in_turn(self.joint_P, i), self.in_turn(self.seen_P, i)
        return joint_P / seen_P.clamp_min(1e-12), (first_P < second_P) & (seen_P > 0)

    def ends(self, value_F: Tensor, i: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return value_F[self.in_turn(self.first_P, i)], value_F[self.in_turn(self.second_P, i)]

    def inner(self, left_FX: Tensor, right_FX: Tensor, i: Tensor | None = None) -> Tensor:
        first_P, second_P = self.in_turn(self.first_P, i), self.in_turn(self.second_P, i)
        products_P: Tensor = PairProducts.apply(left_FX, right_FX, first_P, second_P)
        return products_P

    def sample(self, value_S: Tensor, vector_FX: Tensor) -> tuple[Tensor, Tensor]:
        some = slice(None, None, -(-len(value_S) * vector_FX.shape[1] // BLOCK))
        return value_S[some], (vector_FX[self.first_P[some]] * vector_FX[self.second_P[some]]).sum(1)

    def between_bytes(self, sae: SAE, tokens: int) -> int:
        if self.every is None:
            return 0
        block, pairs = min(BLOCK, sae.d_sae**2), len(self.first_P)
        sorted_copy = 16 * max(block, 2 * pairs)  # of `topk`, on a CPU
        return 4 * 28 * pairs + 4 * 4 * block + sorted_copy + 5 * tokens * sae.d_sae

    def every_n_steps(self, step: Step) -> None:
        """Refresh the table. `slot` is the position of a pair in the old table, or -1 for a new pair."""
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
        """For each block of I adjacent latents, yield the index of the first one and the scores (I, F) of their pairs.

        Each pair is scored once, in the row of its first latent. A score of 0 means that the pair is not a candidate,
        for example because it is in the table.
        """
        fires_BF = (step.f_BF.detach() > 0).float()
        n, size = fires_BF.shape[1], max(1, BLOCK // fires_BF.shape[1])
        # Paper: follows every pair. Here candidates are ranked as if each latent had fired three more times without the
        # other. Otherwise rare latents that fired together once in a batch would rank highest.
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


def pack_tokens(fires_BF: Tensor) -> Tensor:
    """(F, B/64) int64: one bit per latent and token, set if the latent fires.

    To compare two latents, B/64 words of each are read.
    """
    fires_BF = fires_BF.view(torch.uint8)
    if rest := -len(fires_BF) % 64:
        fires_BF = F.pad(fires_BF, (0, 0, 0, rest))
    place_8 = torch.arange(8, dtype=torch.uint8, device=fires_BF.device)[:, None]
    bytes_F = (fires_BF.unflatten(0, (-1, 8)) << place_8).sum(1, dtype=torch.uint8).T.contiguous()
    return bytes_F.view(torch.int64)


class PairProducts(torch.autograd.Function):
    """<left_i, right_j> for each pair, in blocks, since the rows of all pairs would exceed the dense J in size.

    On a GPU under autocast, rows are read in the dtype of matrix products and no row is copied.
    """

    @staticmethod
    def forward(ctx: Any, left_FX: Tensor, right_FX: Tensor, first_P: Tensor, second_P: Tensor) -> Tensor:
        ctx.rounded, ctx.same = row_dtype(left_FX) != left_FX.dtype, left_FX is right_FX
        if ctx.rounded:
            (left_FX, ctx.dtype), (right_FX, _) = (for_products(rows, row_dtype(rows)) for rows in (left_FX, right_FX))
        ctx.save_for_backward(left_FX, right_FX, first_P, second_P)
        if ctx.rounded:
            return rounded_products(left_FX, right_FX, first_P, second_P).float()
        blocks = pair_blocks(first_P, second_P, left_FX.shape[1])
        return torch.cat([(left_FX[first] * right_FX[second]).sum(1) for first, second in blocks])

    @staticmethod
    def backward(ctx: Any, gradient_P: Tensor) -> tuple[Tensor | None, ...]:
        left_FX, right_FX, first_P, second_P = ctx.saved_tensors
        if ctx.rounded and ctx.same:  # one sum for both latents of each pair
            from_P, to_P = torch.cat([second_P, first_P]), torch.cat([first_P, second_P])
            sums_FX = weighted_sums(torch.cat([gradient_P, gradient_P]), left_FX, from_P, to_P)
            return sums_FX.to(ctx.dtype), None, None, None
        to_left = weighted_sums(gradient_P, right_FX, second_P, first_P) if ctx.needs_input_grad[0] else None
        to_right = weighted_sums(gradient_P, left_FX, first_P, second_P) if ctx.needs_input_grad[1] else None
        return to_left, to_right, None, None


def rounded_products(left_FX: Tensor, right_FX: Tensor, first_P: Tensor, second_P: Tensor) -> Tensor:
    """(P): <left_i, right_j>, in the dtype of the rows, from one pass over them. Sums are in float32."""
    # The operator requires `start_F` but does not read it, because `first_P` gives the rows of `left_FX`.
    start_F = torch.zeros_like(first_P[:1])
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left_FX.contiguous(), right_FX.contiguous(), second_P, start_F, first_P, 0
    )


def weighted_sums(weight_P: Tensor, row_FX: Tensor, from_P: Tensor, to_P: Tensor) -> Tensor:
    """(F, X): for latent i, the sum over its pairs (`to_P` = i) of `weight_P` times row `from_P` of `row_FX`.

    For a deterministic order, the pairs are sorted by latent before the rows are summed. A GPU would add rows in place
    in an arbitrary order.
    """
    to_P, order_P = to_P.sort(stable=True)
    first_F = torch.searchsorted(to_P, torch.arange(len(row_FX), device=to_P.device))
    return weighted_row_sums(from_P[order_P], row_FX, first_F, weight_P[order_P])
