"""The moving threshold of BatchTopK, in Triton: see the operator `follow_threshold` in threshold_operator.py."""

import triton
import triton.language as tl
from torch import Tensor

from .division import PROGRAMS, THRESHOLD_CHUNK, equal_spans


def follow(
    value_N: Tensor, threshold: Tensor, batches: Tensor, rate: float,
    programs: int = PROGRAMS, chunk: int = THRESHOLD_CHUNK,
) -> None:  # fmt: skip
    """The kernels for `follow_threshold`. In tests, `programs` (a power of two) and `chunk` are smaller."""
    value_N, size = value_N.contiguous(), value_N.numel()
    parts, span = equal_spans(size, programs, chunk)
    lowest_P = threshold.new_empty(parts)
    find_lowest[(parts,)](value_N, lowest_P, size, span, chunk, num_warps=4)
    move[(1,)](lowest_P, threshold, batches, parts, rate, programs, num_warps=4)


@triton.jit
def find_lowest(value, lowest, size, span, CHUNK: tl.constexpr):
    """Write the smallest value above zero in this program's part, or infinity."""
    begin = tl.program_id(0).to(tl.int64) * span
    found = tl.full((CHUNK,), float("inf"), tl.float32)
    for offset in range(0, span, CHUNK):
        at = begin + offset + tl.arange(0, CHUNK)
        one = tl.load(value + at, mask=at < size, other=0.0).to(tl.float32)
        found = tl.minimum(found, tl.where(one > 0, one, float("inf")))
    tl.store(lowest + tl.program_id(0), tl.min(found, 0))


@triton.jit
def move(lowest, threshold, batches, parts, rate, ROOM: tl.constexpr):
    """Move the threshold towards the smallest of the values of all parts, and add 1 to `batches`."""
    part = tl.arange(0, ROOM)
    found = tl.min(tl.load(lowest + part, mask=part < parts, other=float("inf")), 0)
    before, taken = tl.load(threshold), tl.load(batches)
    share = tl.where(taken == 0, 1.0, rate)
    target = tl.where(found == float("inf"), before, found)
    tl.store(threshold, before + share * (target - before))
    tl.store(batches, taken + 1)
