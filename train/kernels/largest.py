"""The k largest elements of each row, in Triton: see the operator `largest` in operators.py.

Each number is mapped to an integer key, and the keys have the same order as the numbers. So the bound, which is the
k-th largest key, can be found bit by bit or digit by digit. All elements above the bound are kept, then the first
elements that equal the bound, until k elements are kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .division import CHUNK, PROGRAMS, ROOM, Division, Way

INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}  # bits of infinity
DIGITS = 256  # values of an 8-bit digit
ELEMENTS = 16  # elements of a row that a thread holds
TILE = 64  # programs whose counts are added at once


def find_largest(z_RN: Tensor, k: int, room: int = ROOM, programs: int = PROGRAMS, chunk: int = CHUNK) -> Tensor:
    """`largest` for bfloat16, float16 or float32. The last three arguments are powers of two, smaller in the tests."""
    z_RN = z_RN.contiguous()
    rows, n = z_RN.shape
    index_RK = torch.empty(rows, k, dtype=torch.int64, device=z_RN.device)
    if not rows:
        return index_RK
    way, parts, span = Division.of(rows, n, k, room, programs, chunk)
    if way is Way.DIGITS:
        by_digits(z_RN, index_RK, parts, span, chunk)
        return index_RK
    first = min(k, span)
    chosen = index_RK if way is Way.ROW else index_RK.new_empty(rows, parts * first, dtype=torch.int32)
    launch_select(z_RN, z_RN, chosen, (rows, parts), span, first, False)
    if way is Way.PARTS:
        launch_select(z_RN, chosen, index_RK, (rows, 1), parts * first, k, True)
    return index_RK


def launch_select(
    z_RN: Tensor, choice: Tensor, chosen: Tensor, grid: tuple[int, int], span: int, k: int, from_choice: bool
) -> None:
    block = triton.next_power_of_2(span)
    warps = min(max(block // ELEMENTS // 32, 1), 16)
    n, bits, infinity = z_RN.shape[1], 8 * z_RN.element_size(), INFINITY[z_RN.dtype]
    select[grid](z_RN, choice, chosen, n, span, k, from_choice, block, bits, infinity, num_warps=warps)


def by_digits(z_RN: Tensor, index_RK: Tensor, parts: int, span: int, chunk: int) -> None:
    """Find the bound digit by digit (8 bits each, the highest first), then write the indices."""
    (rows, n), k = z_RN.shape, index_RK.shape[1]
    bits, infinity, grid = 8 * z_RN.element_size(), INFINITY[z_RN.dtype], (rows, parts)
    bound = z_RN.new_empty(rows, 2, dtype=torch.int32)
    histogram = z_RN.new_empty(rows, parts, DIGITS, dtype=torch.int32)
    above, start, ties = (z_RN.new_empty(rows, parts, dtype=torch.int32) for _ in range(3))
    top = bits - 8
    for at in range(top, -1, -8):
        count_digit[grid](z_RN, bound, histogram, above, n, span, at, at == top, chunk, bits, infinity)
        choose_digit[(rows,)](bound, histogram, above, start, ties, k, parts, at, at == top, at == 0, TILE)
    write_indices[grid](z_RN, bound, start, ties, index_RK, n, span, k, chunk, bits, infinity)


@triton.jit
def ordered(x, BITS: tl.constexpr, INF: tl.constexpr):
    """int32 keys of BITS bits, ordered like the numbers. NaN is above all numbers; 0.0 and -0.0 have the same key."""
    if BITS == 16:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32)
    else:
        bits = x.to(tl.int32, bitcast=True)
    most: tl.constexpr = (1 << (BITS - 1)) - 1
    size = bits & most
    key = tl.where(bits < 0, -size, size)
    return tl.where(size > INF, most, key)


@triton.jit
def kth_largest(key, k, BITS: tl.constexpr):
    """The k-th largest key: the largest number with at least k keys >= it, found bit by bit from the sign bit down."""
    bound = tl.where(tl.sum((key >= 0).to(tl.int32), 0) >= k, 0, -(1 << (BITS - 1)))
    for place in tl.static_range(BITS - 2, -1, -1):
        higher = bound + (1 << place)
        bound = tl.where(tl.sum((key >= higher).to(tl.int32), 0) >= k, higher, bound)
    return bound


@triton.jit
def select(
    z, choice, chosen, n, span, k, FROM_CHOICE: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, INF: tl.constexpr
):
    """For each row, write the positions (in the row) of its k largest elements.

    Each program selects among the elements of one part of the row. If FROM_CHOICE is set, a single program per row
    selects among the elements that earlier programs have chosen from all parts of the row.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    place = tl.arange(0, BLOCK)
    if FROM_CHOICE:
        index = tl.load(choice + row * span + place, mask=place < span, other=n)
    else:
        index = part * span + place
    real = (place < span) & (index < n)
    key = ordered(tl.load(z + row * n + index, mask=real, other=0.0), BITS, INF)
    lowest: tl.constexpr = -(1 << (BITS - 1))  # less than the key of any number; fills a part that is too short
    key = tl.where(real, key, lowest)
    bound = kth_largest(key, k, BITS)
    above, equal = (key > bound).to(tl.int32), (key == bound).to(tl.int32)
    ties = k - tl.sum(above, 0)
    counted = tl.cumsum((above << 16) | equal, 0)  # one scan for both counts, since neither exceeds BLOCK
    equals = counted & 0xFFFF
    kept = (above == 1) | ((equal == 1) & (equals <= ties))
    to = (counted >> 16) + tl.minimum(equals, ties) - 1
    tl.store(chosen + (row * tl.num_programs(1) + part) * k + to, index, mask=kept)


