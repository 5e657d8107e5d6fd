"""HierarchicalSAE (paper 004) and its five ablations, each adding to the one before.

    lambda = lambda_0 (1 - t/T),  lambda_0 = 1/sqrt(d_in)                       (3)  linear
    dead latents restart on tokens with a high loss                                  resample
    p_i    = share of the last 100 steps in which i fired; dead is p_i < 0.01   (4)  window
    alpha  = clamp(2.5 / L_recon, 0.1, 2)                                       (5)  adaptive
    L      = |x - x_hat|^2 + lambda alpha |f|_1                                 (6)
    W_enc,i <- (W_enc,i + W_enc,j)/2 where cos(i, j) > 0.9, every 100 steps     (7)  hierarchical

lambda ends at zero: what is trained is close to a dense autoencoder (the paper's L0 is 1,735 of 2,304), and the paper's
best row is `hierarchical-linear`. Paper: does not state warm-up or decay of the rate.

With `--l0 N` the run ends with N latents a token. That contradicts (3), whose penalty ends at zero: lambda falls for a
twentieth of the run, and is then what N needs.

Paper: says that its input is normalised, and prints losses that are sums over raw activations; L_recon in (5) is in
these units whatever the input, and 2.5 belongs to their variance at its layer, 24.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ...common.errors import UsageError
from ..losses import L1, MSE
from ..mechanisms import DeadLatents, ResampleDead, UnitNormDecoder, reset_adam_state
from ..recipe import recipe, register_ablation
from ..sae import SAE
from ..scaling import ScaleWithVariance, ScaleWithWidth
from ..schedules import Coefficient, linear, product
from ..step import Mechanism, Step
from ..variant import Optimization, RunConfig, Variant
from . import baselines

PAPER = {"paper": "004", "width": 1}
OPTIMIZATION = Optimization(weight_decay=0.01, clip=1.0)
PAPER_EXACT = {
    "stability": ("mean", "of a sparse SAE most latents fire for less than 1 % of tokens, so most of them restart"),
    "recon_in_alpha": ("sum", "a token's summed error is in the thousands, so alpha is 0.1 throughout"),
}


class ResampleByWindow(ResampleDead):
    """`Resample` of latents with p_i < `below` over the last `every` steps (4).

    By `stability`, a step counts for p_i if `any` of its tokens fires i, or by its `mean` share of tokens that do.
    Paper: does not say which; by `mean`, most latents of a sparse SAE are dead. A latent that was restarted has a full
    window before it can be restarted again. Paper: its sum has w + 1 terms for a window of w.
    """

    fired_WF: Tensor  # the last W steps, in a ring

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


def matching(cosine_FF: Tensor, above: float) -> tuple[Tensor, Tensor]:
    """Disjoint pairs i < j with cosine above `above`: the most similar first, no latent twice."""
    i_P, j_P = (cosine_FF.triu(1) > above).nonzero(as_tuple=True)
    order_P = cosine_FF[i_P, j_P].argsort(descending=True, stable=True)
    taken: set[int] = set()
    pairs = []
    for i, j in zip(i_P[order_P].tolist(), j_P[order_P].tolist(), strict=True):
        if i not in taken and j not in taken:
            taken |= {i, j}
            pairs.append((i, j))
    i_M, j_M = torch.tensor(pairs, dtype=torch.int64, device=cosine_FF.device).view(-1, 2).unbind(1)
    return i_M, j_M


class Merge(Mechanism):
    """Of two latents i, j with cosine over `above`, i becomes the average of both (7), and Adam forgets them.

    Paper: does not say of what the cosine is, nor what becomes of j, of W_dec and of b_enc. Cosines are of the rows of
    W_dec, or of the columns of W_enc (`on`). b_enc is averaged as W_enc is; W_dec,i is the direction of W_dec,i +
    W_dec,j. With `weights` = activity each counts by how often it fired lately. The `partner` j is restarted
    (`recycle`), or silent for ever (`disable`): a latent with W_enc,j = 0 and b_enc,j = 0 has no gradient.
    """

    merged: Tensor  # () int64, in all
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
        self.resample.fired_WF.masked_fill_(self.disabled_F, 1)  # nobody restarts them
        self.resample.dead.since_F.masked_fill_(self.disabled_F, 0)

    def every_n_steps(self, step: Step) -> None:
        if int(step.i) > self.resample.until:
            return
        sae = step.sae
        rows_FD = sae.W_dec.data if self.on == "decoder" else sae.W_enc.data.T
        unit_FD = rows_FD / rows_FD.norm(dim=1, keepdim=True).clamp_min(1e-12)
        unit_FD = unit_FD.masked_fill(self.disabled_F[:, None], 0)
        i_M, j_M = matching(unit_FD @ unit_FD.T, self.above)
        share_M = torch.full(i_M.shape, 0.5, device=i_M.device)
        if self.weights == "activity":
            fired_F = self.resample.fired_WF.mean(0)
            share_M = fired_F[i_M] / (fired_F[i_M] + fired_F[j_M]).clamp_min(1e-12)
        sae.W_enc.data[:, i_M] = torch.lerp(sae.W_enc.data[:, j_M], sae.W_enc.data[:, i_M], share_M)
        sae.b_enc.data[i_M] = torch.lerp(sae.b_enc.data[j_M], sae.b_enc.data[i_M], share_M)
        direction_MD = torch.lerp(sae.W_dec.data[j_M], sae.W_dec.data[i_M], share_M[:, None])
        sae.W_dec.data[i_M] = direction_MD / direction_MD.norm(dim=1, keepdim=True)
        reset_adam_state(step, torch.cat([i_M, j_M]))
        if self.partner == "recycle":
            self.resample.restart(step, j_M)
        else:
            sae.W_enc.data[:, j_M] = 0
            sae.b_enc.data[j_M] = 0
            self.disabled_F[j_M] = True
        self.merged += len(i_M)

    def scalars(self) -> dict[str, Tensor]:
        return {"merged": self.merged}


class Modulate(Mechanism):
    """alpha = clamp(target / L_recon, low, high), without a gradient (5); a coefficient, and its average as state.

    L_recon in the units of the cache, whose rows were divided by `scale`, by `reading`
        mean   the mean squared error of an element: at the paper's explained variance 2.35 = 0.098 * 24, so alpha is 1.06
        sum    the squared error of a token, which the paper's loss of 4,668 is: alpha is 0.1, always
    averaged over steps with `ema`.
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

    def averaged(self, step: Step) -> Tensor:
        error = step.error_BD.detach().square()
        now = self.scale() ** 2 * (error.mean() if self.reading == "mean" else error.sum(1).mean())
        return torch.where(step.i == 0, now, torch.lerp(now, self.average, self.ema))

    def forward(self, step: Step) -> Tensor:
        return (self.target / self.averaged(step)).clamp(self.low, self.high)

    def after_step(self, step: Step) -> None:
        self.alpha.copy_(self(step))
        self.average.copy_(self.averaged(step))

    def scalars(self) -> dict[str, Tensor]:
        return {"alpha": self.alpha}


