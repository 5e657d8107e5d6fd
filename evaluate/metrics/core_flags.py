"""Core's flags: sentences for `MetricResult.flags` about numbers that make an SAE look better than it is.

Each of these SAEs is best in some column of the table: one that returns the mean of the text, one that never or always
fires, one without sparsity, and one with a wrong scale.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from .base import EvalTarget
from .latent_pairs import PAIRED_LATENTS
from .sae_statistics import SAEStatistics

# Beyond these limits, a flag is added.
MOSTLY_DEAD = 0.5  # share of the latents that are dead
NOT_SPARSE = 0.9  # share of d_in: with so many active latents, any rotation of the activations reconstructs nearly all
ALWAYS_ON = 0.99  # a latent that fires at a larger share of the tokens counts as always active
LIKE_THE_MEAN = 0.05  # explained variance below which an SAE is hardly better than the mean of the text
SCALES = (0.8, 1.25)  # limits of relative_reconstruction_bias, which is 1 if no other scale would reconstruct better
MIN_CE_COST = 0.02  # smallest CE in nats that zeroing the layer should cost

NO_PAIRS = "Not measured: correlations between latents and cosines between decoder rows (core.paired_latents is 0)."

Metrics = Mapping[str, Mapping[str, Any]]


def core_flags(target: EvalTarget, metrics: Metrics, stats: SAEStatistics) -> list[str]:
    """Sentences about misleading numbers. References get no flags, because they are degenerate by design."""
    if target.reference:
        return []
    left_out = [few_pairs(stats)] if stats.pairs else [NO_PAIRS]
    return [
        *sparsity_flags(metrics["sparsity"]["l0"], stats),
        *reconstruction_flags(metrics, stats),
        *filter(None, left_out),
    ]


def few_pairs(stats: SAEStatistics) -> str:
    """A flag if fewer latents were paired than by default, which makes the numbers hard to compare; otherwise ""."""
    assert stats.pairs
    latents, d_sae = stats.pairs.latents, len(stats.density())
    if latents >= min(PAIRED_LATENTS, d_sae):
        return ""
    return (
        f"Correlations between latents and cosines between decoder rows are computed from the pairs of {latents:,} of "
        f"{d_sae:,} latents (core.paired_latents)."
    )


def sparsity_flags(l0: float, stats: SAEStatistics) -> Iterator[str]:
    density_F, d_in = stats.density(), len(stats.sums["x"])
    dead = float((density_F == 0).double().mean())
    if l0 == 0:
        yield "L0 is 0: no latent ever fires, so the SAE returns only its decoder bias."
    elif dead > MOSTLY_DEAD:
        yield f"{dead:.0%} of the latents never fire on this text."
    if l0 >= NOT_SPARSE * d_in:
        yield (
            f"L0 is {l0:.1f} for {d_in:,} dimensions. With so many active latents, a mere rotation "
            "reconstructs everything, so a good reconstruction says nothing about the SAE."
        )
    always_F = density_F > ALWAYS_ON
    if l0 and float(density_F[always_F].sum()) > l0 / 2:
        yield (
            f"Most of the L0 of {l0:.1f} comes from {int(always_F.sum()):,} latents that fire at over "
            f"{ALWAYS_ON:.0%} of the tokens. This part of the SAE is dense, like a PCA."
        )


def reconstruction_flags(metrics: Metrics, stats: SAEStatistics) -> Iterator[str]:
    explained = metrics["reconstruction_quality"]["fve"]
    scale = metrics["shrinkage"]["relative_reconstruction_bias"]
    losses = metrics["model_performance_preservation"]
    cost = losses["ce_loss_with_ablation"] - losses["ce_loss_without_sae"]
    if count := int(stats.sums["not_finite"]):
        yield (
            f"The reconstruction is NaN or infinite at {count:,} of {stats.tokens:,} tokens, so the numbers "
            "computed from it are undefined."
        )
    if explained < LIKE_THE_MEAN:
        beside = "the mean of the text alone would reconstruct better"
        yield (
            f"The explained variance is {explained:.3f}: "
            f"{beside if explained < 0 else 'the SAE is hardly better than the mean of the text'}. KL and CE "
            "scores, which compare with a zeroed layer, and the cosine, which compares with the origin, can "
            "be high nevertheless."
        )
    if scale < SCALES[0] or scale > SCALES[1]:
        yield (
            f"Reconstructions are {scale:.2f} times as long as would fit best (relative_reconstruction_bias), which "
            "the cosine does not show. Check the scale of the activations that the SAE was trained on."
        )
    if cost < MIN_CE_COST:
        yield (
            f"Zeroing the layer costs the model only {cost:.3f} nats of CE. The CE score is a share of this "
            "cost, so it does not mean much."
        )
