"""The L0 controller behind `--l0`: it moves the sparsity coefficients until L0 reaches the target."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..common.l0_target import missed_l0
from .schedules import Coefficient
from .step import Mechanism, Step

if TYPE_CHECKING:
    from .variant import Variant


class L0Controller(Mechanism):
    """Moves the coefficients of the sparsity terms so that L0 is `target` when the run ends.

        c_t = c_w exp(s_t + gain e_t),     s_t <- s_t + rate e_t,     e = log(L0/target) + log(L0/L0_earlier)

    Step w is at one twentieth of the run, and c_w is the recipe's own coefficient at step w. Before step w, the
    recipe's warm-up applies. The recipe's schedule after step w is ignored, because a penalty that falls to zero does
    not determine a final L0.

    Weights respond to a coefficient only at the optimizer's rate, so a controller that only integrates the error
    would oscillate. Also, half of all latents are active at first, and L0 falls from there without any penalty. If a
    penalty pushes L0 down further, L0 overshoots the target and latents die for good. So e takes into account how fast
    L0 falls. e is limited to [-1, 1/2], so the penalty weakens faster than it strengthens.
    """

    integral: Tensor  # (), s in the equation above
    l0: Tensor  # (), a running mean of L0 over about five steps
    earlier: Tensor  # (), a running mean of L0 over about twenty steps
    leaves_weights = True

    def __init__(self, target: float, start_step: int, gain: float = 2.0, rate: float = 0.04) -> None:
        super().__init__()
        self.target, self.start_step, self.gain, self.rate = target, start_step, gain, rate
        self.recipe_coefficients: dict[str, Coefficient] = {}
        self.register_buffer("integral", torch.zeros(()))
        self.register_buffer("l0", torch.tensor(float(target)))
        self.register_buffer("earlier", torch.tensor(float(target)))

    def take_over(self, name: str, coefficient: Coefficient) -> Coefficient:
        """Control the coefficient of a term in place of the recipe. Returns c_t as a function of the step."""
        self.recipe_coefficients[name] = coefficient
        self.register_buffer(f"start_{name}", torch.zeros(()))
        return lambda step: self.start_coefficient(name, step) * self.factor(step)

    def start_coefficient(self, name: str, step: Step) -> Tensor:
        """The recipe's coefficient until step w, then c_w, which is at least 1e-6: zero could not be scaled up."""
        recipe_coefficient, at_start = self.recipe_coefficients[name](step), getattr(self, f"start_{name}")
        return torch.where(step.i <= self.start_step, recipe_coefficient, at_start.clamp_min(1e-6))

    def error(self) -> Tensor:
        """The error e."""
        now, earlier = self.l0.clamp_min(1e-3), self.earlier.clamp_min(1e-3)
        return ((now / self.target).log() + (now / earlier).log()).clamp(-1, 0.5)

    def factor(self, step: Step) -> Tensor:
        """c_t / c_w."""
        return torch.where(step.i <= self.start_step, 1.0, (self.integral + self.gain * self.error()).exp())

    def after_step(self, step: Step) -> None:
        for name in self.recipe_coefficients:
            getattr(self, f"start_{name}").copy_(self.start_coefficient(name, step))
        self.l0.copy_(torch.where(step.i == 0, step.l0, self.l0.lerp(step.l0, 0.2)))
        self.earlier.copy_(torch.where(step.i == 0, step.l0, self.earlier.lerp(step.l0, 0.05)))
        moved = self.integral + torch.where(step.i < self.start_step, 0.0, self.rate * self.error())
        self.integral.copy_(moved.clamp(-12, 12))

    def scalars(self) -> dict[str, Tensor]:
        return {"l0_coefficient": (self.integral + self.gain * self.error()).exp()}


def control_l0(variant: "Variant", target: float, steps: int) -> bool:
    """Let an L0Controller set the coefficients of a variant's sparsity terms (`LossTerm.sparsity`).

    Does nothing if the variant's activation keeps k latents: k sets L0, and any additional penalty stays unchanged.
    Returns False if nothing sets L0.
    """
    if any(hasattr(activation, "k") for activation in variant.sae.activation):
        return True
    names = [name for name, term in variant.terms.items() if term.sparsity]
    if names:
        controller = L0Controller(target, steps // 20)
        for name in names:
            variant.coefficients[name] = controller.take_over(name, variant.coefficients[name])
        variant.mechanisms.insert(0, controller)
    return bool(names)


def missed_targets(targets: Mapping[str, float | None], metrics: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A sentence for each run whose last L0 differs from its target by more than 10 %.

    Args:
        targets: run -> its L0 target, or None.
        metrics: run -> its last metrics.
    """
    return [
        sentence
        for name, target in targets.items()
        for sentence in missed_l0(name, metrics.get(name, {}).get("l0"), target)
    ]
