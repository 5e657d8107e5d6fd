"""The five ablations of paper 004, in the paper's order, with their options; and the paper's three baselines."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...losses import L1, MSE
from ...mechanisms import DeadLatents, ResampleDead, UnitNormDecoder
from ...optimization import ANY_NUMBER, Optimization
from ...options import RecipeOptions
from ...recipe import recipe
from ...sae import SAE
from ...scaling import ScaleWithVariance, ScaleWithWidth
from ...schedules import Coefficient, linear, product
from ...step import Mechanism, Step
from ...variant import RunConfig, Variant
from .. import baselines
from .merging import MergeSimilar
from .penalty import AdaptivePenalty
from .window import ResampleByWindow

PAPER: dict[str, Any] = {"paper": "004", "width": 1}
OPTIMIZATION = Optimization(weight_decay=0.01, clip=1.0)
K = ScaleWithWidth(320)  # k of the TopK baseline
PAPER_EXACT: dict[str, tuple[Any, str]] = {
    "dead_by": ("batch", "in a sparse SAE, most latents fire on less than 1 % of a batch, so they count as dead"),
    "stability": ("mean", "in a sparse SAE, most latents fire on less than 1 % of tokens, so most latents restart"),
    "terms": ("w+1", "the sum of w+1 terms is divided by w, so a latent that fires on every token has a p_i of 1.01"),
    "restart_share": (1.0, "a latent that restarts at the last step is saved untrained"),
    "recon_in_alpha": ("sum", "the summed error of a token is in the thousands, so alpha is always 0.1"),
    "alpha_units": ("input", "the target of 2.5 is for raw activations, but the input is normalized"),
    "merge_average": ("encoder", "a merged latent keeps the decoder row and the bias of only one of the two latents"),
    "merge_partner": ("disable", "the second latent of a pair never returns, so the number of latents only falls"),
}


def logged(name: str, coefficient: Coefficient) -> Coefficient:
    """The same coefficient, with its value logged as `name`."""

    def value(step: Step) -> Tensor:
        step.metrics[name] = torch.as_tensor(coefficient(step))
        return step.metrics[name]

    return value


@dataclass(frozen=True)
class HierarchicalOptions(RecipeOptions):
    restarts: Literal["window", "dead", "never"] = "window"
    """Latents that restart. window: latents silent over a window of steps (4). dead: latents that count as dead by
    `dead_by`. never: none."""
    adaptive: bool = True
    """Weaken the penalty while the reconstruction error is large (5)."""
    merging: bool = True
    """Merge latents with nearly the same direction (7)."""
    l1: float | None = None
    """lambda_0 of (3), the strength of the L1 penalty at the first step. None: see `lambda_by`."""
    lambda_by: Literal["d_in", "d_sae", "k"] = "d_in"
    """lambda_0 is 1 over the square root of d_in (section 5.4), d_sae (the k of 4.1), or the baseline's k, 320."""
    l1_end: float = 0.0
    """Strength of the L1 penalty at the last step (3)."""
    resample_every: int = 100
    """Steps between two restarts of dead latents, in recipes without a window."""
    dead_by: Literal["tokens", "batch"] = "tokens"
    """Latents that count as dead in recipes without a window. tokens: latents that have not fired for ten million
    tokens, or a tenth of the run if that is less. batch: latents whose p_i (4) is below `below` in the last batch."""
    restart_share: float = 0.9
    """Share of the run after which latents are neither restarted nor merged. The paper sets no such limit."""
    window: int = 100
    """Number of steps w in the window (4), and between two restarts."""
    terms: Literal["w", "w+1"] = "w"
    """Number of terms in the sum of (4): w, or w + 1 as in the printed formula. Both sums are divided by w."""
    below: float = 0.01
    """A latent is dead if p_i is below this (4)."""
    stability: Literal["any", "mean"] = "any"
    """Contribution of a step to p_i (4). any: 1 if the latent fires on any token of the batch. mean: the share of
    tokens on which it fires."""
    recon_in_alpha: Literal["mean", "sum"] = "mean"
    """L_recon in (5): the mean over d_in, or the sum, as in the paper's loss."""
    alpha_units: Literal["raw", "input"] = "raw"
    """Units of L_recon in (5): raw activations, or the normalized input as in the loss (6)."""
    target: float = ScaleWithVariance(2.5)
    """L_recon at which alpha is 1 (5), in `alpha_units`."""
    alpha_low: float = 0.1
    """Lower bound of alpha (5)."""
    alpha_high: float = 2.0
    """Upper bound of alpha (5)."""
    alpha_ema: float = 0.0
    """Decay per step of the average of L_recon in (5). 0: use the error of the current step."""
    merge_above: float = 0.9
    """Cosine above which two latents are merged (7)."""
    merge_every: int = 100
    """Steps between two rounds of merging (7)."""
    merge_on: Literal["decoder", "encoder"] = "decoder"
    """Directions whose cosines are compared in (7): rows of W_dec, or columns of W_enc."""
    merge_average: Literal["all", "encoder"] = "all"
    """Weights that (7) averages: W_enc, b_enc and W_dec, or only W_enc, as printed."""
    merge_weights: Literal["equal", "activity"] = "equal"
    """Weights of the average in (7): equal, or how often each latent fired recently."""
    merge_partner: Literal["recycle", "disable"] = "recycle"
    """What happens to the second latent of a merged pair. recycle: it restarts on a badly reconstructed token.
    disable: it is silenced."""
    pre_bias: bool = False
    """Subtract b_dec from the encoder's input. The paper's encoder sees x itself (1)."""

    def validation_errors(self, config: RunConfig) -> Iterator[str]:
        for name in ("resample_every", "window", "merge_every"):
            if (count := getattr(self, name)) < 1:
                yield f"invalid {name}={count}: expected 1 step or more."
        if not 0 <= self.restart_share <= 1:
            yield f"invalid restart_share={self.restart_share:g}: expected a share of the run, 0 to 1."


