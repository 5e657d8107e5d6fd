"""Short runs that several test files train."""

import itertools
import os
import random
import signal
import threading
from pathlib import Path

import torch

from sae.train.loop import Trainer
from sae.train.plan import TrainConfig, plan_training
from sae.train.recipe import find_recipe
from sae.train.run import TrainProgress, run_training
from sae.train.variant import RunConfig


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


def train_and_die(config: TrainConfig, file: int, moment: str) -> None:
    """Train until SIGKILL, in a process of its own: before or after the rename of the file with this number among those
    of all checkpoints, or up to 20 ms later, wherever the training and the writing thread then are.
    """
    replace, numbers = os.replace, itertools.count()

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def rename(source: Path, target: Path) -> None:
        due = "checkpoints" in target.parts and next(numbers) == file
        if due and moment == "before":
            die()
        replace(source, target)
        if due and moment == "after":
            die()
        if due:
            threading.Timer(random.Random(file).uniform(0, 0.02), die).start()

    os.replace = rename
    torch.set_num_threads(1)
    train(config)
    die()  # the last steps were faster


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
