"""Pairs of latents of one SAE: the similarity of their activations, and the cosines of their decoder rows (core).

SAEBench has none of these numbers. These numbers are computed over all pairs in a sample of latents. The sample is
drawn with a fixed seed, so that a larger sample contains every smaller one.

Shape suffixes: T counted tokens, D d_in, F latents that are paired.
"""

import math

import numpy as np
import torch
from scipy.sparse import csr_array, vstack
from torch import Tensor

from ...common.device import copy_to_device
from ...common.errors import UsageError
from ...common.formatting import format_bytes
from ...common.memory import available_memory

PAIRED_LATENTS = 1024  # default sample size; for an SAE with fewer latents, the sample is all of them
PAIRED_TOKENS = 32_768  # correlations are computed over the batches that start before this many tokens
SPARSE_BELOW = 0.03  # share of active latents below which a sparse matrix multiplication is faster on a CPU
GRAM_ROWS = 256  # rows of the Gram matrix computed at a time, from the diagonal to the right
PAIR_BYTES = 48  # memory for each pair of latents: sums in float32 and float64, cosines, and their ranks


class LatentPairs:
    """Inner products of the latents over some tokens, for all pairs in a sample of at most `latents` latents."""

    def __init__(self, latents: int) -> None:
        self.latents = latents
        self.index_F: Tensor | None = None  # the sample; None before the first token
        self.gram_FF: Tensor | None = None  # float64, sum over finished batches
        self.batch_FF: Tensor | None = None  # sum over the current batch
        self.sparse: list[csr_array] = []  # latents of the current batch that are not yet in batch_FF

    def add(self, f_TF: Tensor) -> None:
        """Add f^T f for some tokens of a batch. Sparse latents are only stored here; `end_batch` adds them. Only the
        upper triangle of the sum is complete."""
        if self.index_F is None:
            self.index_F = self.sample(f_TF)
        paired_TF = f_TF.index_select(1, self.index_F) if len(self.index_F) < f_TF.shape[1] else f_TF
        if self.batch_FF is None:
            self.batch_FF = f_TF.new_zeros(len(self.index_F), len(self.index_F))
        if paired_TF.device.type == "cpu":
            active_N = paired_TF.flatten().nonzero()[:, 0]
            if len(active_N) < SPARSE_BELOW * paired_TF.numel():
                self.sparse.append(sparse_rows(paired_TF, active_N))
                return
        for start in range(0, len(self.batch_FF), GRAM_ROWS):
            rows = slice(start, start + GRAM_ROWS)
            self.batch_FF[rows, start:].addmm_(paired_TF[:, rows].T, paired_TF[:, start:])

    def sample(self, f_TF: Tensor) -> Tensor:
        """The latents to pair. Raises UsageError if the pairs do not fit into memory."""
        count = min(self.latents, f_TF.shape[1])
        needed, free = PAIR_BYTES * count**2, available_memory(str(f_TF.device))
        if needed > free:
            raise UsageError(
                f"core.paired_latents={self.latents}: all pairs of {count:,} latents need "
                f"{format_bytes(needed)} of memory, but only {format_bytes(int(free))} are free. Give "
                f"{math.isqrt(int(free / PAIR_BYTES)):,} or less."
            )
        return sample_latents(f_TF.shape[1], self.latents, f_TF.device)

    def end_batch(self) -> None:
        if self.batch_FF is not None:
            if self.sparse:
                rows_TF = vstack(self.sparse, format="csr")
                self.batch_FF += torch.from_numpy((rows_TF.T @ rows_TF).toarray())
                self.sparse = []
            self.gram_FF = self.batch_FF.double() if self.gram_FF is None else self.gram_FF.add_(self.batch_FF)
            self.batch_FF = None

    def correlation(self, W_dec_FD: Tensor | None) -> dict[str, float]:
        """Statistics of the cosines between the activations of each pair of alive latents (003, eq. 2).

        The activations are those at the tokens that were passed to `add`. There are about PAIRED_TOKENS such tokens.

        If `W_dec_FD` is given, also Spearman's rank correlation of these cosines with the cosines of the decoder rows
        (002, sec. 4).
        """
        assert self.gram_FF is not None and self.index_F is not None
        alive = self.gram_FF.diagonal() > 0
        counts = {"latents": int(alive.sum()), "latents_dead": int((~alive).sum())}
        cosines = upper_triangle(gram_cosines(self.gram_FF[alive][:, alive]))
        if not len(cosines):
            return {"mean": math.nan, **counts}
        numbers = {**distribution(cosines.abs()), **counts}
        if W_dec_FD is not None:
            rows = W_dec_FD[self.index_F][alive].double()
            numbers["spearman_decoder"] = spearman(cosines, upper_triangle(gram_cosines(rows @ rows.T)))
        return numbers


