"""The controller behind `--l0`: it moves the sparsity coefficients until L0 reaches the target."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .schedules import Coefficient
from .step import Mechanism, Step

if TYPE_CHECKING:
    from .variant import Variant


class L0Controller(Mechanism):
    """`--l0`: the coefficients of the sparsity terms move so that L0 is `target` when the run ends.

        c_t = c_w exp(s_t + gain e_t),     s_t <- s_t + rate e_t,     e = log(L0/target) + log(L0/L0_earlier)

    c_w is the recipe's own coefficient at step w, a twentieth of the run: until then its own warm-up acts. What the
    recipe would do with it afterwards no longer counts: a penalty that falls to zero has no final L0 of its own.

    Weights follow a coefficient at the optimizer's rate only, so a sum of errors alone would swing. And while L0 falls
    from the half of all latents with which a run starts, no penalty is needed to make it fall: pushed on, it passes the
    target and latents die for good. Hence e counts the fall, and lies within [-1, 1/2]: quicker to let go than to push.
    """

    integral: Tensor  # (), s
    l0: Tensor  # (), lately: an average over five steps
    earlier: Tensor  # (), one over twenty

    def __init__(self, target: float, begin: int, gain: float = 2.0, rate: float = 0.04) -> None:
        super().__init__()
        self.target, self.begin, self.gain, self.rate = target, begin, gain, rate
        self.own: dict[str, Coefficient] = {}
        self.register_buffer("integral", torch.zeros(()))
        self.register_buffer("l0", torch.tensor(float(target)))
        self.register_buffer("earlier", torch.tensor(float(target)))

    def take(self, name: str, own: Coefficient) -> Coefficient:
        """The coefficient of a term in place of its own."""
        self.own[name] = own
        self.register_buffer(f"start_{name}", torch.zeros(()))
        return lambda step: self.start(name, step) * self.factor(step)

    def start(self, name: str, step: Step) -> Tensor:
        """c_t until step w, then c_w; a penalty of zero could not be scaled."""
        return torch.where(step.i <= self.begin, self.own[name](step), getattr(self, f"start_{name}").clamp_min(1e-6))

    def error(self) -> Tensor:
        now, earlier = self.l0.clamp_min(1e-3), self.earlier.clamp_min(1e-3)
        return ((now / self.target).log() + (now / earlier).log()).clamp(-1, 0.5)

    def factor(self, step: Step) -> Tensor:
        return torch.where(step.i <= self.begin, 1.0, (self.integral + self.gain * self.error()).exp())

    def after_step(self, step: Step) -> None:
        for name in self.own:
            getattr(self, f"start_{name}").copy_(self.start(name, step))
        self.l0.copy_(torch.where(step.i == 0, step.l0, self.l0.lerp(step.l0, 0.2)))
        self.earlier.copy_(torch.where(step.i == 0, step.l0, self.earlier.lerp(step.l0, 0.05)))
        moved = self.integral + torch.where(step.i < self.begin, 0.0, self.rate * self.error())
        self.integral.copy_(moved.clamp(-12, 12))

    def scalars(self) -> dict[str, Tensor]:
        return {"l0_coefficient": (self.integral + self.gain * self.error()).exp()}


def control_l0(variant: "Variant", target: float, steps: int) -> bool:
    """Let HoldL0 have the sparsity terms of a variant, unless its activation keeps k; False where nothing sets its L0.

    A term counts whose `sparsity` is true. Where an activation keeps k latents a penalty beside it stays as it is.
    """
    if any(hasattr(link, "k") for link in variant.sae.activation):
        return True
    names = [name for name, term in variant.terms.items() if term.sparsity]
    if names:
        hold = L0Controller(target, steps // 20)
        for name in names:
            variant.coefficients[name] = hold.take(name, variant.coefficients[name])
        variant.mechanisms.insert(0, hold)
    return bool(names)
