"""The operators of the gated SAE: see operators.py, and train/variants/gated.py for the formulas."""

import torch
from torch import Tensor


@torch.library.custom_op("sae::gate_latents", mutates_args=(), device_types="cpu")
def gate_latents(z_BF: Tensor, scale_F: Tensor, gate_F: Tensor, mag_F: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """f = 1[z + gate > 0] ReLU(scale z + mag) and f_gate = ReLU(z + gate), with sums over tokens.

    Returns f and f_gate (B, F), both in the dtype of z; and the sum of f_gate (F) and the number of tokens with f != 0
    (F), both in the dtype of the parameters.
    """
    return gate_latents_by_torch(z_BF, scale_F, gate_F, mag_F)


def gate_latents_by_torch(
    z_BF: Tensor, scale_F: Tensor, gate_F: Tensor, mag_F: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shifted_BF = z_BF + gate_F
    f_BF = ((z_BF * scale_F + mag_F).relu() * (shifted_BF > 0)).to(z_BF.dtype)
    gate_BF = shifted_BF.relu()
    return f_BF, gate_BF.to(z_BF.dtype), gate_BF.sum(0), (f_BF != 0).sum(0, dtype=scale_F.dtype)


@gate_latents.register_fake
def _(z_BF: Tensor, scale_F: Tensor, gate_F: Tensor, mag_F: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    f_BF, gate_BF = (torch.empty_like(z_BF, memory_format=torch.contiguous_format) for _ in range(2))
    return f_BF, gate_BF, torch.empty_like(scale_F), torch.empty_like(scale_F)


@gate_latents.register_kernel("cuda")
def _(z_BF: Tensor, scale_F: Tensor, gate_F: Tensor, mag_F: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .gate import latents

    if scale_F.dtype != torch.float32:
        return gate_latents_by_torch(z_BF, scale_F, gate_F, mag_F)
    return latents(z_BF, scale_F, gate_F, mag_F)


@torch.library.custom_op("sae::gate_gradients", mutates_args=(), device_types="cpu")
def gate_gradients(
    z_BF: Tensor, scale_F: Tensor, gate_F: Tensor, mag_F: Tensor, of_f_BF: Tensor, of_gate_BF: Tensor, of_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `gate_latents`.

    Args:
        z_BF, scale_F, gate_F, mag_F: the arguments of `gate_latents`.
        of_f_BF: the gradient of f, in the dtype of z.
        of_gate_BF: the gradient of f_gate, in the dtype of z.
        of_sum: () the gradient of the sum of f_gate over tokens and latents.

    Returns:
        the gradients of z (B, F), scale (F), gate (F) and mag (F).
    """
    return gate_gradients_by_torch(z_BF, scale_F, gate_F, mag_F, of_f_BF, of_gate_BF, of_sum)


def gate_gradients_by_torch(
    z_BF: Tensor, scale_F: Tensor, gate_F: Tensor, mag_F: Tensor, of_f_BF: Tensor, of_gate_BF: Tensor, of_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shifted_BF = z_BF + gate_F
    of_mag_BF = torch.where(z_BF * scale_F + mag_F <= 0, 0, of_f_BF.to(scale_F.dtype) * (shifted_BF > 0))
    of_shifted_BF = torch.where(shifted_BF <= 0, 0, of_gate_BF.to(scale_F.dtype) + of_sum)
    of_z_BF = (of_mag_BF * scale_F + of_shifted_BF).to(z_BF.dtype)
    dtype = scale_F.dtype
    return (
        of_z_BF,
        (of_mag_BF * z_BF).sum(0, dtype=dtype),
        of_shifted_BF.sum(0, dtype=dtype),
        of_mag_BF.sum(0, dtype=dtype),
    )


@gate_gradients.register_fake
def _(
    z_BF: Tensor, scale_F: Tensor, gate_F: Tensor, mag_F: Tensor, of_f_BF: Tensor, of_gate_BF: Tensor, of_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_z_BF = torch.empty_like(z_BF, memory_format=torch.contiguous_format)
    return of_z_BF, torch.empty_like(scale_F), torch.empty_like(scale_F), torch.empty_like(scale_F)


@gate_gradients.register_kernel("cuda")
def _(
    z_BF: Tensor, scale_F: Tensor, gate_F: Tensor, mag_F: Tensor, of_f_BF: Tensor, of_gate_BF: Tensor, of_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .gate import gradients

    if scale_F.dtype != torch.float32:
        return gate_gradients_by_torch(z_BF, scale_F, gate_F, mag_F, of_f_BF, of_gate_BF, of_sum)
    return gradients(z_BF, scale_F, gate_F, mag_F, of_f_BF, of_gate_BF, of_sum)
