"""The recipes of paper 001."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ...activation_functions import Activation, ReLU
from ...losses import L1, MSE, Reconstruction, reconstruction_weight
from ...mechanisms import DeadLatents, UnitNormDecoder
from ...optimization import Optimization
from ...options import RecipeOptions
from ...recipe import recipe
from ...sae import SAE
from ...scaling import ScaleWithDictionary, ScaleWithNorm
from ...schedules import Coefficient, constant, linear
from ...step import LossTerm, Mechanism
from ...variant import RunConfig, Variant
from .competition import ChainL1, CompetitionTemperature, SoftCompetition
from .growth import EnabledLatents, EnabledUtilization, GrowCapacity

PAPER: dict[str, Any] = {"paper": "001", "width": 1}
PAPER_EXACT: dict[str, tuple[Any, str]] = {
    "utilization": ("mean", "rho is about L0/n, so the first case of (4) always applies and adds 5 latents"),
    "n_ref": (None, "at n = 2304, the bounds of (4) always apply: 5, 7 or 10 latents are added"),
    "interval": (1, "all latents are enabled after 173 to 346 of 4,882 steps"),
    "competition": ("softmax", "the weights sum to one, so alpha is nearly zero, about z/n, or has a single winner"),
    "cut": (0.0, "alpha is never exactly zero, so L0 counts every positive latent"),
}


Init = Literal["transpose", "uniform"]


def start_weights(sae: SAE, init: Init) -> SAE:
    """Initialize the SAE: W_dec with unit rows and W_enc as its transpose, or both uniform and independent.

    uniform is PyTorch's initialization of a linear layer: within 1/sqrt(d_in) of zero for W_enc, and within
    1/sqrt(d_sae) of zero for W_dec. The rows of W_dec are then normalized (1). Biases stay zero.
    """
    if init == "uniform":
        with torch.no_grad():
            sae.W_enc.uniform_(-(sae.d_in**-0.5), sae.d_in**-0.5)
            sae.W_dec.uniform_(-(sae.d_sae**-0.5), sae.d_sae**-0.5)
            sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
    return sae


@recipe("progressive-baseline", equations="(1)", paper_exact={}, **PAPER)
def baseline(
    config: RunConfig,
    l1: float = 0.04,
    reconstruction: Reconstruction = "sum",
    pre_bias: bool = False,
    init: Init = "transpose",
) -> Variant:
    """ReLU latents and an L1 penalty: no growth, no competition.

    Paper: the baseline has "fixed sparsity targets" (section 5), but no target is printed. A penalty with a fixed
    coefficient does not set L0, and the 90.60 in the results is a measurement. By default, the coefficient is fixed in
    our baseline, too. With `--l0 90.6`, it is adjusted during training so that the run reaches an L0 of 90.6.

    Args:
        l1: Strength of the L1 penalty (2).
        reconstruction: Sum or mean of the squared error over d_in. The paper's numbers suggest mean, with
            normalize=none.
        pre_bias: Subtract b_dec from the encoder's input. The paper's encoder sees x itself.
        init: Initial weights: W_enc as the transpose of W_dec, or uniform (the paper, for all its systems).
    """
    return Variant(
        start_weights(SAE(config.d_in, config.d_sae, pre_bias=pre_bias), init),
        {"mse": (reconstruction_weight(reconstruction, config.d_in), MSE()), "l1": (l1, L1())},
        [UnitNormDecoder()],
        Optimization(weight_decay=0.01),
        dead=DeadLatents(config.d_sae, config.dead_after_tokens),
    )


@dataclass(frozen=True)
class ProgressiveOptions(RecipeOptions):
    start: float = 0.25
    """Share of the latents that are enabled at the start."""
    interval: int | None = None
    """Steps between two increments (4). None: 10 in a run of 4882 steps, in proportion for others. The paper: 1."""
    hybrid: bool = True
    """Choose the increment by rho (4); false: always 5."""
    n_ref: int | None = 100
    """n in the increments of (4). None: d_sae (the paper)."""
    pace: float = ScaleWithDictionary(1)
    """Factor on the increments of (4), which the paper states for 2304 latents."""
    order: Literal["index", "importance"] = "index"
    """Order in which latents are enabled. importance: the latents that would fire most often come first."""
    beta: float = 0.9
    """Decay per step of the average v of (3)."""
    tau: float = ScaleWithNorm(0.01)
    """Value above which a latent counts as used (3), in units of the SAE's input. Under layer_norm the
    input is the normalized token, whose norm is sqrt(d_in), which is 48 in the paper."""
    utilization: Literal["alive_fraction", "mean", "any"] = "alive_fraction"
    """rho in (3): the share of enabled latents with v above 0.001, the mean share of tokens on which a latent fires
    (the paper), or the share of latents that fire on any token of a batch."""
    competition: Literal["softmax_peak", "softmax", "softmax_scaled", "softmax_active_only", "off"] = "softmax_peak"
    """Weights in (5). softmax_peak: e = exp((z - max z)/T). softmax: e divided by its sum (the paper). softmax_scaled:
    softmax times the number of active latents. softmax_active_only: softmax over the active latents. off: no
    competition."""
    competition_in_recon: bool = True
    """Reconstruct from alpha. false: reconstruct from z, and use alpha only in the penalty (2)."""
    cut: float = ScaleWithNorm(0.01)
    """Values of alpha up to this limit are set to zero. In units of `temperature_unit`. The paper: 0."""
    temperature: float = ScaleWithNorm(0.1)
    """T_base of (6)."""
    temperature_unit: Literal["input", "rms_z"] = "input"
    """Unit of T and `cut`: the unit of the SAE's input, or the root mean square of a token's active latents."""
    temperature_low: float = ScaleWithNorm(0.05)
    """Lower bound of T (6)."""
    temperature_high: float = ScaleWithNorm(0.3)
    """Upper bound of T (6), and with `anneal_steps` the initial T_base."""
    density_scale: float = 0.3
    """s of (6): how strongly T follows rho."""
    density_sign: int = 1
    """1: more use raises T (the paper's equation). -1: lowers it (the paper's text)."""
    momentum: float = 0.99
    """Momentum of T, per step (6)."""
    anneal_steps: int = 0
    """Steps over which T_base of (6) falls from `temperature_high` to `temperature`. 0: T_base is constant. The paper:
    2000, without saying how this combines with (6)."""
    l1: float = 0.04
    """Strength of the L1 penalty (2)."""
    l1_on: Literal["alpha", "z", "both"] = "alpha"
    """Latents under the L1 penalty: alpha (2), z, or both. The penalty on z adds the l1 sign(z) of (7)."""
    reconstruction: Reconstruction = "sum"
    """Sum or mean of the squared error over d_in. The paper's numbers suggest mean, with normalize=none."""
    pre_bias: bool = False
    """Subtract b_dec from the encoder's input. The paper's encoder sees x itself."""
    init: Init = "transpose"
    """Initial weights: W_enc as the transpose of W_dec, or uniform (the paper)."""

    def validation_errors(self, config: RunConfig) -> Iterator[str]:
        if not 0 < self.start <= 1:
            yield f"invalid start={self.start:g}: expected a share of the latents, above 0 and at most 1."
        if self.interval is not None and self.interval < 1:
            yield f"invalid interval={self.interval}: expected 1 step or more."
        for name in ("temperature", "pace"):
            if (value := getattr(self, name)) <= 0:
                yield f"invalid {name}={value:g}: expected a positive number."


