"""Match the latents of two dictionaries one to one, so that the sum of |similarity| over the pairs is largest.

If `signed` is true, the sum of the similarities themselves is maximized.

Up to EXACT_LATENTS latents, the matching is optimal (scipy's linear_sum_assignment). This matching keeps the
similarities of all pairs in memory, at 9 bytes each. For 16,384 latents, it needs 2.4 GB and takes minutes. With more
latents, each latent is matched only with one of its most similar partners (CANDIDATES of them, at 16 bytes each), so
the sum is a lower bound on the optimum. For 4,096 directions of 128 dimensions, half of them shared, the sum equals the
optimum to seven digits.

Shape suffixes: F latents of one dictionary, G of the other, B a block of the F, K candidates.
"""

from collections.abc import Callable
from typing import NamedTuple, Self

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix, hstack, identity
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

EXACT_LATENTS = 16_384
CANDIDATES = 64
BLOCK = 1024  # latents whose similarities are computed at one time

BlockSimilarity = Callable[[slice], Tensor]  # a slice of the F latents -> their similarities (B, G) with all G latents


class Matching(NamedTuple):
    """The partner of each latent (F,), or -1, and its signed similarity to the partner (F,), or 0 without a partner."""

    partner_F: np.ndarray
    similarity_F: np.ndarray

    @property
    def total(self) -> float:
        """The sum of |similarity|."""
        return float(np.abs(self.similarity_F).sum())

    def inverse(self, latents: int) -> Self:
        """The same pairs, indexed by the latents of the other dictionary, which has `latents` latents."""
        partner_G, similarity_G = np.full(latents, -1), np.zeros(latents)
        matched_F = self.partner_F >= 0
        partner_G[self.partner_F[matched_F]] = np.flatnonzero(matched_F)
        similarity_G[self.partner_F[matched_F]] = self.similarity_F[matched_F]
        return type(self)(partner_G, similarity_G)


def match_latents(
    similarity: BlockSimilarity, latents: int, exact_latents: int = EXACT_LATENTS, signed: bool = False
) -> Matching:
    """The matching between two dictionaries that have `latents` latents each."""
    match = match_all_pairs if latents <= exact_latents else match_candidates
    return match(similarity, latents, signed)


def match_all_pairs(similarity: BlockSimilarity, latents: int, signed: bool = False) -> Matching:
    cost_FG, negative_FG = np.empty((latents, latents)), np.zeros((latents, latents), bool)
    for rows in blocks(latents):
        similarity_BG = similarity(rows).cpu()
        if signed:
            cost_FG[rows] = 1 - similarity_BG
        else:
            cost_FG[rows], negative_FG[rows] = 1 - similarity_BG.abs(), similarity_BG < 0
    rows_F, partner_F = linear_sum_assignment(cost_FG)
    sign_F = np.where(negative_FG[rows_F, partner_F], -1, 1)
    return Matching(partner_F, sign_F * (1 - cost_FG[rows_F, partner_F]))


def match_candidates(similarity: BlockSimilarity, latents: int, signed: bool = False) -> Matching:
    """Match each latent with one of the CANDIDATES most similar latents, or with none."""
    count = min(CANDIDATES, latents)
    candidates, values = [], []
    for rows in blocks(latents):
        similarity_BG = similarity(rows)
        candidate_BK = (similarity_BG if signed else similarity_BG.abs()).topk(count).indices
        candidates.append(candidate_BK.cpu())
        values.append(similarity_BG.gather(1, candidate_BK).cpu())
    candidate_FK, similarity_FK = torch.cat(candidates).numpy(), torch.cat(values).double().numpy()
    gain_FK = similarity_FK.clip(0) if signed else np.abs(similarity_FK)
    # Weights are 1 + gain, since a sparse graph has no edges of weight 0. Each latent also has an edge to an extra
    # column of its own. A latent that is assigned to its extra column has no partner.
    starts = np.arange(latents + 1) * count
    graph = csr_matrix((1 + gain_FK.ravel(), candidate_FK.ravel(), starts), (latents, latents))
    _, column_F = min_weight_full_bipartite_matching(hstack([graph, identity(latents)], "csr"), maximize=True)
    chosen_FK = candidate_FK == column_F[:, None]
    return Matching(np.where(chosen_FK.any(1), column_F, -1), (similarity_FK * chosen_FK).sum(1))


def blocks(latents: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, latents)) for start in range(0, latents, BLOCK)]