def noted(name: str, coefficient: Coefficient) -> Coefficient:
    """The coefficient, its value left in the step's notes."""

    def value(step: Step) -> Tensor:
        step.metrics[name] = torch.as_tensor(coefficient(step))
        return step.metrics[name]

    return value


def build(
    config: RunConfig,
    restarts: Literal["window", "dead", "never"] = "window",
    adaptive: bool = True,
    merging: bool = True,
    l1: float | None = None,
    l1_end: float = 0.0,
    resample_every: int = 100,
    window: int = 100,
    below: float = 0.01,
    stability: Literal["any", "mean"] = "any",
    recon_in_alpha: Literal["mean", "sum"] = "mean",
    target: float = ScaleWithVariance(2.5),
    alpha_low: float = 0.1,
    alpha_high: float = 2.0,
    alpha_ema: float = 0.0,
    merge_above: float = 0.9,
    merge_every: int = 100,
    merge_on: Literal["decoder", "encoder"] = "decoder",
    merge_weights: Literal["equal", "activity"] = "equal",
    merge_partner: Literal["recycle", "disable"] = "recycle",
    pre_bias: bool = False,
) -> Variant:
    counts = {"resample_every": resample_every, "window": window, "merge_every": merge_every}
    if wrong := [f"{name}={count}" for name, count in counts.items() if count < 1]:
        raise UsageError(f"{', '.join(wrong)} is no number of steps: give 1 or more.")
    sae = SAE(config.d_in, config.d_sae, pre_bias=pre_bias)
    dead = DeadLatents(config.d_sae, config.dead_after_tokens)
    penalty = noted("lambda", linear(config.d_in**-0.5 if l1 is None else l1, l1_end, config.steps))  # (3)
    until = config.steps * 9 // 10  # Paper: to the end. A latent restarted just before it would stay as it was drawn.
    mechanisms: list[Mechanism] = []
    if adaptive:
        modulate = Modulate(lambda: variant.scale, recon_in_alpha, target, alpha_low, alpha_high, alpha_ema)
        penalty = product(penalty, modulate)
        mechanisms.append(modulate)
    if restarts == "window":
        resample = ResampleByWindow(dead, window, until, below, stability)
        if merging:
            mechanisms.append(Merge(resample, merge_above, merge_every, merge_on, merge_weights, merge_partner))
        mechanisms.append(resample)
    elif restarts == "dead":
        # Paper: restarts one ablation before the window says who is dead; until then it is the house's dead latents.
        mechanisms.append(ResampleDead(dead, resample_every, until))
    terms = {"mse": (1.0, MSE()), "l1": (penalty, L1())}  # (6)
    variant = Variant(sae, terms, [*mechanisms, UnitNormDecoder()], OPTIMIZATION, dead=dead)
    return variant  # by this name `modulate` finds the scale


