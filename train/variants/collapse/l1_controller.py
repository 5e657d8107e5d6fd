"""Paper 000, 4.2, second process: an L1 penalty that changes within bounds."""

import torch
from torch import Tensor

from ...schedules import ramp
from ...step import Mechanism, Step


class DynamicL1(Mechanism):
    """lambda(t), kept in bounds that move linearly from [0.02, 1.0] to [0.01, 0.5] (4.2).

    `mode` chooses the value to which the bounds are applied:
        l0_target    lambda <- lambda exp(kappa (L0/L0* - 1))
        recon_ratio  0.04 times the ratio of the error to the first error
        none         0.04

    `penalty_moved` counts the steps in which lambda was not 0.04. `penalty_bounded` counts the steps in which a bound
    changed lambda.

    Paper: 0.04 always lies within these bounds, so if lambda is 0.04 throughout (`none`), they have no effect on it.
    The paper does not say to which value the bounds apply.
    """

    acted_penalty_moved: Tensor  # () int64
    acted_penalty_bounded: Tensor  # () int64
    value: Tensor  # ()
    error: Tensor  # (), the recent mean squared error
    first_error: Tensor  # ()
    leaves_weights = True

    def __init__(
        self, start: float, steps: int, target: float, mode: str = "l0_target", kappa: float = 0.01, beta: float = 0.9
    ) -> None:
        super().__init__()
        self.start, self.steps, self.target, self.mode, self.kappa, self.beta = start, steps, target, mode, kappa, beta
        self.register_buffer("value", torch.tensor(start))
        self.register_buffer("error", torch.zeros(()))
        self.register_buffer("first_error", torch.zeros(()))
        for name in ("acted_penalty_moved", "acted_penalty_bounded"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    def clamp(self, value: Tensor, step: Step) -> Tensor:
        """`value`, limited to the bounds of this step."""
        share = ramp(step, self.steps)
        return value.clamp(min=0.02 - 0.01 * share, max=1.0 - 0.5 * share)

    def coefficient(self, step: Step) -> Tensor:
        """lambda(t), the coefficient of |f|_1."""
        value = step.metrics["lambda"] = self.clamp(self.value, step)
        return value

    def after_step(self, step: Step) -> None:
        used = self.clamp(self.value, step)
        bounded = used != self.value
        self.acted_penalty_moved.add_(used != self.start)
        if self.mode == "l0_target":
            wanted = self.value * torch.exp(self.kappa * (step.l0 / self.target - 1))
            self.value.copy_(self.clamp(wanted, step))
            bounded = bounded | (self.value != wanted)
        elif self.mode == "recon_ratio":
            error = step.error_BD.detach().square().sum(-1).mean()
            self.first_error.copy_(torch.where(step.i == 0, error, self.first_error))
            self.error.copy_(torch.where(step.i == 0, error, self.error.lerp(error, 1 - self.beta)))
            self.value.copy_(self.start * self.error / self.first_error.clamp_min(1e-12))
        self.acted_penalty_bounded.add_(bounded)

    def scalars(self) -> dict[str, Tensor]:
        return {"penalty_moved": self.acted_penalty_moved, "penalty_bounded": self.acted_penalty_bounded}
