"""A variant: an SAE with its losses, schedules, mechanisms and optimizer settings, ready to train."""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from .mechanisms import DeadLatents
from .sae import SAE
from .schedules import Coefficient, constant
from .step import LossTerm, Mechanism, Step

SIZES = ("d_in", "d_sae", "steps", "batch_size")  # the fields of RunConfig that every run.json records


class RunConfig(NamedTuple):
    """What a recipe has to know about the run that it is built for."""

    d_in: int
    d_sae: int
    steps: int
    batch_size: int
    l0: float | None = None  # target latents per token (`--l0`); None: the recipe's default
    paper_exact: bool = False  # the paper's settings verbatim instead of those that work
    variance: float | None = None  # elementwise, of the cache's rows; None: unknown, so nothing is scaled by it

    def identity(self) -> dict[str, Any]:
        """What decides the result, besides the cache, as in run.json: l0 and literal only where they are set."""
        optional = {"l0": self.l0, "literal": self.paper_exact}
        return {name: getattr(self, name) for name in SIZES} | {
            name: value for name, value in optional.items() if value
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any], variance: float | None) -> "RunConfig":
        """The config that a run.json records."""
        sizes = {name: record[name] for name in SIZES}
        return cls(**sizes, l0=record.get("l0"), paper_exact=record.get("literal", False), variance=variance)

    def penalty_warmup(self, steps: int | None) -> int:
        """The steps over which a penalty grows: `steps`, or by default a twentieth of the run."""
        return self.steps // 20 if steps is None else steps

    @property
    def dead_after_tokens(self) -> int:
        """A latent is dead if it has not fired for this many tokens: ten million, or a tenth of a shorter run."""
        return min(10_000_000, max(self.steps * self.batch_size // 10, self.batch_size))


@dataclass(frozen=True)
class Optimization:
    """AdamW, its learning rate over the run, and the normalization of the input. These are options of every recipe."""

    lr: float = 3e-4
    """Learning rate at its peak."""
    beta1: float = 0.9
    """Adam's decay of the first moment."""
    beta2: float = 0.999
    """Adam's decay of the second moment."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on W_enc alone: unit rows of W_dec would only be renormalized."""
    warmup: int | None = None
    """Steps over which the learning rate rises from zero. None: 1000, or a tenth of a shorter run."""
    decay_start: float = 0.8
    """Share of the run after which the learning rate falls linearly to zero."""
    clip: float | None = 1.0
    """Limit of the global gradient norm, after the decoder's projection. None: off."""
    normalize: Literal["unit_ms", "none"] = "unit_ms"
    """unit_ms: divide the input by sqrt(E|x|^2), from the cache's manifest. none: raw input."""
    center: bool = False
    """Also subtract the cache's mean row from the input."""
    b_dec_init: Literal["mean", "zero"] = "mean"
    """Initial b_dec: the cache's mean row, or zero."""

    def warmup_steps(self, steps: int) -> int:
        return min(1000, steps // 10) if self.warmup is None else self.warmup

    def lr_at(self, i: Tensor, steps: int) -> Tensor:
        """The learning rate of step i: lr min(1, (i+1)/w), then linearly to 0 from `decay_start` on."""
        up = ((i + 1) / max(self.warmup_steps(steps), 1)).clamp(max=1.0)
        down = ((steps - i) / max(steps * (1 - self.decay_start), 1)).clamp(max=1.0)
        return self.lr * up * down

    def validation_errors(self, steps: int) -> Iterator[str]:
        """One sentence for each option that cannot work in a run of so many steps."""
        if not self.lr > 0:
            yield f"lr={self.lr:g} is not positive."
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{name}={getattr(self, name):g} is out of range: give 0 up to, but not including, 1."
        for name in ("eps", "weight_decay"):
            if getattr(self, name) < 0:
                yield f"{name}={getattr(self, name):g} is negative."
        if self.clip is not None and not self.clip > 0:
            yield f"clip={self.clip:g} would zero every gradient: give a positive norm, or none."
        if not 0 <= self.warmup_steps(steps) <= steps:
            yield f"warmup={self.warmup} is negative or longer than the run of {steps} steps."
        if not 0 <= self.decay_start <= 1:
            yield f"decay_start={self.decay_start:g} is out of range: give a fraction of the run, 0 to 1."


class Mechanisms(nn.ModuleList):
    """Mechanisms, in the order in which they run."""

    def __iter__(self) -> Iterator[Mechanism]:
        return super().__iter__()  # type: ignore[return-value]


class Variant(nn.Module):
    """Everything about one SAE that is trained: `.to()` moves all of it, and a checkpoint holds all of it.

    Args:
        sae: the SAE.
        terms: name -> coefficient and loss term; the loss is the sum of their products.
        mechanisms: what acts around the optimizer, in order, after `dead`.
        optimization: options of the optimizer.
        dead: counts how long each latent has been inactive; the first mechanism of every variant.
    """

    mean_D: Tensor  # subtracted from raw activations
    scale: Tensor  # (), by which they are divided then

    def __init__(
        self,
        sae: SAE,
        terms: Mapping[str, tuple[Coefficient | float, LossTerm]],
        mechanisms: Iterable[Mechanism] = (),
        optimization: Optimization = Optimization(),
        *,
        dead: DeadLatents,
    ) -> None:
        super().__init__()
        self.sae = sae
        self.terms = cast("MutableMapping[str, LossTerm]", nn.ModuleDict())
        self.coefficients: dict[str, Coefficient] = {}
        for name, (coefficient, term) in terms.items():
            self.add_term(name, coefficient, term)
        self.dead = dead
        self.mechanisms = Mechanisms([dead, *mechanisms])
        self.optimization = optimization
        self.options: dict[str, Any] = {}  # the recipe's own, with the values it was built with
        self.notes: list[str] = []  # what a reader of the run should know about them
        self.register_buffer("mean_D", torch.zeros(sae.d_in))
        self.register_buffer("scale", torch.ones(()))

    def add_term(self, name: str, coefficient: Coefficient | float, term: LossTerm) -> None:
        self.terms[name] = term
        self.coefficients[name] = coefficient if callable(coefficient) else constant(coefficient)

    def set_normalization(self, mean_D: Tensor, mean_square_norm: float) -> None:
        """Set the constants of normalization from the mean row and E|x|^2 of the cache. Checkpoints hold them."""
        settings, square = self.optimization, mean_square_norm
        if settings.center:
            self.mean_D.copy_(mean_D)
            square -= float(mean_D.square().sum())
        if settings.normalize == "unit_ms":
            self.scale.fill_(square**0.5)
        if settings.b_dec_init == "mean":
            self.sae.b_dec.data.copy_((mean_D - self.mean_D) / self.scale)

    def forward(self, i: Tensor, x_BD: Tensor, optimizer: torch.optim.Optimizer) -> Step:
        """The forward pass of step i on raw activations (B, d_in)."""
        x_BD = (x_BD.float() - self.mean_D) / self.scale
        pre_BF, f_BF, recon_BD, kept = self.sae(x_BD)
        return Step(i, self.sae, optimizer, x_BD, pre_BF, f_BF, recon_BD.float(), kept)

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Each loss term times its coefficient. Coefficients that change over the run are added to the metrics."""
        losses = {}
        for name, term in self.terms.items():
            coefficient = self.coefficients[name](step)
            if isinstance(coefficient, Tensor):
                step.metrics[f"{name}_coefficient"] = coefficient.detach()
            losses[name] = coefficient * term(step)
        return losses

    def scalars(self) -> dict[str, Tensor]:
        return {name: value for mechanism in self.mechanisms for name, value in mechanism.scalars().items()}
