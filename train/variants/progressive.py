"""Competitive progressive autoencoders (paper 001): start with a quarter of the latents, enable more as they are used.

    L     = |x - D(alpha(z))|^2 + l1 |alpha(z)|_1,  z = ReLU(x W_enc + b_enc)                     (2)
    v_i   <- 0.9 v_i + 0.1 1[f_i > 0.01],  rho = mean of v over the enabled latents               (3)
    n     <- n + 5, or min(7, max(2, 0.1 n rho)), or min(10, max(4, 0.15 n rho)), by rho          (4)
    alpha = softmax(z / T) z                                                                      (5)
    T     = T_base (1 + (exp(exp(rho) - 1) - 1) s), within [0.05, 0.3], momentum 0.99             (6)

The paper's own settings are `utilization=mean n_ref=none interval=1 competition=softmax cut=0`. `PAPER_EXACT` says what
each of them does. The defaults are readings that work.

The paper does not state the units of its loss. Ours are this package's, |x|^2 = 1 on average and errors summed over
d_in; what its numbers point to is `reconstruction=mean normalize=none`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..activation_functions import Activation, ReLU
from ..losses import L1, MSE, Reconstruction, reconstruction_weight
from ..mechanisms import ActivityEMA, DeadLatents, UnitNormDecoder
from ..optimization import Optimization
from ..options import RecipeOptions
from ..recipe import recipe
from ..sae import SAE
from ..scaling import ScaleWithDictionary, ScaleWithNorm
from ..schedules import Coefficient, constant, linear
from ..step import LossTerm, Mechanism, Step
from ..variant import RunConfig, Variant

PAPER: dict[str, Any] = {"paper": "001", "width": 1}
PAPER_EXACT: dict[str, tuple[Any, str]] = {
    "utilization": ("mean", "rho is about L0/n, so growth stays in the first branch of (4)"),
    "n_ref": (None, "at n = 2304 the bounds of (4) always bind: 5, 7 or 10"),
    "interval": (1, "growth is over after 173 to 346 of 4,882 steps"),
    "competition": ("softmax", "the weights sum to one, so alpha vanishes, about z/n, or has one winner"),
    "cut": (0.0, "alpha is nowhere exactly zero, so L0 counts every positive latent"),
}


class EnabledLatents(Activation, name="enabled"):
    """Sets latents that are not enabled yet to minus infinity: they never fire and take no part in a competition."""

    on_F: Tensor  # 1 or 0

    def __init__(self, d_sae: int) -> None:
        super().__init__(d_sae=d_sae)
        self.register_buffer("on_F", torch.ones(d_sae))

    def forward(self, z_BF: Tensor) -> Tensor:
        return torch.where(self.on_F > 0, z_BF, -torch.inf)


# (2): the penalty.


class ChainL1(LossTerm):
    """mean_B sum_F |c(pre)| for a chain c of activations of which the reconstruction uses none or only a part."""

    sparsity = True

    def __init__(self, *chain: Activation) -> None:
        super().__init__()
        self.chain = nn.Sequential(*chain)

    def forward(self, step: Step) -> Tensor:
        l1: Tensor = self.chain(step.pre_BF).abs().sum(-1).mean()
        return l1


# (3) and (4): growth.


class EnabledUtilization(ActivityEMA):
    """v_i (3) and rho, the share of the enabled latents that is in use.

    Paper: 1[|f_i(x_t)| > tau] is of one token, x_t here is a batch. By `reading`, v_i is
        alive_fraction   the share of its tokens, and rho the share of enabled latents with v_i over 0.001
        mean             the share of its tokens, so rho is about L0/n, always below 0.3
        any              whether any of its tokens, so rho is about 1
    """

    rho: Tensor  # ()

    def __init__(self, enabled: EnabledLatents, beta: float, tau: float, reading: str = "alive_fraction") -> None:
        super().__init__(len(enabled.on_F), beta, tau)
        self.enabled = enabled
        self.reading = reading
        self.register_buffer("rho", torch.zeros(()))

    def after_step(self, step: Step) -> None:
        if self.reading == "any":
            fired_F = (step.f_BF.detach() > self.threshold).any(0)
            self.rate_F.lerp_(fired_F.float(), 1 - self.beta)
        else:
            super().after_step(step)
        v_F = (self.rate_F > 1e-3).float() if self.reading == "alive_fraction" else self.rate_F
        self.rho.copy_((v_F * self.enabled.on_F).sum() / self.enabled.on_F.sum())

    def scalars(self) -> dict[str, Tensor]:
        return {"rho": self.rho}


class GrowCapacity(Mechanism):
    """Enables a share `start` of the latents, and every `interval` steps some more, by rho (4).

    Until then a latent keeps its initial value: no gradient, no weight decay, not counted as dead. Its Adam moments
    start at zero, with the common count of steps. `n_ref` is the n of (4), None is d_sae. Paper: 0.1 n rho is at least
    69 at n = 2304, so "adaptive 2-7" is 7 and "adaptive 4-10" is 10; they adapt for n around 100.

    Which come first: the paper does not say. `order` is by `index`, or by `importance`: how often a latent that is not
    enabled would fire, on the same average as (3).
    """

    n: Tensor  # (), not rounded
    wish_F: Tensor  # how often each latent would fire

    def __init__(
        self,
        enabled: EnabledLatents,
        utilization: EnabledUtilization,
        dead: DeadLatents,
        start: float,
        interval: int = 10,
        hybrid: bool = True,
        n_ref: int | None = 100,
        pace: float = 1.0,
        order: str = "index",
    ) -> None:
        super().__init__()
        self.enabled, self.use, self.dead = enabled, utilization, dead  # `use` is a key in checkpoints
        self.interval, self.hybrid, self.pace = interval, hybrid, pace
        self.order = order
        d_sae = len(enabled.on_F)
        self.n_ref = d_sae if n_ref is None else n_ref
        first = max(1, math.ceil(start * d_sae))
        enabled.on_F[first:] = 0
        self.register_buffer("n", torch.tensor(float(first)))
        self.register_buffer("wish_F", torch.zeros(d_sae))

    def increment(self, rho: Tensor) -> Tensor:
        """The latents to enable at once by (4), at the paper's width."""
        low = torch.full_like(rho, 5.0)
        if not self.hybrid:
            return low
        middle = (0.1 * self.n_ref * rho).floor().clamp(2, 7)
        high = (0.15 * self.n_ref * rho).floor().clamp(4, 10)
        return torch.where(rho < 0.3, low, torch.where(rho < 0.6, middle, high))

    def after_backward(self, step: Step) -> None:
        self.W_enc_before = step.sae.W_enc.detach().clone()  # before this step's update; not part of the state

    def after_step(self, step: Step) -> None:
        on_F = self.enabled.on_F
        # Weight decay also moved the latents that are not enabled.
        step.sae.W_enc.data.copy_(torch.where(on_F > 0, step.sae.W_enc, self.W_enc_before))
        due = (step.i + 1) % self.interval == 0
        self.n.add_(torch.where(due, self.pace * self.increment(self.use.rho), 0)).clamp_(max=len(on_F))
        if self.order == "importance":
            would_fire_BF = step.pre_BF.detach() > self.use.threshold
            self.wish_F.lerp_(would_fire_BF.float().mean(0), 1 - self.use.beta)
        ranked_F = torch.where(on_F > 0, torch.inf, self.wish_F).argsort(descending=True, stable=True)
        rank_F = torch.empty_like(ranked_F).scatter_(0, ranked_F, torch.arange(len(on_F), device=on_F.device))
        on_F.copy_(rank_F < self.n.floor())
        self.dead.since_F.masked_fill_(on_F == 0, 0)

    def scalars(self) -> dict[str, Tensor]:
        return {"enabled": self.enabled.on_F.sum()}


