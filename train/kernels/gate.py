"""The latents of the gated SAE and their gradients, in Triton: see the operators in gate_operator.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .division import JUMP_SPAN, JUMP_TILE
from .jump import grid, parts_of


def latents(
    z_BF: Tensor, scale_F: Tensor, gate_F: Tensor, mag_F: Tensor,
    span: int = JUMP_SPAN, tile: tuple[int, int] = JUMP_TILE,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The kernel for `gate_latents`. Tests pass a smaller `span` and `tile`."""
    z_BF = z_BF.contiguous()
    f_BF, gate_BF, sum_PF, count_PF = torch.empty_like(z_BF), torch.empty_like(z_BF), *two_parts_of(z_BF, span)
    latents_of_part[grid(z_BF, span, tile)](
        z_BF, scale_F, gate_F, mag_F, f_BF, gate_BF, sum_PF, count_PF, *z_BF.shape, span, *tile, num_warps=4
    )
    return f_BF, gate_BF, sum_PF.sum(0), count_PF.sum(0)


def gradients(
    z_BF: Tensor, scale_F: Tensor, gate_F: Tensor, mag_F: Tensor, of_f_BF: Tensor, of_gate_BF: Tensor, of_sum: Tensor,
    span: int = JUMP_SPAN, tile: tuple[int, int] = JUMP_TILE,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The kernel for `gate_gradients`. Tests pass a smaller `span` and `tile`."""
    z_BF, of_f_BF, of_gate_BF = z_BF.contiguous(), of_f_BF.contiguous(), of_gate_BF.contiguous()
    of_z_BF, of_scale_PF = torch.empty_like(z_BF), parts_of(z_BF, span)
    of_gate_PF, of_mag_PF = two_parts_of(z_BF, span)
    gradients_of_part[grid(z_BF, span, tile)](
        z_BF, scale_F, gate_F, mag_F, of_f_BF, of_gate_BF, of_sum, of_z_BF, of_scale_PF, of_gate_PF, of_mag_PF,
        *z_BF.shape, span, *tile, num_warps=4,
    )  # fmt: skip
    return of_z_BF, of_scale_PF.sum(0), of_gate_PF.sum(0), of_mag_PF.sum(0)


def two_parts_of(z_BF: Tensor, span: int) -> tuple[Tensor, Tensor]:
    return parts_of(z_BF, span), parts_of(z_BF, span)


@triton.jit
def rectified(value):
    """ReLU, which keeps NaN."""
    return tl.where(value <= 0, 0.0, value)


@triton.jit
def latents_of_part(
    z, scale, gate, mag, f, f_gate, sums, counts, tokens, width,
    SPAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute f and f_gate for one block of tokens and latents. Also sum f_gate and count nonzero f for each latent."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * SPAN
    inside = column < width
    factor = tl.load(scale + column, mask=inside, other=0.0)[None, :]
    gate_bias = tl.load(gate + column, mask=inside, other=0.0)[None, :]
    mag_bias = tl.load(mag + column, mask=inside, other=0.0)[None, :]
    total, count = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    for begin in range(0, SPAN, ROWS):
        row = first + begin + tl.arange(0, ROWS)
        at = row[:, None].to(tl.int64) * width + column[None, :]
        real = (row < tokens)[:, None] & inside[None, :]
        value = tl.load(z + at, mask=real, other=0.0).to(tl.float32)
        shifted = value + gate_bias
        latent = rectified(value * factor + mag_bias) * (shifted > 0).to(tl.float32)
        latent = latent.to(f.dtype.element_ty)
        shifted = rectified(shifted)
        tl.store(f + at, latent, mask=real)
        tl.store(f_gate + at, shifted.to(f_gate.dtype.element_ty), mask=real)
        total += tl.sum(tl.where(real, shifted, 0.0), 0)
        count += tl.sum((real & (latent.to(tl.float32) != 0)).to(tl.float32), 0)
    tl.store(sums + tl.program_id(1) * width + column, total, mask=inside)
    tl.store(counts + tl.program_id(1) * width + column, count, mask=inside)


@triton.jit
def gradients_of_part(
    z, scale, gate, mag, of_f, of_gate, of_sum, of_z, scales, gates, mags, tokens, width,
    SPAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of z for one block of tokens and latents, and what the block adds to the other gradients."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * SPAN
    inside = column < width
    factor = tl.load(scale + column, mask=inside, other=0.0)[None, :]
    gate_bias = tl.load(gate + column, mask=inside, other=0.0)[None, :]
    mag_bias = tl.load(mag + column, mask=inside, other=0.0)[None, :]
    constant = tl.load(of_sum)
    to_scale, to_gate = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    to_mag = tl.zeros((COLUMNS,), tl.float32)
    for begin in range(0, SPAN, ROWS):
        row = first + begin + tl.arange(0, ROWS)
        at = row[:, None].to(tl.int64) * width + column[None, :]
        real = (row < tokens)[:, None] & inside[None, :]
        value = tl.load(z + at, mask=real, other=0.0).to(tl.float32)
        shifted = value + gate_bias
        through = tl.load(of_f + at, mask=real, other=0.0).to(tl.float32) * (shifted > 0).to(tl.float32)
        through = tl.where(value * factor + mag_bias <= 0, 0.0, through)
        opened = tl.load(of_gate + at, mask=real, other=0.0).to(tl.float32) + constant
        opened = tl.where((shifted <= 0) | (real == 0), 0.0, opened)
        tl.store(of_z + at, (through * factor + opened).to(of_z.dtype.element_ty), mask=real)
        to_scale += tl.sum(through * value, 0)
        to_gate += tl.sum(opened, 0)
        to_mag += tl.sum(through, 0)
    tl.store(scales + tl.program_id(1) * width + column, to_scale, mask=inside)
    tl.store(gates + tl.program_id(1) * width + column, to_gate, mask=inside)
    tl.store(mags + tl.program_id(1) * width + column, to_mag, mask=inside)