def build(config: RunConfig, options: HierarchicalOptions) -> Variant:
    """Build the full model or one of its ablations, depending on `restarts`, `adaptive` and `merging`."""
    dead = DeadLatents(config.d_sae, config.dead_after_tokens)
    start = first_lambda(config, options.lambda_by) if options.l1 is None else options.l1
    penalty = logged("lambda", linear(start, options.l1_end, config.steps))  # (3)
    mechanisms: list[Mechanism] = []
    if options.adaptive:
        adaptive = AdaptivePenalty(
            lambda: variant.scale if options.alpha_units == "raw" else variant.scale.new_ones(()),
            options.recon_in_alpha,
            options.target,
            options.alpha_low,
            options.alpha_high,
            options.alpha_ema,
        )
        penalty = product(penalty, adaptive)
        mechanisms.append(adaptive)
    mechanisms += resampling(config, options, dead)
    variant = Variant(
        SAE(config.d_in, config.d_sae, pre_bias=options.pre_bias),
        {"mse": (1.0, MSE()), "l1": (penalty, L1())},  # (6)
        [*mechanisms, UnitNormDecoder()],
        OPTIMIZATION,
        dead=dead,
    )
    return variant


def resampling(config: RunConfig, options: HierarchicalOptions, dead: DeadLatents) -> list[Mechanism]:
    """The mechanisms that restart dead latents (4) and merge similar latents (7).

    A merge frees one latent of a pair.
    """
    # In the paper, latents restart until the end. A latent that restarts just before the end would keep its initial
    # values.
    until = math.floor(round(options.restart_share * config.steps, 6))
    below, stability = options.below, options.stability
    if options.restarts == "never":
        return []
    if options.restarts == "dead":
        # Paper: the second ablation restarts dead latents, but only the third one adds (4). The paper does not say
        # which latents count as dead in the second one. `dead_by` selects either the latents that this package
        # counts as dead, or those that are dead by (4) on a single batch.
        every = options.resample_every
        if options.dead_by == "tokens":
            return [ResampleDead(dead, every, until)]
        return [ResampleByWindow(dead, 1, until, below, stability, every=every)]
    terms = options.window + (options.terms == "w+1")
    resample = ResampleByWindow(dead, options.window, until, below, stability, terms=terms)
    if not options.merging:
        return [resample]
    merge = MergeSimilar(
        resample,
        options.merge_above,
        options.merge_every,
        options.merge_on,
        options.merge_average,
        options.merge_weights,
        options.merge_partner,
    )
    return [merge, resample]


