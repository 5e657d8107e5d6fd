"""HierarchicalSAE (paper 004) and its five ablations, each of which adds one mechanism to the one before.

    lambda = lambda_0 (1 - t/T),  lambda_0 = 1/sqrt(d_in)                       (3)  linear
    dead latents restart on tokens with a high loss                                  resample
    p_i    = share of the last 100 steps in which i fired; dead is p_i < 0.01   (4)  window
    alpha  = clamp(2.5 / L_recon, 0.1, 2)                                       (5)  adaptive
    L      = |x - x_hat|^2 + lambda alpha |f|_1                                 (6)
    W_enc,i <- (W_enc,i + W_enc,j)/2 where cos(i, j) > 0.9, every 100 steps     (7)  hierarchical

lambda ends at zero: the result is close to a dense autoencoder (the paper's L0 is 1,735 of 2,304), and the paper's best
row is `hierarchical-linear`. Paper: does not state warm-up or decay of the learning rate.

With `--l0 N` the run ends with N latents per token. That contradicts (3), whose penalty ends at zero: lambda falls for
a twentieth of the run, and is then whatever N needs.

Paper: says that its input is normalized, and prints losses that are sums over raw activations; L_recon in (5) is in
these units whatever the input, and 2.5 belongs to their variance at its layer, 24.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..losses import L1, MSE
from ..mechanisms import DeadLatents, ResampleDead, UnitNormDecoder, reset_adam_state
from ..optimization import Optimization
from ..options import RecipeOptions
from ..recipe import recipe
from ..sae import SAE
from ..scaling import ScaleWithVariance, ScaleWithWidth
from ..schedules import Coefficient, linear, product
from ..step import Mechanism, Step
from ..variant import RunConfig, Variant
from . import baselines

PAPER: dict[str, Any] = {"paper": "004", "width": 1}
OPTIMIZATION = Optimization(weight_decay=0.01, clip=1.0)
PAPER_EXACT: dict[str, tuple[Any, str]] = {
    "stability": ("mean", "of a sparse SAE most latents fire for less than 1 % of tokens, so most of them restart"),
    "recon_in_alpha": ("sum", "a token's summed error is in the thousands, so alpha is 0.1 throughout"),
}


# (4): which latents are dead.


class ResampleByWindow(ResampleDead):
    """Resamples latents with p_i < `below` over the last `every` steps (4).

    By `stability`, a step counts for p_i if `any` of its tokens fires i, or by its `mean` share of tokens that do.
    Paper: does not say which; by `mean`, most latents of a sparse SAE are dead. A restarted latent has a full window
    before it can be restarted again. Paper: its sum has w + 1 terms for a window of w.
    """

    fired_WF: Tensor  # the last W steps, as a ring buffer

    def __init__(self, dead: DeadLatents, window: int, until: int, below: float, stability: str) -> None:
        super().__init__(dead, window, until)
        self.below, self.stability = below, stability
        self.register_buffer("fired_WF", torch.ones(window, len(dead.since_F)))

    def after_step(self, step: Step) -> None:
        if self.stability == "any":
            fired_F = step.fired_F.float()
        else:
            fired_F = (step.f_BF.detach() != 0).float().mean(0)
        self.fired_WF.index_copy_(0, (step.i % len(self.fired_WF)).view(1), fired_F[None])

    def silent(self) -> Tensor:
        return self.fired_WF.sum(0) < self.below * len(self.fired_WF)

    def restart(self, step: Step, index_N: Tensor) -> Tensor:
        restarted_N = super().restart(step, index_N)
        self.fired_WF[:, restarted_N] = 1
        return restarted_N

    def scalars(self) -> dict[str, Tensor]:
        return super().scalars() | {"stability": self.fired_WF.mean()}


# (5): the penalty weakens while the reconstruction is bad.


class AdaptivePenalty(Mechanism):
    """alpha = clamp(target / L_recon, low, high), without a gradient (5). A coefficient, with its average as state.

    L_recon is in the units of the cache, whose rows were divided by `scale`. By `reading` it is
        mean   the mean squared error of an element: at the paper's explained variance 2.35 = 0.098 * 24, so alpha is
               1.06
        sum    the squared error of a token, as the paper's loss of 4,668 is: alpha is 0.1, always
    averaged over steps with decay `ema`.
    """

    average: Tensor  # ()
    alpha: Tensor  # ()

    def __init__(
        self, scale: Callable[[], Tensor], reading: str, target: float, low: float, high: float, ema: float
    ) -> None:
        super().__init__()
        self.scale, self.reading, self.target, self.low, self.high, self.ema = scale, reading, target, low, high, ema
        self.register_buffer("average", torch.zeros(()))
        self.register_buffer("alpha", torch.ones(()))

    def recent_error(self, step: Step) -> Tensor:
        """L_recon, this step included."""
        square_BD, square = step.error_BD.detach().square(), self.scale() ** 2
        if square.dim():  # of each dimension (normalize=standardize)
            square_BD, square = square_BD * square, square.new_ones(())
        error = square * (square_BD.mean() if self.reading == "mean" else square_BD.sum(1).mean())
        return torch.where(step.i == 0, error, torch.lerp(error, self.average, self.ema))

    def forward(self, step: Step) -> Tensor:
        return (self.target / self.recent_error(step)).clamp(self.low, self.high)

    def after_step(self, step: Step) -> None:
        self.alpha.copy_(self(step))
        self.average.copy_(self.recent_error(step))

    def scalars(self) -> dict[str, Tensor]:
        return {"alpha": self.alpha}


# (7): latents with nearly the same direction are merged.


def match_pairs(cosine_FF: Tensor, above: float) -> tuple[Tensor, Tensor]:
    """Disjoint pairs i < j with cosine above `above`: the most similar first, no latent twice."""
    i_P, j_P = (cosine_FF.triu(1) > above).nonzero(as_tuple=True)
    order_P = cosine_FF[i_P, j_P].argsort(descending=True, stable=True)
    matched: set[int] = set()
    pairs = []
    for i, j in zip(i_P[order_P].tolist(), j_P[order_P].tolist(), strict=True):
        if i not in matched and j not in matched:
            matched |= {i, j}
            pairs.append((i, j))
    i_M, j_M = torch.tensor(pairs, dtype=torch.int64, device=cosine_FF.device).view(-1, 2).unbind(1)
    return i_M, j_M


class MergeSimilar(Mechanism):
    """Given two latents i, j with a cosine over `above`, i becomes the average of both (7); their Adam state is reset.

    Paper: does not say of what the cosine is, nor what becomes of j, of W_dec and of b_enc. Cosines are of the rows of
    W_dec, or of the columns of W_enc (`on`). b_enc is averaged as W_enc is; W_dec,i is the direction of W_dec,i +
    W_dec,j. With `weights` = activity each latent is weighted by how often it fired lately. The `partner` j is
    restarted (`recycle`), or silent from then on (`disable`): with W_enc,j = 0 and b_enc,j = 0 it has no gradient.
    """

    merged: Tensor  # () int64, in total
    disabled_F: Tensor  # bool

    def __init__(
        self, resample: ResampleByWindow, above: float, every: int, on: str, weights: str, partner: str
    ) -> None:
        super().__init__()
        self.resample, self.above, self.every = resample, above, every
        self.on, self.weights, self.partner = on, weights, partner
        self.register_buffer("merged", torch.zeros((), dtype=torch.int64))
        self.register_buffer("disabled_F", torch.zeros(resample.fired_WF.shape[1], dtype=torch.bool))

    def after_step(self, step: Step) -> None:
        # A disabled latent is neither dead nor silent, so nothing restarts it.
        self.resample.fired_WF.masked_fill_(self.disabled_F, 1)
        self.resample.dead.since_F.masked_fill_(self.disabled_F, 0)

    def every_n_steps(self, step: Step) -> None:
        if int(step.i) > self.resample.until:
            return
        i_M, j_M = self.similar_pairs(step.sae)
        share_M = torch.full(i_M.shape, 0.5, device=i_M.device)
        if self.weights == "activity":
            fired_F = self.resample.fired_WF.mean(0)
            share_M = fired_F[i_M] / (fired_F[i_M] + fired_F[j_M]).clamp_min(1e-12)
        self.average_into_first(step.sae, i_M, j_M, share_M)
        reset_adam_state(step, torch.cat([i_M, j_M]))
        if self.partner == "recycle":
            self.resample.restart(step, j_M)
        else:
            step.sae.W_enc.data[:, j_M] = 0
            step.sae.b_enc.data[j_M] = 0
            self.disabled_F[j_M] = True
        self.merged += len(i_M)

    def similar_pairs(self, sae: SAE) -> tuple[Tensor, Tensor]:
        rows_FD = sae.W_dec.data if self.on == "decoder" else sae.W_enc.data.T
        unit_FD = rows_FD / rows_FD.norm(dim=1, keepdim=True).clamp_min(1e-12)
        unit_FD = unit_FD.masked_fill(self.disabled_F[:, None], 0)
        return match_pairs(unit_FD @ unit_FD.T, self.above)

    @staticmethod
    def average_into_first(sae: SAE, i_M: Tensor, j_M: Tensor, share_M: Tensor) -> None:
        """Latent i becomes share * i + (1 - share) * j, its decoder row unit."""
        sae.W_enc.data[:, i_M] = torch.lerp(sae.W_enc.data[:, j_M], sae.W_enc.data[:, i_M], share_M)
        sae.b_enc.data[i_M] = torch.lerp(sae.b_enc.data[j_M], sae.b_enc.data[i_M], share_M)
        direction_MD = torch.lerp(sae.W_dec.data[j_M], sae.W_dec.data[i_M], share_M[:, None])
        sae.W_dec.data[i_M] = direction_MD / direction_MD.norm(dim=1, keepdim=True)

    def scalars(self) -> dict[str, Tensor]:
        return {"merged": self.merged}


# The recipes.


def logged(name: str, coefficient: Coefficient) -> Coefficient:
    """The coefficient, whose value is logged as `name`."""

    def value(step: Step) -> Tensor:
        step.metrics[name] = torch.as_tensor(coefficient(step))
        return step.metrics[name]

    return value


@dataclass(frozen=True)
class HierarchicalOptions(RecipeOptions):
    restarts: Literal["window", "dead", "never"] = "window"
    """Latents that restart: silent over a window of steps (4), dead by the count of tokens, or none."""
    adaptive: bool = True
    """Weaken the penalty while the reconstruction is bad (5)."""
    merging: bool = True
    """Merge latents with nearly the same direction (7)."""
    l1: float | None = None
    """lambda_0 of (3), the strength of the L1 penalty at the first step. None: 1/sqrt(d_in)."""
    l1_end: float = 0.0
    """Strength of the L1 penalty at the last step (3)."""
    resample_every: int = 100
    """Steps between two restarts of dead latents, before there is a window."""
    window: int = 100
    """Steps w of the window (4), and between two restarts."""
    below: float = 0.01
    """A latent is dead if p_i is below this (4)."""
    stability: Literal["any", "mean"] = "any"
    """How a step counts for p_i (4): whether any of its tokens fires the latent, or the share of tokens that do."""
    recon_in_alpha: Literal["mean", "sum"] = "mean"
    """L_recon in (5): mean over d_in, or summed as in the paper's loss. In units of raw activations."""
    target: float = ScaleWithVariance(2.5)
    """L_recon at which alpha is 1 (5), in units of raw activations."""
    alpha_low: float = 0.1
    """Lower bound of alpha (5)."""
    alpha_high: float = 2.0
    """Upper bound of alpha (5)."""
    alpha_ema: float = 0.0
    """Decay of the average of L_recon in (5), per step. 0: the step's own error."""
    merge_above: float = 0.9
    """Cosine above which two latents are merged (7)."""
    merge_every: int = 100
    """Steps between two rounds of merging (7)."""
    merge_on: Literal["decoder", "encoder"] = "decoder"
    """Directions whose cosine counts in (7): rows of W_dec, or columns of W_enc."""
    merge_weights: Literal["equal", "activity"] = "equal"
    """Weights of the average in (7): equal, or how often each latent fired lately."""
    merge_partner: Literal["recycle", "disable"] = "recycle"
    """What becomes of the second latent of a merged pair: it restarts on a badly reconstructed token, or is silent."""
    pre_bias: bool = False
    """Subtract b_dec from the encoder's input. The paper's encoder sees x itself (1)."""

    def validation_errors(self, config: RunConfig) -> Iterator[str]:
        for name in ("resample_every", "window", "merge_every"):
            if (count := getattr(self, name)) < 1:
                yield f"invalid {name}={count}: expected 1 step or more."


