"""Gated SAE (Rajamanoharan et al. 2024a): a gate and a magnitude, which share W_enc.

    z      = (x - b_dec) W_enc
    f      = 1[z + b_gate > 0] ReLU(exp(r_mag) z + b_mag)
    f_gate = ReLU(z + b_gate)
    L      = |x - x_hat(f)|^2 + l1 |f_gate|_1 + |x - (f_gate sg(W_dec) + sg(b_dec))|^2

The step function in f has no gradient, so the gate learns from the last two terms alone. sg stops the gradient.
"""

import torch
from torch import Tensor, nn

from ..activation_functions import Activation
from ..losses import MSE
from ..mechanisms import DeadLatents, UnitNormDecoder
from ..optimization import Optimization
from ..recipe import recipe
from ..sae import SAE
from ..schedules import warmup
from ..step import LossTerm, Step
from ..variant import RunConfig, Variant


class Gated(Activation, name="gated"):
    """1[z + b_gate > 0] ReLU(exp(r_mag) z + b_mag)."""

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
        return self.gated.gate(step.pre_BF).sum(-1).mean()


class GateMSE(LossTerm):
    """mean_B |x - (f_gate sg(W_dec) + sg(b_dec))|^2: the gate's latents reconstruct through a frozen decoder."""

    undivided = ""

    def __init__(self, gated: Gated) -> None:
        super().__init__()
        self.gated = gated

    def forward(self, step: Step) -> Tensor:
        sae = step.sae
        recon_BD = self.gated.gate(step.pre_BF) @ sae.W_dec.detach() + sae.b_dec.detach()
        return (step.x_BD - recon_BD).square().sum(-1).mean()


@recipe("gated", paper="Rajamanoharan et al. 2024a")
def gated(config: RunConfig, l1: float = 0.04, l1_warmup: int | None = None) -> Variant:
    """A gate with an L1 penalty chooses the latents that fire.

    The magnitudes of latents are not penalized, and therefore not shrunk.

    Args:
        l1: Strength of the L1 penalty on the gate.
        l1_warmup: Steps over which the L1 penalty rises from zero. None: a twentieth of the run.
    """
    activation = Gated(config.d_sae)
    sae = SAE(config.d_in, config.d_sae, [activation])
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