def sparse_rows(f_TF: Tensor, active_N: Tensor) -> csr_array:
    """The latents as a sparse matrix, given the positions of the nonzero entries."""
    tokens, latents = f_TF.shape
    index_N, value_N = active_N.numpy(), f_TF.flatten()[active_N].numpy()
    ends = np.searchsorted(index_N, np.arange(0, f_TF.numel() + 1, latents))
    return csr_array((value_N, index_N % latents, ends), shape=(tokens, latents))


def sample_latents(d_sae: int, latents: int, device: torch.device) -> Tensor:
    """The indices of at most `latents` latents, in ascending order."""
    drawn = torch.randperm(d_sae, generator=torch.Generator().manual_seed(0))[:latents]
    return copy_to_device(drawn.sort().values, device)


def gram_cosines(gram_FF: Tensor) -> Tensor:
    """Cosines of vectors from their inner products."""
    norm_F = gram_FF.diagonal().sqrt()
    return gram_FF / norm_F[:, None] / norm_F


def upper_triangle(matrix_FF: Tensor) -> Tensor:
    """The entries above the diagonal, which contain every pair once."""
    return matrix_FF[tuple(torch.triu_indices(len(matrix_FF), len(matrix_FF), 1, device=matrix_FF.device))]


def distribution(values: Tensor) -> dict[str, float]:
    """Mean, standard deviation and quantiles (linear interpolation)."""
    shares = {"quantile_50": 0.5, "quantile_90": 0.9, "quantile_99": 0.99, "quantile_99.9": 0.999}
    positions = {name: share * (len(values) - 1) for name, share in shares.items()}
    # Only these positions are sorted: torch.quantile accepts at most 16 million numbers, and a full sort is several
    # times slower.
    ends = sorted({end for position in positions.values() for end in (math.floor(position), math.ceil(position))})
    ordered = dict(zip(ends, np.partition(values.detach().cpu().numpy(), ends)[ends].tolist(), strict=True))

    def quantile(position: float) -> float:
        below, above = ordered[math.floor(position)], ordered[math.ceil(position)]
        return below + (position - math.floor(position)) * (above - below)

    numbers = {"mean": float(values.mean()), "sd": float(values.std(correction=0))}
    return numbers | {name: quantile(position) for name, position in positions.items()}


def spearman(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of the ranks; equal values share their mean rank."""

    def ranks(values: Tensor) -> Tensor:
        _, group, count = values.unique(return_inverse=True, return_counts=True)
        last = count.cumsum(0).double()
        return (last - (count - 1) / 2)[group]

    ranked = torch.stack([ranks(a), ranks(b)])
    return float(ranked.corrcoef()[0, 1])


def decoder_geometry(W_dec_FD: Tensor, latents: int) -> dict[str, float]:
    """|cosine| between pairs of decoder rows, and the effective rank of the decoder (Roy and Vetterli 2007).

    The effective rank is exp of the entropy of the normalized singular values. Rows are scaled to unit length first, so
    that their lengths do not matter. The pairs come from a sample of `latents` latents; if that is 0, there are no
    pairs.
    """
    unit_FD = torch.nn.functional.normalize(W_dec_FD.float(), dim=1)
    sample_FD = unit_FD[sample_latents(len(unit_FD), latents, unit_FD.device)]
    share = torch.linalg.eigvalsh((unit_FD.T @ unit_FD).double()).clamp(min=0).sqrt()
    share = share / share.sum()
    cosines = distribution(upper_triangle(sample_FD @ sample_FD.T).abs()) if len(sample_FD) > 1 else {}
    return {
        **{f"decoder_cosine_{name}": number for name, number in cosines.items()},
        "effective_rank": float(torch.special.entr(share).sum().exp()),
    }
