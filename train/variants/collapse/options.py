"""The options of the eleven runs of paper 000. Each run adds its own options to the options of the run before."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ...options import RecipeOptions
from ...scaling import ScaleWithWidth
from ...variant import RunConfig

BUDGET_TOKENS = {"paper": 100_000, "matched": 10_000_000}


def fewest_groups(d_in: int, d_sae: int) -> int:
    """The smallest number of equally large groups such that the rows within each can be orthogonal.

    This number is 1 if d_sae is at most d_in.
    """
    return next(groups for groups in range(1, d_sae + 1) if d_sae % groups == 0 and d_sae // groups <= d_in)


@dataclass(frozen=True)
class BaselineOptions(RecipeOptions):
    """Run 0: ReLU latents, an L1 penalty, and the techniques that section 4.3 uses for stability."""

    l1: float = 0.04
    """Strength lambda of the L1 penalty (1)."""
    l1_warmup: int | None = None
    """Steps over which the L1 penalty rises from zero. None: a twentieth of the run."""
    pre_bias: bool = False
    """Subtract b_dec from the encoder's input. The paper's encoder sees x itself (3.1)."""
    units: Literal["field", "as_printed", "evidence"] = "field"
    """Units of the loss. field: input scaled to E|x|^2 = 1, error summed over d_in. as_printed: raw input, error
    summed. evidence: raw input, error averaged over d_in."""
    budget: Literal["paper", "matched"] | None = None
    """Require a number of tokens. paper: 100,000, with the paper's warm-up of 1000 steps and no decay. matched: 10
    million, as in the other papers. None: any number. `sae reproduce 000` sets both itself."""
    batch_norm: Literal["off", "pre"] = "off"
    """pre: batch normalization of the pre-activations (4.3). The paper does not say where it normalizes."""
    importance: Literal["off", "loss_ema", "groups"] = "off"
    """Importance sampling (4.3). groups: each step updates only some groups of latents, drawn with probabilities that
    follow their recent utilization; before run 7 there are 16 groups. loss_ema: weight each token by its error,
    relative to the recent mean error."""
    importance_share: float = 0.5
    """Share of the groups that `importance=groups` draws in each step. The paper states no value."""

    def sampled_groups(self) -> int:
        """The number of groups from which `importance=groups` draws.

        Before run 7, it is the paper's number, 16 (4.1).
        """
        return 16

    def group_count(self, config: RunConfig) -> int:
        """The number of groups within which rows are compared.

        Before run 7, it is the smallest number that allows orthogonal rows.
        """
        return fewest_groups(config.d_in, config.d_sae)

    def validation_errors(self, config: RunConfig) -> Iterator[str]:
        if self.budget is not None:
            tokens = BUDGET_TOKENS[self.budget]
            steps = tokens // config.batch_size
            if config.steps != steps:
                yield (
                    f"budget={self.budget} requires {tokens:,} tokens, which are {steps} steps of {config.batch_size}, "
                    f"but this run has {config.steps} steps: give --steps {steps}, or leave the budget out. The "
                    "paper's batch size is 125."
                )
        groups, d_sae = self.group_count(config), config.d_sae
        if groups < 1 or d_sae % groups or d_sae // groups < 2:
            yield (
                f"A dictionary of {d_sae} latents cannot be divided into {groups} equal groups of two or more: "
                "give a divisor with --set groups=..., or another --width."
            )
        if self.importance == "groups" and d_sae % self.sampled_groups():
            yield (
                f"importance=groups draws from {self.sampled_groups()} equal groups, but a dictionary of {d_sae} "
                "latents cannot be divided into so many: give another --width, or --set importance=off."
            )
        if not 0 < self.importance_share <= 1:
            yield f"invalid importance_share={self.importance_share:g}: expected a share above 0 and up to 1."


@dataclass(frozen=True)
class MonitorOptions(BaselineOptions):
    """Run 1: the projection and the average of utilization (4.1)."""

    jl_dim: int = ScaleWithWidth(128)
    """Dimensions of the Johnson-Lindenstrauss projection."""
    jl_on: Literal["decoder", "encoder", "activations"] = "decoder"
    """Vectors that are projected: rows of the decoder, directions of the encoder, or the latents of a token."""
    beta: float = 0.9
    """Decay per step of the average of the utilization u_i (2)."""

    def validation_errors(self, config: RunConfig) -> Iterator[str]:
        yield from super().validation_errors(config)
        if self.jl_dim <= 0:
            yield f"invalid jl_dim={self.jl_dim}: expected a positive number of dimensions."


@dataclass(frozen=True)
class ContrastOptions(MonitorOptions):
    """Run 2: the contrast loss (4), and the way in which it and the losses of later runs enter the total loss (5)."""

    alpha: float = 0.1
    """Strength of the contrast loss (1). The paper states no value."""
    alpha_warmup: int | None = None
    """Steps over which the contrast loss, and the losses that later runs add, rise from zero. None: 1000, or a tenth of
    the run if that is less."""
    contrast_cos: Literal["exact_group", "exact", "jl"] = "exact_group"
    """Pairs whose cosine is penalized: pairs within a group, all pairs, or all pairs after the projection."""
    contrast_on: Literal["decoder", "activations"] = "decoder"
    """Vectors that are compared for two latents: their decoder rows, or their activations over the batch (the paper,
    where f denotes activations)."""
    tau_max: float = 0.4
    """|cos| above which a pair is pushed apart, at the first step (4)."""
    tau_min: float = 0.05
    """|cos| above which a pair is pushed apart, at the last step (4)."""
    contrast_power: float = 1.0
    """Exponent of the excess |cos| - tau: 1 is linear, 2 squared."""
    loss_units: Literal["fvu", "raw"] = "fvu"
    """Units of the contrast loss and of the losses that later runs add. fvu: fractions of the input's variance, so that
    the same strengths suit any input. raw: as printed."""
    gradient_balance: float | None = None
    """Largest gradient norm of the contrast loss, and of each loss that later runs add, as a multiple of the
    gradient norm of the reconstruction loss (4.3). None: no limit."""

    def validation_errors(self, config: RunConfig) -> Iterator[str]:
        yield from super().validation_errors(config)
        if self.contrast_power <= 0:
            yield f"invalid contrast_power={self.contrast_power:g}: expected a positive exponent."
        if self.contrast_cos == "jl" and self.contrast_on == "activations":
            yield (
                "contrast_cos=jl compares projected rows, but contrast_on=activations compares latents over the batch: "
                "give contrast_cos=exact or exact_group."
            )
        elif self.contrast_cos == "jl" and self.jl_on == "activations":
            yield (
                "contrast_cos=jl compares projected rows, but jl_on=activations projects no rows: "
                "give jl_on=decoder or encoder."
            )


@dataclass(frozen=True)
class DynamicL1Options(ContrastOptions):
    """Run 3: lambda changes within bounds (4.2)."""

    l1_controller: Literal["l0_target", "recon_ratio", "none"] = "l0_target"
    """Quantity that changes lambda within its bounds: the distance of L0 from `l0`, the reconstruction error relative
    to the error of the first step, or nothing (the paper), in which case the bounds have no effect."""
    l0: float | None = None
    """Target of `l1_controller=l0_target`, in latents per token. None: 40, or an eighth of d_sae if that is less."""
    kappa: float = 0.01
    """Rate of `l1_controller=l0_target`: lambda is multiplied by exp(kappa (L0/l0 - 1)) per step."""

    def validation_errors(self, config: RunConfig) -> Iterator[str]:
        yield from super().validation_errors(config)
        if self.l0 is not None and not 0 < self.l0 <= config.d_sae:
            yield f"invalid l0={self.l0:g}: expected latents per token above 0 and at most {config.d_sae}."


@dataclass(frozen=True)
class DiversityOptions(DynamicL1Options):
    """Run 4: the diversity loss (6)."""

    diversity_strength: float = 0.01
    """Strength of the diversity loss, which the paper names but does not define."""


@dataclass(frozen=True)
class OrthogonalityLossOptions(DiversityOptions):
    """Run 5: L_orth (5)."""

    beta_orth: float = 0.01
    """Strength beta of the orthogonality loss (5). The paper states no value."""
    orth_on: Literal["decoder", "activations"] = "decoder"
    """Vectors that should be orthogonal: decoder rows, or the latents of a group over the batch (the paper)."""


@dataclass(frozen=True)
class GramSchmidtOptions(OrthogonalityLossOptions):
    """Run 6: Gram-Schmidt in the forward pass (3)."""

    gs_axis: Literal["decoder_group", "jl", "activation_batch"] = "decoder_group"
    """Vectors that (3) makes orthogonal. decoder_group: the rows of W_dec in a group. jl: these rows, but with the
    inner products of their projections. activation_batch: the latents, each as a column over the batch (the paper)."""
    gs_order: Literal["index", "utilisation"] = "index"
    """Order in which (3) processes the latents of a group; the first latent keeps its direction. utilisation: the most
    used latents first."""
    gs_gradient: Literal["straight_through", "through"] = "straight_through"
    """straight_through: the gradient of an orthogonal row is passed to the row from which it was computed. through:
    differentiate (3)."""


@dataclass(frozen=True)
class GroupOptions(GramSchmidtOptions):
    """Run 7: groups of latents (4.1)."""

    groups: int = 16
    """Number of equal groups of contiguous latents. Rows are random at first, so any other division is equivalent."""
    group_stat: Literal["mean", "max"] = "mean"
    """Utilization of a group: the mean or the maximum of its latents' utilization (2)."""

    def sampled_groups(self) -> int:
        return self.groups

    def group_count(self, config: RunConfig) -> int:
        return self.groups