# (5) and (6): competition and its temperature.


class SoftCompetition(Activation, name="competition"):
    """alpha(z)_i = w_i z_i, z = ReLU(pre) (5), and zero unless it is above `cut`.

    With e_i = exp((z_i - max z) / T), `weights` are
        softmax              e / sum e: as printed in the paper, which shrinks everything
        softmax_peak         e: the strongest latent keeps its value
        softmax_scaled       e / sum e times the number of active latents
        softmax_active_only  e / sum e over the active latents, z > 0

    T and `cut` are in the `unit` of the SAE's `input`, or of `rms_z`, the root mean square of a token's active latents,
    under which the winner is nearly alone. Paper: alpha is nowhere exactly zero, so its L0 can only have counted what
    exceeds the 0.01 of (3); hence `cut`.
    """

    T: Tensor  # ()
    cut: Tensor  # ()

    def __init__(
        self, temperature: float, weights: str = "softmax_peak", unit: str = "input", cut: float = 0.0
    ) -> None:
        super().__init__(temperature=temperature, weights=weights, unit=unit, cut=cut)
        self.weights = weights
        self.unit = unit
        self.register_buffer("T", torch.tensor(temperature))
        self.register_buffer("cut", torch.tensor(cut))

    def forward(self, z_BF: Tensor) -> Tensor:
        competing_BF = z_BF > (0 if self.weights == "softmax_active_only" else -torch.inf)
        z_BF = z_BF.float().relu()
        active_B1 = (z_BF > 0).sum(-1, keepdim=True)
        unit_B1 = z_BF.new_ones(())
        if self.unit == "rms_z":
            unit_B1 = (z_BF.detach().square().sum(-1, keepdim=True) / active_B1.clamp_min(1)).sqrt().clamp_min(1e-12)
        weight_BF = ((z_BF - z_BF.amax(-1, keepdim=True)) / (self.T * unit_B1)).exp() * competing_BF
        if self.weights != "softmax_peak":
            weight_BF = weight_BF / weight_BF.sum(-1, keepdim=True).clamp_min(1e-12)
        if self.weights == "softmax_scaled":
            weight_BF = active_B1 * weight_BF
        alpha_BF = weight_BF * z_BF
        return alpha_BF * (alpha_BF > self.cut * unit_B1)

    def rescale_(self, factor: float) -> None:
        if self.unit == "input":
            self.T.mul_(factor)
            self.cut.mul_(factor)


