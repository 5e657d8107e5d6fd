"""Random dictionaries of an SAE's shape. The similarity of an SAE to random dictionaries is the chance level of
stability.

There are two kinds, because neither is right for every SAE. `shuffle_rows` preserves the entries of each decoder row (a
few of which may be large) but not the directions. `gaussian_rows` preserves the second moment of a decoder's rows
(which may reflect the covariance of activations, or a common direction) but not the entries.

Shape suffixes: T tokens, D d_in, F latents of one SAE, B a block of latents.
"""

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor
from torch.nn.functional import normalize

from .latent_correlation import Latents

LATENTS_PER_BLOCK = 64  # latents of a random dictionary that are computed at a time, on all tokens
SAMPLED = 16  # one in this many tokens is sampled to estimate a threshold
MOMENT_ROUNDS = 50  # enough to fit the eigenvalues of the second moment of Gaussian rows to about 1e-3


def shuffle_rows(W_dec_FD: Tensor, seed: int) -> Tensor:
    """The decoder with the entries of each row in a random order: random directions with the same entries."""
    generator = torch.Generator().manual_seed(seed)
    return W_dec_FD.cpu().gather(1, torch.rand(W_dec_FD.shape, generator=generator).argsort(1)).to(W_dec_FD.device)


def second_moment(unit_FD: Tensor) -> Tensor:
    """E[w w^T] (D, D) over the rows of a dictionary. The mean row is not subtracted, because it is a direction that the
    rows have in common."""
    return unit_FD.T @ unit_FD / len(unit_FD)


def gaussian_rows(moment_DD: Tensor, latents: int, seed: int) -> Tensor:
    """Normalized Gaussian vectors (F, D) that have the second moment `moment_DD` (of trace 1) after normalization.

    Normalizing a Gaussian vector changes its covariance. The variances along the eigenvectors of the moment are
    therefore chosen so that the normalized rows have the right mean squares.
    """
    moment_D, axis_DD = torch.linalg.eigh(moment_DD.double().cpu())
    moment_D = moment_D.clamp_min(0)
    draw_FD = torch.randn(latents, len(moment_D), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    scale_D = moment_D.sqrt()
    for _ in range(MOMENT_ROUNDS):
        square_D = normalize(draw_FD * scale_D, dim=1).square().mean(0)
        scale_D = scale_D * torch.where(square_D > 0, moment_D / square_D, 0).sqrt()
        scale_D = scale_D / scale_D.norm()
    row_FD = normalize(draw_FD * scale_D, dim=1) @ axis_DD.T
    return row_FD.to(moment_DD.device, moment_DD.dtype)


def random_latents(direction_FD: Tensor, x_DT: Tensor, active_F: np.ndarray) -> Latents:
    """The latents relu(x . d_i - theta_i) of random directions d_i, for activations x of mean 0.

    Each theta_i is chosen so that the random latent fires on active_F[i] tokens, as many as the SAE's latent i.
    """
    places, values = [], []
    for start in range(0, len(active_F), LATENTS_PER_BLOCK):
        projection_BT = (direction_FD[start : start + LATENTS_PER_BLOCK] @ x_DT).cpu().numpy()
        for value_T, count in zip(projection_BT, active_F[start : start + LATENTS_PER_BLOCK], strict=True):
            place_Z, value_Z = strongest(value_T, min(int(count), len(value_T) - 1))
            places.append(place_Z)
            values.append(value_Z)
    starts = np.cumsum([0, *map(len, places)])
    f_FT = csr_matrix((np.concatenate(values), np.concatenate(places), starts), (len(active_F), x_DT.shape[1]))
    return Latents.of(f_FT.astype(np.float64).T.tocsr())


def strongest(value_T: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The indices of the `count` largest values, and by how much each exceeds the threshold, which is the largest of
    the other values. Values equal to the threshold are left out.

    A sample provides a lower bound of the threshold, so that only few values have to be sorted. If at most `count`
    values reach the bound, the bound is wrong, and all values are sorted.
    """
    sample_T = value_T[::SAMPLED]
    expected = min(int(count / SAMPLED * 1.25) + 8, len(sample_T) - 1)
    place_Z = np.flatnonzero(value_T >= largest(sample_T, expected))
    if len(place_Z) <= count:
        place_Z = np.arange(len(value_T))
    value_Z = value_T[place_Z]
    threshold = largest(value_Z, count)
    above_Z = value_Z > threshold
    return place_Z[above_Z], value_Z[above_Z] - threshold


def largest(value_T: np.ndarray, place: int) -> np.float32:
    """The value that has the index `place` when the values are sorted in descending order."""
    ascending = len(value_T) - 1 - place
    return np.partition(value_T, ascending)[ascending]
