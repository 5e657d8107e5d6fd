"""Paper 000: a baseline and ten runs, each of which adds one mechanism to the previous run."""

import inspect
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ....common.errors import UsageError
from ...activation_functions import Activation, ReLU, activation_chain
from ...losses import L1, MSE
from ...mechanisms import DeadLatents, UnitNormDecoder
from ...optimization import Optimization
from ...recipe import recipe
from ...sae import SAE
from ...schedules import Coefficient, cosine, product, warmup
from ...step import LossTerm, Mechanism, Step
from ...variant import RunConfig, Variant
from . import options as o
from .batch_norm import BatchNorm, RunningStatistics
from .groups import DecoderRows, GroupLearningRate, GroupSampling, GroupUtilization, Neighbours, WinnerTakeAll
from .l1_controller import DynamicL1
from .losses import BalancedLoss, ContrastLoss, DiversityLoss, ImportanceWeightedMSE
from .monitors import RecentError, Sketch, Totals, UtilizationEMA
from .orthogonality import GramSchmidt, GramSchmidtLatents, GroupOrthogonalityLoss, HardOrthogonality, init_orthonormal

PAPER_EXACT = {
    "l1_warmup": (0, "the paper prints no warm-up; without one, L1 shrinks latents that have learned nothing yet"),
    "batch_norm": (
        "pre",
        "the paper does not say where; before the ReLU, half of all latents fire until L1 changes its shifts",
    ),
    "importance": ("groups", "the paper does not define it; in every step half of all latents are not updated"),
    "gradient_balance": (1.0, "the paper does not define it; each loss needs another backward pass"),
    "jl_on": ("activations", "the matrix has d_sae rows, so it projects the latents, and nothing uses the projection"),
    "contrast_on": ("activations", "latents that never fire together count as dissimilar, even with similar rows"),
    "contrast_cos": ("exact", "all pairs: there are no groups before run 7, and a projection mixes the latents"),
    "orth_on": ("activations", "as with `contrast_on`; and since run 6, (3) has made the latents orthogonal already"),
    "near_scope": ("dictionary", "a latent is inhibited by neighbors in other groups, with which it does not compete"),
    "l1_controller": ("none", "0.04 lies inside all printed bounds, so the bounds have no effect"),
    "gs_axis": (
        "activation_batch",
        "latents depend on their batch and are hardly ever 0; the paper has no rule for a single token",
    ),
    "group_lr": ("softmax", "the softmax is nearly equal for all 16 groups, so every rate is about lr/16"),
}
SWITCHED_OFF = {
    "importance_share": ("importance", ("off", "loss_ema")),
    "kappa": ("l1_controller", ("recon_ratio", "none")),
    "l0": ("l1_controller", ("recon_ratio", "none")),
    "gs_order": ("gs_axis", ("activation_batch",)),
    **{name: ("inhibition", ("off",)) for name in ("gamma", "neighbours", "near", "near_scope")},
}


