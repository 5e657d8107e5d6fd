"""The operators that compare the batch with its reconstructions from prefixes of a dictionary: see operators.py."""

import torch
from torch import Tensor


@torch.library.custom_op("sae::compare_prefixes", mutates_args=(), device_types="cpu")
def compare_prefixes(part_GBD: Tensor, bias_D: Tensor, x_BD: Tensor) -> tuple[Tensor, Tensor]:
    """Compare b_dec plus the first g parts with x, for each g; on a GPU, in one pass over the parts.

    Args:
        part_GBD: the part of the reconstruction that each section of the dictionary decodes, possibly in bfloat16.
        bias_D: b_dec.
        x_BD: the batch. Sums have its dtype.

    Returns:
        (B, D) the reconstruction from all parts, and (G) the sum of the squared errors of each prefix.
    """
    return compare_prefixes_by_torch(part_GBD, bias_D, x_BD)


def compare_prefixes_by_torch(part_GBD: Tensor, bias_D: Tensor, x_BD: Tensor) -> tuple[Tensor, Tensor]:
    recon_GBD = part_GBD.to(x_BD.dtype).cumsum(0) + bias_D
    return recon_GBD[-1].clone(), (recon_GBD - x_BD).square().sum((1, 2))


@compare_prefixes.register_fake
def _(part_GBD: Tensor, bias_D: Tensor, x_BD: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_BD, memory_format=torch.contiguous_format), x_BD.new_empty(len(part_GBD))


@compare_prefixes.register_kernel("cuda")
def _(part_GBD: Tensor, bias_D: Tensor, x_BD: Tensor) -> tuple[Tensor, Tensor]:
    from .prefix import compare

    if x_BD.dtype != torch.float32:
        return compare_prefixes_by_torch(part_GBD, bias_D, x_BD)
    return compare(part_GBD, bias_D, x_BD)


@torch.library.custom_op("sae::prefix_gradients", mutates_args=(), device_types="cpu")
def prefix_gradients(part_GBD: Tensor, bias_D: Tensor, x_BD: Tensor, weight_G: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of a weighted sum of the squared errors of all prefixes. `weight_G` is twice the weight of each.

    Returns the gradient of each part (G, B, D), in the dtype of the part: the weighted sum of the errors of the
    prefixes that contain the part. Also returns the gradient of b_dec (D).
    """
    return prefix_gradients_by_torch(part_GBD, bias_D, x_BD, weight_G)


def prefix_gradients_by_torch(
    part_GBD: Tensor, bias_D: Tensor, x_BD: Tensor, weight_G: Tensor
) -> tuple[Tensor, Tensor]:
    error_GBD = (part_GBD.to(x_BD.dtype).cumsum(0) + bias_D - x_BD) * weight_G[:, None, None]
    g_GBD = error_GBD.flip(0).cumsum(0).flip(0)
    return g_GBD.to(part_GBD.dtype), g_GBD[0].sum(0)


@prefix_gradients.register_fake
def _(part_GBD: Tensor, bias_D: Tensor, x_BD: Tensor, weight_G: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(part_GBD, memory_format=torch.contiguous_format), x_BD.new_empty(x_BD.shape[1])


@prefix_gradients.register_kernel("cuda")
def _(part_GBD: Tensor, bias_D: Tensor, x_BD: Tensor, weight_G: Tensor) -> tuple[Tensor, Tensor]:
    from .prefix import gradients

    if x_BD.dtype != torch.float32:
        return prefix_gradients_by_torch(part_GBD, bias_D, x_BD, weight_G)
    return gradients(part_GBD, bias_D, x_BD, weight_G)
