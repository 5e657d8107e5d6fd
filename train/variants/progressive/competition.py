"""Paper 001: the competition between latents, (5) and (6), and the penalty on the result, (2) and (7)."""

import torch
from torch import Tensor, nn

from ...activation_functions import Activation
from ...schedules import Coefficient
from ...step import LossTerm, Mechanism, Step
from .growth import EnabledUtilization

COUNTED_TOKENS = 64  # number of tokens of a batch on which the effect of the competition is measured


class ChainL1(LossTerm):
    """mean_B sum_F |c(pre)| for a chain c of activations. The reconstruction may use a chain other than c."""

    sparsity = True
    undivided = ""

    def __init__(self, *chain: Activation) -> None:
        super().__init__()
        self.chain = nn.Sequential(*chain)

    def forward(self, step: Step) -> Tensor:
        l1: Tensor = self.chain(step.pre_BF).abs().sum(-1).mean()
        return l1


class SoftCompetition(Activation, name="competition"):
    """alpha(z)_i = w_i z_i with z = ReLU(pre) (5). Values up to `cut` are set to zero.

    With e_i = exp((z_i - max z) / T), `weights` are
        softmax              e / sum e: as printed in the paper, which shrinks everything
        softmax_peak         e: the strongest latent keeps its value
        softmax_scaled       e / sum e times the number of active latents
        softmax_active_only  e / sum e over the active latents, z > 0

    `unit` selects the unit of T and `cut`: "input" is the unit of the SAE's input, and "rms_z" is the root mean square
    of a token's active latents. With "rms_z", hardly any latent except the winner stays active.

    Paper: alpha is never exactly zero, so the paper's L0 must be the number of values above 0.01, the limit in (3).
    `cut` sets values that do not exceed such a limit to zero.
    """

    T: Tensor  # ()
    cut: Tensor  # ()

    def __init__(
        self, temperature: float, weights: str = "softmax_peak", unit: str = "input", cut: float = 0.0
    ) -> None:
        super().__init__(temperature=temperature, weights=weights, unit=unit, cut=cut)
        self.weights = weights
        self.unit = unit
        self.register_buffer("T", torch.tensor(temperature))
        self.register_buffer("cut", torch.tensor(cut))

    def forward(self, z_BF: Tensor) -> Tensor:
        competing_BF = z_BF > (0 if self.weights == "softmax_active_only" else -torch.inf)
        z_BF = z_BF.float().relu()
        active_B1 = (z_BF > 0).sum(-1, keepdim=True)
        unit_B1 = z_BF.new_ones(())
        if self.unit == "rms_z":
            unit_B1 = (z_BF.detach().square().sum(-1, keepdim=True) / active_B1.clamp_min(1)).sqrt().clamp_min(1e-12)
        weight_BF = ((z_BF - z_BF.amax(-1, keepdim=True)) / (self.T * unit_B1)).exp() * competing_BF
        if self.weights != "softmax_peak":
            weight_BF = weight_BF / weight_BF.sum(-1, keepdim=True).clamp_min(1e-12)
        if self.weights == "softmax_scaled":
            weight_BF = active_B1 * weight_BF
        alpha_BF = weight_BF * z_BF
        return alpha_BF * (alpha_BF > self.cut * unit_B1)

    def rescale_(self, factor: float) -> None:
        if self.unit == "input":
            self.T.mul_(factor)
            self.cut.mul_(factor)


class CompetitionTemperature(Mechanism):
    """T follows rho: T <- 0.99 T + 0.01 clamp(T_base (1 + sign (exp(exp(rho) - 1) - 1) s), low, high) (6).

    Paper: by (6), more use raises T and weakens competition, which contradicts the paper's text; `sign` = -1 reverses
    this. For rho in [0, 1], T is in [0.1, 0.237], so the bounds of T never apply.

    `acted_tempered` sums |T - T'| over the steps. `acted_competed` sums the share of the latents' values that the
    competition changes, sum |z - alpha| / sum z, over the first tokens of each batch.
    """

    acted_tempered: Tensor  # () float32
    acted_competed: Tensor  # () float32

    def __init__(
        self,
        competition: SoftCompetition,
        utilization: EnabledUtilization,
        base: Coefficient,
        s: float = 0.3,
        sign: int = 1,
        low: float = 0.05,
        high: float = 0.3,
        momentum: float = 0.99,
    ) -> None:
        super().__init__()
        self.competition, self.base, self.s, self.sign = competition, base, s, sign
        self.use = utilization  # the name is a key in checkpoints
        self.low, self.high, self.momentum = low, high, momentum
        for name in ("acted_tempered", "acted_competed"):
            self.register_buffer(name, torch.zeros(()))

    def target(self, rho: Tensor, base: Tensor | float) -> Tensor:
        """T by (6), before momentum is applied."""
        return (base * (1 + self.sign * (torch.exp(torch.exp(rho) - 1) - 1) * self.s)).clamp(self.low, self.high)

    def after_step(self, step: Step) -> None:
        z_BF = self.use.enabled(step.pre_BF.detach()[:COUNTED_TOKENS])
        moved = (z_BF.relu() - self.competition(z_BF)).abs().sum() / z_BF.relu().sum().clamp_min(1e-12)
        self.acted_competed.add_(moved)
        T = self.competition.T
        before = T.clone()
        T.lerp_(self.target(self.use.rho, self.base(step)), 1 - self.momentum)
        self.acted_tempered.add_((T - before).abs())

    def scalars(self) -> dict[str, Tensor]:
        return {"T": self.competition.T, "tempered": self.acted_tempered, "competed": self.acted_competed}