RESTART = ("resample_every",)
WINDOW = ("window", "below", "stability")
ADAPTIVE = ("recon_in_alpha", "target", "alpha_low", "alpha_high", "alpha_ema")
MERGE = ("merge_above", "merge_every", "merge_on", "merge_weights", "merge_partner")

for _name, _summary, _equations, _idle, _fixed in (
    (
        "-linear",
        "ReLU latents under an L1 penalty that falls linearly to zero. `l1` None: 1/sqrt(d_in).",
        "(1)-(3)",
        RESTART + WINDOW + ADAPTIVE + MERGE,
        {"restarts": "never", "adaptive": False, "merging": False},
    ),
    (
        "-resample",
        "`hierarchical-linear` whose dead latents restart on badly reconstructed tokens.",
        "(1)-(3)",
        WINDOW + ADAPTIVE + MERGE,
        {"restarts": "dead", "adaptive": False, "merging": False},
    ),
    (
        "-window",
        "`hierarchical-resample` where dead means silent over a window of steps.",
        "(1)-(4)",
        RESTART + ADAPTIVE + MERGE,
        {"restarts": "window", "adaptive": False, "merging": False},
    ),
    (
        "-adaptive",
        "`hierarchical-window` with a penalty that weakens while the reconstruction is bad.",
        "(1)-(6)",
        RESTART + MERGE,
        {"restarts": "window", "adaptive": True, "merging": False},
    ),
    (
        "",
        "`hierarchical-adaptive` that merges latents with nearly the same direction.",
        "(1)-(7)",
        RESTART,
        {"restarts": "window", "adaptive": True, "merging": True},
    ),
):
    register_ablation(
        f"hierarchical{_name}",
        build,
        _summary,
        {"equations": _equations, "paper_exact": PAPER_EXACT, **PAPER},
        *_idle,
        **_fixed,
    )


def with_optimization(variant: Variant) -> Variant:
    """A baseline trained as the paper trains everything it compares."""
    variant.optimization = OPTIMIZATION
    return variant


@recipe("hierarchical-topk320", paper_exact={}, **PAPER)
def topk(config: RunConfig, k: int = ScaleWithWidth(320), aux: float = 1 / 32) -> Variant:
    """The paper's baseline: `topk`."""
    return with_optimization(baselines.topk(config, k=k, aux=aux))


@recipe("hierarchical-batchtopk", paper_exact={}, **PAPER)
def batchtopk(config: RunConfig, k: float = ScaleWithWidth(320), aux: float = 1 / 32) -> Variant:
    """The second baseline: `batchtopk`. Paper: gives it no k; this is that of the first."""
    return with_optimization(baselines.batchtopk(config, k=k, aux=aux))


@recipe("hierarchical-l1", paper_exact={}, **PAPER)
def l1(config: RunConfig, l1: float = 0.04, l1_warmup: int = 0, pre_bias: bool = False) -> Variant:
    """The third baseline: `relu` under a constant L1 penalty."""
    return with_optimization(baselines.relu(config, l1=l1, l1_warmup=l1_warmup, pre_bias=pre_bias))