@dataclass(frozen=True)
class GroupRateOptions(GroupOptions):
    """Run 8: a learning rate for each group (2)."""

    group_lr: Literal["softmax_mean1", "softmax", "softmax_temp", "inverse"] = "softmax_mean1"
    """Learning rate of a group, relative to the run's. softmax: the softmax of utilization over groups (the paper).
    softmax_mean1: that softmax times the number of groups. softmax_temp: like softmax_mean1, with utilization divided
    by its standard deviation. inverse: like softmax_temp, but the least used groups get the highest rates."""


@dataclass(frozen=True)
class WinnerTakeAllOptions(GroupRateOptions):
    """Run 9: winner-take-all with local inhibition (4.2)."""

    wta_share: float = 0.1
    """Share of each group's latents that stay active per token, rounded up. `--l0` raises the share if necessary."""
    wta_scope: Literal["group", "global"] = "group"
    """Where latents compete: within each group, or in the whole dictionary."""
    inhibition: Literal["subtractive", "divisive", "off"] = "subtractive"
    """How the strongest neighbor weakens a latent: by subtraction, by division, or not at all."""
    gamma: float = 0.25
    """Strength of the inhibition."""
    neighbours: int = 8
    """Number of neighbors of each latent; at most the size of its group minus one."""
    near: Literal["encoder", "decoder"] = "encoder"
    """Vectors whose angles determine which latents are neighbors: directions of the encoder or rows of the decoder."""
    near_scope: Literal["group", "dictionary"] = "group"
    """Where the neighbors of a latent are searched: in its group, or in the whole dictionary. Starting with run 6, the
    rows of a group are orthogonal, so a latent has no near neighbors there."""

    def validation_errors(self, config: RunConfig) -> Iterator[str]:
        yield from super().validation_errors(config)
        if self.neighbours <= 0:
            yield f"invalid neighbours={self.neighbours}: expected a positive number."
        if not 0 < self.wta_share <= 1:
            yield f"invalid wta_share={self.wta_share:g}: expected a share of the latents, above 0 and at most 1."
        if self.gamma < 0:
            yield f"invalid gamma={self.gamma:g}: expected 0 or more."


@dataclass(frozen=True)
class HardOrthogonalityOptions(WinnerTakeAllOptions):
    """Run 10: rows are made orthonormal after the updates (6)."""

    hard_every: int = 1
    """Number of steps from one projection onto orthonormal rows to the next."""

    def validation_errors(self, config: RunConfig) -> Iterator[str]:
        yield from super().validation_errors(config)
        if self.hard_every <= 0:
            yield f"invalid hard_every={self.hard_every}: expected a positive number of steps."
