"""How many tokens to process at a time. Logits and latents are the largest tensors of an evaluation."""

import torch
from torch import Tensor

from ...common.device import copy_to_device
from ...common.errors import SaeError
from ...common.memory import available_memory
from .base import SAELike

CPU_NUMBERS = 2**21  # elements of a part on a CPU: 8 MB in float32
MIN_TOKENS = 128  # of a part on a CPU: with fewer, reading the weights takes longer than multiplying by them
MAX_NUMBERS = 2**31 - 1  # largest number of elements that kernels can index with 32 bits
COPIES = 4  # tensors of this size in memory at a time: logits, log-probabilities of two models, probabilities
SHARE = 0.5  # share of the free memory that these tensors may take
CACHED_NUMBERS = 2**18  # numbers that chained operations read at a time on a CPU: 1 MB, which fits into its cache


def tokens_at_once(numbers: int, device: torch.device | str) -> int:
    """How many tokens to process at a time, if the result for one token (logits or latents) has `numbers` float32
    elements.

    On a GPU, as many as fit into half of the free memory. On a CPU, a part of 8 MB is fastest, because larger tensors
    are allocated again each time, which can take longer than the matrix multiplications. $SAE_MEMORY_GB limits both.
    """
    device = torch.device(device)
    tokens = min(SHARE * available_memory(str(device)) / (COPIES * 4 * numbers), MAX_NUMBERS // numbers)
    if device.type == "cpu":
        tokens = min(tokens, max(MIN_TOKENS, CPU_NUMBERS // numbers))
    return max(1, int(tokens))


@torch.no_grad()
def tokens_per_encode(sae: SAELike, x_TD: Tensor, device: torch.device | str) -> int:
    """How many tokens an SAE encodes at a time. The number of latents is found by encoding one row.

    If the SAE cannot encode this row, its error is ignored here and the largest number is returned: encoding then fails
    again in the caller, where errors are handled.
    """
    try:
        latents = sae.encode(copy_to_device(x_TD[:1].float(), device)).shape[-1]
    except SaeError:
        latents = 1
    return tokens_at_once(latents, device)


def tokens_in_cache(numbers: int, device: torch.device, tokens: int) -> int:
    """How many of the `tokens` of a part to process at a time with elementwise operations: on a GPU, all of them."""
    return max(1, CACHED_NUMBERS // numbers if device.type == "cpu" else tokens)
