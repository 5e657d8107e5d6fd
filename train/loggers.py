"""Loggers in addition to metrics.jsonl: TensorBoard, Weights & Biases and trackio. Packages are imported on use."""

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from ..common.errors import UsageError
from ..common.packages import import_extra
from .plan import Run

PROJECT = "sae"


class Logger(Protocol):
    """Receives the metrics of one run."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...
    def finish(self) -> None: ...


class TensorBoard:
    """Writes event files into the run folder. View them with `tensorboard --logdir runs`."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.writer = import_logger("tensorboard").SummaryWriter(str(folder / "tensorboard"))
        self.writer.add_text("run", "\n".join(f"    {name} = {value}" for name, value in config.items()))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self.writer.close()


def wandb(folder: Path, config: Mapping[str, Any]) -> Logger:
    """A run with the folder's name in the project `sae`. Resumes an existing run. WANDB_MODE=offline keeps it local."""
    module = import_logger("wandb")
    settings = module.Settings(silent=True)
    return module.init(
        project=PROJECT, name=folder.name, id=folder.name, dir=str(folder), config=dict(config), resume="allow",
        reinit="create_new", settings=settings,
    )  # fmt: skip


def trackio(folder: Path, config: Mapping[str, Any]) -> Logger:
    """A run with the folder's name in the project `sae`. View it with `trackio show --project sae`."""
    module = import_logger("trackio")
    with contextlib.redirect_stdout(io.StringIO()):  # standard output is for results
        return module.init(project=PROJECT, name=folder.name, config=dict(config), resume="allow", embed=False)


LOGGERS: dict[str, Callable[[Path, Mapping[str, Any]], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": wandb,
    "trackio": trackio,
}


def import_logger(name: str) -> Any:
    """The module of a logger.

    Raises UnavailableError if the logger's package is missing; metrics.jsonl needs no package.
    """
    return import_extra(name, f"--log {name}", "torch.utils.tensorboard" if name == "tensorboard" else None)


class Loggers:
    """The loggers of several runs. Each logger is started when its run logs its first metrics.

    Raises UsageError for an unknown name, and UnavailableError if a logger is not installed.
    """

    def __init__(self, names: Sequence[str], runs: Sequence[Run]) -> None:
        unknown = [name for name in names if name not in LOGGERS]
        if unknown:
            raise UsageError(f"unknown --log {unknown[0]}: expected one of {', '.join(LOGGERS)}.")
        for name in names:
            import_logger(name)
        self.names, self.runs = names, {run.name: run for run in runs}
        self.started: dict[str, list[Logger]] = {}

    def log(self, metrics: Mapping[str, Mapping[str, float]]) -> None:
        """Log metrics, given as run name -> metrics. One of the metrics is `step`."""
        for name, line in metrics.items():
            if name not in self.started:
                run = self.runs[name]
                self.started[name] = [LOGGERS[kind](run.folder, run.identity()) for kind in self.names]
            for logger in self.started[name]:
                logger.log({key: value for key, value in line.items() if key != "step"}, step=int(line["step"]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for loggers in self.started.values():
            for logger in loggers:
                logger.finish()
