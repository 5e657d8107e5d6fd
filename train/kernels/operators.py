"""The operators that have kernels in Triton.

Each operator is registered with torch, so that torch.compile, fake-tensor tracing and CUDA graphs treat it as one
operation. Each operator has two implementations with the same result: kernels on a GPU, and torch operations on a CPU.
The tests compare them. Importing this module does not import Triton.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

LONGEST = 1 << 30  # maximum number of elements per row, because the kernels compute indices in 32 bits


@torch.library.custom_op("sae::largest", mutates_args=(), device_types="cpu")
def largest(z_RN: Tensor, k: int) -> Tensor:
    """(R, k) int64: the indices of the k largest elements of each row of z (R, N), ascending.

    Among equal elements, the elements with the lowest indices are chosen, so that the choice depends only on the
    values. As in `torch.topk`, NaN is larger than every number, and 0.0 equals -0.0.
    """
    return largest_by_sort(z_RN, k)


def largest_by_sort(z_RN: Tensor, k: int) -> Tensor:
    return z_RN.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values


@largest.register_fake
def _(z_RN: Tensor, k: int) -> Tensor:
    torch._check(0 < k <= z_RN.shape[1], lambda: f"k = {k} is out of range: a row has {z_RN.shape[1]} elements.")
    return z_RN.new_empty(len(z_RN), k, dtype=torch.int64)


@largest.register_kernel("cuda")
def _(z_RN: Tensor, k: int) -> Tensor:
    from .largest import INFINITY, find_largest

    if z_RN.dtype not in INFINITY or z_RN.shape[1] > LONGEST:
        return largest_by_sort(z_RN, k)
    return find_largest(z_RN, k)


@torch.library.custom_op("sae::decode_rows", mutates_args=(), device_types="cpu")
def decode_rows(
    value_N: Tensor, row_FD: Tensor, latent_N: Tensor, token_start_B: Tensor, bias_D: Tensor, x_BD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Decode the kept latents of each token and compare the result with x; on a GPU, in one pass over their rows.

    Args:
        value_N: the values of the kept latents, ordered by token.
        row_FD: the rows of W_dec, possibly in bfloat16. Sums have the dtype of x.
        latent_N: the indices of the kept latents.
        token_start_B: where the latents of each token start in N.
        bias_D: b_dec.
        x_BD: the batch.

    Returns:
        (B, D) the reconstruction; () the sum of its squared errors; (N) half the gradient of this sum with respect to
        the values.
    """
    return decode_by_bags(value_N, row_FD, latent_N, token_start_B, bias_D, x_BD)


def decode_by_bags(
    value_N: Tensor, row_FD: Tensor, latent_N: Tensor, token_start_B: Tensor, bias_D: Tensor, x_BD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    row_FD = row_FD.to(x_BD.dtype)
    recon_BD = bias_D + F.embedding_bag(latent_N, row_FD, token_start_B, mode="sum", per_sample_weights=value_N)
    error_BD = recon_BD - x_BD
    slope_N = products_with_rows(error_BD, row_FD, latent_N, token_start_B)
    return recon_BD, error_BD.square().sum(), slope_N


def products_with_rows(row_BD: Tensor, row_FD: Tensor, latent_N: Tensor, token_start_B: Tensor) -> Tensor:
    """(N): the dot product of each kept latent's row with the row of its token. All rows have the same dtype."""
    at_N = torch.arange(len(latent_N), device=latent_N.device)
    token_N = torch.searchsorted(token_start_B, at_N, right=True) - 1
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        row_BD, row_FD, latent_N, token_start_B, token_N, 0
    )


@decode_rows.register_fake
def _(
    value_N: Tensor, row_FD: Tensor, latent_N: Tensor, token_start_B: Tensor, bias_D: Tensor, x_BD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x_BD), x_BD.new_empty(()), torch.empty_like(value_N)


