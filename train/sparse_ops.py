"""The matrix products of a step, computed with only the latents that may be active, for steps with few such latents.

A dense product multiplies mostly zeros. With k of n latents active, only the encoder needs a dense product. The four
other products (decoding, and the gradients of the latents, W_dec and W_enc) are sums of k rows per token. Shapes: N is
the number of latents that may be active in the whole batch. N is fixed, and these latents are ordered by token.
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .dense_ops import for_products
from .kernels.operators import decode_rows, products_with_rows, sum_rows

FLOPS = {"float32": 60e12, "tf32": 395e12, "bfloat16": 790e12}
"""Precision -> FLOPs of an H200 per second, as in benchmarks/step_budget.py; tf32 has half the rate of bfloat16."""
BANDWIDTH = 4.3e12
"""Bytes per second of its memory."""
ROW_BYTES = {"float32": 4, "tf32": 4, "bfloat16": 2}
"""Precision -> bytes of each element of a row that is gathered on a GPU (`row_dtype`)."""
MARGIN = 1.4
"""How much longer gathering takes than its bytes imply. An estimate: products come closer to their limit than gathers.
"""


def break_even(precision: str) -> float:
    """The n/k at which four gathers of k rows for each token take as long on a GPU as four dense products.

    For each token and each of d_in elements, a gather reads k numbers, and a product takes 2 n FLOPs.
    """
    return MARGIN * (ROW_BYTES[precision] / BANDWIDTH) / (2 / FLOPS[precision])


SPARSE_FROM: dict[str, dict[str, float]] = {
    "cpu": dict.fromkeys(FLOPS, 16.0),
    "cuda": {precision: break_even(precision) for precision in FLOPS},
}
"""Device -> precision -> the smallest n/k at which sparse products are used. On other devices they are never used.