class CompetitionTemperature(Mechanism):
    """T follows rho: T <- 0.99 T + 0.01 clamp(T_base (1 + sign (exp(exp(rho) - 1) - 1) s), low, high) (6).

    Paper: more use makes T larger and competition weaker, against its text; `sign` -1 turns that around. For rho in
    [0, 1] T is in [0.1, 0.237], so its bounds never bind.
    """

    def __init__(
        self,
        competition: SoftCompetition,
        utilization: EnabledUtilization,
        base: Coefficient,
        s: float = 0.3,
        sign: int = 1,
        low: float = 0.05,
        high: float = 0.3,
        momentum: float = 0.99,
    ) -> None:
        super().__init__()
        self.competition, self.base, self.s, self.sign = competition, base, s, sign
        self.use = utilization  # the name is a key in checkpoints
        self.low, self.high, self.momentum = low, high, momentum

    def target(self, rho: Tensor, base: Tensor | float) -> Tensor:
        """T by (6), before its momentum."""
        return (base * (1 + self.sign * (torch.exp(torch.exp(rho) - 1) - 1) * self.s)).clamp(self.low, self.high)

    def after_step(self, step: Step) -> None:
        self.competition.T.lerp_(self.target(self.use.rho, self.base(step)), 1 - self.momentum)

    def scalars(self) -> dict[str, Tensor]:
        return {"T": self.competition.T}


# The recipes.


@recipe("progressive-baseline", equations="(1)", paper_exact={}, **PAPER)
def baseline(
    config: RunConfig, l1: float = 0.04, reconstruction: Reconstruction = "sum", pre_bias: bool = False
) -> Variant:
    """ReLU latents and an L1 penalty: no growth, no competition.

    Args:
        l1: Strength of the L1 penalty (2).
        reconstruction: Squared error summed or averaged over d_in. The paper's numbers point to mean, with
            normalize=none.
        pre_bias: Subtract b_dec from the encoder's input. The paper's encoder sees x itself.
    """
    return Variant(
        SAE(config.d_in, config.d_sae, pre_bias=pre_bias),
        {"mse": (reconstruction_weight(reconstruction, config.d_in), MSE()), "l1": (l1, L1())},
        [UnitNormDecoder()],
        Optimization(weight_decay=0.01),
        dead=DeadLatents(config.d_sae, config.dead_after_tokens),
    )


