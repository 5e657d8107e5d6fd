"""Gated SAE (Rajamanoharan et al. 2024a): a gate and a magnitude, which share W_enc.

    z      = (x - b_dec) W_enc
    f      = 1[z + b_gate > 0] ReLU(exp(r_mag) z + b_mag)
    f_gate = ReLU(z + b_gate)
    L      = |x - x_hat(f)|^2 + l1 |f_gate|_1 + |x - (f_gate sg(W_dec) + sg(b_dec))|^2

The step function in f has no gradient, so the gate learns only from the last two terms. sg stops the gradient.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import dense_ops
from ..activation_functions import Activation
from ..kernels.gate_operator import gate_gradients, gate_latents
from ..losses import MSE
from ..mechanisms import DeadLatents, UnitNormDecoder
from ..optimization import Optimization
from ..recipe import recipe
from ..sae import SAE, TrainingOutput
from ..schedules import warmup
from ..step import LossTerm, Step
from ..variant import RunConfig, Variant


class Gated(Activation, name="gated"):
    """1[z + b_gate > 0] ReLU(exp(r_mag) z + b_mag)."""

    has_kernels = True

    def __init__(self, d_sae: int) -> None:
        super().__init__(d_sae=d_sae)
        self.r_mag, self.b_gate, self.b_mag = (nn.Parameter(torch.zeros(d_sae)) for _ in range(3))

    def gate(self, z_BF: Tensor) -> Tensor:
        """f_gate = ReLU(z + b_gate)."""
        return (z_BF + self.b_gate).relu()

    def forward(self, z_BF: Tensor) -> Tensor:
        return (z_BF * self.r_mag.exp() + self.b_mag).relu() * (z_BF + self.b_gate > 0)

    def rescale_(self, factor: float | Tensor) -> None:
        self.b_gate.mul_(factor)
        self.b_mag.mul_(factor)


class GateL1(LossTerm):
    """mean_B sum_F f_gate."""

    sparsity = True
    undivided = ""

    def __init__(self, gated: Gated) -> None:
        super().__init__()
        self.gated = gated

    def forward(self, step: Step) -> Tensor:
        if "gate_sum" in step.values:
            return step.values["gate_sum"] / step.tokens
        return self.gated.gate(step.pre_BF).sum(-1).mean()


class GateMSE(LossTerm):
    """mean_B |x - (f_gate sg(W_dec) + sg(b_dec))|^2: the gate's latents reconstruct through a frozen decoder."""

    undivided = ""

    def __init__(self, gated: Gated) -> None:
        super().__init__()
        self.gated = gated

    def forward(self, step: Step) -> Tensor:
        if "gate_squared_error" in step.values:
            return step.values["gate_squared_error"] / step.tokens
        sae = step.sae
        recon_BD = self.gated.gate(step.pre_BF) @ sae.W_dec.detach() + sae.b_dec.detach()
        return (step.x_BD - recon_BD).square().sum(-1).mean()


