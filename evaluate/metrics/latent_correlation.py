"""Correlations between the latents of SAEs on the same held-out tokens.

The latents are stored sparsely, with 12 bytes for each nonzero value: 25 MB for 32,768 tokens and an L0 of 64. The
activations take 4 bytes per number and are in memory twice while random dictionaries are built: 2 x 300 MB for 32,768
tokens of Gemma-2-2B.

Shape suffixes: T tokens, D d_in, F latents of one SAE, G of another, B a block of latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from scipy.sparse import csr_matrix, vstack
from torch import Tensor

from ...common.device import copy_to_device
from ...common.errors import SaeError, UsageError
from ..context import EvalContext
from .base import EvalTarget, Progress, RowSet, SAELike, encode_finite
from .held_out_rows import read_rows
from .latent_matching import BlockSimilarity
from .parts import tokens_per_encode

MAX_ACTIVE = 2**28  # limit for the number of nonzero latents of an SAE over all tokens: 3 GB
CONSTANT = 1e-12  # a latent is constant if its variance is less than this share of its mean square


@dataclass(frozen=True)
class Latents:
    """The latents of one SAE (T, F), in float64, with their means and standard deviations (F,).

    `varies_F` is False for dead latents: latents that are 0 at every token or constant for another reason.
    """

    f_TF: csr_matrix
    mean_F: np.ndarray
    sd_F: np.ndarray
    varies_F: np.ndarray

    @classmethod
    def of(cls, f_TF: csr_matrix) -> Self:
        tokens = f_TF.shape[0]
        sum_F, square_F = (
            np.bincount(f_TF.indices, values, minlength=f_TF.shape[1]) for values in (f_TF.data, f_TF.data**2)
        )
        mean_F, square_F = sum_F / tokens, square_F / tokens
        variance_F = square_F - mean_F**2
        varies_F = variance_F > CONSTANT * square_F
        return cls(f_TF, mean_F, np.sqrt(np.where(varies_F, variance_F, 0)), varies_F)

    @property
    def active_F(self) -> np.ndarray:
        """The number of tokens at which each latent is not 0 (F,)."""
        return np.bincount(self.f_TF.indices, minlength=self.f_TF.shape[1])

    @property
    def has_negative(self) -> bool:
        """Whether any latent is negative at any token, as in SAEs that keep the largest |z|."""
        return bool((self.f_TF.data < 0).any())

    def correlation(self, other: "Latents") -> BlockSimilarity:
        """Pearson correlations with the latents of another SAE; 0 for latents that do not vary."""
        f_FT, tokens = self.f_TF.T.tocsr(), self.f_TF.shape[0]
        with np.errstate(divide="ignore"):
            scale_F, scale_G = (np.where(one.varies_F, 1 / one.sd_F, 0) for one in (self, other))

        def block(rows: slice) -> Tensor:
            product_BG = (f_FT[rows] @ other.f_TF).toarray() / tokens
            covariance_BG = product_BG - np.outer(self.mean_F[rows], other.mean_F)
            return torch.from_numpy(covariance_BG * scale_F[rows, None] * scale_G)

        return block


@dataclass
class HeldOutRows:
    """The held-out activations of one row set (T, D), on the CPU, and each SAE's latents on them.

    `failed` says why an SAE's latents are missing. `outliers` is the number of outlier rows that were skipped while
    reading.
    """

    x: list[Tensor] = field(default_factory=list)
    f: dict[int, list[csr_matrix]] = field(default_factory=dict)
    failed: dict[int, SaeError] = field(default_factory=dict)
    outliers: int = 0

    @property
    def tokens(self) -> int:
        return sum(map(len, self.x))

    def add(self, x_TD: Tensor, saes: dict[int, SAELike]) -> None:
        """Add rows that are on the SAEs' device, and encode them immediately. `saes` are keyed by their index."""
        self.x.append(x_TD.float().cpu())
        self.encode(x_TD, saes)

    def encode(self, x_TD: Tensor, saes: dict[int, SAELike]) -> None:
        """Encode rows and store their latents."""
        for place, sae in saes.items():
            kept = self.f.setdefault(place, [])
            try:
                if place not in self.failed:
                    kept.append(sparse(encode_finite(sae, x_TD)))
                if (active := sum(part.nnz for part in kept)) > MAX_ACTIVE:
                    raise UsageError(
                        f"The latents have {active:,} nonzero activations at {sum(part.shape[0] for part in kept):,} "
                        "tokens. The SAE is not sparse, and its activations do not fit into memory. Read less text, "
                        "for example with --set stability.tokens=4096."
                    )
            except SaeError as error:
                self.failed[place] = error
                kept.clear()

    def latents(self, place: int) -> Latents:
        return Latents.of(vstack(self.f[place], "csr"))

    def centered(self, device: str) -> Tensor:
        """x minus its mean (D, T), on a device."""
        x_TD = torch.cat(self.x)
        return x_TD.sub_(x_TD.mean(0)).T.to(device)


def sparse(f_TF: Tensor) -> csr_matrix:
    """The same matrix as csr_matrix(f_TF), in float64. scipy's own conversion takes five times as long, because it
    looks up each nonzero value by a row index and a column index."""
    value_TF = f_TF.cpu().numpy()
    nonzero_TF = value_TF != 0
    place_Z = np.flatnonzero(nonzero_TF)
    starts = np.concatenate([[0], np.count_nonzero(nonzero_TF, axis=1).cumsum()])
    values = value_TF.ravel()[place_Z].astype(np.float64)
    return csr_matrix((values, place_Z % value_TF.shape[1], starts), value_TF.shape)


def read_latents(
    ctx: EvalContext, targets: Sequence[EvalTarget], tokens: int, batch_contexts: int, progress: Progress
) -> dict[RowSet, HeldOutRows]:
    """The rows of held-out text for each row set, and each target's latents on them, keyed by the target's index."""
    row_sets = list(dict.fromkeys(target.row_set for target in targets))
    found = {}
    for row_set, (x_TD, outliers) in read_rows(ctx, row_sets, tokens, batch_contexts, progress).items():
        saes = {place: target.sae for place, target in enumerate(targets) if target.row_set == row_set}
        rows = found[row_set] = HeldOutRows([x_TD.float()] if len(x_TD) else [], outliers=outliers)
        alike: dict[int, dict[int, SAELike]] = {}
        for place, sae in saes.items() if len(x_TD) else ():
            alike.setdefault(tokens_per_encode(sae, x_TD, ctx.device), {})[place] = sae
        for tokens, some in alike.items():
            for number, part_TD in enumerate(x_TD.split(tokens)):
                rows.encode(copy_to_device(part_TD, ctx.device), some)
                progress(min((number + 1) * tokens, len(x_TD)), len(x_TD), "tokens encoded")
    return found