GROWTH = ("interval", "hybrid", "n_ref", "pace", "order")
COMPETITION = (
    "competition_in_recon",
    "cut",
    "temperature",
    "temperature_unit",
    "temperature_low",
    "temperature_high",
    "density_scale",
    "density_sign",
    "momentum",
    "anneal_steps",
    "l1_on",
)
SWITCHED_OFF = {"n_ref": ("hybrid", (False,)), **{name: ("competition", ("off",)) for name in COMPETITION}}


@recipe("progressive", equations="(2)-(6)", paper_exact=PAPER_EXACT, switched_off=SWITCHED_OFF, **PAPER)
def progressive(config: RunConfig, options: ProgressiveOptions) -> Variant:
    """Latents compete, and their use decides how many are enabled next.

    At first a quarter of the latents are enabled. How many are enabled next depends on how many of the enabled latents
    fire, and so does the temperature at which the enabled latents compete.
    """
    interval = options.interval
    if interval is None:
        interval = max(1, round(10 * config.steps / 4882))
    enabled = EnabledLatents(config.d_sae)
    dead = DeadLatents(config.d_sae, config.dead_after_tokens)
    utilization = EnabledUtilization(enabled, options.beta, options.tau, options.utilization)
    growth = GrowCapacity(
        enabled, utilization, dead, options.start, interval, options.hybrid, options.n_ref, options.pace, options.order
    )
    mechanisms: list[Mechanism] = [utilization, growth, UnitNormDecoder()]
    losses: dict[str, tuple[Coefficient | float, LossTerm]] = {
        "mse": (reconstruction_weight(options.reconstruction, config.d_in), MSE())
    }
    chain: list[Activation] = [enabled, ReLU()]
    if options.competition == "off":
        losses["l1"] = (options.l1, L1())
    else:
        competition, temperature = competition_parts(options, utilization)
        mechanisms.insert(1, temperature)
        if options.l1_on != "z":
            losses["l1"] = (options.l1, L1() if options.competition_in_recon else ChainL1(enabled, competition))
        if options.l1_on != "alpha":
            losses["l1_z"] = (options.l1, ChainL1(enabled, ReLU()))
        if options.competition_in_recon:
            chain = [enabled, competition]
    sae = start_weights(SAE(config.d_in, config.d_sae, chain, pre_bias=options.pre_bias), options.init)
    return Variant(sae, losses, mechanisms, Optimization(weight_decay=0.01), dead=dead)