@decode_rows.register_kernel("cuda")
def _(
    value_N: Tensor, row_FD: Tensor, latent_N: Tensor, token_start_B: Tensor, bias_D: Tensor, x_BD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from .rows import decode

    if x_BD.dtype != torch.float32:
        return decode_by_bags(value_N, row_FD, latent_N, token_start_B, bias_D, x_BD)
    return decode(value_N, row_FD, latent_N, token_start_B, bias_D, x_BD)


@torch.library.custom_op("sae::sum_rows", mutates_args=(), device_types="cpu")
def sum_rows(index_N: Tensor, row_RD: Tensor, start_F: Tensor, weight_N: Tensor, transposed: bool) -> Tensor:
    """(F, D), or (D, F) if `transposed`: sums of weighted rows, one per segment of N; segments start at `start_F`.

    Rows may be in bfloat16. Sums have the dtype of the weights.
    """
    return sum_by_bags(index_N, row_RD, start_F, weight_N, transposed)


def sum_by_bags(index_N: Tensor, row_RD: Tensor, start_F: Tensor, weight_N: Tensor, transposed: bool) -> Tensor:
    sum_FD = F.embedding_bag(index_N, row_RD.to(weight_N.dtype), start_F, mode="sum", per_sample_weights=weight_N)
    return sum_FD.T.contiguous() if transposed else sum_FD


@sum_rows.register_fake
def _(index_N: Tensor, row_RD: Tensor, start_F: Tensor, weight_N: Tensor, transposed: bool) -> Tensor:
    shape = len(start_F), row_RD.shape[1]
    return weight_N.new_empty(shape[::-1] if transposed else shape)


@sum_rows.register_kernel("cuda")
def _(index_N: Tensor, row_RD: Tensor, start_F: Tensor, weight_N: Tensor, transposed: bool) -> Tensor:
    from .rows import sum_by_stretch

    if weight_N.dtype != torch.float32:
        return sum_by_bags(index_N, row_RD, start_F, weight_N, transposed)
    return sum_by_stretch(index_N, row_RD, start_F, weight_N, transposed)


@torch.library.custom_op("sae::jump_gradients", mutates_args=(), device_types="cpu")
def jump_gradients(z_BF: Tensor, theta_F: Tensor, g_BF: Tensor, eps: float, to_input: bool) -> tuple[Tensor, Tensor]:
    """JumpReLU's gradients, given g, the gradient of its output z H(z - theta) (train/variants/jumprelu.py).

    Returns the gradient of z (B, F), and the sums (F), in theta's dtype, of g over the tokens with |z - theta| < eps/2.
    If `to_input` is set, the gradient of z includes the gradient through theta's window.
    """
    return jump_gradients_by_torch(z_BF, theta_F, g_BF, eps, to_input)


def jump_gradients_by_torch(
    z_BF: Tensor, theta_F: Tensor, g_BF: Tensor, eps: float, to_input: bool
) -> tuple[Tensor, Tensor]:
    near_BF = (z_BF - theta_F).abs() < eps / 2
    near_F = (g_BF.to(theta_F.dtype) * near_BF).sum_to_size(theta_F.shape)
    to_z_BF = g_BF * (z_BF > theta_F)
    if to_input:
        to_z_BF = to_z_BF + (theta_F / eps).to(g_BF.dtype) * near_BF * g_BF
    return to_z_BF, near_F


@jump_gradients.register_fake
def _(z_BF: Tensor, theta_F: Tensor, g_BF: Tensor, eps: float, to_input: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(g_BF, memory_format=torch.contiguous_format), torch.empty_like(theta_F)


@jump_gradients.register_kernel("cuda")
def _(z_BF: Tensor, theta_F: Tensor, g_BF: Tensor, eps: float, to_input: bool) -> tuple[Tensor, Tensor]:
    from .jump import gradients

    if theta_F.dtype != torch.float32:
        return jump_gradients_by_torch(z_BF, theta_F, g_BF, eps, to_input)
    return gradients(z_BF, theta_F, g_BF, eps, to_input)


@torch.library.custom_op("sae::jump_counts", mutates_args=(), device_types="cpu")
def jump_counts(z_BF: Tensor, theta_F: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The number of tokens with z > theta (F), and the number with |z - theta| < eps/2 (F), in theta's dtype."""
    return jump_counts_by_torch(z_BF, theta_F, eps)


def jump_counts_by_torch(z_BF: Tensor, theta_F: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    above_BF, near_BF = z_BF > theta_F, (z_BF - theta_F).abs() < eps / 2
    return above_BF.sum(0, dtype=theta_F.dtype), near_BF.sum(0, dtype=theta_F.dtype)


@jump_counts.register_fake
def _(z_BF: Tensor, theta_F: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(theta_F), torch.empty_like(theta_F)


@jump_counts.register_kernel("cuda")
def _(z_BF: Tensor, theta_F: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from .jump import counts

    if theta_F.dtype != torch.float32:
        return jump_counts_by_torch(z_BF, theta_F, eps)
    return counts(z_BF, theta_F, eps)
