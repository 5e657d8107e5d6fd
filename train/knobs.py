"""What makes runs comparable: a paper's constants at other widths and in other units, and one L0 for every recipe."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .coefficients import Coefficient
from .step import Mechanism, Step

if TYPE_CHECKING:
    from .recipe import Setting, Variant

WIDTH = 2304  # Gemma-2-2B's, at which the papers count
VARIANCE = 24.0
"""Of an element of raw activations at layer 19 of Gemma-2-2B, by the papers' MSE and explained variance.

Those give 27.1, as 2.66 / (1 - 0.902) of paper 004; but the MSE is SAEBench's, about 1.13 times the elementwise one.
"""


class Scaled:
    """The default of an option that a paper gives where d_in is 2304 or the variance 24: a number, and its rule.

    The recipe is built with the number `at` its own setting; `--literal` and `--set` give raw ones.
    """

    of = "d_in"  # what the number is in proportion to
    reference: float = WIDTH

    def at(self, run: "Setting", raw: bool) -> Any:
        """The number of this run; `raw`: its input is not normalised."""
        raise NotImplementedError

    def measured(self, run: "Setting") -> float:
        """What `of` is in this run."""
        return float(getattr(run, self.of))

    def __str__(self) -> str:
        return f"{self:g} at {self.of} {self.reference:g}"


class AtWidth(Scaled, int):
    """A count: the same share of d_in, rounded, and 1 at least."""

    def at(self, run: "Setting", raw: bool) -> int:
        return max(1, round(self * run.d_in / WIDTH))


class AtDictionary(Scaled, float):
    """A pace of latents: the same share of d_sae."""

    of = "d_sae"

    def at(self, run: "Setting", raw: bool) -> float:
        return self * run.d_sae / WIDTH


class AtVariance(Scaled, float):
    """A squared error of raw activations: the same share of their variance."""

    of = "variance"
    reference = VARIANCE

    def at(self, run: "Setting", raw: bool) -> float:
        return self * self.measured(run) / VARIANCE

    def measured(self, run: "Setting") -> float:
        return VARIANCE if run.variance is None else run.variance


class AtScale(AtVariance):
    """A length: in proportion to raw activations where the input is raw, and as it is where the input has |x|^2 = 1."""

    def at(self, run: "Setting", raw: bool) -> float:
        return self * (self.measured(run) / VARIANCE) ** 0.5 if raw else float(self)


def scaled(options: dict[str, Any], run: "Setting", raw: bool) -> tuple[dict[str, Any], list[str]]:
    """The options with their numbers at this run, and a sentence for each that differs."""
    values, notes = dict(options), []
    for name, paper in options.items():
        if isinstance(paper, Scaled):
            plain = int(paper) if isinstance(paper, int) else float(paper)  # type: ignore[arg-type]
            values[name] = here = plain if run.literal else paper.at(run, raw)
            if isinstance(paper, AtVariance) and run.variance is None and not run.literal:
                notes.append(f"{name} {paper}, and left so: the variance of these rows is not known")
            if here != plain:
                notes.append(f"{name} {paper} -> {here:.3g} at {paper.measured(run):.4g}")
    return values, notes


class HoldL0(Mechanism):
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

    def after(self, step: Step) -> None:
        for name in self.own:
            getattr(self, f"start_{name}").copy_(self.start(name, step))
        self.l0.copy_(torch.where(step.i == 0, step.l0, self.l0.lerp(step.l0, 0.2)))
        self.earlier.copy_(torch.where(step.i == 0, step.l0, self.earlier.lerp(step.l0, 0.05)))
        moved = self.integral + torch.where(step.i < self.begin, 0.0, self.rate * self.error())
        self.integral.copy_(moved.clamp(-12, 12))

    def scalars(self) -> dict[str, Tensor]:
        return {"l0_coefficient": (self.integral + self.gain * self.error()).exp()}


def hold_l0(variant: "Variant", target: float, steps: int) -> bool:
    """Let HoldL0 have the sparsity terms of a variant, unless its activation keeps k; False where nothing sets its L0.

    A term counts whose `sparsity` is true. Where an activation keeps k latents a penalty beside it stays as it is.
    """
    if any(hasattr(link, "k") for link in variant.sae.activation):
        return True
    names = [name for name, term in variant.terms.items() if term.sparsity]
    if names:
        hold = HoldL0(target, steps // 20)
        for name in names:
            variant.coefficients[name] = hold.take(name, variant.coefficients[name])
        variant.mechanisms.insert(0, hold)
    return bool(names)
