"""Paper 002's recipes: the model, its ablations and its baseline."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ...activation_functions import Activation, BatchTopK, ReLU, TopK
from ...losses import L1, MSE, AuxK, Reconstruction, reconstruction_weight
from ...mechanisms import BatchTopKThreshold, DeadLatents, UnitNormDecoder
from ...optimization import Optimization
from ...options import RecipeOptions
from ...recipe import recipe
from ...sae import SAE
from ...scaling import ScaleWithWidth
from ...schedules import warmup
from ...step import Mechanism
from ...variant import RunConfig, Variant
from ..baselines import relu
from .pairs import Coactivation, DensePairs, PairTable
from .penalty import CompetitionLoss, add_competition, competition_strength

PAPER: dict[str, Any] = {"paper": "002", "equations": "(3)-(5)"}
PAPER_EXACT: dict[str, tuple[Any, str]] = {
    "tau_on": ("lift", "chance is 1 on the scale of c and tau is 0.6, so most independent pairs pass"),
    "reduction": ("sum", "over n^2 pairs of random rows it is n^2/d, thousands of times the reconstruction"),
    "pair_store": ("dense", "a sum over all pairs needs all of them: n^2 entries"),
}

SWITCHED_OFF = {name: ("pair_store", ("dense",)) for name in ("pairs", "refresh", "turns")}


@dataclass(frozen=True)
class CompetitionOptions(RecipeOptions):
    k: int = ScaleWithWidth(100)
    """Active latents per token. The paper's results also say 320 (`competition-k320`)."""
    strength: float = 0.03
    """Strength of the competition loss (5)."""
    strength_warmup: int | None = None
    """Steps t_w over which the strength rises (4). None: 2000, or 2000/4882 of the run if that is less."""
    tau: float = 0.6
    """Value that a pair must reach to be penalized."""
    tau_on: Literal["conditional", "lift"] = "conditional"
    """Scale of tau: the conditional probability P of one latent given the other, or the lift c of (3) (the paper)."""
    weight: Literal["lift", "conditional"] = "lift"
    """Weight of a pair in (5): its lift c, or its conditional probability."""
    pair_vec: Literal["decoder", "activation"] = "decoder"
    """Vectors compared in (5): rows of W_dec, or latents over the batch divided by sqrt(B)."""
    direction: Literal["symmetric", "child_only", "parent_only"] = "symmetric"
    """Latent of a pair that gets the gradient: both, the rarer one (child), or the other (parent)."""
    reduction: Literal["active_pairs", "sum", "n"] = "active_pairs"
    """active_pairs: mean over pairs that pass tau. sum: over all ordered pairs (the paper). n: that sum / d_sae."""
    diagonal: bool = False
    """Also penalize each latent's similarity to itself, as the printed sum over all i and j does (5)."""
    target: Literal["cofire", "absorption"] = "cofire"
    """Pairs to penalize. cofire: pairs that fire together (the paper). absorption: pairs with a decoder cosine above
    0.2 that rarely fire together."""
    beta: float = 0.99
    """Decay of the averages of p and J, per step."""
    pair_store: Literal["table", "dense"] = "table"
    """table: track a fixed number of pairs. dense: track all pairs, n^2 entries (the paper)."""
    pairs: int = 16
    """Pairs per latent that the table tracks, on average."""
    refresh: int = 100
    """Number of steps from one search for better pairs to the next."""
    turns: int = 8
    """A step penalizes one in `turns` pairs of the table, different ones in each step. Their mean, or their scaled
    sum, is the estimate for the whole table. 1: the whole table in every step. The mean is 0 in a step in which no pair
    passes tau, so on average it is too small if fewer pairs than `turns` pass."""
    memory_gb: float = 2.0
    """Memory that the statistics of pairs may take, in GB. A run that needs more is refused before it starts."""
    act: Literal["topk", "batchtopk", "relu"] = "topk"
    """Activation function. The paper bounds L0 by k and does not name one."""
    l1: float = 0.04
    """Strength of the L1 penalty (5)."""
    l1_warmup: int | None = None
    """Steps over which the L1 penalty rises from zero. None: a twentieth of the run."""
    aux: float = 0.0
    """Weight of AuxK, which revives dead latents. The paper does not use it."""
    reconstruction: Reconstruction = "sum"
    """Sum or mean of the squared error over d_in. The paper's numbers suggest mean, with normalize=none."""
    pre_bias: bool = False
    """Subtract b_dec from the encoder's input. The paper writes E(x)."""

    def validation_errors(self, config: RunConfig) -> Iterator[str]:
        if not 0 <= self.beta < 1:
            yield f"invalid beta={self.beta:g}: expected a decay from 0 to below 1."
        for name in ("pairs", "refresh", "turns"):
            if (count := getattr(self, name)) < 1:
                yield f"invalid {name}={count}: expected 1 or more."
        if self.turns > 0 and self.pair_store == "table" and self.pairs * config.d_sae % self.turns:
            yield (
                f"turns={self.turns} does not divide the table's {self.pairs} pairs for each of {config.d_sae} latents:"
                f" give a divisor of pairs={self.pairs}."
            )
        if self.tau < 0:
            yield f"invalid tau={self.tau:g}: below 0 every pair would pass."
        if self.diagonal and self.target == "absorption":
            yield "diagonal=true has no effect with target=absorption: a latent never fires without itself."
        limit = self.memory_gb
        if self.pair_store == "dense" and (needed := DensePairs.gigabytes(config.d_sae)) > limit:
            yield (
                f"pair_store=dense takes {needed:.1f} GB for {config.d_sae} latents, eight matrices of n x n in "
                f"float32, but memory_gb={limit:g}: use pair_store=table, a smaller --width, or raise memory_gb."
            )
        if self.pair_store == "table" and (needed := PairTable.gigabytes(self.pairs * config.d_sae)) > limit:
            yield (
                f"pair_store=table takes {needed:.1f} GB for {self.pairs} pairs per latent, but memory_gb={limit:g}: "
                "set fewer pairs, or raise memory_gb."
            )


