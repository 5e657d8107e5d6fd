"""Recipes that the quick suite takes where the slow one takes all."""

import pytest

import sae.train.variants  # noqa: F401  (registers the recipes)
from sae.train.recipe import RECIPES

SOME = (
    "april", "batchtopk", "collapse-10", "competition", "decorrelation", "frozen-encoder", "gated", "hierarchical",
    "jumprelu", "matryoshka", "ortsae", "progressive", "relu", "switch", "topk",
)  # fmt: skip
"""At least one recipe of each file that defines recipes."""
FEW = ("batchtopk", "collapse-10", "competition", "hierarchical", "jumprelu", "switch")
"""The recipes whose steps differ most, for tests that take a second for each recipe."""
SOME_QUICK = [pytest.param(name, marks=() if name in SOME else pytest.mark.slow) for name in sorted(RECIPES)]
FEW_QUICK = [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in sorted(RECIPES)]
"""All recipes as test parameters; those that are not in `SOME`, or not in `FEW`, are marked slow."""
