"""The operators that have kernels in Triton.

An operator is declared to torch, so that torch.compile, traces without values and CUDA graphs treat it as one
operation. It has two implementations with the same result: the kernels on a GPU, and operations of torch on a CPU. The
tests compare the two. Importing this module does not import Triton.
"""

import torch
from torch import Tensor

LONGEST = 1 << 30  # elements of a row: the kernels compute indices in 32 bits


@torch.library.custom_op("sae::largest", mutates_args=(), device_types="cpu")
def largest(z_RN: Tensor, k: int) -> Tensor:
    """(R, k) int64: the indices of the k largest elements of each row of z (R, N), ascending.

    Among equal elements, those with the lowest indices are chosen, so that the choice depends only on the values. As in
    `torch.topk`, NaN is larger than every number, and 0.0 equals -0.0.
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
