"""The products of a step over those latents alone that are on, where few are.

A dense product multiplies mostly zeros: with k of n latents on, encoding takes the one it needs, and the four others
(decode, and the gradients to latents, W_dec and W_enc) are sums of k rows a token. Shapes: N latents that may be on in
the whole batch, a fixed number, token by token.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

SPARSE_FROM = {"cpu": 16, "cuda": 1024}
"""n/k from which rows are gathered, by device; on others never.

cpu: measured by benchmarks/bench_decode.py, the whole step of `topk`; see its table in benchmarks/results.
cuda: not measured. A row in float32 against a dense product in bfloat16 ties at 370 by the limits of an H200 (790 TFLOP/s,
4.3 TB/s), and gathering does not reach them as products do.
"""


def sparse_is_faster(d_sae: int, k: float, device: str) -> bool:
    """Whether rows are to be gathered: by shapes and device, so that a run does the same in every step."""
    return device in SPARSE_FROM and d_sae >= SPARSE_FROM[device] * k


class SelectedLatents(NamedTuple):
    """Which latents may be on, and the same latent by latent: what both directions of a product need."""

    flat_index_N: Tensor  # token * F + latent, rising by token
    token_N: Tensor
    latent_N: Tensor
    token_start_B: Tensor  # where each token's begin
    latent_order_N: Tensor  # by latent, of one latent by token
    latent_start_F: Tensor  # where each latent's begin in that order

    @classmethod
    def of(cls, flat_index_N: Tensor, tokens: int, d_sae: int) -> "SelectedLatents":
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
        )


class KeptLatents(NamedTuple):
    """The latents of a batch that may be on, one by one."""

    value_N: Tensor
    selected: SelectedLatents

    def by_section(self, sizes: Sequence[int]) -> "KeptLatents":
        """The same where each section of the latents has tokens of its own: token t of section g is token g B + t."""
        token_N, latent_N, tokens, d_sae = (
            self.selected.token_N,
            self.selected.latent_N,
            len(self.selected.token_start_B),
            len(self.selected.latent_start_F),
        )
        end_G = torch.tensor(list(accumulate(sizes)), device=latent_N.device)
        section_N = torch.searchsorted(end_G, latent_N, right=True)
        flat_index_N, latent_order_N = ((section_N * tokens + token_N) * d_sae + latent_N).sort()
        return KeptLatents(self.value_N[latent_order_N], SelectedLatents.of(flat_index_N, len(sizes) * tokens, d_sae))


def weighted_row_sums(index_N: Tensor, row_RD: Tensor, first: Tensor, weight_N: Tensor) -> Tensor:
    """Sums of weighted rows, one for each stretch of N that begins at `first`. Always in the order of N."""
    return F.embedding_bag(index_N, row_RD, first, mode="sum", per_sample_weights=weight_N.to(row_RD.dtype))


def sum_by_latent(
    weight_N: Tensor, row_BD: Tensor, token_N: Tensor, latent_order_N: Tensor, latent_start_F: Tensor
) -> Tensor:
    """(F, D): for each latent the sum of the rows of its tokens, weighted: f^T row without the zeros."""
    return weighted_row_sums(token_N[latent_order_N], row_BD, latent_start_F, weight_N[latent_order_N])


class _SparseEncode(torch.autograd.Function):
    """The chosen of (x - b_dec) W_enc + b_enc, taken from all of them; its gradient goes by rows."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, pre_BF: Tensor, x_BD: Tensor, w_DF: Tensor, b_F: Tensor, b_D: Tensor | None, *chosen: Tensor
    ) -> Tensor:  # fmt: skip
        flat_index_N, token_N, latent_order_N, latent_start_F = chosen
        ctx.save_for_backward(x_BD, w_DF, b_D, token_N, latent_order_N, latent_start_F)
        return pre_BF.flatten().index_select(0, flat_index_N).to(x_BD.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        x_BD, w_DF, b_D, token_N, latent_order_N, latent_start_F = ctx.saved_tensors
        (g_N,) = gradient
        b_F_ = F.embedding_bag(latent_order_N, g_N[:, None], latent_start_F, mode="sum").squeeze(1)
        w_FD_ = sum_by_latent(g_N, x_BD if b_D is None else x_BD - b_D, token_N, latent_order_N, latent_start_F)
        return None, None, w_FD_.T, b_F_, None if b_D is None else -(w_DF @ b_F_), *[None] * 4


class _SparseDecode(torch.autograd.Function):
    """Hands a reconstruction on; its gradient to W_dec goes by rows."""

    @staticmethod
    def forward(ctx: FunctionCtx, recon_BD: Tensor, w_FD: Tensor, value_N: Tensor, *chosen: Tensor) -> Tensor:
        ctx.save_for_backward(value_N, *chosen)
        return recon_BD.view_as(recon_BD)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        value_N, *chosen = ctx.saved_tensors
        (g_BD,) = gradient
        return g_BD, sum_by_latent(value_N, g_BD.contiguous(), *chosen), None, None, None, None


def encode(
    pre_BF: Tensor, x_BD: Tensor, w_DF: Tensor, b_F: Tensor, b_D: Tensor | None, selected: SelectedLatents
) -> Tensor:
    """(N) pre-activations of the chosen. `pre_BF` holds all of them; `b_D` is what the encoder subtracts from x, if any.

    The gradient to W_enc is (x - b)^T g, of which only the chosen's part is not zero; x gets none.
    """
    return _SparseEncode.apply(
        pre_BF.detach(),
        x_BD,
        w_DF,
        b_F,
        b_D,
        selected.flat_index_N,
        selected.token_N,
        selected.latent_order_N,
        selected.latent_start_F,
    )


def decode(kept: KeptLatents, w_FD: Tensor) -> Tensor:
    """(B, D): for each token the rows of its latents times their values."""
    value_N, selected = kept
    recon_BD = weighted_row_sums(selected.latent_N, w_FD.detach(), selected.token_start_B, value_N)
    return _SparseDecode.apply(
        recon_BD, w_FD, value_N.detach(), selected.token_N, selected.latent_order_N, selected.latent_start_F
    )


def scatter_latents(value_N: Tensor, flat_index_N: Tensor, like_BF: Tensor) -> Tensor:
    """The values at their places, zeros elsewhere."""
    zeros = torch.zeros_like(like_BF, dtype=value_N.dtype).flatten()
    return zeros.scatter_(0, flat_index_N, value_N).view_as(like_BF)