class EncodeGateDecode(torch.autograd.Function):
    """z, f, f W_dec, f_gate sg(W_dec), the sum of f_gate, and the number of tokens on which each latent fires.

    z and the number of tokens carry no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x_BD: Tensor, b_D: Tensor, w_DF: Tensor, b_F: Tensor, r_F: Tensor, gate_F: Tensor, mag_F: Tensor,
        w_FD: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        (encoder_DF, ctx.dtype), (decoder_FD, ctx.decoder_dtype) = (
            dense_ops.for_products(weight, x_BD.dtype) for weight in (w_DF, w_FD)
        )
        z_BF = torch.addmm(b_F.to(x_BD.dtype), x_BD, encoder_DF)
        f_BF, gate_BF, sum_F, counts_F = gate_latents(z_BF, r_F.exp(), gate_F, mag_F)
        ctx.save_for_backward(x_BD, w_DF, z_BF, r_F, gate_F, mag_F, f_BF, decoder_FD)
        ctx.mark_non_differentiable(z_BF, counts_F)
        ctx.set_materialize_grads(False)
        return z_BF, f_BF, f_BF @ decoder_FD, gate_BF @ decoder_FD, sum_F.sum(), counts_F

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x_BD, w_DF, z_BF, r_F, gate_F, mag_F, f_BF, decoder_FD = ctx.saved_tensors
        _, of_f_BF, of_recon_BD, of_gate_BD, of_sum, _ = gradients
        of_recon_BD, of_gate_BD = (torch.zeros_like(x_BD) if g is None else g for g in (of_recon_BD, of_gate_BD))
        of_sum = x_BD.new_zeros((), dtype=r_F.dtype) if of_sum is None else of_sum
        through_BF = of_recon_BD @ decoder_FD.T
        if of_f_BF is not None:
            through_BF += of_f_BF
        scale_F = r_F.exp()
        of_z_BF, scale_F_, gate_F_, mag_F_ = gate_gradients(
            z_BF, scale_F, gate_F, mag_F, through_BF, of_gate_BD @ decoder_FD.T, of_sum
        )
        b_F_ = gate_F_ + scale_F * mag_F_  # the sum over tokens of z's gradient
        w_DF_ = (x_BD.T @ of_z_BF).to(ctx.dtype) if ctx.needs_input_grad[2] else None
        w_FD_ = (f_BF.T @ of_recon_BD).to(ctx.decoder_dtype) if ctx.needs_input_grad[7] else None
        return None, -(w_DF @ b_F_), w_DF_, b_F_, scale_F * scale_F_, gate_F_, mag_F_, w_FD_


def encode_gate_decode(sae: SAE, x_BD: Tensor, centered_BD: Tensor | None = None) -> TrainingOutput | None:
    """`SAE.run` with kernels: one pass over z computes f and f_gate, and another pass computes their gradients."""
    (gated,) = sae.activation
    if not isinstance(gated, Gated) or not gated.by_kernels:
        return None
    centered_BD = dense_ops.center(x_BD, sae.b_dec) if centered_BD is None else centered_BD
    z_BF, f_BF, part_BD, gate_part_BD, gate_sum, counts_F = EncodeGateDecode.apply(
        centered_BD, sae.b_dec, sae.W_enc, sae.b_enc, gated.r_mag, gated.b_gate, gated.b_mag, sae.W_dec
    )
    recon_BD, squared_G = dense_ops.squared_errors(part_BD[None], sae.b_dec, x_BD)
    _, gate_squared_G = dense_ops.squared_errors(gate_part_BD[None], sae.b_dec.detach(), x_BD)
    values = {"gate_sum": gate_sum, "gate_squared_error": gate_squared_G[0], "counts_F": counts_F}
    return TrainingOutput(z_BF, f_BF, recon_BD, None, squared_G[0], values=values)


@recipe("gated", paper="Rajamanoharan et al. 2024a")
def gated(config: RunConfig, l1: float = 0.04, l1_warmup: int | None = None) -> Variant:
    """A gate with an L1 penalty selects the latents that fire.

    The magnitudes of latents are not penalized, and therefore not shrunk.

    Args:
        l1: Strength of the L1 penalty on the gate.
        l1_warmup: Steps over which the L1 penalty rises from zero. None: a twentieth of the run.
    """
    activation = Gated(config.d_sae)
    sae = SAE(config.d_in, config.d_sae, [activation])
    sae.own_pass = encode_gate_decode
    sae.b_enc.requires_grad_(False)  # stays zero: b_gate and b_mag take its place
    return Variant(
        sae,
        {
            "mse": (1.0, MSE()),
            "l1": (warmup(l1, config.penalty_warmup(l1_warmup)), GateL1(activation)),
            "gate": (1.0, GateMSE(activation)),
        },
        [UnitNormDecoder()],
        Optimization(beta1=0.0),
        dead=DeadLatents(config.d_sae, config.dead_after_tokens),
    )