cpu: measured on whole steps of `topk` by benchmarks/bench_decode.py; see its table in benchmarks/results. cuda:
computed by `break_even`, not measured. 257 in bfloat16 and tf32, 39 in float32.
"""


def sparse_is_faster(d_sae: int, k: float, device: str, precision: str) -> bool:
    """Whether to use sparse products. The answer is the same for every step of a run, whatever the values."""
    return d_sae >= SPARSE_FROM.get(device, {}).get(precision, math.inf) * k


def row_dtype(row_RD: Tensor) -> torch.dtype:
    """The dtype of gathered rows: on a GPU the dtype of matrix products, on a CPU unchanged. Sums are in float32."""
    device = row_RD.device.type
    in_autocast = device == "cuda" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if in_autocast else row_RD.dtype


class SelectedLatents(NamedTuple):
    """The indices of the selected latents, in the two orders that the products need."""

    flat_index_N: Tensor  # token * F + latent, ascending by token
    token_N: Tensor
    latent_N: Tensor
    token_start_B: Tensor  # where each token starts in the order by token
    latent_order_N: Tensor  # the permutation that sorts by latent, then by token
    latent_start_F: Tensor  # where each latent starts in the order by latent
    by_kernels: bool  # whether sums use the operators with GPU kernels

    @classmethod
    def of(cls, flat_index_N: Tensor, tokens: int, d_sae: int, by_kernels: bool = False) -> "SelectedLatents":
        token_N, latent_N = flat_index_N.div(d_sae, rounding_mode="floor"), flat_index_N % d_sae
        by_latent_N, latent_order_N = latent_N.sort(stable=True)
        at_B, at_F = (torch.arange(count, device=flat_index_N.device) for count in (tokens, d_sae))
        return cls(
            flat_index_N,
            token_N,
            latent_N,
            torch.searchsorted(token_N, at_B),
            latent_order_N,
            torch.searchsorted(by_latent_N, at_F),
            by_kernels,
        )


class KeptLatents(NamedTuple):
    """The selected latents of a batch, as values and indices. A selected latent can be 0."""

    value_N: Tensor
    selected: SelectedLatents

    def dense(self) -> Tensor:
        """(B, F): the same latents as a dense tensor."""
        tokens, d_sae = len(self.selected.token_start_B), len(self.selected.latent_start_F)
        zeros_BF = self.value_N.new_zeros(tokens, d_sae)
        return scatter_latents(self.value_N, self.selected.flat_index_N, zeros_BF)

    def counts(self) -> Tensor:
        """(F) float32: for how many tokens each latent is active. Sums of ones are exact in any order."""
        active_N = (self.value_N.detach() != 0).float()
        return active_N.new_zeros(len(self.selected.latent_start_F)).scatter_add_(0, self.selected.latent_N, active_N)

    def by_section(self, sizes: Sequence[int]) -> "KeptLatents":
        """The same latents, with tokens numbered across sections: token t of section g becomes token g * B + t."""
        token_N, latent_N, tokens, d_sae = (
            self.selected.token_N,
            self.selected.latent_N,
            len(self.selected.token_start_B),
            len(self.selected.latent_start_F),
        )
        # The ends stay Python numbers, because a tensor of them would have to be copied to the GPU in every step.
        section_N = torch.zeros_like(latent_N)
        for end in accumulate(sizes[:-1]):
            section_N += latent_N >= end
        flat_index_N, latent_order_N = ((section_N * tokens + token_N) * d_sae + latent_N).sort()
        selected = SelectedLatents.of(flat_index_N, len(sizes) * tokens, d_sae, self.selected.by_kernels)
        return KeptLatents(self.value_N[latent_order_N], selected)


def weighted_row_sums(index_N: Tensor, row_RD: Tensor, first: Tensor, weight_N: Tensor) -> Tensor:
    """Sums of weighted rows: one sum for each segment of the dimension N. The segments start at `first`."""
    return F.embedding_bag(index_N, row_RD, first, mode="sum", per_sample_weights=weight_N.to(row_RD.dtype))


def sum_by_latent(
    weight_N: Tensor, row_BD: Tensor, token_N: Tensor, latent_order_N: Tensor, latent_start_F: Tensor, *,
    dtype: torch.dtype, by_kernels: bool, transposed: bool = False,
) -> Tensor:  # fmt: skip
    """(F, D), or (D, F) if `transposed`: the product of f^T and the rows, computed without the zeros in f.

    For each latent, this is the weighted sum of the rows of its tokens.
    """
    index_N, weight_N = token_N[latent_order_N], weight_N[latent_order_N]
    if by_kernels:
        return sum_rows(index_N, row_BD, latent_start_F, weight_N, transposed).to(dtype)
    sum_FD = weighted_row_sums(index_N, row_BD, latent_start_F, weight_N)
    if not transposed:
        return sum_FD.to(dtype)
    # Write the sums in the memory order of W_enc. Autograd would do this too, but would use only one thread of a CPU.
    return torch.mul(sum_FD.T, 1, out=sum_FD.new_empty(sum_FD.shape[::-1], dtype=dtype))


class _SparseEncode(torch.autograd.Function):
    """Selects elements of (x - b_dec) W_enc + b_enc; the gradient is computed sparsely."""

    @staticmethod
    def forward(
        ctx: Any, pre_BF: Tensor, x_BD: Tensor, w_DF: Tensor, b_F: Tensor, b_D: Tensor | None, by_kernels: bool,
        *chosen: Tensor,
    ) -> Tensor:  # fmt: skip
        flat_index_N, token_N, latent_order_N, latent_start_F = chosen
        ctx.save_for_backward(x_BD, w_DF, b_D, token_N, latent_order_N, latent_start_F)
        ctx.row_dtype, ctx.by_kernels = row_dtype(x_BD), by_kernels
        return pre_BF.flatten().index_select(0, flat_index_N).to(x_BD.dtype)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        x_BD, w_DF, b_D, token_N, latent_order_N, latent_start_F = ctx.saved_tensors
        (g_N,) = gradient
        b_F_ = F.embedding_bag(latent_order_N, g_N[:, None], latent_start_F, mode="sum").squeeze(1)
        w_DF_ = None
        if ctx.needs_input_grad[2]:
            centered_BD = x_BD if b_D is None else x_BD - b_D
            chosen = token_N, latent_order_N, latent_start_F
            row_BD = centered_BD.to(ctx.row_dtype)
            w_DF_ = sum_by_latent(g_N, row_BD, *chosen, dtype=w_DF.dtype, by_kernels=ctx.by_kernels, transposed=True)
        return None, None, w_DF_, b_F_, None if b_D is None else -(w_DF @ b_F_), *[None] * 5


class _SparseDecode(torch.autograd.Function):
    """The identity function on a reconstruction; the gradient of W_dec is computed sparsely."""

    @staticmethod
    def forward(
        ctx: Any, recon_BD: Tensor, w_FD: Tensor, value_N: Tensor, by_kernels: bool, *chosen: Tensor
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(value_N, *chosen)
        ctx.dtype, ctx.by_kernels = w_FD.dtype, by_kernels
        return recon_BD.view_as(recon_BD)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        value_N, *chosen = ctx.saved_tensors
        (g_BD,) = gradient
        w_FD_ = None
        if ctx.needs_input_grad[1]:
            w_FD_ = sum_by_latent(value_N, g_BD.contiguous(), *chosen, dtype=ctx.dtype, by_kernels=ctx.by_kernels)
        return g_BD, w_FD_, *[None] * 5


class _DecodeAndCompare(torch.autograd.Function):
    """The operator `decode_rows`, with gradients."""

    @staticmethod
    def forward(
        ctx: Any, value_N: Tensor, w_FD: Tensor, b_D: Tensor, x_BD: Tensor, latent_N: Tensor, token_start_B: Tensor,
        *chosen: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        row_FD, _ = for_products(w_FD, row_dtype(w_FD))
        recon_BD, squared_error, slope_N = decode_rows(value_N, row_FD, latent_N, token_start_B, b_D, x_BD)
        ctx.save_for_backward(value_N, row_FD, x_BD, recon_BD, slope_N, latent_N, token_start_B, *chosen)
        ctx.dtype = w_FD.dtype
        ctx.set_materialize_grads(False)
        return recon_BD, squared_error

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        value_N, row_FD, x_BD, recon_BD, slope_N, latent_N, token_start_B, *chosen = ctx.saved_tensors
        g_BD, of_squared_error = gradients
        g_N = None
        if g_BD is not None:
            g_BD = g_BD.contiguous()
            g_N = products_with_rows(g_BD.to(row_FD.dtype), row_FD, latent_N, token_start_B).to(value_N.dtype)
        if of_squared_error is not None:
            factor = 2 * of_squared_error
            error_BD, slope_N = (recon_BD - x_BD).mul_(factor), slope_N * factor
            g_BD, g_N = (error_BD, slope_N) if g_BD is None else (g_BD + error_BD, g_N + slope_N)
        if g_BD is None:
            return (None,) * 9
        w_FD_ = None
        if ctx.needs_input_grad[1]:
            w_FD_ = sum_by_latent(value_N, g_BD.to(row_FD.dtype), *chosen, dtype=ctx.dtype, by_kernels=True)
        return g_N, w_FD_, g_BD.sum(0), *[None] * 6


def encode(
    pre_BF: Tensor, x_BD: Tensor, w_DF: Tensor, b_F: Tensor, b_D: Tensor | None, selected: SelectedLatents
) -> Tensor:
    """(N): pre-activations of the selected latents, taken from `pre_BF`.

    `b_D` is the b_dec that the encoder subtracts from x, or None. The gradient of W_enc is (x - b)^T g, which is zero
    except for the selected latents; x gets no gradient.
    """
    return _SparseEncode.apply(
        pre_BF.detach(),
        x_BD,
        w_DF,
        b_F,
        b_D,
        selected.by_kernels,
        selected.flat_index_N,
        selected.token_N,
        selected.latent_order_N,
        selected.latent_start_F,
    )


def decode(kept: KeptLatents, w_FD: Tensor) -> Tensor:
    """(B, D): for each token, the sum of the W_dec rows of its latents, each weighted by the latent's value."""
    value_N, selected = kept
    row_FD = for_products(w_FD, row_dtype(w_FD))[0].detach()
    recon_BD = weighted_row_sums(selected.latent_N, row_FD, selected.token_start_B, value_N)
    return _SparseDecode.apply(
        recon_BD,
        w_FD,
        value_N.detach(),
        selected.by_kernels,
        selected.token_N,
        selected.latent_order_N,
        selected.latent_start_F,
    )


def decode_and_compare(kept: KeptLatents, w_FD: Tensor, b_D: Tensor, x_BD: Tensor) -> tuple[Tensor, Tensor]:
    """x_hat = f W_dec + b_dec (B, D), and the scalar sum_BD (x - x_hat)^2.

    On a GPU, one pass over W_dec's rows computes both, and also the gradient of the squared error with respect to the
    latents.
    """
    value_N, selected = kept
    return _DecodeAndCompare.apply(
        value_N,
        w_FD,
        b_D,
        x_BD,
        selected.latent_N,
        selected.token_start_B,
        selected.token_N,
        selected.latent_order_N,
        selected.latent_start_F,
    )


def scatter_latents(value_N: Tensor, flat_index_N: Tensor, like_BF: Tensor) -> Tensor:
    """A dense tensor like `like_BF` with the values at their indices and zeros elsewhere."""
    zeros = torch.zeros_like(like_BF, dtype=value_N.dtype).flatten()
    return zeros.scatter_(0, flat_index_N, value_N).view_as(like_BF)
