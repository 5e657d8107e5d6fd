"""Short runs that several test files train."""

from pathlib import Path

import torch

from sae.train.loop import Trainer
from sae.train.plan import TrainConfig, plan_training
from sae.train.recipe import find_recipe
from sae.train.run import TrainProgress, run_training
from sae.train.variant import RunConfig

CHECKPOINTS = "*/checkpoints/*"  # the paths of their files


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


SETTING = RunConfig(32, 128, 40, 64)


def trained_recipe(cache, config: RunConfig, name: str, batches: list[torch.Tensor], **options: object) -> Trainer:
    """A recipe trained to the end of its config, with metrics of the last tenth of the steps."""
    torch.manual_seed(0)
    variant = find_recipe(name).make(config, options)
    mean_D = torch.from_numpy(cache.mean("layer_00")).float()
    variant.set_normalization(mean_D, cache.statistics("layer_00")["mean_square_norm"])
    trainer = Trainer(variant, config.steps, "cpu")
    for number in range(config.steps):
        trainer.run_periodic(number, trainer.step(batches[number % len(batches)]))
        if number == config.steps * 9 // 10:
            trainer.pop_metrics()
    return trainer
