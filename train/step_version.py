"""The version number of a training step's arithmetic, and how far the results of two versions can differ.

Different versions of a step compute the same sums in a different order, so the sums are rounded differently. A run that
was interrupted under one version and resumed under another is not bit-identical to a run under either version alone.
"""

from collections.abc import Mapping
from typing import NamedTuple

# Increase this number by one in every commit after which a recipe's step, on a CPU with --accumulate 1, gives results
# that are not bit-identical to those before, whether in its losses, gradients, optimizer or mechanisms. To see whether
# bits change, train before and after the commit on one machine and compare sae.safetensors. tests/compatibility checks
# resumed runs against the bounds below. A change that alters results by more than rounding needs a new option instead
# of a new version, so that earlier runs keep the old behaviour. run.json and the checkpoints record the version as
# `step_version`; where `step_version` is missing, the version is 1.
STEP_VERSION = 4

MEASURED_STEPS = 25  # that the interrupted runs in tests/compatibility have left; the bounds hold for this many steps


class RoundingBounds(NamedTuple):
    """The largest differences caused by rounding within `MEASURED_STEPS`, each relative to the value itself."""

    weights: float = 1e-5  # |new - old| / |old|, where all tensors of an SAE are joined into one vector
    loss: float = 1e-5
    metrics: float = 1e-4  # every other logged metric


# For recipes that select latents by rank, where rounding decides which of two nearly equal latents is selected.
BY_RANK = RoundingBounds(1e-3, 3e-4, 1e-3)
RANKING = (
    "topk", "batchtopk", "matryoshka", "ortsae", "switch", "competition", "competition-no-warmup", "competition-off",
    "competition-small", "competition-k320", "hierarchical-batchtopk", "hierarchical-topk320", "frozen-decoder",
    "soft-frozen-decoder", "frozen-encoder", "collapse-09",
)  # fmt: skip
# Recipes whose results differ by more than the default bounds. Measured by benchmarks/step_versions.py; the bounds are
# at least three times the differences that it finds.
WIDER: Mapping[str, RoundingBounds] = {
    **dict.fromkeys(RANKING, BY_RANK),
    "gated": RoundingBounds(1e-3, 1e-5, 1e-4),
    "hierarchical-window": RoundingBounds(1e-3, 1e-5, 1e-3),
    "collapse-10": BY_RANK._replace(metrics=3e-2),  # its metric rows_projected is sensitive to small differences
    "p-anneal": RoundingBounds(1e-2, 1e-3, 0.1),  # its gradient is unbounded near zero
}


def rounding_bounds(recipe: str) -> RoundingBounds:
    """The bounds of a recipe."""
    return WIDER.get(recipe, RoundingBounds())


def describe_version_change(recipe: str, version: int) -> str:
    """A note for a user who resumes a run from a checkpoint of another version."""
    bounds = rounding_bounds(recipe)
    return (
        f"its checkpoint was written by version {version} of the training step, and the run continues with version "
        f"{STEP_VERSION}, which rounds differently. After {MEASURED_STEPS} steps, the weights of {recipe} differ from "
        f"those of a run with one version by at most {bounds.weights:g} of their norm, and the loss by at most "
        f"{bounds.loss:g} of its value. The differences grow with the number of steps, as between two machines. For "
        "bit-identical results, resume with the version of sae that began the run."
    )
