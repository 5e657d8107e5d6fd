"""The workflow of `sae demo`: the three stages on the embedded model and text, without any downloads."""

from collections.abc import Sequence
from pathlib import Path

from ..common.errors import UsageError
from ..evaluate.plan import EvaluateConfig
from ..harvest import mini
from ..harvest.plan import HarvestConfig
from ..train.plan import TrainConfig

TOKENS, FEWEST_TOKENS = 200_000, 2000


def harvest_config(tokens: int | None = None) -> HarvestConfig:
    """Layers 5, 12 and 19 of gemma-2-mini on the standard library's text."""
    tokens = TOKENS if tokens is None else tokens
    if tokens < FEWEST_TOKENS:
        raise UsageError(f"--tokens {tokens} are too few to train on; give {FEWEST_TOKENS} or more.")
    return HarvestConfig(model=mini.NAME, tokens=tokens)


def train_config(cache: Path, steps: int) -> TrainConfig:
    """Four recipes on layer 12.

    `decorrelation` penalizes more pairs of latents than in the paper: if it penalizes the paper's 0.1 % of pairs, it
    does not lower the mean correlation here (numbers: docs/lab/log.md).
    """
    return TrainConfig(
        variants=("relu", "topk", "batchtopk", "decorrelation"),
        layers=(12,),
        caches=(cache,),
        steps=steps,
        batch_size=1024,
        width="4x",
        options=("decorrelation.fraction=0.05", "decorrelation.strength=0.2"),
    )


def evaluate_config(runs: Sequence[Path], tokens: int | None = None) -> EvaluateConfig:
    """Measure what each SAE costs the model on held-out text."""
    return EvaluateConfig(runs=runs, suite="core", tokens=(TOKENS if tokens is None else tokens) // 12)
