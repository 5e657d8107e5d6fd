"""The operator `gram`: a matrix product whose result has another dtype than its inputs.

torch has such a product only for GPUs.
"""

import torch
from torch import Tensor


@torch.library.custom_op("sae::gram", mutates_args=(), device_types="cpu")
def gram(f_GBM: Tensor) -> Tensor:
    """(G, M, M): for each matrix, the dot product of every two of its columns; in float32 for a bfloat16 matrix."""
    f_GBM = f_GBM.float() if f_GBM.dtype == torch.bfloat16 else f_GBM
    return f_GBM.mT @ f_GBM


@gram.register_fake
def _(f_GBM: Tensor) -> Tensor:
    blocks, _, size = f_GBM.shape
    return f_GBM.new_empty(blocks, size, size, dtype=torch.float32 if f_GBM.dtype == torch.bfloat16 else f_GBM.dtype)


@gram.register_kernel("cuda")
def _(f_GBM: Tensor) -> Tensor:
    if f_GBM.dtype != torch.bfloat16:
        return f_GBM.mT @ f_GBM
    return torch.bmm(f_GBM.mT, f_GBM, out_dtype=torch.float32)
