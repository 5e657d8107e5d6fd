"""The operator that moves the threshold of BatchTopK: see operators.py, and `BatchTopKThreshold`."""

import torch
from torch import Tensor


@torch.library.custom_op("sae::follow_threshold", mutates_args=("threshold", "batches"), device_types="cpu")
def follow_threshold(value_N: Tensor, threshold: Tensor, batches: Tensor, rate: float) -> None:
    """Move a threshold towards the smallest positive value, and add 1 to `batches`. On a GPU, this takes two launches.

    Args:
        value_N: latents of a batch, in any order. Only positive latents count; if there are none, the threshold stays.
        threshold: () float32: t becomes t + rate (min - t).
        batches: () int64, incremented. If `batches` is 0, the rate is 1.
        rate: how far the threshold moves, as a share of its distance from the minimum.
    """
    follow_by_torch(value_N, threshold, batches, rate)


def follow_by_torch(value_N: Tensor, threshold: Tensor, batches: Tensor, rate: float) -> None:
    move_threshold(lowest_positive(value_N), threshold, torch.where(batches == 0, 1.0, rate))
    batches.add_(1)


def lowest_positive(value_N: Tensor) -> Tensor:
    """Scalar: the smallest value above zero, in float32; infinity if there is none."""
    value_N = value_N.float()
    return torch.where(value_N > 0, value_N, torch.inf).min()


def move_threshold(lowest: Tensor, threshold: Tensor, rate: Tensor | float) -> None:
    """Move the threshold towards `lowest`, by the fraction `rate` of the distance.

    The threshold stays where it is if `lowest` is infinite.
    """
    target = torch.where(lowest.isinf(), threshold, lowest)
    threshold.copy_(threshold + rate * (target - threshold))


@follow_threshold.register_fake
def _(value_N: Tensor, threshold: Tensor, batches: Tensor, rate: float) -> None:
    return None


@follow_threshold.register_kernel("cuda")
def _(value_N: Tensor, threshold: Tensor, batches: Tensor, rate: float) -> None:
    from .threshold import follow

    if torch.float64 in (value_N.dtype, threshold.dtype):
        follow_by_torch(value_N, threshold, batches, rate)
    else:
        follow(value_N, threshold, batches, rate)