def first_lambda(config: RunConfig, by: str) -> float:
    """lambda_0 of (3). With `by` "k", it depends on the k of the baseline: 320 at d_in = 2304, proportional to d_in."""
    return {"d_in": config.d_in, "d_sae": config.d_sae, "k": K.resolve(config, False)}[by] ** -0.5


RESTART = ("resample_every", "dead_by")
WINDOW = ("window", "terms")
SILENT = ("below", "stability")
ADAPTIVE = ("recon_in_alpha", "alpha_units", "target", "alpha_low", "alpha_high", "alpha_ema")
MERGE = ("merge_above", "merge_every", "merge_on", "merge_average", "merge_weights", "merge_partner")
ABLATIONS: tuple[tuple[str, str, str, tuple[str, ...], dict[str, Any]], ...] = (
    (
        "hierarchical-linear",
        "ReLU latents under an L1 penalty that falls linearly to zero.",
        "(1)-(3)",
        RESTART + WINDOW + SILENT + ADAPTIVE + MERGE + ("restart_share",),
        {"restarts": "never", "adaptive": False, "merging": False},
    ),
    (
        "hierarchical-resample",
        "`hierarchical-linear` that restarts dead latents on lossy tokens.",
        "(1)-(3)",
        WINDOW + ADAPTIVE + MERGE,
        {"restarts": "dead", "adaptive": False, "merging": False},
    ),
    (
        "hierarchical-window",
        "`hierarchical-resample` that detects dead latents over a window.",
        "(1)-(4)",
        RESTART + ADAPTIVE + MERGE,
        {"restarts": "window", "adaptive": False, "merging": False},
    ),
    (
        "hierarchical-adaptive",
        "`hierarchical-window` with a penalty that adapts to the error.",
        "(1)-(6)",
        RESTART + MERGE,
        {"restarts": "window", "adaptive": True, "merging": False},
    ),
    (
        "hierarchical",
        "`hierarchical-adaptive` that merges nearly parallel latents.",
        "(1)-(7)",
        RESTART,
        {"restarts": "window", "adaptive": True, "merging": True},
    ),
)
for _name, _summary, _equations, _unused, _fixed in ABLATIONS:
    recipe(
        _name,
        equations=_equations,
        paper_exact=PAPER_EXACT,
        summary=_summary,
        unused=_unused,
        fixed=_fixed,
        switched_off={"lambda_by": ("l1", ANY_NUMBER)},
        **PAPER,
    )(build)


def with_optimization(variant: Variant) -> Variant:
    """Give a baseline the optimizer settings that the paper uses for all systems that it compares."""
    variant.optimization = OPTIMIZATION
    return variant


@recipe("hierarchical-topk320", paper_exact={}, **PAPER)
def topk(config: RunConfig, k: int = K, aux: float = 1 / 32) -> Variant:
    """The paper's TopK baseline.

    Paper: does not mention AuxK; our readings of the paper set aux=0.

    Args:
        k: Active latents per token.
        aux: Weight of AuxK, which revives dead latents.
    """
    return with_optimization(baselines.topk(config, k=k, aux=aux))


@recipe("hierarchical-batchtopk", paper_exact={}, **PAPER)
def batchtopk(config: RunConfig, k: float = K, aux: float = 1 / 32) -> Variant:
    """The paper's BatchTopK baseline.

    The paper states no k for this baseline; the default is the k of the TopK baseline. The paper does not mention AuxK,
    so our readings of the paper set aux=0.

    Args:
        k: Active latents per token, on average over the batch.
        aux: Weight of AuxK, which revives dead latents.
    """
    return with_optimization(baselines.batchtopk(config, k=k, aux=aux))


@recipe("hierarchical-l1", paper_exact={}, **PAPER)
def l1(config: RunConfig, l1: float = 0.04, l1_warmup: int = 0, pre_bias: bool = False) -> Variant:
    """The paper's L1 baseline: `relu` under a constant L1 penalty.

    Args:
        l1: Strength of the L1 penalty.
        l1_warmup: Steps over which the L1 penalty rises from zero.
        pre_bias: Subtract b_dec from the encoder's input.
    """
    return with_optimization(baselines.relu(config, l1=l1, l1_warmup=l1_warmup, pre_bias=pre_bias))