def build(config: RunConfig, options: HierarchicalOptions) -> Variant:
    """The full model or one of its ablations, by `restarts`, `adaptive` and `merging`."""
    dead = DeadLatents(config.d_sae, config.dead_after_tokens)
    start = config.d_in**-0.5 if options.l1 is None else options.l1
    penalty = logged("lambda", linear(start, options.l1_end, config.steps))  # (3)
    mechanisms: list[Mechanism] = []
    if options.adaptive:
        adaptive = AdaptivePenalty(
            lambda: variant.scale,
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
    """Restarts of dead latents (4), and merging (7), which restarts the partners that it frees."""
    # Paper: to the end. A latent restarted just before it would stay as it was drawn.
    until = config.steps * 9 // 10
    if options.restarts == "never":
        return []
    if options.restarts == "dead":
        # Paper: restarts one ablation before the window says who is dead; until then by this package's dead latents.
        return [ResampleDead(dead, options.resample_every, until)]
    resample = ResampleByWindow(dead, options.window, until, options.below, options.stability)
    if not options.merging:
        return [resample]
    above, every, on = options.merge_above, options.merge_every, options.merge_on
    return [MergeSimilar(resample, above, every, on, options.merge_weights, options.merge_partner), resample]


RESTART = ("resample_every",)
WINDOW = ("window", "below", "stability")
ADAPTIVE = ("recon_in_alpha", "target", "alpha_low", "alpha_high", "alpha_ema")
MERGE = ("merge_above", "merge_every", "merge_on", "merge_weights", "merge_partner")
ABLATIONS: tuple[tuple[str, str, str, tuple[str, ...], dict[str, Any]], ...] = (
    (
        "hierarchical-linear",
        "ReLU latents under an L1 penalty that falls linearly to zero.",
        "(1)-(3)",
        RESTART + WINDOW + ADAPTIVE + MERGE,
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
        "`hierarchical-resample` with deadness judged over a window.",
        "(1)-(4)",
        RESTART + ADAPTIVE + MERGE,
        {"restarts": "window", "adaptive": False, "merging": False},
    ),
    (
        "hierarchical-adaptive",
        "`hierarchical-window` with a penalty that follows the error.",
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
        _name, equations=_equations, paper_exact=PAPER_EXACT, summary=_summary, unused=_unused, fixed=_fixed, **PAPER
    )(build)


def with_optimization(variant: Variant) -> Variant:
    """A baseline with the optimizer settings of everything the paper compares."""
    variant.optimization = OPTIMIZATION
    return variant


@recipe("hierarchical-topk320", paper_exact={}, **PAPER)
def topk(config: RunConfig, k: int = ScaleWithWidth(320), aux: float = 1 / 32) -> Variant:
    """The paper's TopK baseline.

    Args:
        k: Latents kept per token.
        aux: Weight of AuxK, which revives dead latents.
    """
    return with_optimization(baselines.topk(config, k=k, aux=aux))


@recipe("hierarchical-batchtopk", paper_exact={}, **PAPER)
def batchtopk(config: RunConfig, k: float = ScaleWithWidth(320), aux: float = 1 / 32) -> Variant:
    """The paper's BatchTopK baseline.

    Paper: gives it no k; this is that of its TopK baseline.

    Args:
        k: Latents kept per token, on average over the batch.
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
