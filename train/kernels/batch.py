"""Passes over a batch and its reconstruction, in Triton: see the operators in batch_operators.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .division import BATCH_TILE


def normalize(
    x_BD: Tensor, mean_D: Tensor, scale: Tensor, b_D: Tensor | None, dtype: torch.dtype,
    tile: tuple[int, int] = BATCH_TILE,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The kernels for `normalize_batch`. Tests pass a smaller `tile`."""
    x_BD, (tokens, width) = x_BD.contiguous(), x_BD.shape
    blocks, parts = grid(x_BD, tile)
    normalized_BD, centered_BD = (torch.empty_like(x_BD, dtype=one) for one in (torch.float32, dtype))
    sums_PD, squares_PC, variance_C = (mean_D.new_empty(shape) for shape in ((parts, width), (parts, blocks), blocks))
    bias_D = mean_D if b_D is None else b_D
    normalize_tile[blocks, parts](
        x_BD, mean_D, scale, bias_D, normalized_BD, centered_BD, sums_PD, squares_PC, tokens, width, blocks,
        scale.dim(), b_D is not None, *tile, num_warps=4,
    )  # fmt: skip
    combine_tiles[(blocks,)](sums_PD, squares_PC, variance_C, tokens, width, blocks, parts, *tile, num_warps=4)
    return normalized_BD, centered_BD, variance_C.sum()


def compare(product_BD: Tensor, b_D: Tensor, x_BD: Tensor, tile: tuple[int, int] = BATCH_TILE) -> tuple[Tensor, Tensor]:
    """The kernel for `compare`. Tests pass a smaller `tile`."""
    product_BD, x_BD, (tokens, width) = product_BD.contiguous(), x_BD.contiguous(), x_BD.shape
    blocks, parts = grid(x_BD, tile)
    error_BD, squares_PC = torch.empty_like(x_BD), x_BD.new_empty(parts, blocks)
    compare_tile[blocks, parts](product_BD, b_D, x_BD, error_BD, squares_PC, tokens, width, blocks, *tile, num_warps=4)
    return error_BD, squares_PC.sum()


def compare_backward(
    error_BD: Tensor, gradient: Tensor, dtype: torch.dtype, tile: tuple[int, int] = BATCH_TILE
) -> tuple[Tensor, Tensor]:
    """The kernel for `compare_backward`. Tests pass a smaller `tile`."""
    error_BD, (tokens, width) = error_BD.contiguous(), error_BD.shape
    blocks, parts = grid(error_BD, tile)
    g_BD, sums_PD = torch.empty_like(error_BD, dtype=dtype), error_BD.new_empty(parts, width)
    scale_tile[blocks, parts](error_BD, gradient, g_BD, sums_PD, tokens, width, *tile, num_warps=4)
    return g_BD, sums_PD.sum(0)


def grid(x_BD: Tensor, tile: tuple[int, int]) -> tuple[int, int]:
    """The number of tiles in a row and in a column."""
    return triton.cdiv(x_BD.shape[1], tile[1]), triton.cdiv(len(x_BD), tile[0])


@triton.jit
def place(tokens, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The indices of this program's columns and a mask of those that exist; the same for the elements of its tile."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = column < width
    return (
        column,
        inside,
        row[:, None].to(tl.int64) * width + column[None, :],
        (row < tokens)[:, None] & inside[None, :],
    )


@triton.jit
def normalize_tile(
    x, mean, scale, bias, normalized, centered, sums, squares, tokens, width, blocks,
    SCALES: tl.constexpr, SUBTRACTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Normalize and center a tile, and write its sum per column and its squared distance from the column means."""
    column, inside, at, real = place(tokens, width, ROWS, COLUMNS)
    value = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
    value = value - tl.load(mean + column, mask=inside, other=0.0)[None, :]
    value = tl.div_rn(value, tl.load(scale + column * SCALES, mask=inside, other=1.0)[None, :])
    tl.store(normalized + at, value, mask=real)
    shifted = value
    if SUBTRACTS:
        shifted = value - tl.load(bias + column, mask=inside, other=0.0)[None, :]
    tl.store(centered + at, shifted.to(centered.dtype.element_ty), mask=real)
    part = tl.program_id(1)
    total = tl.sum(tl.where(real, value, 0.0), 0)
    tl.store(sums + part * width + column, total, mask=inside)
    count = tl.minimum(tokens - part * ROWS, ROWS).to(tl.float32)
    gap = tl.where(real, value - (total / count)[None, :], 0.0)
    tl.store(squares + part * blocks + tl.program_id(0), tl.sum(tl.sum(gap * gap, 0), 0))


@triton.jit
def combine_tiles(sums, squares, variance, tokens, width, blocks, parts, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """For a block of columns, sum the squared distances of all rows from the mean row, given the sums of each tile."""
    block = tl.program_id(0)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    total = tl.zeros((COLUMNS,), tl.float32)
    within = tl.zeros((ROWS,), tl.float32)
    for begin in range(0, parts, ROWS):
        part = begin + tl.arange(0, ROWS)
        here = (part < parts)[:, None] & inside[None, :]
        total += tl.sum(tl.load(sums + part[:, None] * width + column[None, :], mask=here, other=0.0), 0)
        within += tl.load(squares + part * blocks + block, mask=part < parts, other=0.0)
    mean = total / tokens
    between = tl.zeros((COLUMNS,), tl.float32)
    for begin in range(0, parts, ROWS):
        part = begin + tl.arange(0, ROWS)
        here = (part < parts)[:, None] & inside[None, :]
        count = tl.maximum(tl.minimum(tokens - part * ROWS, ROWS), 1).to(tl.float32)[:, None]
        value = tl.load(sums + part[:, None] * width + column[None, :], mask=here, other=0.0)
        gap = tl.where(here, value / count - mean[None, :], 0.0)
        between += tl.sum(count * gap * gap, 0)
    tl.store(variance + block, tl.sum(between, 0) + tl.sum(within, 0))


@triton.jit
def compare_tile(product, bias, x, error, squares, tokens, width, blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write a tile of x - (product + bias), and its sum of squares."""
    column, inside, at, real = place(tokens, width, ROWS, COLUMNS)
    recon = tl.load(product + at, mask=real, other=0.0).to(tl.float32)
    recon = recon + tl.load(bias + column, mask=inside, other=0.0)[None, :]
    apart = tl.load(x + at, mask=real, other=0.0) - recon
    tl.store(error + at, apart, mask=real)
    apart = tl.where(real, apart, 0.0)
    tl.store(squares + tl.program_id(1) * blocks + tl.program_id(0), tl.sum(tl.sum(apart * apart, 0), 0))


@triton.jit
def scale_tile(error, gradient, scaled, sums, tokens, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Multiply a tile of errors by -2 times a gradient, and write the sum of each column of the result."""
    column, inside, at, real = place(tokens, width, ROWS, COLUMNS)
    value = tl.load(error + at, mask=real, other=0.0) * (-2 * tl.load(gradient))
    tl.store(scaled + at, value.to(scaled.dtype.element_ty), mask=real)
    tl.store(sums + tl.program_id(1) * width + column, tl.sum(tl.where(real, value, 0.0), 0), mask=inside)
