"""How often both latents of a pair fire, in Triton: see the operator `count_pairs` in pair_operator.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .division import PAIR_TILE


def count(word_FW: Tensor, first_P: Tensor, second_P: Tensor, tile: tuple[int, int] = PAIR_TILE) -> Tensor:
    """The kernel for `count_pairs`. Tests pass a smaller `tile`."""
    word_FW, first_P, second_P = word_FW.contiguous(), first_P.contiguous(), second_P.contiguous()
    count_P, (pairs, words) = torch.empty_like(first_P), tile
    if len(first_P):
        count_part[(triton.cdiv(len(first_P), pairs),)](
            word_FW, first_P, second_P, count_P, len(first_P), word_FW.shape[1], pairs, words, num_warps=4
        )
    return count_P


@triton.jit
def count_part(word, first, second, count, pairs, width, PAIRS: tl.constexpr, WORDS: tl.constexpr):
    """For each of PAIRS pairs, count the bits that are set in both of its rows, reading WORDS words at a time.

    As in `count_pairs_by_torch`, bits are added up within groups of 2, then 4, then 8, then 64.
    """
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    real = pair < pairs
    one = tl.load(first + pair, mask=real, other=0) * width
    other = tl.load(second + pair, mask=real, other=0) * width
    total = tl.zeros((PAIRS,), tl.int64)
    for left in range(0, width, WORDS):
        column = left + tl.arange(0, WORDS)
        inside = real[:, None] & (column < width)[None, :]
        bits = tl.load(word + one[:, None] + column[None, :], mask=inside, other=0)
        bits &= tl.load(word + other[:, None] + column[None, :], mask=inside, other=0)
        bits -= (bits >> 1) & 0x5555555555555555
        bits = (bits & 0x3333333333333333) + ((bits >> 2) & 0x3333333333333333)
        bits = (bits + (bits >> 4)) & 0x0F0F0F0F0F0F0F0F
        total += tl.sum((bits * 0x0101010101010101) >> 56, 1)
    tl.store(count + pair, total, mask=real)
