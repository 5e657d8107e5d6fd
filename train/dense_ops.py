"""The matrix products of a dense training step, each fused with the elementwise operations on its result.

An elementwise pass over (B, F) takes up to a tenth of the time of a matrix product; it takes longest if its result
needs new memory. Autograd makes such a pass for each bias, ReLU, mask and sum of gradients. Here the encoder's product
also adds the bias. The product that computes the gradient of the latents also adds the gradient of any loss on the
latents. ReLU and its mask work in place.

No function here computes the gradient of x, so a dense step takes five products instead of six. Under autocast,
products have the autocast dtype, and so do latents. Weights keep their own dtype, and gradients have the dtype of their
weights. If a weight has a copy in bfloat16 (train/kernel_update.py), products read the copy, and the gradient of the
weight is in bfloat16.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels.batch_operators import compare, compare_backward
from .kernels.prefix_operator import compare_prefixes, prefix_gradients


def encode(x_BD: Tensor, w_DF: Tensor, b_F: Tensor, b_D: Tensor | None, centered_BD: Tensor | None = None) -> Tensor:
    """(B, F): (x - b_dec) W_enc + b_enc. `b_D` is the b_dec that the encoder subtracts from x, or None.

    `centered_BD` is the result of `center`, if it is known.
    """
    return _Encode.apply(center(x_BD, b_D) if centered_BD is None else centered_BD, b_D, w_DF, b_F)


def encode_relu_decode(
    x_BD: Tensor, w_DF: Tensor, b_F: Tensor, b_D: Tensor | None, w_FD: Tensor, centered_BD: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """f = ReLU((x - b_dec) W_enc + b_enc) (B, F), and f W_dec (B, D). `centered_BD` as in `encode`."""
    return _EncodeReLUDecode.apply(center(x_BD, b_D) if centered_BD is None else centered_BD, b_D, w_DF, b_F, w_FD)


def select_decode(pre_BF: Tensor, flat_index_N: Tensor, w_FD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three tensors: f (B, F), f W_dec (B, D), and the selected latents (N).

    f is the ReLU of the pre-activations where they are selected, and 0 elsewhere.

    The selected latents carry no gradient.
    """
    return _SelectDecode.apply(pre_BF, flat_index_N, w_FD)


def total(f_BF: Tensor) -> Tensor:
    """Scalar: the sum of all latents in float32 or float64. Its gradient is one number, expanded without new memory."""
    return _Total.apply(f_BF)


def squared_error(recon_BD: Tensor, x_BD: Tensor) -> Tensor:
    """Scalar: sum_BD (x - x_hat)^2. The gradient takes one pass over (B, D); autograd would take four."""
    return _SquaredError.apply(recon_BD, x_BD)


