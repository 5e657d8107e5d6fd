"""The optimizer settings that every recipe accepts: AdamW, its learning rate schedule, and the scale of the input."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ..common.learning_rate import peak_share

# option -> (another option, the values of this other option with which `option` has no effect)
SwitchedOff = Mapping[str, tuple[str, tuple[Any, ...]]]
ANY_NUMBER = ("a number",)  # stands for any number as the value of an option that can also be None
SWITCHED_OFF: SwitchedOff = {name: ("weight_decay", (0,)) for name in ("weight_decay_on", "weight_decay_form")}
CENTERING = ("standardize", "layer_norm")  # values of `normalize` with which `center` has no effect


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
    """Strength of the weight decay."""
    weight_decay_on: Literal["encoder", "all"] = "encoder"
    """encoder: W_enc only, since unit-norm rows of W_dec would only be renormalized. all: every parameter."""
    weight_decay_form: Literal["decoupled", "coupled"] = "decoupled"
    """decoupled: weights shrink by lr times the decay, as in AdamW. coupled: decay adds to the gradient, as in Adam."""
    warmup: int | None = None
    """Steps over which the learning rate rises from zero. None: 1000, or a tenth of the run if that is less."""
    decay_start: float = 0.8
    """Share of the run after which the learning rate falls linearly to zero."""
    clip: float | None = 1.0
    """Limit of the global gradient norm, after the decoder's projection. None: off."""
    normalize: Literal["unit_ms", "standardize", "layer_norm", "none"] = "unit_ms"
    """unit_ms: divide the input by sqrt(E|x|^2), from the cache's manifest. standardize: subtract the mean and divide
    by the standard deviation of each dimension, both computed from the first 10,000 rows that training reads.
    layer_norm: subtract each token's own mean over d_in and divide by its standard deviation, so that |x|^2 = d_in - 1;
    the saved SAE does the same. none: raw input."""
    center: bool = False
    """Also subtract the cache's mean row from the input."""
    b_dec_init: Literal["mean", "zero"] = "mean"
    """Initial b_dec. mean: the cache's mean row, normalized like the input (for layer_norm, approximately)."""

    def warmup_steps(self, steps: int) -> int:
        return min(1000, steps // 10) if self.warmup is None else self.warmup

    def lr_at(self, i: Tensor, steps: int) -> Tensor:
        """The learning rate of step i: lr min(1, (i+1)/w), falling linearly to 0 after `decay_start`."""
        up = ((i + 1) / max(self.warmup_steps(steps), 1)).clamp(max=1.0)
        down = ((steps - i) / max(steps * (1 - self.decay_start), 1)).clamp(max=1.0)
        return self.lr * up * down

    def peak_share(self, steps: int) -> float:
        """The largest learning rate in a run of `steps` steps, as a share of `lr`.

        The share is below 1 if the warm-up is longer than the run.
        """
        return peak_share(steps, self.warmup_steps(steps), self.decay_start)

    def notes(self, steps: int) -> Iterator[str]:
        """One sentence for each option whose effect the user should know."""
        warmup = self.warmup_steps(steps)
        if warmup > steps:
            yield (
                f"warmup={warmup} is longer than the run of {steps} steps: "
                f"the learning rate reaches {self.peak_share(steps):.0%} of {self.lr:g}"
            )

    def validation_errors(self, steps: int) -> Iterator[str]:
        """One sentence for each option that cannot work in a run of `steps` steps."""
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
        if self.warmup_steps(steps) < 0:
            yield f"warmup={self.warmup} is negative."
        if self.center and self.normalize in CENTERING:
            yield f"center=true has no effect with normalize={self.normalize}, which subtracts a mean: leave it out."
        if not 0 <= self.decay_start <= 1:
            yield f"decay_start={self.decay_start:g} is out of range: give a fraction of the run, 0 to 1."
