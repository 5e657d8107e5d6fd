"""OrtSAE (Korznikov et al. 2025): each decoder row is penalized for its similarity to its nearest row.

    L = |x - x_hat|^2 + aux + strength mean_i max_{j in chunk(i), j != i} cos(W_i, W_j)^2

In each step the rows are shuffled into chunks of at most `chunk` rows. So a step costs O(n chunk d), and over many
steps every pair is compared.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ...common.errors import UsageError
from ..recipe import recipe
from ..step import LossTerm, Step
from ..variant import RunConfig, Variant
from .baselines import AUX_OPTIONS, batchtopk


def permutation_of_step(step: Step, count: int) -> Tensor:
    """A permutation of `count` indices that depends only on the step, so that a resumed run uses the same chunks.

    Each index is hashed with the step (the finalizer of MurmurHash3, on 32 of 64 bits), and the hashes are sorted.
    """
    x = (torch.arange(count, device=step.i.device) * 0x9E3779B1 + step.i * 0x85EBCA6B) & 0xFFFFFFFF
    for multiplier in (0x85EBCA6B, 0xC2B2AE35):
        x = ((x ^ (x >> 16)) * multiplier) & 0xFFFFFFFF
    return (x ^ (x >> 16)).argsort()


class OrtSAELoss(LossTerm):
    """mean_i max_{j in chunk(i), j != i} cos(W_i, W_j)^2.

    The nearest row is found without a gradient, and then its cosine is computed again with a gradient. This second
    computation costs O(n d) and replaces a backward pass through the chunks' matrices. Where the maximum is unique, the
    gradient is exact.
    """

    undivided = ""

    def __init__(self, chunk: int = 8192) -> None:
        super().__init__()
        self.chunk = chunk

    def forward(self, step: Step) -> Tensor:
        unit_FD = F.normalize(step.sae.W_dec, dim=1)
        with torch.no_grad():
            order_F = permutation_of_step(step, len(unit_FD))
            chunks = -(-len(order_F) // self.chunk)
            nearest_F = torch.empty_like(order_F)
            for index_C in order_F.tensor_split(chunks):
                square_CC = (unit_FD[index_C] @ unit_FD[index_C].T).square().fill_diagonal_(-1)
                nearest_F[index_C] = index_C[square_CC.argmax(1)]
        square_F = (unit_FD * unit_FD[nearest_F]).sum(1).square()
        step.metrics["nearest_cosine"] = square_F.detach().sqrt().mean()
        return square_F.mean()


@recipe("ortsae", paper="Korznikov et al. 2025", switched_off=AUX_OPTIONS)
def ortsae(
    config: RunConfig,
    k: float = 32,
    strength: float = 0.25,
    chunk: int = 8192,
    aux: float = 1 / 32,
    aux_k: int | None = None,
) -> Variant:
    """`batchtopk` that penalizes each decoder row's largest cosine.

    In each step, the rows are divided at random into chunks. For each row, only the
    other rows of its chunk are searched for the nearest one.

    Paper: its text was not available; the values of strength and chunk are ours.

    Args:
        k: Active latents per token, on average over the batch.
        strength: Strength of the penalty on similar decoder rows.
        chunk: Maximum number of rows in a chunk. Each row is compared with the other rows of its chunk.
        aux: Weight of AuxK, which trains dead latents to model the residual.
        aux_k: Dead latents that AuxK uses per token. None: d_in / 2.
    """
    if chunk < 3 or config.d_sae < 2:  # with chunk >= 3, chunks of nearly equal size have at least two rows
        raise UsageError(
            f"chunk={chunk} with {config.d_sae} latents can leave a row alone in its chunk: set chunk to 3 or more and "
            "--width to 2 or more."
        )
    variant = batchtopk(config, k=k, aux=aux, aux_k=aux_k)
    variant.add_term("orthogonality", strength, OrtSAELoss(chunk))
    return variant