def select_decode_sections(
    pre_BF: Tensor, flat_index_N: Tensor, w_FD: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Like `select_decode`, but sections of the dictionary are decoded separately: (G, B, D) instead of (B, D)."""
    return _SelectDecodeSections.apply(pre_BF, flat_index_N, w_FD, sizes)


def squared_errors(part_GBD: Tensor, b_D: Tensor, x_BD: Tensor) -> tuple[Tensor, Tensor]:
    """(B, D): b_dec plus all parts; (G): for each g, the squared error of b_dec plus the first g parts.

    Uses operators with GPU kernels, which need one pass for these results and a second one for the gradients.
    """
    return _SquaredErrors.apply(part_GBD, b_D, x_BD)


def reconstruction_error(product_BD: Tensor, b_D: Tensor, x_BD: Tensor) -> tuple[Tensor, Tensor]:
    """The error x - (f W_dec + b_dec) (B, D) and the sum of its squares, a scalar, given the product f W_dec (B, D).

    On a GPU, one pass computes both, and another pass computes their gradients.
    """
    return _ReconstructionError.apply(product_BD, b_D, x_BD)


COPY = "copy_for_products"  # attribute of a weight: its bfloat16 copy, kept by train/kernel_update.py


def for_products(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, torch.dtype]:
    """A weight in the dtype of the products, and the dtype in which the products compute the gradient of the weight."""
    copy: Tensor | None = getattr(weight, COPY, None)
    return (weight.to(dtype), weight.dtype) if copy is None or copy.dtype != dtype else (copy, dtype)


def decode(f_BF: Tensor, w_FD: Tensor) -> Tensor:
    """(B, D): f W_dec."""
    dtype = dtype_of_products(f_BF)
    copy: Tensor | None = getattr(w_FD, COPY, None)
    if copy is None or copy.dtype != dtype or f_BF.dim() != 2:
        return f_BF @ w_FD
    return _Decode.apply(f_BF.to(dtype), w_FD)


def dtype_of_products(given: Tensor) -> torch.dtype:
    """The dtype in which a matrix product reads a tensor."""
    device = given.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else given.dtype


def center(x_BD: Tensor, b_D: Tensor | None) -> Tensor:
    """The encoder's input, x or x - b_dec, in the dtype of the matrix products.

    Carries no gradient: the products that read it also compute the gradient of b_dec. It would also be possible to
    subtract b_dec W_enc from the product. Compared with this, subtracting b_dec from x costs a pass over (B, D), but
    saves a pass over W_enc and one over its gradient. Some dimensions of language models have large means. The
    subtraction keeps these means out of the product, whose result is rounded.
    """
    centered_BD = x_BD.detach() if b_D is None else x_BD.detach() - b_D.detach()
    return centered_BD.to(dtype_of_products(x_BD))


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BD: Tensor, b_D: Tensor | None, w_DF: Tensor, b_F: Tensor) -> Tensor:
        encoder_DF, ctx.dtype = for_products(w_DF, x_BD.dtype)
        ctx.save_for_backward(x_BD, w_DF)
        ctx.subtracts = b_D is not None
        return torch.addmm(b_F.to(x_BD.dtype), x_BD, encoder_DF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        x_BD, w_DF = ctx.saved_tensors
        (g_BF,) = gradient
        return None, *encoder_gradients(x_BD, w_DF, g_BF, ctx.subtracts, ctx.dtype if ctx.needs_input_grad[2] else None)


class _Decode(torch.autograd.Function):
    """A product with the copy of W_dec."""

    @staticmethod
    def forward(ctx: Any, f_BF: Tensor, w_FD: Tensor) -> Tensor:
        decoder_FD, ctx.dtype = for_products(w_FD, f_BF.dtype)
        ctx.save_for_backward(f_BF, decoder_FD)
        return f_BF @ decoder_FD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        f_BF, decoder_FD = ctx.saved_tensors
        (g_BD,) = gradient
        return (
            g_BD @ decoder_FD.T if ctx.needs_input_grad[0] else None,
            (f_BF.T @ g_BD).to(ctx.dtype) if ctx.needs_input_grad[1] else None,
        )


class _EncodeReLUDecode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BD: Tensor, b_D: Tensor | None, w_DF: Tensor, b_F: Tensor, w_FD: Tensor
    ) -> tuple[Tensor, Tensor]:
        (encoder_DF, ctx.dtype), (decoder_FD, ctx.decoder_dtype) = (
            for_products(weight, x_BD.dtype) for weight in (w_DF, w_FD)
        )
        f_BF = torch.addmm(b_F.to(x_BD.dtype), x_BD, encoder_DF).relu_()  # pre-activations are not kept
        ctx.save_for_backward(x_BD, w_DF, f_BF, decoder_FD)
        ctx.subtracts = b_D is not None
        ctx.set_materialize_grads(False)  # saves a pass over (B, F) if no loss reads the latents
        return f_BF, f_BF @ decoder_FD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x_BD, w_DF, f_BF, decoder_FD = ctx.saved_tensors
        of_f_BF, of_recon_BD = gradients
        dtype = ctx.decoder_dtype if ctx.needs_input_grad[4] else None
        g_BF, w_FD_ = decoder_gradients(f_BF, decoder_FD, of_f_BF, of_recon_BD, dtype)
        dtype = ctx.dtype if ctx.needs_input_grad[2] else None
        return None, *encoder_gradients(x_BD, w_DF, g_BF, ctx.subtracts, dtype), w_FD_


class _SelectDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre_BF: Tensor, flat_index_N: Tensor, w_FD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value_N = pre_BF.flatten().index_select(0, flat_index_N).relu_()
        f_BF = torch.zeros_like(pre_BF).flatten().scatter_(0, flat_index_N, value_N).view_as(pre_BF)
        decoder_FD, ctx.dtype = for_products(w_FD, pre_BF.dtype)
        ctx.save_for_backward(f_BF, decoder_FD)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(value_N)
        return f_BF, f_BF @ decoder_FD, value_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        f_BF, decoder_FD = ctx.saved_tensors
        of_f_BF, of_recon_BD, _ = gradients
        dtype = ctx.dtype if ctx.needs_input_grad[2] else None
        g_BF, w_FD_ = decoder_gradients(f_BF, decoder_FD, of_f_BF, of_recon_BD, dtype)
        return g_BF, None, w_FD_


class _SelectDecodeSections(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pre_BF: Tensor, flat_index_N: Tensor, w_FD: Tensor, sizes: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        value_N = pre_BF.flatten().index_select(0, flat_index_N).relu_()
        f_BF = torch.zeros_like(pre_BF).flatten().scatter_(0, flat_index_N, value_N).view_as(pre_BF)
        decoder_FD, ctx.dtype = for_products(w_FD, pre_BF.dtype)
        ctx.sections = sections(sizes)
        part_GBD = f_BF.new_empty(len(sizes), len(f_BF), w_FD.shape[1])
        for part_BD, section in zip(part_GBD, ctx.sections, strict=True):
            torch.mm(f_BF[:, section], decoder_FD[section], out=part_BD)
        ctx.save_for_backward(f_BF, decoder_FD)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(value_N)
        return f_BF, part_GBD, value_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        f_BF, decoder_FD = ctx.saved_tensors
        of_f_BF, of_part_GBD, _ = gradients
        if of_part_GBD is None:
            return *decoder_gradients(f_BF, decoder_FD, of_f_BF, None, None), None, None
        g_BF, w_FD_ = torch.empty_like(f_BF), None
        for g_BD, section in zip(of_part_GBD, ctx.sections, strict=True):
            torch.mm(g_BD, decoder_FD[section].T, out=g_BF[:, section])
        if of_f_BF is not None:
            g_BF += of_f_BF
        torch.ops.aten.threshold_backward.grad_input(g_BF, f_BF, 0, grad_input=g_BF)  # in place
        if ctx.needs_input_grad[2]:
            w_FD_ = torch.empty_like(decoder_FD)
            for g_BD, section in zip(of_part_GBD, ctx.sections, strict=True):
                torch.mm(f_BF[:, section].T, g_BD, out=w_FD_[section])
            w_FD_ = w_FD_.to(ctx.dtype)
        return g_BF, None, w_FD_, None


class _SquaredErrors(torch.autograd.Function):
    """The operators `compare_prefixes` and `prefix_gradients`."""

    @staticmethod
    def forward(ctx: Any, part_GBD: Tensor, b_D: Tensor, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(part_GBD, b_D, x_BD)
        ctx.set_materialize_grads(False)
        recon_BD, squared_G = compare_prefixes(part_GBD, b_D, x_BD)
        return recon_BD, squared_G

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        part_GBD, b_D, x_BD = ctx.saved_tensors
        of_recon_BD, of_squared_G = gradients
        g_GBD = g_D = None
        if of_squared_G is not None:
            g_GBD, g_D = prefix_gradients(part_GBD, b_D, x_BD, 2 * of_squared_G)
        if of_recon_BD is not None:
            of_part_GBD = of_recon_BD.to(part_GBD.dtype).expand_as(part_GBD)
            g_GBD = of_part_GBD if g_GBD is None else g_GBD + of_part_GBD
            g_D = of_recon_BD.sum(0) if g_D is None else g_D + of_recon_BD.sum(0)
        return g_GBD, g_D, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, f_BF: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = f_BF.shape, f_BF.dtype
        return f_BF.sum(dtype=torch.promote_types(f_BF.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> Tensor:
        return gradient[0].to(ctx.dtype).expand(ctx.shape)


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recon_BD: Tensor, x_BD: Tensor) -> Tensor:
        error_BD = recon_BD - x_BD
        ctx.save_for_backward(error_BD)
        return error_BD.square().sum()

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None]:
        (error_BD,) = ctx.saved_tensors
        return error_BD * (2 * gradient[0]), None


class _ReconstructionError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, product_BD: Tensor, b_D: Tensor, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        error_BD, squared_error = compare(product_BD, b_D, x_BD)
        ctx.save_for_backward(error_BD)
        ctx.dtype = product_BD.dtype
        ctx.set_materialize_grads(False)
        return error_BD, squared_error

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        (error_BD,) = ctx.saved_tensors
        of_error_BD, of_squared_error = gradients
        if of_error_BD is None:
            if of_squared_error is None:
                return None, None, None
            return *compare_backward(error_BD, of_squared_error, ctx.dtype), None
        g_BD = -of_error_BD if of_squared_error is None else error_BD * (-2 * of_squared_error) - of_error_BD
        return g_BD.to(ctx.dtype), g_BD.sum(0), None


def sections(sizes: Sequence[int]) -> list[slice]:
    """Consecutive slices of these sizes."""
    return [slice(end - size, end) for end, size in zip(accumulate(sizes), sizes, strict=True)]


def decoder_gradients(
    f_BF: Tensor, decoder_FD: Tensor, of_f_BF: Tensor | None, of_recon_BD: Tensor | None, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """The gradients of the pre-activations (0 where the latent is 0) and of W_dec (in `dtype`, unless that is None).

    `of_f_BF` is the gradient of losses on the latents, and `of_recon_BD` is the gradient of f W_dec. One of the two may
    be None.
    """
    if of_recon_BD is None:
        assert of_f_BF is not None
        return torch.ops.aten.threshold_backward(of_f_BF, f_BF, 0), None
    g_BD = of_recon_BD.to(f_BF.dtype)
    g_BF = g_BD @ decoder_FD.T if of_f_BF is None else torch.addmm(of_f_BF, g_BD, decoder_FD.T)
    torch.ops.aten.threshold_backward.grad_input(g_BF, f_BF, 0, grad_input=g_BF)  # in place
    return g_BF, None if dtype is None else (f_BF.T @ g_BD).to(dtype)


def encoder_gradients(
    x_BD: Tensor, w_DF: Tensor, g_BF: Tensor, subtracts: bool, dtype: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """The gradients of b_dec, W_enc and b_enc, from the gradient `g_BF` of the pre-activations.

    `x_BD` is the encoder's input. `dtype` is the dtype of the gradient of W_enc; if it is None, this gradient is not
    computed.
    """
    b_F_ = g_BF.sum(0, dtype=w_DF.dtype)
    return -(w_DF @ b_F_) if subtracts else None, None if dtype is None else (x_BD.T @ g_BF).to(dtype), b_F_
