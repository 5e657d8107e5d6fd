"""Short runs that several test files train."""

from pathlib import Path

from sae.train.plan import TrainConfig, plan_training
from sae.train.run import TrainProgress, run_training


def make_config(cache, *variants: str, **changes) -> TrainConfig:
    """Twelve steps of 64 tokens, a checkpoint after every fourth."""
    settings = dict(
        layers=[0],
        caches=[cache.folder],
        steps=12,
        batch_size=64,
        width="128",
        device="cpu",
        checkpoint_every=4,
        log_every=2,
    )
    return TrainConfig(list(variants), **settings | changes)


def train(config: TrainConfig, report: TrainProgress | None = None) -> list[Path]:
    plan = plan_training(config)
    run_training(plan, report or TrainProgress())
    return [run.folder for run in plan.runs]