class CollapseParts:
    """The parts of a variant, to which each run adds its own."""

    utilization: UtilizationEMA  # set by run 1 and later
    sketch: Sketch  # set by run 1 and later
    groups: GroupUtilization  # set by run 7 and later

    def __init__(self, config: RunConfig, options: o.BaselineOptions) -> None:
        self.config, self.options = config, options
        self.sae = SAE(config.d_in, config.d_sae, pre_bias=options.pre_bias)
        self.rows = DecoderRows(options.group_count(config))
        self.error_weight = 1 / config.d_in if options.units == "evidence" else 1.0
        self.activations: list[Activation] = []
        self.mechanisms: list[Mechanism] = []
        self.last_mechanisms: list[Mechanism] = []  # act after all others that change weights, but before the unit norm
        self.totals: list[Mechanism] = []  # come last: checkpoints name tensors by the mechanism's position
        self.losses: dict[str, tuple[Coefficient | float, LossTerm]] = {}

    def add_loss(
        self, name: str, strength: float, loss: LossTerm, options: o.ContrastOptions, note: str | None = None
    ) -> None:
        """Add a loss whose strength grows over `alpha_warmup`. The strength is logged as `note`."""
        coefficient = self.growing(strength, options, note)
        if options.gradient_balance is not None:
            loss = BalancedLoss(coefficient, loss, self.rows, self.error_weight, options.gradient_balance)
            self.losses[name] = (1.0, loss)
            if name == "contrast":  # the first of these losses
                self.totals.append(Totals(["losses_balanced"], lambda step: step.metrics))
        else:
            self.losses[name] = (coefficient, loss)

    def growing(self, strength: float, options: o.ContrastOptions, note: str | None) -> Coefficient:
        """`strength` after a linear warm-up, multiplied by the input's variance if `loss_units=fvu`."""
        steps = min(1000, self.config.steps // 10) if options.alpha_warmup is None else options.alpha_warmup
        ramp = warmup(strength, steps)

        def coefficient(step: Step) -> Tensor:
            value = torch.as_tensor(ramp(step))
            if note:
                step.metrics[note] = value
            if options.loss_units == "raw":
                return value
            centered_BD = step.whole.x_BD - step.whole.x_BD.mean(0)
            return value * self.error_weight * centered_BD.square().sum(-1).mean()

        return coefficient

    def variant(self) -> Variant:
        self.sae.activation = activation_chain(self.activations)
        return Variant(
            self.sae,
            self.losses,
            [*self.mechanisms, *self.last_mechanisms, *self.totals, UnitNormDecoder()],
            optimization(self.config, self.options),
            dead=DeadLatents(self.config.d_sae, self.config.dead_after_tokens),
        )


def optimization(config: RunConfig, options: o.BaselineOptions) -> Optimization:
    """The optimizer's settings; `budget=paper` also sets the paper's learning-rate schedule."""
    normalize: Literal["unit_ms", "none"] = "unit_ms" if options.units == "field" else "none"
    if options.budget != "paper":
        return Optimization(normalize=normalize)
    # Paper: warms up over 1000 steps. In a shorter run, the rate rises until the last step and does not reach its peak.
    return Optimization(normalize=normalize, warmup=1000, decay_start=1.0)


# The runs: each function adds the part of one run to the parts of the previous run.


def add_baseline(parts: CollapseParts, options: o.BaselineOptions) -> None:
    """Add ReLU latents and an L1 penalty.

    The batch norm and the importance sampling of 4.3 are options.
    """
    config = parts.config
    error: LossTerm = MSE()
    if options.batch_norm == "pre":
        # The dot products of a unit input with unit rows have a standard deviation of about d_in^-0.5.
        norm = BatchNorm(config.d_sae, config.d_in**-0.5 if options.units == "field" else 1.0)
        parts.activations.append(norm)
        parts.mechanisms.append(RunningStatistics(norm))
    parts.activations.append(ReLU())
    if options.importance == "loss_ema":
        recent = RecentError()
        parts.mechanisms.append(recent)
        error = ImportanceWeightedMSE(recent)
    if options.importance == "groups":
        count, beta = options.sampled_groups(), options.beta if isinstance(options, o.MonitorOptions) else 0.9
        share = options.importance_share
        parts.mechanisms.append(GroupSampling(parts.rows, config.d_sae, count, share, beta, config.steps))
    parts.losses["mse"] = (parts.error_weight, error)
    parts.losses["l1"] = (warmup(options.l1, config.penalty_warmup(options.l1_warmup)), L1())


def add_monitors(parts: CollapseParts, options: o.MonitorOptions) -> None:
    """Add monitors of row angles and utilization.

    The angles are those after a random projection of the rows.
    """
    config = parts.config
    parts.sketch = Sketch(config.d_in, config.d_sae, options.jl_dim, options.jl_on)
    parts.utilization = UtilizationEMA(config.d_sae, options.beta)
    parts.mechanisms += [parts.utilization, parts.sketch]


def add_contrast(parts: CollapseParts, options: o.ContrastOptions) -> None:
    """Add a contrast loss on nearly parallel rows."""
    tau = cosine(options.tau_max, options.tau_min, parts.config.steps)
    sketch = parts.sketch if options.contrast_cos == "jl" else None
    across_groups = options.contrast_cos != "exact_group"
    loss = ContrastLoss(parts.rows, tau, options.contrast_power, across_groups, sketch, options.contrast_on)
    parts.totals.append(Totals(["pairs_over_tau"], lambda step: step.metrics))
    parts.add_loss("contrast", options.alpha, loss, options, note="alpha")


def add_dynamic_l1(parts: CollapseParts, options: o.DynamicL1Options) -> None:
    """Add an L1 penalty of adaptive strength within bounds.

    Both bounds decrease during training.

    `--l0` does not use this controller, because this controller's bounds and kappa make L0 overshoot the target by far.
    With `--l0`, lambda is controlled as in every other recipe.
    """
    config = parts.config
    target = min(40.0, config.d_sae / 8) if options.l0 is None else options.l0
    controller = DynamicL1(options.l1, config.steps, target, options.l1_controller, options.kappa)
    parts.mechanisms.append(controller)
    growth = warmup(1.0, config.penalty_warmup(options.l1_warmup))
    parts.losses["l1"] = (product(growth, controller.coefficient), L1())


def add_diversity(parts: CollapseParts, options: o.DiversityOptions) -> None:
    """Add a loss that penalizes unequal use of the latents."""
    groups = options.groups if isinstance(options, o.GroupOptions) else None
    parts.add_loss("diversity", options.diversity_strength, DiversityLoss(groups), options)


def add_orthogonality_loss(parts: CollapseParts, options: o.OrthogonalityLossOptions) -> None:
    """Add Gram-Schmidt as a loss on the rows of a group."""
    loss = GroupOrthogonalityLoss(parts.rows, options.orth_on)
    parts.add_loss("orthogonality", options.beta_orth, loss, options, note="beta")


def add_gram_schmidt(parts: CollapseParts, options: o.GramSchmidtOptions) -> None:
    """Add modified Gram-Schmidt in the forward pass."""
    groups, d_sae = parts.rows.groups, parts.config.d_sae
    if options.gs_axis == "activation_batch":
        latents = GramSchmidtLatents(groups, options.gs_gradient)
        parts.activations.append(latents)
        parts.totals.append(Totals(["orthogonalized"], lambda step: latents.counts))
        return
    sketch = parts.sketch if options.gs_axis == "jl" else None
    if sketch is not None and (options.jl_on != "decoder" or d_sae // groups > sketch.R_DS.shape[1]):
        raise UsageError(
            f"gs_axis=jl needs jl_on=decoder and groups of at most jl_dim = {sketch.R_DS.shape[1]} latents; "
            f"with {d_sae} latents in {groups} groups, a group has {d_sae // groups}."
        )
    init_orthonormal(parts.sae, parts.rows, "Gram-Schmidt")
    order, gradient = options.gs_order, options.gs_gradient
    parts.last_mechanisms.append(GramSchmidt(parts.sae, parts.rows, parts.utilization, order, gradient, sketch))


def add_groups(parts: CollapseParts, options: o.GroupOptions) -> None:
    """Add sixteen groups, within which rows are compared.

    Every loss and constraint that compared any two rows now compares only rows in the same group. The added part itself
    is a monitor.
    """
    parts.groups = GroupUtilization(parts.utilization, options.groups, options.group_stat)
    parts.mechanisms.append(parts.groups)


def add_group_rate(parts: CollapseParts, options: o.GroupRateOptions) -> None:
    """Add a learning rate per group, set by utilization."""
    parts.mechanisms.append(GroupLearningRate(parts.rows, parts.groups, options.group_lr))


def add_winner_take_all(parts: CollapseParts, options: o.WinnerTakeAllOptions) -> None:
    """Add winner-take-all in each group, with inhibition."""
    config, share = parts.config, options.wta_share
    if config.l0 is not None:
        share = max(share, config.l0 / config.d_sae)  # large enough for the L0 of `--l0`
    groups, winners = options.groups, math.ceil(share * config.d_sae / options.groups)
    if options.wta_scope == "global":
        groups, winners = 1, winners * groups
    activation = WinnerTakeAll(
        config.d_sae, groups, winners, options.gamma, options.neighbours, options.inhibition, options.near_scope
    )
    parts.activations.append(activation)
    parts.totals.append(Totals(["inhibited", "outcompeted"], lambda step: activation.counts))
    parts.mechanisms.append(Neighbours(activation, parts.sae, options.near))


def add_hard_orthogonality(parts: CollapseParts, options: o.HardOrthogonalityOptions) -> None:
    """Add a step that makes each group's rows orthonormal.

    By default, the rows are projected after every update.
    """
    # Paper: keeps (3) in the forward pass as well, but (3) does not change orthonormal rows.
    init_orthonormal(parts.sae, parts.rows, "Hard orthogonality")
    parts.mechanisms.append(HardOrthogonality(parts.rows, options.hard_every))


class CollapseRun(NamedTuple):
    equations: str
    options: type[o.BaselineOptions]
    add: Callable[[CollapseParts, Any], None]

    @property
    def addition(self) -> str:
        """What this run adds: the words after "Add" in the first line of the docstring of `add`."""
        return (inspect.getdoc(self.add) or "").split("\n")[0].removeprefix("Add ")


RUNS = (
    CollapseRun("(1)", o.BaselineOptions, add_baseline),
    CollapseRun("4.1", o.MonitorOptions, add_monitors),
    CollapseRun("(4)", o.ContrastOptions, add_contrast),
    CollapseRun("4.2", o.DynamicL1Options, add_dynamic_l1),
    CollapseRun("6", o.DiversityOptions, add_diversity),
    CollapseRun("(5)", o.OrthogonalityLossOptions, add_orthogonality_loss),
    CollapseRun("(3)", o.GramSchmidtOptions, add_gram_schmidt),
    CollapseRun("4.1", o.GroupOptions, add_groups),
    CollapseRun("(2)", o.GroupRateOptions, add_group_rate),
    CollapseRun("4.2", o.WinnerTakeAllOptions, add_winner_take_all),
    CollapseRun("6", o.HardOrthogonalityOptions, add_hard_orthogonality),
)


def build(config: RunConfig, options: o.BaselineOptions) -> Variant:
    """Build the variant of the run to which these options belong, with the parts of this run and all earlier runs."""
    parts = CollapseParts(config, options)
    for run in RUNS:
        if isinstance(options, run.options):
            run.add(parts, options)
    return parts.variant()


def recipe_name(number: int) -> str:
    return f"collapse-{number:02d}" if number else "collapse-baseline"


for _number, _run in enumerate(RUNS):
    _summary = f"`{recipe_name(_number - 1)}` plus {_run.addition}" if _number else _run.addition
    # With the default batch size of 2048, these runs share a pass with all others; the paper's batch size is 125.
    recipe(
        recipe_name(_number),
        paper="000",
        equations=_run.equations,
        width=1,
        paper_exact=PAPER_EXACT,
        switched_off=SWITCHED_OFF,
        options=_run.options,
        summary=_summary,
    )(build)
