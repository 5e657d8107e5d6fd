"""A variant: an SAE with its losses, schedules, mechanisms and optimizer settings, ready to train."""

from collections.abc import Hashable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..common.errors import UsageError
from ..common.precision import recorded_precision
from .activation_functions import Activation
from .dense_ops import dtype_of_products
from .kernels.batch_operators import normalize_batch
from .kernels.update_layout import LONGEST_ROW
from .layer_norm import layer_normalize
from .mechanisms import DeadLatents, UnitNormDecoder
from .optimization import Optimization
from .sae import SAE
from .schedules import Coefficient, constant
from .step import LossTerm, Mechanism, Step

SIZES = ("d_in", "d_sae", "steps", "batch_size")  # the fields of RunConfig that every run.json records


class RunConfig(NamedTuple):
    """Everything that a recipe needs to know about the run it is built for."""

    d_in: int
    d_sae: int
    steps: int
    batch_size: int
    l0: float | None = None  # target latents per token (`--l0`); None: the recipe's default
    paper_exact: bool = False  # the paper's settings verbatim, without corrections
    variance: float | None = None  # elementwise variance of the cache's rows; None: unknown, so nothing is scaled by it
    accumulate: int = 1  # equal parts in which a batch is computed
    precision: str | None = None  # for matrix products (common/precision.py); None: the default of the device

    def identity(self) -> dict[str, Any]:
        """Everything except the cache that determines the result, as in run.json. Unset entries are omitted."""
        parts = self.accumulate if self.accumulate > 1 else None
        precision = self.precision if self.precision != "float32" else None
        optional = {"l0": self.l0, "literal": self.paper_exact, "accumulate": parts, "precision": precision}
        return {name: getattr(self, name) for name in SIZES} | {
            name: value for name, value in optional.items() if value
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any], variance: float | None) -> "RunConfig":
        """The config that a run.json records."""
        sizes = {name: record[name] for name in SIZES}
        changes = record.get("accumulate_since") or [(0, record.get("accumulate", 1))]
        optional = {"l0": record.get("l0"), "paper_exact": record.get("literal", False), "accumulate": changes[-1][1]}
        return cls(**sizes, **optional, precision=recorded_precision(record), variance=variance)

    def penalty_warmup(self, steps: int | None) -> int:
        """The steps over which a penalty grows: `steps`, or by default a twentieth of the run."""
        return self.steps // 20 if steps is None else steps

    @property
    def dead_after_tokens(self) -> int:
        """A latent is dead if it has not fired for this many tokens: ten million, or a tenth of the run if less."""
        return min(10_000_000, max(self.steps * self.batch_size // 10, self.batch_size))


class Mechanisms(nn.ModuleList):
    """Mechanisms, in the order in which they run."""

    def __iter__(self) -> Iterator[Mechanism]:
        return super().__iter__()  # type: ignore[return-value]


class Variant(nn.Module):
    """Everything that belongs to one SAE in training: `.to()` moves all of it, and a checkpoint contains all of it.

    Args:
        sae: the SAE.
        terms: name -> coefficient and loss term; the loss is the sum of their products.
        mechanisms: called after `dead`, in this order, before and after each optimizer step.
        optimization: options of the optimizer; None: the defaults.
        dead: counts how long each latent has been inactive; the first mechanism of every variant.
    """

    mean_D: Tensor  # subtracted from raw activations
    scale: Tensor  # divides the centered activations; () or, with normalize=standardize, (d_in,)
    uses_kernels = False  # whether steps use any of the kernels of train/kernels
    updates_by_kernels = False  # whether a trainer updates the weights with kernels (train/kernel_update.py)

    def __init__(
        self,
        sae: SAE,
        terms: Mapping[str, tuple[Coefficient | float, LossTerm]],
        mechanisms: Iterable[Mechanism] = (),
        optimization: Optimization | None = None,
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
        self.optimization = optimization or Optimization()
        self.options: dict[str, Any] = {}  # the recipe's own options, as this variant was built
        self.changed: dict[str, tuple[Any, Any]] = {}  # if resumed: option -> (value here, value in a new run)
        self.notes: list[str] = []  # notes about the options, shown to the user
        self.register_buffer("mean_D", torch.zeros(sae.d_in))
        self.register_buffer("scale", torch.ones(()))

    def add_term(self, name: str, coefficient: Coefficient | float, term: LossTerm) -> None:
        self.terms[name] = term
        self.coefficients[name] = coefficient if callable(coefficient) else constant(coefficient)

    def configure(self, optimization: Optimization) -> None:
        """Set the options of the optimizer. Raises UsageError if the normalization cannot be folded into the SAE."""
        self.optimization = optimization
        if optimization.normalize == "standardize":
            if any(activation.sees_input for activation in self.sae.activation):
                raise UsageError(
                    "normalize=standardize cannot be folded into an SAE with a router: give unit_ms or none."
                )
            self.scale = torch.ones(self.sae.d_in)

    @property
    def reads_rows(self) -> bool:
        """Whether `set_normalization` needs rows."""
        return self.scale.dim() > 0 or any(mechanism.reads_rows for mechanism in self.mechanisms)

    def set_normalization(self, mean_D: Tensor, mean_square_norm: float, sample_ND: Tensor | None = None) -> None:
        """Set the normalization constants from the mean row and E|x|^2 of the cache. Checkpoints contain them.

        `sample_ND` contains the first raw rows of the run, on any device. `sample_ND` is needed if `reads_rows` is
        true: normalize=standardize uses the mean and standard deviation of these rows, and mechanisms with `reads_rows`
        are initialized from them. If `sample_ND` is None, this initialization is left out.
        """
        settings, square = self.optimization, mean_square_norm
        if settings.normalize == "standardize":
            assert sample_ND is not None
            sd_D, sample_mean_D = torch.std_mean(sample_ND.double(), 0, correction=0)
            self.mean_D.copy_(sample_mean_D)
            self.scale.copy_(torch.where(sd_D > 0, sd_D, 1))
        elif settings.center:
            self.mean_D.copy_(mean_D)
            square -= float(mean_D.square().sum())
        if settings.normalize == "unit_ms":
            self.scale.fill_(square**0.5)
        if settings.b_dec_init == "mean":
            start_D = (mean_D - self.mean_D) / self.scale
            if settings.normalize == "layer_norm":  # approximate: as if all tokens had the same deviation
                start_D = (mean_D - mean_D.mean()) / (mean_square_norm / len(mean_D)) ** 0.5
            self.sae.b_dec.data.copy_(start_D)
        for mechanism in self.mechanisms:
            if mechanism.reads_rows and sample_ND is not None:
                mechanism.start_from_rows(self.sae, self.normalize(sample_ND.to(self.mean_D.device)))

    def normalize(self, x_BD: Tensor) -> Tensor:
        """Normalize raw activations (B, d_in) as the SAE expects them in training. Returns float32."""
        if self.optimization.normalize == "layer_norm":
            return layer_normalize(x_BD.float()).x_BD
        return (x_BD.float() - self.mean_D).div_(self.scale)

    def forward(self, i: Tensor, x_BD: Tensor, optimizer: torch.optim.Optimizer) -> Step:
        """The forward pass of step i on raw activations (B, d_in)."""
        sae, centered_BD, variance = self.sae, None, None
        if sae.by_kernels and self.optimization.normalize != "layer_norm":
            bias_D = sae.b_dec.detach() if sae.pre_bias else None
            dtype = dtype_of_products(self.mean_D)
            x_BD, centered_BD, variance = normalize_batch(x_BD, self.mean_D, self.scale, bias_D, dtype)
        else:
            x_BD = self.normalize(x_BD)
        done = sae.run(x_BD, centered_BD)
        recon_BD = None if done.recon_BD is None else done.recon_BD.float()
        step = Step(i, sae, optimizer, x_BD, done.pre_BF, done.f_BF, recon_BD, done.kept)
        step.squared_error, step.selected_N = done.squared_error, done.selected_N
        step.error_BD, step.variance = done.error_BD, variance
        step.values = done.values
        if "counts_F" in step.values:
            step.counts_F = step.values["counts_F"]
        return step

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Each loss term times its coefficient. Coefficients that change over the run are added to the metrics."""
        losses = {}
        for name, term in self.terms.items():
            coefficient = self.coefficients[name](step)
            if isinstance(coefficient, Tensor):
                step.metrics[f"{name}_coefficient"] = coefficient.detach()
            elif coefficient == 1:
                losses[name] = term(step)
                continue
            losses[name] = coefficient * term(step)
        return losses

    @property
    def with_kernels(self) -> list[Activation]:
        """The activations that can use the kernels of train/kernels."""
        return [module for module in self.modules() if isinstance(module, Activation) and module.has_kernels]

    @property
    def updates_at_once(self) -> bool:
        """Whether the kernels can project the gradient, update all weights and normalize them in one pass.

        No other mechanism may act on the weights just before or after the update (`Mechanism.leaves_weights`).
        """
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        return (
            all(mechanism.leaves_weights or type(mechanism) is UnitNormDecoder for mechanism in self.mechanisms)
            and all(weight.dtype == torch.float32 and weight.is_contiguous() for weight in weights)
            and self.sae.d_in <= LONGEST_ROW
        )

    @property
    def normalizes_at_once(self) -> bool:
        """Whether the kernels that update the weights also keep the rows of W_dec on the unit sphere."""
        return any(isinstance(mechanism, UnitNormDecoder) and mechanism.by_kernels for mechanism in self.mechanisms)

    def use_kernels(self) -> None:
        """Let steps use the kernels of train/kernels where possible; on a CPU, torch computes the same result."""
        self.uses_kernels = self.sae.by_kernels = True
        for activation in self.with_kernels:
            activation.by_kernels = True
        for mechanism in self.mechanisms:
            mechanism.by_kernels = mechanism.has_kernels
        if self.updates_at_once:
            self.updates_by_kernels = True
            for mechanism in self.mechanisms:
                if isinstance(mechanism, UnitNormDecoder):
                    mechanism.by_kernels = True

    def shape_key(self) -> Hashable:
        """A key that changes when a mechanism changes the shapes in a step (`Mechanism.shape_key`)."""
        return tuple(mechanism.shape_key() for mechanism in self.mechanisms)

    def scalars(self) -> dict[str, Tensor]:
        return {name: value for mechanism in self.mechanisms for name, value in mechanism.scalars().items()}
