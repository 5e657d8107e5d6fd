"""The operators that pass over a batch and its reconstruction: see operators.py."""

import torch
from torch import Tensor


@torch.library.custom_op("sae::normalize_batch", mutates_args=(), device_types="cpu")
def normalize_batch(
    x_BD: Tensor, mean_D: Tensor, scale: Tensor, b_D: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize a batch and subtract the encoder's bias, in one pass on a GPU.

    Args:
        x_BD: raw activations.
        mean_D: float32, subtracted first.
        scale: () or (D) float32, the divisor.
        b_D: b_dec, if the encoder subtracts it from its input, or None.
        dtype: the dtype of matrix products.

    Returns:
        (B, D) float32, the normalized batch; (B, D) in `dtype`, the encoder's input; () float32, the sum of squared
        distances of the normalized rows from their mean.
    """
    return normalize_by_torch(x_BD, mean_D, scale, b_D, dtype)


def normalize_by_torch(
    x_BD: Tensor, mean_D: Tensor, scale: Tensor, b_D: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    normalized_BD = (x_BD.to(mean_D.dtype) - mean_D).div_(scale)
    centered_BD = normalized_BD.to(dtype, copy=True) if b_D is None else (normalized_BD - b_D).to(dtype)
    return normalized_BD, centered_BD, squared_distances(normalized_BD)


def squared_distances(x_BD: Tensor) -> Tensor:
    """Scalar: sum_BD (x - mean_B x)^2."""
    return (x_BD - x_BD.mean(0)).square().sum()


@normalize_batch.register_fake
def _(
    x_BD: Tensor, mean_D: Tensor, scale: Tensor, b_D: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    normalized_BD, centered_BD = (x_BD.new_empty(x_BD.shape, dtype=one) for one in (mean_D.dtype, dtype))
    return normalized_BD, centered_BD, mean_D.new_empty(())


@normalize_batch.register_kernel("cuda")
def _(
    x_BD: Tensor, mean_D: Tensor, scale: Tensor, b_D: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    from .batch import normalize

    if mean_D.dtype != torch.float32:
        return normalize_by_torch(x_BD, mean_D, scale, b_D, dtype)
    return normalize(x_BD, mean_D, scale, b_D, dtype)


@torch.library.custom_op("sae::compare", mutates_args=(), device_types="cpu")
def compare(product_BD: Tensor, b_D: Tensor, x_BD: Tensor) -> tuple[Tensor, Tensor]:
    """The error x - (f W_dec + b_dec) (B, D) and the sum of its squares, a scalar, both in the dtype of x.

    `product_BD` is f W_dec.
    """
    return compare_by_torch(product_BD, b_D, x_BD)


def compare_by_torch(product_BD: Tensor, b_D: Tensor, x_BD: Tensor) -> tuple[Tensor, Tensor]:
    error_BD = x_BD - (product_BD + b_D)
    return error_BD, error_BD.square().sum()


@compare.register_fake
def _(product_BD: Tensor, b_D: Tensor, x_BD: Tensor) -> tuple[Tensor, Tensor]:
    return x_BD.new_empty(x_BD.shape), x_BD.new_empty(())


@compare.register_kernel("cuda")
def _(product_BD: Tensor, b_D: Tensor, x_BD: Tensor) -> tuple[Tensor, Tensor]:
    from .batch import compare as by_kernel

    if x_BD.dtype != torch.float32:
        return compare_by_torch(product_BD, b_D, x_BD)
    return by_kernel(product_BD, b_D, x_BD)


@torch.library.custom_op("sae::compare_backward", mutates_args=(), device_types="cpu")
def compare_backward(error_BD: Tensor, gradient: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The gradients of f W_dec (B, D) in `dtype` and of b_dec (D), given the `gradient` of the sum of squares."""
    return compare_backward_by_torch(error_BD, gradient, dtype)


def compare_backward_by_torch(error_BD: Tensor, gradient: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    g_BD = error_BD * (-2 * gradient)
    return g_BD.to(dtype), g_BD.sum(0)


@compare_backward.register_fake
def _(error_BD: Tensor, gradient: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return error_BD.new_empty(error_BD.shape, dtype=dtype), error_BD.new_empty(error_BD.shape[1])


@compare_backward.register_kernel("cuda")
def _(error_BD: Tensor, gradient: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    from .batch import compare_backward as by_kernel

    if error_BD.dtype != torch.float32:
        return compare_backward_by_torch(error_BD, gradient, dtype)
    return by_kernel(error_BD, gradient, dtype)
