"""Errors of prefixes of a dictionary, and their gradients, in Triton: see the operators in prefix_operator.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .division import PREFIX_SPAN, prefix_tile


def compare(
    part_GBD: Tensor, bias_D: Tensor, x_BD: Tensor, span: int = PREFIX_SPAN, tile: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """The kernel for `compare_prefixes`. In tests, `span` and `tile` (by default `prefix_tile`) are smaller."""
    part_GBD, x_BD = part_GBD.contiguous(), x_BD.contiguous()
    prefixes, (rows, columns) = len(part_GBD), tile or prefix_tile(len(part_GBD))
    grid = triton.cdiv(x_BD.shape[1], columns), triton.cdiv(len(x_BD), span)
    recon_BD, squared_PG = torch.empty_like(x_BD), x_BD.new_empty(grid[0] * grid[1], prefixes)
    compare_part[grid](
        part_GBD, bias_D, x_BD, recon_BD, squared_PG, prefixes, *x_BD.shape, span,
        triton.next_power_of_2(prefixes), rows, columns, num_warps=4,
    )  # fmt: skip
    return recon_BD, squared_PG.sum(0)


def gradients(
    part_GBD: Tensor, bias_D: Tensor, x_BD: Tensor, weight_G: Tensor,
    span: int = PREFIX_SPAN, tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The kernel for `prefix_gradients`. Tests pass a smaller `span` and `tile` (`prefix_tile`)."""
    part_GBD, x_BD, weight_G = part_GBD.contiguous(), x_BD.contiguous(), weight_G.contiguous()
    prefixes, (rows, columns) = len(part_GBD), tile or prefix_tile(len(part_GBD))
    grid = triton.cdiv(x_BD.shape[1], columns), triton.cdiv(len(x_BD), span)
    g_GBD, sum_PD = torch.empty_like(part_GBD), x_BD.new_empty(grid[1], x_BD.shape[1])
    gradients_of_part[grid](
        part_GBD, bias_D, x_BD, weight_G, g_GBD, sum_PD, prefixes, *x_BD.shape, span,
        triton.next_power_of_2(prefixes), rows, columns, num_warps=4,
    )  # fmt: skip
    return g_GBD, sum_PD.sum(0)


@triton.jit
def compare_part(
    part, bias, x, recon, squared, prefixes, tokens, width,
    SPAN: tl.constexpr, ROOM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """For a part of the tokens and dimensions, the reconstruction and the squared errors of every prefix."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    prefix = tl.arange(0, ROOM)
    offset = tl.load(bias + column, mask=column < width, other=0.0)[None, :]
    squares = tl.zeros((ROOM,), tl.float32)
    for begin in range(0, SPAN, ROWS):
        row = tl.program_id(1) * SPAN + begin + tl.arange(0, ROWS)
        at = row[:, None].to(tl.int64) * width + column[None, :]
        real = (row < tokens)[:, None] & (column < width)[None, :]
        parts = read_parts(part, prefix, prefixes, at, real, tokens, width)
        target = tl.load(x + at, mask=real, other=0.0) - offset
        error = errors(parts, target, prefix, prefixes, real, ROOM)
        squares += tl.sum(tl.sum(error * error, 2), 1)
        tl.store(recon + at, tl.sum(parts, 0) + offset, mask=real)
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(squared + program * prefixes + prefix, squares, mask=prefix < prefixes)


@triton.jit
def gradients_of_part(
    part, bias, x, weight, g, sums, prefixes, tokens, width,
    SPAN: tl.constexpr, ROOM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """For some tokens and dimensions, compute the gradient of each section.

    Also computes the gradient of b_dec, which is the first section's gradient, summed over tokens.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    prefix = tl.arange(0, ROOM)
    offset = tl.load(bias + column, mask=column < width, other=0.0)[None, :]
    factor = tl.load(weight + prefix, mask=prefix < prefixes, other=0.0)[:, None, None]
    total = tl.zeros((COLUMNS,), tl.float32)
    for begin in range(0, SPAN, ROWS):
        row = tl.program_id(1) * SPAN + begin + tl.arange(0, ROWS)
        at = row[:, None].to(tl.int64) * width + column[None, :]
        real = (row < tokens)[:, None] & (column < width)[None, :]
        parts = read_parts(part, prefix, prefixes, at, real, tokens, width)
        target = tl.load(x + at, mask=real, other=0.0) - offset
        error = errors(parts, target, prefix, prefixes, real, ROOM) * factor
        total += tl.sum(tl.sum(error, 0), 0)
        if ROOM > 1:
            error = tl.cumsum(error, 0, reverse=True)
        to = tl.cast(tokens, tl.int64) * width * prefix[:, None, None] + at[None, :, :]
        tl.store(g + to, error.to(g.dtype.element_ty), mask=(prefix < prefixes)[:, None, None] & real[None, :, :])
    tl.store(sums + tl.program_id(1) * width + column, total, mask=column < width)


@triton.jit
def read_parts(part, prefix, prefixes, at, real, tokens, width):
    to = tl.cast(tokens, tl.int64) * width * prefix[:, None, None] + at[None, :, :]
    return tl.load(part + to, mask=(prefix < prefixes)[:, None, None] & real[None, :, :], other=0.0).to(tl.float32)


@triton.jit
def errors(parts, target, prefix, prefixes, real, ROOM: tl.constexpr):
    """The error of each prefix, and 0 in the padding."""
    sums = parts
    if ROOM > 1:
        sums = tl.cumsum(parts, 0)
    there = (prefix < prefixes)[:, None, None] & real[None, :, :]
    return tl.where(there, sums - target[None, :, :], 0.0)
