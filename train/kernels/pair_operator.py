"""The operator that counts how often both latents of a pair fire: see operators.py, and the recipe `competition`."""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 2**24  # elements to process at once, so that a table of pairs needs little additional memory


@torch.library.custom_op("sae::count_pairs", mutates_args=(), device_types="cpu")
def count_pairs(word_FW: Tensor, first_P: Tensor, second_P: Tensor) -> Tensor:
    """(P) int64: for each pair, the number of bits that are set in both latents' rows, which consist of int64 words."""
    return count_pairs_by_torch(word_FW, first_P, second_P)


def count_pairs_by_torch(word_FW: Tensor, first_P: Tensor, second_P: Tensor) -> Tensor:
    """`count_pairs` by torch. Bits are added up within groups of 2, then 4, then 8, then 64."""
    counts = []
    for first, second in pair_blocks(first_P, second_P, word_FW.shape[1]):
        bits = word_FW[first] & word_FW[second]
        bits = bits - ((bits >> 1) & 0x5555555555555555)
        bits = (bits & 0x3333333333333333) + ((bits >> 2) & 0x3333333333333333)
        bits = (bits + (bits >> 4)) & 0x0F0F0F0F0F0F0F0F
        counts.append(((bits * 0x0101010101010101) >> 56).sum(1))
    return torch.cat(counts)


def pair_blocks(first_P: Tensor, second_P: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Split the pairs into parts of `BLOCK` / `width` pairs (at least 1), since each pair needs rows of that width."""
    size = max(1, BLOCK // width)
    return zip(first_P.split(size), second_P.split(size), strict=True)


@count_pairs.register_fake
def _(word_FW: Tensor, first_P: Tensor, second_P: Tensor) -> Tensor:
    return torch.empty_like(first_P)


@count_pairs.register_kernel("cuda")
def _(word_FW: Tensor, first_P: Tensor, second_P: Tensor) -> Tensor:
    from .pair import count

    return count(word_FW, first_P, second_P)