@triton.jit
def count_digit(
    z, bound, histogram, above, n, span,
    AT: tl.constexpr, TOP: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr, INF: tl.constexpr,
):  # fmt: skip
    """For the digit whose lowest bit is bit AT, count how often each of its values occurs.

    In a part, only the keys whose higher digits equal those of the bound are counted.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    place = tl.arange(0, CHUNK)
    counts = tl.zeros((256,), tl.int32)
    higher = tl.zeros((), tl.int32)
    if not TOP:
        prefix = tl.load(bound + 2 * row) >> (AT + 8)
    for begin in range(0, span, CHUNK):
        index = part * span + begin + place
        real = (begin + place < span) & (index < n)
        key = ordered(tl.load(z + row * n + index, mask=real, other=0.0), BITS, INF)
        if TOP:
            counts += tl.histogram((key >> AT) + 128, 256, mask=real)
        else:
            upper = key >> (AT + 8)
            counts += tl.histogram((key >> AT) & 255, 256, mask=real & (upper == prefix))
            higher += tl.sum((real & (upper > prefix)).to(tl.int32), 0)
    program = row * tl.num_programs(1) + part
    tl.store(histogram + program * 256 + tl.arange(0, 256), counts)
    tl.store(above + program, higher)


@triton.jit
def choose_digit(
    bound, histogram, above, start, ties, k, parts,
    AT: tl.constexpr, TOP: tl.constexpr, LAST: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Choose one digit of the bound: the digit whose lowest bit is bit AT.

    After the last digit, also compute for each part where it writes its indices, and how many of its elements that
    equal the bound are kept. `bound` holds the digits chosen so far, and the number of kept elements that have these
    digits.
    """
    row = tl.program_id(0).to(tl.int64)
    value, tile = tl.arange(0, 256), tl.arange(0, TILE)
    counts = tl.zeros((256,), tl.int32)
    for begin in range(0, parts, TILE):
        part = begin + tile
        counts += tl.sum(read_counts(histogram, row * parts + part, part < parts), 0)
    if TOP:
        digits, left = 0, k
    else:
        digits, left = tl.load(bound + 2 * row), tl.load(bound + 2 * row + 1)
    not_below = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
    digit = tl.max(tl.where(not_below >= left, value, 0), 0)
    left -= tl.sum(tl.where(value > digit, counts, 0), 0)
    if TOP:
        digits = (digit - 128) << AT
    else:
        digits |= digit << AT
    tl.store(bound + 2 * row, digits)
    tl.store(bound + 2 * row + 1, left)
    if LAST:
        kept_before = tl.zeros((), tl.int32)
        equal_before = tl.zeros((), tl.int32)
        for begin in range(0, parts, TILE):
            part = begin + tile
            there = part < parts
            count = read_counts(histogram, row * parts + part, there)
            equal = tl.sum(tl.where(value[None, :] == digit, count, 0), 1)
            more = tl.sum(tl.where(value[None, :] > digit, count, 0), 1)
            more += tl.load(above + row * parts + part, mask=there, other=0)
            earlier = equal_before + tl.cumsum(equal, 0) - equal
            of_equal = tl.minimum(tl.maximum(left - earlier, 0), equal)
            kept = more + of_equal
            tl.store(start + row * parts + part, kept_before + tl.cumsum(kept, 0) - kept, mask=there)
            tl.store(ties + row * parts + part, of_equal, mask=there)
            kept_before += tl.sum(kept, 0)
            equal_before += tl.sum(equal, 0)


@triton.jit
def read_counts(histogram, program, there):
    return tl.load(histogram + program[:, None] * 256 + tl.arange(0, 256)[None, :], mask=there[:, None], other=0)


@triton.jit
def write_indices(
    z, bound, start, ties, chosen, n, span, k, CHUNK: tl.constexpr, BITS: tl.constexpr, INF: tl.constexpr
):
    """Write the indices of a part's elements above the bound, and of the first `ties` elements that equal it."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    program = row * tl.num_programs(1) + part
    place = tl.arange(0, CHUNK)
    limit = tl.load(bound + 2 * row)
    written, left = tl.load(start + program), tl.load(ties + program)
    for begin in range(0, span, CHUNK):
        index = part * span + begin + place
        real = (begin + place < span) & (index < n)
        key = ordered(tl.load(z + row * n + index, mask=real, other=0.0), BITS, INF)
        above, equal = (real & (key > limit)).to(tl.int32), (real & (key == limit)).to(tl.int32)
        counted = tl.cumsum((above << 16) | equal, 0)
        equals = counted & 0xFFFF
        kept = (above == 1) | ((equal == 1) & (equals <= left))
        to = written + (counted >> 16) + tl.minimum(equals, left) - 1
        tl.store(chosen + row * k + to, index, mask=kept)
        taken = tl.minimum(tl.sum(equal, 0), left)
        written += tl.sum(above, 0) + taken
        left -= taken
