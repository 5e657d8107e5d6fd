"""The update of the weights, in Triton: see the operator `update` in update_operator.py.

For each weight, a kernel adds up the squares of its gradient. From these sums, one program computes the norm and the
scale, and decides whether to update. Then a kernel updates each weight. Where rows are unit vectors, each program
handles one row: it holds the weights and the gradient in registers, so it projects, updates and normalizes the row in
one pass. Other weights are read in chunks.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .update_layout import TILE, Rows, warps


def update_weights(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    steps: Sequence[Tensor],
    copies: Sequence[Tensor],
    unit: Sequence[bool],
    decays: Sequence[float],
    loss: Tensor,
    i: Tensor,
    failed_at: Tensor,
    rates_S: Tensor,
    corrections_S2: Tensor,
    limit: float | None,
    beta1: float,
    beta2: float,
    eps: float,
    coupled: bool,
) -> tuple[Tensor, Tensor]:
    """`update` on a GPU."""
    gradients = [gradient.contiguous() for gradient in gradients]
    layouts = [Rows.of(weight.shape, is_unit) for weight, is_unit in zip(weights, unit, strict=True)]
    sums = loss.new_empty(sum(layout.adding for layout in layouts), dtype=torch.float32)
    norm, factors = loss.new_empty((), dtype=torch.float32), loss.new_empty(2, dtype=torch.float32)
    begin = 0
    for weight, gradient, layout, is_unit in zip(weights, gradients, layouts, unit, strict=True):
        part = sums[begin : begin + layout.adding]
        add_squares[(layout.adding,)](
            gradient, weight, part, weight.numel(), layout.rows, layout.span, is_unit, layout.block,
            num_warps=warps(layout.block),
        )  # fmt: skip
        begin += layout.adding
    limited = limit is not None
    decide[(1,)](
        sums, loss, i, failed_at, norm, factors, len(sums), limit if limited else 1.0, limited, TILE, num_warps=4
    )
    for n, (weight, layout) in enumerate(zip(weights, layouts, strict=True)):
        copy = copies[n] if n < len(copies) else weight
        move[(layout.rows,)](
            weight, gradients[n], firsts[n], seconds[n], copy, factors, i, rates_S, steps[n], corrections_S2,
            weight.numel(), layout.span, beta1, 1 - beta1, beta2, 1 - beta2, eps, decays[n],
            unit[n], coupled, n < len(copies), beta1 > 0, layout.block, num_warps=warps(layout.block),
        )  # fmt: skip
    return norm, factors[1]


@triton.jit
def tangent(gradient, weight):
    """A row of a gradient, minus its component along the corresponding row of the weight, which is a unit vector."""
    return gradient - weight * tl.sum(gradient * weight, 0)


@triton.jit
def add_squares(gradient, weight, sums, size, rows, span, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """Write the sum of the squared gradients of this program's rows.

    If the rows are unit vectors, their gradients are projected before they are squared.
    """
    program = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        begin = tl.cast(row, tl.int64) * span
        real = place < tl.minimum(size - begin, span).to(tl.int32)
        g = tl.load(gradient + begin + place, mask=real, other=0.0).to(tl.float32)
        if UNIT:
            g = tangent(g, tl.load(weight + begin + place, mask=real, other=0.0))
        squares += g * g
    tl.store(sums + program, tl.sum(squares, 0))


@triton.jit
def decide(sums, loss, i, failed_at, norm, factors, count, limit, LIMITED: tl.constexpr, TILE: tl.constexpr):
    """Write the norm of the gradient, the divisor of the gradient, and 1 if weights are updated or 0 otherwise."""
    place = tl.arange(0, TILE)
    squares = tl.zeros((TILE,), tl.float32)
    for begin in range(0, count, TILE):
        squares += tl.load(sums + begin + place, mask=begin + place < count, other=0.0)
    length = tl.sqrt(tl.sum(squares, 0))
    scale = length * 0 + 1
    if LIMITED:
        scale = tl.maximum((length + 1e-6) / limit, 1.0)
    failed = tl.load(failed_at)
    finite = tl.abs(tl.load(loss) + length) < float("inf")
    failed = tl.where((failed < 0) & (finite == 0), tl.load(i), failed)
    tl.store(failed_at, failed)
    tl.store(norm, length)
    tl.store(factors, scale)
    tl.store(factors + 1, (failed < 0).to(tl.float32))


@triton.jit
def move(
    weight, gradient, first, second, copy, factors, i, rates, step, corrections,
    size, span, beta1, rest1, beta2, rest2, eps, decay,
    UNIT: tl.constexpr, COUPLED: tl.constexpr, COPIED: tl.constexpr, AVERAGED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update a row or a chunk of a weight by Adam, and write the moments and the copy of the weight.

    `rest` is 1 - beta.

    If AVERAGED is false, beta1 is 0: the first moment is the gradient, and the memory of the first moment is not used.
    """
    if tl.load(factors + 1) > 0:
        place = tl.arange(0, BLOCK)
        begin = tl.program_id(0).to(tl.int64) * span
        real = place < tl.minimum(size - begin, span).to(tl.int32)
        rate = tl.load(rates + tl.load(i))
        taken = tl.load(step).to(tl.int32)
        correction1, correction2 = tl.load(corrections + 2 * taken), tl.load(corrections + 2 * taken + 1)
        w = tl.load(weight + begin + place, mask=real, other=0.0)
        g = tl.load(gradient + begin + place, mask=real, other=0.0).to(tl.float32)
        if UNIT:
            g = tangent(g, w)
        g = g / tl.load(factors)
        if COUPLED:
            g += decay * w
        else:
            w -= rate * decay * w
        m = g
        if AVERAGED:
            m = beta1 * tl.load(first + begin + place, mask=real, other=0.0) + rest1 * g
            tl.store(first + begin + place, m, mask=real)
        v = beta2 * tl.load(second + begin + place, mask=real, other=0.0) + rest2 * g * g
        tl.store(second + begin + place, v, mask=real)
        w -= rate / correction1 * m / (tl.sqrt(v) / correction2 + eps)
        if UNIT:
            w = tl.where(real, w, 0.0)  # with an epsilon of 0, the padding is NaN
            w = w / tl.maximum(tl.sqrt(tl.sum(w * w, 0)), 1e-12)
        tl.store(weight + begin + place, w, mask=real)
        if COPIED:
            tl.store(copy + begin + place, w.to(tl.bfloat16), mask=real)
