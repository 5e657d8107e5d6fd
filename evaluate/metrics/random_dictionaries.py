"""Random dictionaries of the shape of an SAE: what a matching with them reaches is chance.

There are two kinds, since neither is right for every SAE. `shuffle_rows` keeps the entries of each decoder row, such as
a few large ones, and none of the directions. `gaussian_rows` keeps the second moment of a decoder's rows, such as that
of the activations from whose covariance they were drawn, or a direction in common, and none of the entries.

Shape suffixes: T tokens, D d_in, F latents of one SAE, B a block of latents.
"""

import numpy as np
import torch
from scipy.sparse import vstack
from torch import Tensor
from torch.nn.functional import normalize

from .latent_correlation import Latents, sparse

LATENTS_PER_BLOCK = 256  # of a random dictionary, computed at one time on all tokens
MOMENT_ROUNDS = 50  # after which the second moment of Gaussian rows has the right eigenvalues to about 1e-3


def shuffle_rows(W_dec_FD: Tensor, seed: int) -> Tensor:
    """The decoder with the entries of each row in a random order: random directions with the same entries."""
    generator = torch.Generator().manual_seed(seed)
    return W_dec_FD.cpu().gather(1, torch.rand(W_dec_FD.shape, generator=generator).argsort(1)).to(W_dec_FD.device)


def second_moment(unit_FD: Tensor) -> Tensor:
    """E[w w^T] (D, D) over the rows of a dictionary. Their mean is not taken off: it is a direction in common too."""
    return unit_FD.T @ unit_FD / len(unit_FD)


def gaussian_rows(moment_DD: Tensor, latents: int, seed: int) -> Tensor:
    """Gaussian directions of unit length (F, D) with a second moment, whose trace is 1.

    A Gaussian vector with this covariance would have another one after division by its length, so the variances along
    the axes of the moment are those with which the rows have the right mean squares.
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

    theta_i is such that latent i fires at active_F[i] of the tokens, as often as that of the SAE that it stands for.
    """
    tokens = x_DT.shape[1]
    order_F = np.argsort(active_F, kind="stable")  # so that the latents of a block need about as many values
    parts = []
    for start in range(0, len(order_F), LATENTS_PER_BLOCK):
        block_B = order_F[start : start + LATENTS_PER_BLOCK]
        projection_BT = direction_FD[block_B] @ x_DT
        count_B = torch.from_numpy(np.minimum(active_F[block_B], tokens - 1)).to(projection_BT.device)
        largest = projection_BT.topk(int(count_B.max()) + 1).values
        threshold_B1 = largest.gather(1, count_B[:, None])
        parts.append(sparse((projection_BT - threshold_B1).relu()))
    return Latents.of(vstack(parts, "csr")[np.argsort(order_F)].T.tocsr())
