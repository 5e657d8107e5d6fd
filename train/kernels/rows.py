"""Sums of rows, by token and by latent, in Triton: see the operators `decode_rows` and `sum_rows` in operators.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .division import SUM_TILE, row_tile


def decode(
    value_N: Tensor,
    row_FD: Tensor,
    latent_N: Tensor,
    token_start_B: Tensor,
    bias_D: Tensor,
    x_BD: Tensor,
    tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`decode_rows` for rows in bfloat16, float16 or float32. Tests pass a smaller `tile` (`row_tile`)."""
    value_N, row_FD, x_BD = value_N.contiguous(), row_FD.contiguous(), x_BD.contiguous()
    tokens, width = x_BD.shape
    recon_BD, squared_B, slope_N = torch.empty_like(x_BD), x_BD.new_empty(tokens), torch.empty_like(value_N)
    if tokens:
        block, chunk = tile or row_tile(len(latent_N) / tokens)
        decode_token[(tokens,)](
            value_N, row_FD, latent_N, token_start_B, bias_D, x_BD, recon_BD, squared_B, slope_N, tokens,
            len(latent_N), width, block, chunk, num_warps=4,
        )  # fmt: skip
    return recon_BD, squared_B.sum(), slope_N


@triton.jit
def decode_token(
    value, latent_row, latent, start, bias, x, recon, squared, slope, tokens, count, width,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Decode one token, and compare the reconstruction with x.

    The rows of the token's latents are read one chunk of columns at a time; each chunk is read for all rows at once.
    The weighted sum of these rows' chunks is a chunk of the reconstruction. The dot products of the rows with the error
    are added up over the chunks (`slopes`). For a token with more than BLOCK latents, the rows beyond the first BLOCK
    are read twice.
    """
    token = tl.program_id(0).to(tl.int64)
    place, column = tl.arange(0, BLOCK), tl.arange(0, CHUNK)
    begin = tl.load(start + token)
    end = tl.load(start + token + 1, mask=token + 1 < tokens, other=count)
    real = begin + place < end
    row = tl.load(latent + begin + place, mask=real, other=0) * width
    weight = tl.load(value + begin + place, mask=real, other=0.0)
    slopes = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((CHUNK,), tl.float32)
    for left in range(0, width, CHUNK):
        inside = left + column < width
        part = read_rows(latent_row, row, left + column, real, inside)
        sums = tl.sum(part * weight[:, None], 0)
        for more in range(begin + BLOCK, end, BLOCK):
            real_more = more + place < end
            row_more = tl.load(latent + more + place, mask=real_more, other=0) * width
            weight_more = tl.load(value + more + place, mask=real_more, other=0.0)
            part_more = read_rows(latent_row, row_more, left + column, real_more, inside)
            sums += tl.sum(part_more * weight_more[:, None], 0)
        sums += tl.load(bias + left + column, mask=inside, other=0.0)
        to = token * width + left + column
        tl.store(recon + to, sums, mask=inside)
        error = sums - tl.load(x + to, mask=inside, other=0.0)
        squares += error * error
        slopes += tl.sum(part * error[None, :], 1)
    tl.store(squared + token, tl.sum(squares, 0))
    tl.store(slope + begin + place, slopes, mask=real)
    tl.debug_barrier()  # wait until all threads of the program have written the reconstruction, which is read below
    for more in range(begin + BLOCK, end, BLOCK):
        real_more = more + place < end
        row_more = tl.load(latent + more + place, mask=real_more, other=0) * width
        slopes = tl.zeros((BLOCK,), tl.float32)
        for left in range(0, width, CHUNK):
            inside = left + column < width
            to = token * width + left + column
            error = tl.load(recon + to, mask=inside, other=0.0) - tl.load(x + to, mask=inside, other=0.0)
            part_more = read_rows(latent_row, row_more, left + column, real_more, inside)
            slopes += tl.sum(part_more * error[None, :], 1)
        tl.store(slope + more + place, slopes, mask=real_more)


@triton.jit
def read_rows(rows, row, column, real, inside):
    part = tl.load(rows + row[:, None] + column[None, :], mask=real[:, None] & inside[None, :], other=0.0)
    return part.to(tl.float32)


def sum_by_stretch(
    index_N: Tensor, row_RD: Tensor, start_F: Tensor, weight_N: Tensor, transposed: bool,
    tile: tuple[int, int, int] = SUM_TILE,
) -> Tensor:  # fmt: skip
    """`sum_rows` for rows in bfloat16, float16 or float32. In tests, `tile` is smaller than `SUM_TILE`."""
    row_RD, width, stretches = row_RD.contiguous(), row_RD.shape[1], len(start_F)
    total = weight_N.new_empty((width, stretches) if transposed else (stretches, width))
    rows, block, chunk = tile
    grid = triton.cdiv(stretches, block), triton.cdiv(width, chunk)
    sum_stretches[grid](
        index_N.contiguous(), row_RD, start_F, weight_N.contiguous(), total, stretches, len(index_N), width,
        transposed, rows, block, chunk, num_warps=4,
    )  # fmt: skip
    return total


@triton.jit
def sum_stretches(
    index, row, start, weight, total, stretches, count, width,
    TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Compute CHUNK columns of the sums of BLOCK segments, ROWS rows at a time. Each sum adds its rows in order."""
    first, left = tl.program_id(0).to(tl.int64) * BLOCK, tl.program_id(1) * CHUNK
    place, one, column = tl.arange(0, ROWS), tl.arange(0, BLOCK), left + tl.arange(0, CHUNK)
    inside = column < width
    sums = tl.zeros((BLOCK, CHUNK), tl.float32)
    for here in range(0, BLOCK):
        begin = tl.load(start + first + here, mask=first + here < stretches, other=count)
        end = tl.load(start + first + here + 1, mask=first + here + 1 < stretches, other=count)
        sum_of_one = tl.zeros((CHUNK,), tl.float32)
        for at in range(begin, end, ROWS):
            real = at + place < end
            offset = tl.load(index + at + place, mask=real, other=0) * width
            factor = tl.load(weight + at + place, mask=real, other=0.0)
            part = read_rows(row, offset, column, real, inside)
            sum_of_one += tl.sum(part * factor[:, None], 0)
        sums = tl.where((one == here)[:, None], sum_of_one[None, :], sums)
    stretch = first + one
    there = (stretch < stretches)[:, None] & inside[None, :]
    if TRANSPOSED:
        tl.store(total + column[None, :].to(tl.int64) * stretches + stretch[:, None], sums, mask=there)
    else:
        tl.store(total + stretch[:, None] * width + column[None, :], sums, mask=there)
