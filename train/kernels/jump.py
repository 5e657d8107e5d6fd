"""JumpReLU's gradients and counts, in Triton: see the operators `jump_gradients` and `jump_counts` in operators.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .division import JUMP_SPAN, JUMP_TILE


def gradients(
    z_BF: Tensor, theta_F: Tensor, g_BF: Tensor, eps: float, to_input: bool,
    span: int = JUMP_SPAN, tile: tuple[int, int] = JUMP_TILE,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The kernel for `jump_gradients`. Tests pass a smaller `span` and `tile`."""
    z_BF, g_BF = z_BF.contiguous(), g_BF.contiguous()
    of_z_BF, part_PF = torch.empty_like(g_BF), parts_of(z_BF, span)
    gradients_of_part[grid(z_BF, span, tile)](
        z_BF, theta_F, g_BF, of_z_BF, part_PF, *z_BF.shape, eps / 2, 1 / eps, to_input, span, *tile, num_warps=4
    )
    return of_z_BF, part_PF.sum(0)


def counts(
    z_BF: Tensor, theta_F: Tensor, eps: float, span: int = JUMP_SPAN, tile: tuple[int, int] = JUMP_TILE
) -> tuple[Tensor, Tensor]:
    """The kernel for `jump_counts`. Tests pass a smaller `span` and `tile`."""
    z_BF = z_BF.contiguous()
    fires_PF, near_PF = parts_of(z_BF, span), parts_of(z_BF, span)
    counts_of_part[grid(z_BF, span, tile)](
        z_BF, theta_F, fires_PF, near_PF, *z_BF.shape, eps / 2, span, *tile, num_warps=4
    )
    return fires_PF.sum(0), near_PF.sum(0)


def parts_of(z_BF: Tensor, span: int) -> Tensor:
    """An empty (P, F) float32 tensor for sums over parts of `span` tokens each."""
    return z_BF.new_empty(triton.cdiv(len(z_BF), span), z_BF.shape[1], dtype=torch.float32)


def grid(z_BF: Tensor, span: int, tile: tuple[int, int]) -> tuple[int, int]:
    return triton.cdiv(z_BF.shape[1], tile[1]), triton.cdiv(len(z_BF), span)


@triton.jit
def gradients_of_part(
    z, theta, g, of_z, part, tokens, width, half, inverse,
    TO_INPUT: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """For a part of the tokens and latents, the gradient of z, and the sums of g over the tokens with z near theta."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * SPAN
    inside = column < width
    threshold = tl.load(theta + column, mask=inside, other=0.0)
    sums = tl.zeros((COLUMNS,), tl.float32)
    for begin in range(0, SPAN, ROWS):
        row = first + begin + tl.arange(0, ROWS)
        at = row[:, None].to(tl.int64) * width + column[None, :]
        real = (row < tokens)[:, None] & inside[None, :]
        gap = tl.load(z + at, mask=real, other=0.0).to(tl.float32) - threshold[None, :]
        gradient = tl.load(g + at, mask=real, other=0.0).to(tl.float32)
        near = gradient * (tl.abs(gap) < half).to(tl.float32)
        sums += tl.sum(near, 0)
        through = gradient * (gap > 0).to(tl.float32)
        if TO_INPUT:
            through += threshold[None, :] * inverse * near
        tl.store(of_z + at, through.to(of_z.dtype.element_ty), mask=real)
    tl.store(part + tl.program_id(1) * width + column, sums, mask=inside)


@triton.jit
def counts_of_part(
    z, theta, fires, near, tokens, width, half, SPAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Count the tokens of a part for which z is above theta, and those for which it is near theta."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * SPAN
    inside = column < width
    threshold = tl.load(theta + column, mask=inside, other=0.0)
    above, close = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    for begin in range(0, SPAN, ROWS):
        row = first + begin + tl.arange(0, ROWS)
        real = (row < tokens)[:, None] & inside[None, :]
        at = row[:, None].to(tl.int64) * width + column[None, :]
        gap = tl.load(z + at, mask=real, other=0.0).to(tl.float32) - threshold[None, :]
        above += tl.sum((real & (gap > 0)).to(tl.float32), 0)
        close += tl.sum((real & (tl.abs(gap) < half)).to(tl.float32), 0)
    tl.store(fires + tl.program_id(1) * width + column, above, mask=inside)
    tl.store(near + tl.program_id(1) * width + column, close, mask=inside)