@dataclass(frozen=True)
class ProgressiveOptions(RecipeOptions):
    start: float = 0.25
    """Share of the latents that are enabled from the start."""
    interval: int | None = None
    """Steps between two increments (4). None: 10 in 4882, so that growth fills half of the run. The paper: 1."""
    hybrid: bool = True
    """Choose the increment by rho (4); false: always 5."""
    n_ref: int | None = 100
    """n in the increments of (4). None: d_sae (the paper)."""
    pace: float = ScaleWithDictionary(1)
    """Factor on the increments of (4), which the paper gives at 2304 latents."""
    order: Literal["index", "importance"] = "index"
    """Order in which latents are enabled. importance: those first that would fire most often."""
    beta: float = 0.9
    """Decay of the average v of (3), per step."""
    tau: float = ScaleWithNorm(0.01)
    """Value above which a latent counts as used (3), in units of the SAE's input."""
    utilization: Literal["alive_fraction", "mean", "any"] = "alive_fraction"
    """rho in (3): the share of enabled latents with v over 0.001, the mean share of tokens (the paper), or the share of
    latents that fire for any token of a batch."""
    competition: Literal["softmax_peak", "softmax", "softmax_scaled", "softmax_active_only", "off"] = "softmax_peak"
    """Weights in (5): exp((z - max z)/T); over their sum (the paper); that times the number of active latents; over the
    sum of the active latents; or no competition."""
    competition_in_recon: bool = True
    """Reconstruct from alpha; false: from z, and only penalize alpha (2)."""
    cut: float = ScaleWithNorm(0.01)
    """alpha is set to zero unless it is above this, in units of `temperature_unit`. The paper: 0."""
    temperature: float = ScaleWithNorm(0.1)
    """T_base of (6)."""
    temperature_unit: Literal["input", "rms_z"] = "input"
    """Unit of T and `cut`: that of the SAE's input, or the root mean square of a token's active latents."""
    temperature_low: float = ScaleWithNorm(0.05)
    """Lower bound of T (6)."""
    temperature_high: float = ScaleWithNorm(0.3)
    """Upper bound of T (6), and where T_base starts under `anneal_steps`."""
    density_scale: float = 0.3
    """s of (6): how strongly T follows rho."""
    density_sign: int = 1
    """1: more use raises T (the paper's equation). -1: lowers it (the paper's text)."""
    momentum: float = 0.99
    """Momentum of T, per step (6)."""
    anneal_steps: int = 0
    """Steps over which T_base falls from `temperature_high` to `temperature`. 0: constant. The paper also says 2000."""
    l1: float = 0.04
    """Strength of the L1 penalty (2)."""
    l1_on: Literal["alpha", "z", "both"] = "alpha"
    """Latents under the L1 penalty: alpha (2), z, or both, which is the gradient printed as (7)."""
    reconstruction: Reconstruction = "sum"
    """Squared error summed or averaged over d_in. The paper's numbers point to mean, with normalize=none."""
    pre_bias: bool = False
    """Subtract b_dec from the encoder's input. The paper's encoder sees x itself."""

    def validation_errors(self, config: RunConfig) -> Iterator[str]:
        if not 0 < self.start <= 1:
            yield f"invalid start={self.start:g}: expected a share of the latents above 0 and up to 1."
        if self.interval is not None and self.interval < 1:
            yield f"invalid interval={self.interval}: expected 1 step or more."
        for name in ("temperature", "pace"):
            if (value := getattr(self, name)) <= 0:
                yield f"invalid {name}={value:g}: expected a positive number."


@recipe("progressive", equations="(2)-(6)", paper_exact=PAPER_EXACT, **PAPER)
def progressive(config: RunConfig, options: ProgressiveOptions) -> Variant:
    """Latents are enabled as they are used, and compete.

    A quarter of the latents is enabled at first. They compete under a temperature that follows their use.
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
    sae = SAE(config.d_in, config.d_sae, chain, pre_bias=options.pre_bias)
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
# Without competition there is no cut either: L0 counts every positive latent.
ABLATIONS: tuple[tuple[str, str, tuple[str, ...], dict[str, Any]], ...] = (
    ("all-at-once", "`progressive` with every latent enabled from the start.", GROWTH, {"start": 1.0}),
    ("fixed-increment", "`progressive` that grows by 5 whatever the utilization.", ("n_ref",), {"hybrid": False}),
    ("no-ema", "`progressive` with the last batch's utilization, (3) at beta = 0.", (), {"beta": 0.0}),
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
        **PAPER,
    )(progressive)