def competition_parts(
    options: ProgressiveOptions, utilization: EnabledUtilization
) -> tuple[SoftCompetition, CompetitionTemperature]:
    """The competition (5) and its temperature (6)."""
    low, high = options.temperature_low, options.temperature_high
    start, base = options.temperature, constant(options.temperature)
    if options.anneal_steps:
        start, base = high, linear(high, options.temperature, options.anneal_steps)
    competition = SoftCompetition(start, options.competition, options.temperature_unit, options.cut)
    scale, sign, momentum = options.density_scale, options.density_sign, options.momentum
    return competition, CompetitionTemperature(competition, utilization, base, scale, sign, low, high, momentum)


# Without competition there is no cut, so L0 counts every positive latent.
ABLATIONS: tuple[tuple[str, str, tuple[str, ...], dict[str, Any]], ...] = (
    ("all-at-once", "`progressive` with every latent enabled from the start.", GROWTH, {"start": 1.0}),
    ("fixed-increment", "`progressive` that grows by 5 at any utilization.", ("n_ref",), {"hybrid": False}),
    ("no-ema", "`progressive` with the utilization of only the last batch (beta = 0).", (), {"beta": 0.0}),
    (
        "no-competition",
        "`progressive` without competition and without its cut.",
        COMPETITION,
        {"competition": "off"},
    ),
)
for _name, _summary, _unused, _fixed in ABLATIONS:
    recipe(
        f"progressive-{_name}",
        equations="(2)-(6)",
        paper_exact=PAPER_EXACT,
        summary=_summary,
        unused=_unused,
        fixed=_fixed,
        switched_off=SWITCHED_OFF,
        **PAPER,
    )(progressive)