@recipe("competition", paper_exact=PAPER_EXACT, switched_off=SWITCHED_OFF, **PAPER)
def competition(config: RunConfig, options: CompetitionOptions) -> Variant:
    """TopK; latents that fire together are pushed apart.

    Pairs that fire together are penalized for the similarity of their decoder rows.
    """
    variant = topk_with_l1(config, options)
    loss = CompetitionLoss(
        pair_statistics(config, options),
        options.k / config.d_sae,
        options.tau,
        options.tau_on,
        options.weight,
        options.pair_vec,
        options.direction,
        options.reduction,
        options.target,
        options.diagonal,
    )
    steps = options.strength_warmup
    if steps is None:
        steps = min(2000, round(config.steps * 2000 / 4882))
    return add_competition(variant, competition_strength(options.strength, steps), loss)


def topk_with_l1(config: RunConfig, options: CompetitionOptions) -> Variant:
    """The model of (1), before (5) is added."""
    dead = DeadLatents(config.d_sae, config.dead_after_tokens)
    mechanisms: list[Mechanism] = [UnitNormDecoder()]
    activation: Activation = ReLU()
    if options.act == "topk":
        activation = TopK(options.k)
    elif options.act == "batchtopk":
        activation = BatchTopK(options.k)
        mechanisms.insert(0, BatchTopKThreshold(activation))
    variant = Variant(
        SAE(config.d_in, config.d_sae, [activation], pre_bias=options.pre_bias),
        {
            "mse": (reconstruction_weight(options.reconstruction, config.d_in), MSE()),
            "l1": (warmup(options.l1, config.penalty_warmup(options.l1_warmup)), L1()),
        },
        mechanisms,
        Optimization(),
        dead=dead,
    )
    if options.aux:
        variant.add_term("aux", options.aux, AuxK(dead, max(1, config.d_in // 2)))
    return variant


def pair_statistics(config: RunConfig, options: CompetitionOptions) -> Coactivation:
    if options.pair_store == "dense":
        return DensePairs(config.d_sae, options.beta)
    by = "cofire" if options.target == "cofire" else "cosine"
    return PairTable(config.d_sae, options.pairs * config.d_sae, options.beta, options.refresh, by, options.turns)


# The paper does not say how small the reduced dictionary is.
ABLATIONS: tuple[tuple[str, int, str, dict[str, Any]], ...] = (
    ("no-warmup", 8, "`competition` at full strength from the first step.", {"strength_warmup": 0}),
    ("off", 8, "`competition` with strength zero; its statistics are kept.", {"strength": 0.0}),
    ("small", 1, "`competition` in a dictionary of d_in latents.", {}),
    ("k320", 8, "`competition` with the 320 latents per token of the paper's results.", {"k": ScaleWithWidth(320)}),
)
for _name, _width, _summary, _fixed in ABLATIONS:
    recipe(
        f"competition-{_name}",
        width=_width,
        paper_exact=PAPER_EXACT,
        summary=_summary,
        fixed=_fixed,
        switched_off=SWITCHED_OFF,
        **PAPER,
    )(competition)


@recipe("competition-baseline", paper="002", equations="(1)", paper_exact={})
def baseline(
    config: RunConfig,
    l1: float = 0.04,
    l1_warmup: int | None = None,
    reconstruction: Reconstruction = "sum",
    pre_bias: bool = False,
) -> Variant:
    """ReLU latents and an L1 penalty: the paper's baseline.

    Args:
        l1: Strength of the L1 penalty.
        l1_warmup: Steps over which the L1 penalty rises from zero. None: a twentieth of the run.
        reconstruction: Sum or mean of the squared error over d_in. The paper's numbers suggest mean, with
            normalize=none.
        pre_bias: Subtract b_dec from the encoder's input. The paper writes E(x).
    """
    variant = relu(config, l1=l1, l1_warmup=l1_warmup, pre_bias=pre_bias)
    variant.add_term("mse", reconstruction_weight(reconstruction, config.d_in), MSE())
    return variant
